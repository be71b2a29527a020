"""The README's Python runs as it stands there."""

import csv
import json
import re
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
from dansm.scale.studies.proof import RUNS, curves, images_to, read_rows
from test_examples import PEERS, put_back

README = Path(__file__).parents[1] / "README.md"
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


LABELS = {run.label: name for name, run in RUNS.items()}
COUNTS = {"3": "three", "5": "five", "10": "ten", "20": "twenty", "50": "fifty"}


def distance(run, steps, images):
    """Over the seeds that came so far: mean ± standard deviation, or what one seed has."""
    found = [float(row["distance"]) for row in records("distances.csv")
             if (row["run"], row["steps"], row["images"]) == (run, str(steps), str(images))]
    return f"{fmean(found):.1f} ± {stdev(found):.1f}" if len(found) > 1 else f"{found[0]:.1f}"


def test_the_table_of_the_proof_is_what_was_measured():
    """Each row to its last digit; rates of those that had a card for themselves."""
    rows = re.findall(r"^\| (.+?) \| ([\d. |±]+?) \| ([\d,]+|–) \| ([\d.]+ %|–) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for label, distances, rate, share in rows:
        assert distances.split(" | ") == [distance(LABELS[label], steps, 2_048_000) for steps in COUNTS], label
        told = [(f"{float(speed['images_per_second']):,.0f}", f"{100 * float(speed['matching']):.1f} %")
                for speed in records("speed.csv") if speed["run"] == LABELS[label]]
        assert [(rate, share)] == (told or [("–", "–")])


def test_what_the_proof_costs_and_what_two_gpus_win_is_what_was_counted():
    said = " ".join(README.read_text().split())
    millions = sum(run.images * run.seeds for run in RUNS.values() if "batch" not in run.settings) / 1e6
    evaluations = {(row["run"], row["seed"], row["images"]) for row in records("distances.csv")}
    assert f"for {millions:.0f} million images in batches of 256" in said and f"{len(evaluations)} evaluations" in said
    with open(README.parent / "results" / "bench" / "scaling" / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rate = {card: median(float(row["images_per_second"]) for row in rows if row["card"] == card)
            for card in ("first", "second", "both")}
    page = " ".join((README.parent / "results" / "README.md").read_text().split())
    assert f"{rate['both']:,.0f} images/s against {rate['first']:,.0f} and {rate['second']:,.0f}" in page
    assert f"at {rate['both'] / fmean((rate['first'], rate['second'])):.2f} times the rate of one" in page


def test_every_run_of_the_proof_is_there_whole():
    ends = {(row["run"], int(row["seed"])) for row in records("distances.csv")
            if int(row["images"]) == RUNS[row["run"]].images}
    assert ends == {(name, seed) for name, run in RUNS.items() for seed in range(run.seeds)} and len(ends) == 29


def test_what_is_said_of_seeds_is_what_was_measured():
    said, table = README.read_text(), (README.parent / "results" / "README.md").read_text()
    said = " ".join(said.split())
    inner, squared = (distance(name, 10, 1_024_000) for name in ("inner-10000", "greedy-10000"))
    assert f"a pool of 10,000 was worse in ten steps and more, {inner} against {squared} in ten" in said
    inner, squared = (distance(name, 10, 1_024_000) for name in ("inner-100000", "greedy-100000"))
    assert f"one of 100,000 in every count, {inner} against {squared}" in said
    rows = re.findall(r"^  \| (.+?) \| ([\d,]+) \| ([\d.]+ ± [\d.± |]+) \|$", table, re.MULTILINE)
    assert len(rows) == 10
    for label, images, cells in rows:
        at = int(images.replace(",", ""))
        assert cells.split(" | ") == [distance(LABELS[label], steps, at) for steps in COUNTS], label


def test_what_is_said_of_small_batches_on_cifar10_is_what_was_measured():
    page = README.read_text().replace("**", "")
    runs = {name: run for name, run in RUNS.items() if name.startswith("batch")}
    for name, run in runs.items():
        cells = " | ".join(distance(name, steps, run.images) for steps in COUNTS)
        assert f"| {run.label} | {cells} |" in page
    said = " ".join((README.parent / "results" / "README.md").read_text().split())
    for steps, word in COUNTS.items():
        eight = ", ".join(distance(f"batch8-{way}", steps, 512_000) for way in ("off", "assigned", "greedy-10000"))
        one = " and ".join(distance(f"batch1-{way}", steps, 128_000) for way in ("off", "greedy-10000"))
        assert f"{eight} in {word}" in said and one in said


def needed(run, steps, images):
    row, = (row for row in records("summary.csv")
            if (row["run"], row["steps"], row["images"]) == (run, str(steps), str(images)))
    return row


def test_the_table_of_images_to_equal_quality_is_what_was_measured():
    """Each cell: at most the first mark; or the images, and in brackets those of the quickest and slowest pair."""
    table = (README.parent / "results" / "README.md").read_text()
    rows = re.findall(r"^  \| ([\d,]+) \| (10,000|100,000) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) == 8
    for images, pool, cells in rows:
        at = int(images.replace(",", ""))
        for cell, steps in zip(cells.split(" | "), COUNTS, strict=True):
            row = needed(f"greedy-{pool.replace(',', '')}", steps, at)
            ours = round(float(row["images_ours"]), -3)
            if cell == "256,000 at most":
                assert row["at_least"] == "True" and ours == 256_000
                continue
            least, most = (row[name] and at / float(row[name]) for name in ("most_ratio", "least_ratio"))
            brackets = f"{least:,.0f} to {most:,.0f}" if most else "not by each"
            numbers = [round(int(number.replace(",", "")), -3) for number in re.findall(r"[\d,]{4,}", brackets)]
            said = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", cell)]
            assert said[0] == ours and row["at_least"] == "False" and ("not by each" in cell) == (not most)
            assert said[1:] == pytest.approx(numbers, abs=1000), (cell, row)  # ratios have three digits


def test_what_the_readme_says_under_its_curve_is_what_was_measured():
    text, last = README.read_text().replace("**", ""), {
        steps: needed("greedy-10000", steps, 5_120_000) for steps in COUNTS}
    assert all(row["seeds"] == "3" for row in last.values())
    for label in ("random pairs", "pool of 10,000"):
        assert f"| {label} | {' | '.join(distance(LABELS[label], steps, 5_120_000) for steps in COUNTS)} |" in text
    needs = [f"{'≤ ' * (row['at_least'] == 'True')}{float(row['images_ours']) / 1e6:.2f}" for row in last.values()]
    needs[3:] = [f"{needs[3]} (one of nine pairs of seeds: never)", f"{needs[4]} (three: never)"]  # counted below
    assert f"| images the pool needs for the first row, millions | {' | '.join(needs)} |" in text
    text = " ".join(text.split())

    def fewer(run, steps, *marks):
        saved = [100 - 100 / float(needed(run, steps, images)["ratio"]) for images in marks]
        return f"{min(saved):.0f} to {max(saved):.0f} %"

    marks = (512_000, 1_024_000, 2_048_000, 3_584_000, 5_120_000)
    assert f"In twenty steps the pool of 10,000 needs {fewer('greedy-10000', '20', *marks)} fewer images" in text
    before, end = fewer("greedy-10000", "50", *marks[:-1]), 100 - 100 / float(last["50"]["ratio"])
    assert f"In fifty {before} fewer up to 3.6 million and {end:.0f} % at 5.1" in text
    table = " ".join((README.parent / "results" / "README.md").read_text().split())
    assert (f"(10,000: {fewer('greedy-10000', '10', *marks)}, 100,000: "
            f"{fewer('greedy-100000', '10', *marks[:3])})") in table
    assert (f"in twenty the pool of 10,000 saves {fewer('greedy-10000', '20', *marks)}, that of 100,000 "
            f"{fewer('greedy-100000', '20', *marks[:3])}; in fifty {fewer('greedy-10000', '50', *marks)} and "
            f"{fewer('greedy-100000', '50', *marks[:3])}") in table


def seeds_of(run, steps, images):
    return [float(row["distance"]) for row in records("distances.csv")
            if (row["run"], row["steps"], row["images"]) == (run, steps, str(images))]


def nearer(one, other, images):
    """The counts of steps in which each seed of `one` is nearer than each of `other`."""
    return [steps for steps in COUNTS if max(seeds_of(one, steps, images)) < min(seeds_of(other, steps, images))]


def level(one, other, images):
    """Those in which the seed of `one` lies among those of `other`."""
    def among(found, others):
        return min(others) <= found <= max(others)

    return [steps for steps in COUNTS if among(seeds_of(one, steps, images)[0], seeds_of(other, steps, images))]


def test_what_is_said_in_words_of_the_proof_holds_of_each_seed():
    """README's and results/README.md's "each nearer than each", "behind" and "level", by the rule that stands there."""
    few, most = ["3", "5", "10"], ["3", "5", "10", "20"]
    for pool in ("greedy-10000", "greedy-100000"):
        assert nearer(pool, "off", 1_024_000) == nearer(pool, "off", 2_048_000) == list(COUNTS)
    assert nearer("greedy-10000", "off", 5_120_000) == nearer("greedy-100000", "greedy-10000", 2_048_000) == few
    assert nearer("greedy-10000", "inner-10000", 1_024_000) == ["10", "20", "50"]
    assert nearer("greedy-100000", "inner-100000", 1_024_000) == list(COUNTS)
    assert level("greedy-1000", "greedy-10000", 2_048_000) == ["5", "10", "20"]
    assert level("assigned-256", "greedy-10000", 2_048_000) == list(COUNTS)
    assert nearer("optimal-10000", "greedy-100000", 2_048_000) == ["3"]
    assert level("optimal-10000", "greedy-100000", 2_048_000) == ["5", "10", "20", "50"]
    assert nearer("off", "greedy-1000000", 256_000) == ["20", "50"]
    assert nearer("greedy-1000000", "greedy-100000", 512_000) == ["3", "5"]
    assert nearer("greedy-100000", "greedy-1000000", 2_048_000) == most
    assert nearer("off", "nearest-16", 2_048_000) == ["20", "50"]
    assert all(nearer("batch8-greedy-10000", "batch8-off", images) == list(COUNTS)
               for images in (128_000, 256_000, 512_000)) and nearer("batch1-greedy-10000", "batch1-off", 128_000)
    apart = [max(found) / min(found) - 1 for run in ("off", "greedy-10000", "greedy-100000") for steps in COUNTS
             for images in (1_024_000, 2_048_000, 3_584_000, 5_120_000) if (found := seeds_of(run, steps, images))]
    assert f"{min(apart):.0%} {max(apart):.0%}" == "1% 9%"
    rows = read_rows(README.parent / "results" / "proof" / "distances.csv")
    never = {steps: [images_to(off, points) for off in seeds_of("off", str(steps), 5_120_000)
                     for points in curves(rows, "greedy-10000", steps).values()].count(None) for steps in (10, 20, 50)}
    assert never == {10: 0, 20: 1, 50: 3}
    twice = [abs(float(row["ratio"]) - 1) for row in records("twice.csv") if row["gpu"] == row["before_gpu"]]
    assert len(twice) == 75 and f"{max(twice):.1%}" == "2.2%"


def test_what_is_said_of_diffusion_on_cifar10_is_what_was_measured():
    said = " ".join((README.parent / "results" / "README.md").read_text().split())
    marks, ways = (256_000, 512_000, 1_024_000, 2_048_000), ("diffusion-greedy-10000", "diffusion-off")
    assert all(len(seeds_of(way, steps, images)) == 2 for way in ways for steps in COUNTS for images in marks)
    assert all({"3", "5"} <= set(nearer(*ways, images)) for images in marks)
    assert nearer(*ways, 2_048_000) == ["3", "5", "10"]
    change = {steps: [100 * (fmean(seeds_of(ways[0], steps, images)) / fmean(seeds_of(ways[1], steps, images)) - 1)
                      for images in marks] for steps in COUNTS}
    listed = {steps: [f"{abs(each):.0f}" for each in found] for steps, found in change.items()}
    assert f"{', '.join(listed['3'][:3])} and {listed['3'][3]} % nearer in three steps" in said
    assert f"{', '.join(listed['5'])} % in five" in said and max(change["3"] + change["5"]) < 0
    assert f"in ten {', '.join(listed['10'][:2])} % farther, then {', '.join(listed['10'][2:])} % nearer" in said
    assert f"in twenty {', '.join(listed['20'])} % farther" in said and f"in fifty {', '.join(listed['50'])} %." in said
    assert min(change["20"] + change["50"] + change["10"][:2]) > 0 > max(change["10"][2:])
    page = " ".join(README.read_text().split())
    three, five = (" against ".join(f"{fmean(seeds_of(way, steps, 2_048_000)):.0f}" for way in ways) for steps in "35")
    assert f"({three}, {five} after 2 million images)" in page
    late = [each for steps in ("20", "50") for each in change[steps][:3]]
    assert f"it was {min(late):.0f} to {max(late):.0f} % behind up to a million" in page


def test_what_is_said_of_pools_of_different_ages_is_what_was_measured():
    said = " ".join(README.read_text().replace("**", "").split())
    for size, ways in (("1000", ("random", "greedy", "ages")), ("10000", ("greedy", "ages"))):
        seeds, curve = digits(f"ages-{size}")
        told = [", ".join(f"{dict(curve(way, '10', seeds))[images]:.2f}" for images in (8_000, 64_000, 256_000))
                for way in ways]
        assert len(seeds) == 3 and all(numbers in said for numbers in told), told
        apart = {images: [side / one for seed in seeds for (at, side), (_, one) in
                          [(a, b) for a, b in zip(curve("ages", "10", [seed]), curve("greedy", "10", [seed]),
                                                  strict=True)] if at == images]
                 for images in (8_000, 16_000, 32_000, 64_000, 128_000, 256_000)}
        assert all(max(found) < 1 for images, found in apart.items() if size == "1000" or images >= 32_000)
        again, before = digits("long" if size == "1000" else "long-10000")
        assert again == seeds and all(curve(way, steps, seeds) == before(way, steps, seeds)
                                      for way in ("random", "greedy") for steps in ("1", "2", "3", "5", "10"))
    page = " ".join((README.parent / "results" / "README.md").read_text().split())
    with open(README.parent / "results" / "proof" / "ages.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["match_size"], row["images"]) == ("100000", "256000")]
    for steps, word in COUNTS.items():
        found = [float(row["distance"]) for row in rows if row["steps"] == steps]
        one = distance("greedy-100000", steps, 256_000)
        assert f"{fmean(found):.1f} ± {stdev(found):.1f} in {word} ({'one pool ' * (steps == '3')}{one})" in page
