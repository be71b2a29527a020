"""The README's Python runs as it stands there."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from test_examples import PEERS, put_back

from scale.proof import RUNS, images_to

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


def digits(folder):
    """The seeds of a record, and what gives the curve of some of them, (images, mean distance), by method and steps."""
    record = json.loads((README.parent / "results" / "digits" / folder / "digits.json").read_text())
    marks, seeds = (sorted({run[key] for run in record["runs"]}) for key in ("trained_steps", "seed"))

    def curve(method, count, of):
        return [(record["batch"] * mark, fmean(run["distance"][count] for run in record["runs"] if run["seed"] in of and
                                               (run["method"], run["trained_steps"]) == (method, mark)))
                for mark in marks]

    return seeds, curve


def told(folder, words, count):
    """`words` with the images that the pool needs for what random pairs come to at their end: mean, least, most."""
    seeds, curve = digits(folder)
    found = [images_to(curve("random", count, of)[-1][1], curve("greedy", count, of))
             for of in (seeds, *([seed] for seed in seeds))]
    return words(found[0], min(found[1:]), max(found[1:]))


def test_what_the_readme_says_of_the_digits_is_what_was_measured():
    said, (seeds, curve) = " ".join(README.read_text().split()), digits("long")
    assert len(seeds) == 3 and curve("random", "1", seeds)[-1][0] == 256_000

    def thousands(*images):
        return "{:,.0f} ({:,.0f} to {:,.0f}".format(*(round(number, -3) for number in images))

    assert told("long", thousands, "10") + " by seed), in five" in said
    assert told("long", thousands, "5") + ")." in said


def test_what_the_readme_says_of_small_batches_is_what_was_measured():
    said = " ".join(README.read_text().replace("**", "").split())
    for folder, methods, joined in (("batch8", ("random", "optimal", "greedy"), ", "),
                                    ("batch1", ("random", "greedy"), " → ")):
        seeds, curve = digits(folder)
        last = {count: joined.join(f"{curve(method, count, seeds)[-1][1]:.2f}" for method in methods)
                for count in ("1", "5", "10")}
        assert len(seeds) == 3
        assert f"{last['1']} in one step" in said and f"{last['5']} in five" in said and f"{last['10']} in ten" in said

    def hundreds(*images):
        return "{:,.0f} images ({:,.0f} to {:,.0f} by seed)".format(*(round(number, -2) for number in images))

    assert f"the pool has after {told('batch1', hundreds, '10')}" in said


def records(name):
    with open(README.parent / "results" / "proof" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_of_the_proof_is_what_was_measured():
    """Each row to its last digit, from the tables of the first seed; rates of those that had a card for themselves."""
    labels = {run.label: name for name, run in RUNS.items()}
    rows = re.findall(r"^\| (.+?) \| ([\d. |]+?) \| ([\d,]+|–) \| ([\d.]+ %|–) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for label, distances, rate, share in rows:
        measured = [row for row in records("distances.csv") if row["images"] == "2048000" and row["seed"] == "0"
                    and row["run"] == labels[label]]
        assert distances.split(" | ") == [f"{float(row['distance']):.1f}" for row in measured], label
        told = [(f"{float(speed['images_per_second']):,.0f}", f"{100 * float(speed['matching']):.1f} %")
                for speed in records("speed.csv") if (speed["run"], speed["seed"]) == (labels[label], "0")]
        assert [(rate, share)] == (told or [("–", "–")])


def of_seeds(run, steps):
    """How many seeds there are after 1,024,000 images, and the mean and standard deviation of their distances."""
    found = [float(row["distance"]) for row in records("distances.csv")
             if (row["run"], row["steps"], row["images"]) == (run, steps, "1024000")]
    return str(len(found)), f"{fmean(found):.1f} ± {stdev(found):.1f}"


def test_what_is_said_of_seeds_is_what_was_measured():
    said, table = README.read_text(), (README.parent / "results" / "README.md").read_text()
    said, counts = " ".join(said.split()), ("3", "5", "10", "20", "50")
    for steps in counts:
        (seeds, off), (_, ours) = (of_seeds(name, steps) for name in ("off", "greedy-10000"))
        assert seeds == "3" and f"{off} and {ours} in" in said
    (seeds, inner), (_, squared) = (of_seeds(name, "10") for name in ("inner-100000", "greedy-100000"))
    assert seeds == "2" and f"of 100,000 {inner} against {squared}, two seeds" in said
    rows = re.findall(r"^  \| (.+?) \| (\d) \| ([\d.]+ ± [\d.± |]+) \|$", table, re.MULTILINE)
    labels = {run.label: name for name, run in RUNS.items()}
    assert len(rows) == 4
    for label, seeds, cells in rows:
        assert [(seeds, cell) for cell in cells.split(" | ")] == [of_seeds(labels[label], steps) for steps in counts]


def test_what_the_readme_says_under_its_curve_is_what_was_measured():
    text, found = " ".join(README.read_text().split()), {}
    for row in records("summary.csv"):
        if row["run"] == "greedy-10000":
            found.setdefault(row["steps"], {})[int(row["images"])] = row

    words = {"5": "five", "10": "ten", "20": "twenty", "50": "fifty"}

    def needs(steps, images):
        return f"{float(found[steps][images]['images_ours']) / 1e6:.2f} million in {words[steps]}"

    ten, twenty, fifty = (needs(steps, 1_024_000) for steps in ("10", "20", "50"))
    last = {steps: row[5_120_000] for steps, row in found.items()}
    assert f"need {ten} sampling steps, {twenty} and {fifty} (three seeds)" in text
    assert all(row[1_024_000]["seeds"] == "3" and last[steps]["seeds"] == "1" for steps, row in found.items())
    assert f"needs {needs('10', 5_120_000)} steps and {needs('5', 5_120_000)} (one seed)" in text
    assert last["3"]["at_least"] == "True" and float(last["3"]["images_ours"]) == 256_000
    both = {steps: f"{float(row['distance']):.1f} against {float(row['off']):.1f}" for steps, row in last.items()}
    assert f"{both['20']} and {both['50']}" in text and not last["20"]["ratio"] and not last["50"]["ratio"]
    fewer = {steps: {images: 100 - 100 / float(row["ratio"]) for images, row in rows.items() if row["ratio"]}
             for steps, rows in found.items()}
    told = [fewer["20"][images] for images in (512_000, 1_024_000, 2_048_000, 3_584_000)]
    assert f"the pool of 10,000 needs {min(told):.0f} to {max(told):.0f} % fewer images on CIFAR-10" in text
    told = [fewer["50"][images] for images in (512_000, 1_024_000, 2_048_000)]
    assert f"in fifty {min(told):.0f} to {max(told):.0f} % fewer up to 2 million, then more" in text
    assert fewer["50"][3_584_000] < 0
