"""The README's Python runs as it stands there."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from test_examples import PEERS, put_back

from scale.proof import images_to

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_readme_shows_python():
    assert any("NoisePool" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("change", [str, put_back], ids=["as it stands", "with what stood there before"])
def test_every_python_block_of_the_readme_runs(block, change):
    for peer in PEERS:
        if peer in block:
            pytest.importorskip(peer)
    assert change is str or "# was:" not in block or change(block) != block
    exec(compile(change(block), str(README), "exec"), {})


def test_every_file_the_readme_names_is_there():
    links = re.findall(r"(?:\]\(|src=\")([^)\"#]+)", README.read_text())
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing


def test_what_the_readme_says_of_the_digits_is_what_was_measured():
    record = json.loads((README.parent / "results" / "digits" / "long" / "digits.json").read_text())
    marks, seeds = (sorted({run[key] for run in record["runs"]}) for key in ("trained_steps", "seed"))

    def curve(method, count, of):
        return [(64 * mark, fmean(run["distance"][count] for run in record["runs"] if run["seed"] in of and
                                  (run["method"], run["trained_steps"]) == (method, mark))) for mark in marks]

    def needed(count, of):
        return images_to(curve("random", count, of)[-1][1], curve("greedy", count, of))

    said = " ".join(README.read_text().split())
    assert len(seeds) == 3 and 64 * marks[-1] == 256_000
    told = {"10": "{:,.0f} ({:,.0f} to {:,.0f} by seed), in five", "5": "{:,.0f} ({:,.0f} to {:,.0f})."}
    for count, words in told.items():
        by_seed = [needed(count, [seed]) for seed in seeds]
        found = (needed(count, seeds), min(by_seed), max(by_seed))
        assert words.format(*(round(images, -3) for images in found)) in said
