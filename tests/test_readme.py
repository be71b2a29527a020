"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest
from test_examples import PEERS, put_back

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
