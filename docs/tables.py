"""Write the tables of all pages from the records in results/: what `make docs` runs. A page marks a table by the lines
<!-- table: NAME --> and <!-- end -->. NAME is a function below, with dashes for underscores; words after it are its
arguments, run@images for a row of the proof. It returns rows, the header first."""

import csv
import json
import math
import re
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from dansm.scale.studies.proof_runs import RUNS, images_to

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
MARKER = re.compile(r"(<!-- table: (\S+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
STEPS = "3", "5", "10", "20", "50"


def updated(page):
    """The text of a page with every marked table written again."""
    def table(found):
        begin, name, arguments, end = found.groups()
        return begin + markdown(globals()[name.replace("-", "_")](*arguments.split())) + end
    return MARKER.sub(table, page)


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |\n" for row in rows]
    return "".join([lines[0], "|" + "---|" * len(rows[0]) + "\n", *lines[1:]])


def read(path, **picked):
    lines = (RESULTS / path).read_text(encoding="utf-8").splitlines()
    return [record for record in csv.DictReader(lines) if picked.items() <= record.items()]


def pivot(records, rows, columns):
    """rows: label → the values by which records are picked. columns: label → the same, and how to write a cell."""
    def cell(row, column, write):
        return write([record for record in records if (row | column).items() <= record.items()])
    lines = [[label, *(cell(row, *column) for column in columns.values())] for label, row in rows.items()]
    return [["", *columns], *lines]


def listing(records, names, columns):
    """A line for all values that the columns `names` have together. columns: label → how to write a cell."""
    picks = [{name: record[name] for name in names} for record in records]
    rows = {", ".join(pick.values()): pick for pick in picks}
    return pivot(records, rows, {label: ({}, write) for label, write in columns.items()})


def numbers(column, digits=1, unit="", scale=1):
    """How to write the numbers of some records: their mean ± standard deviation, or the one there is."""
    def write(records):
        values = [scale * float(record[column]) for record in records if record.get(column)]
        deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):,.{digits}f}{deviation}{unit}".replace("-", "−") if values else ""
    return write


def three_digits(value):
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def of_proof(table, write, *names):
    """A row for each run@images of the proof, a column for each count of sampling steps."""
    runs = [name.split("@") for name in names]
    rows = {f"{RUNS[run].label}, {int(images):,} images": {"run": run, "images": images} for run, images in runs}
    return pivot(read(f"proof/{table}"), rows, {f"{steps} steps": ({"steps": steps}, write) for steps in STEPS})


def needed(records):
    """How many thousand images a run needs for what random pairs have, and the range over all pairs of seeds."""
    row, = records
    images = f"{float(row['images_ours']) / 1000:,.0f}"
    if row["at_least"] == "True":
        return f"≤ {images}"
    if not row["least_ratio"]:
        return f"{images}, not all"
    if row["seeds"] == "1":
        return images
    least, most = (float(row["images"]) / 1000 / float(row[name]) for name in ("most_ratio", "least_ratio"))
    return f"{images} ({least:,.0f}–{most:,.0f})"


proof = partial(of_proof, "distances.csv", numbers("distance"))
proof_ratio = partial(of_proof, "summary.csv", numbers("of_random", 2))
proof_images = partial(of_proof, "summary.csv", needed)
proof_prior = partial(listing, read("proof/prior.csv"), ["way"], {"noises": numbers("noises", 0)} | {
    f"p: {name}s": numbers(f"{name}_p", 3) for name in ("size", "mean", "variance", "covariance")})
paths = partial(listing, read("foundations/paths.csv"), ["pairs"], {
    "length": numbers("path_length"), "own noise is the nearest": numbers("own_noise_nearest", 1, " %", 100),
    "distance of two paths": numbers("inter_path_mean"), "to the nearest": numbers("inter_path_minimum")})
train_rates = partial(listing, read("bench/train/train.csv", part="steps"), ["case", "way"], {
    "ms a step": numbers("median_ms"), "images/s": numbers("images_per_second", 0),
    "matching": numbers("matching_share", 1, " %", 100), "MFU": numbers("mfu", 0, " %", 100)})

train_steps = partial(listing, read("bench/train/h200.csv"), ["case", "build"], {
    "ms a step": numbers("median_ms"), "images/s": numbers("images_per_second", 0),
    "times faster": numbers("times_faster", 2)})

leakage = partial(listing, read("conditions/leakage.csv"), ["coupling"], {
    "class told": numbers("class_told", 1, " %", 100), "class means: largest": numbers("class_mean_largest", 2),
    "on average": numbers("class_mean_average", 2), "‖z‖²/D at first": numbers("size_first_quarter", 3),
    "at last": numbers("size_last_quarter", 3)})
CLASSES = {"random pairs": "random", "one pool of 10,000, labels ignored": "one-pool",
           "a pool of 1,000 for each class": "class-1000", "the same with prices": "class-1000-priced",
           "a pool of 10,000 for each class": "class-10000",
           "assigned in batches of 256, within classes": "assigned", "semidiscrete within each class": "semidiscrete",
           "semidiscrete, labels ignored": "semidiscrete-one"}


def classes_cifar10():
    """Without guidance."""
    columns = {f"{steps} steps": ({"steps": steps}, numbers("frechet_distance")) for steps in STEPS}
    columns["right class"] = {"steps": "20"}, numbers("label_accuracy", 1, " %", 100)
    classes = CLASSES | {"semidiscrete within each class, 5,120,000 images": "semidiscrete-5m"}
    rows = {label: {"run": run, "guidance": "1.0"} for label, run in classes.items()}
    return pivot(read("conditions/cifar10.csv"), rows, columns)


def classes_guided():
    """With the guidance that is best for each, which stands behind; and with guidance 2."""
    steps = STEPS[1:4]
    columns = {f"best: {count} steps": ({"steps": count}, best_guided) for count in steps} | {
        f"guidance 2: {count}": ({"steps": count, "guidance": "2.0"}, numbers("frechet_distance")) for count in steps}
    rows = {label: {"run": run} for label, run in CLASSES.items()}
    return pivot(read("conditions/cifar10.csv"), rows, columns)


def continuous():
    columns = {f"{problem}, {steps} steps": ({"problem": problem}, numbers(f"w2_{steps}_steps", 3))
               for problem in ("two-moons", "checkerboard", "texts") for steps in (2, 50)}
    shown = ["random", "one pool", "k-means 16", "k-means 64", "carried 1", "carried 100",
             *(f"C²OT {weight}" for weight in ("0.1", "1", "100"))]
    return pivot(read("conditions/continuous.csv"), {name: {"coupling": name} for name in shown}, columns)


def couple(images):
    """How far shares are off, for each count of noises by the best of a solver's settings, and the noises to 10 %."""
    found = read("bench/couple/compare.csv", images=images)
    budgets = sorted({int(row["noises"]) for row in found})
    ways = {"ours": ("ours", ".*"), "POT, defaults": ("pot", ".* / 1"),
            "POT, coordinates divided": ("pot", r".* / (?!1$)\d+"),
            "ott-jax, SGD": ("ott", "sgd.* 0.99"), "ott-jax, Adam": ("ott", "adam.* 0.99"),
            "ott-jax, SGD, longer average": ("ott", "sgd.*"), "ott-jax, Adam, longer average": ("ott", "adam.*")}
    lines = [["", *(f"{budget:,} noises" for budget in budgets), "noises to 10 %"]]
    for label, (solver, settings) in ways.items():
        best = {}
        for row in found:
            if row["solver"] == solver and re.fullmatch(settings, row["settings"]):
                noises, off = int(row["noises"]), float(row["off"])
                best[noises] = min(off, best.get(noises, math.inf))
        if best:
            to_ten = images_to(0.1, dict(sorted(best.items())))
            cells = [f"{100 * best[budget]:,.1f} %" if budget in best else "" for budget in budgets]
            lines.append([label, *cells, f"{to_ten:,.0f}" if to_ten else f"over {max(best):,}"])
    return lines


def proof_after(images, *runs):
    """Distances after so many images."""
    rows = {RUNS[run].label: {"run": run} for run in runs}
    columns = {f"{steps} steps": ({"steps": steps}, numbers("distance")) for steps in STEPS}
    return pivot(read("proof/distances.csv", images=images), rows, columns)


def embeddings():
    columns = {f"{steps} steps": ({}, numbers(f"frechet_{steps}")) for steps in (3, 10, 50)} | {
        "condition missed, 50": ({}, numbers("condition_error_50", 2)),
        "cluster told": ({}, numbers("cluster_told", 1, " %", 100))}
    rows = {"random pairs": "random", "one pool of 10,000": "pool", "one pool, conditions carried": "carry-1",
            "ten clusters, a pool of 1,000 for each": "kmeans-10", "100 clusters, a pool of 100 for each": "kmeans-100"}
    return pivot(read("conditions/embeddings.csv"), {label: {"way": way} for label, way in rows.items()}, columns)


def learned():
    columns = {"straightness": ({}, numbers("straightness", 3)), "calls to 10⁻³": ({}, numbers("nfe_1e-3", 0)),
               "calls to 10⁻⁵": ({}, numbers("nfe_1e-5", 0)),
               "to the nearest image": ({}, numbers("pixels_nearest_mean")),
               "of 1 % at most": ({}, numbers("pixels_nearest_1%")),
               "below half of the second": ({}, numbers("pixels_below_0.5", 1, " %", 100)),
               "nearest, features": ({}, numbers("features_nearest_mean", 2))}
    rows = {"random pairs": "random-0", "pool of 10,000": "pool-0", "semidiscrete": "semi-0",
            "semidiscrete, 5,120,000 images": "semi-5m-0", "other training images": "real images"}
    return pivot(read("couple/learned.csv"), {label: {"run": run} for label, run in rows.items()}, columns)


def copies():
    """Samples of the semidiscrete plan next to those of random pairs that have nearly the same distance."""
    lines = [["steps", "distance", "random pairs: steps", "distance", "nearer in pixels", "nearer in features",
              "nearest, features", "random pairs"]]
    records = {(row["run"], row["steps"]): row for row in read("couple/copies.csv")}
    for row in records.values():
        if row["run"] == "semi-0":
            theirs = records["random-0", row["equal_steps"]]
            lines.append([row["steps"], numbers("frechet_distance")([row]), row["equal_steps"],
                          numbers("equal_distance")([row]), numbers("pixels_nearer", 0, " %", 100)([row]),
                          numbers("features_nearer", 0, " %", 100)([row]), numbers("features_nearest", 2)([row]),
                          numbers("features_nearest", 2)([theirs])])
    return lines


def groups():
    """Milliseconds of a call."""
    cases = {f"{groups} × {int(size):,} of {shape}": {"groups": groups, "match_size": size, "shape": shape}
             for groups, size, shape in (("10", "1000", "4×32×32"), ("10", "10000", "4×32×32"),
                                         ("10", "1000", "3×32×32"), ("10", "10000", "3×32×32"),
                                         ("100", "1000", "4×32×32"))}
    columns = {way: ({"way": way}, numbers("median_ms", 2, " ms"))
               for way in ("grouped", "one pool", "a call for each")}
    return pivot(read("bench/groups/h100.csv"), cases, columns)


couple_gpu = partial(listing, read("bench/couple/h200.csv"), ["way"], {
    "samples": numbers("samples", 0), "parts": numbers("parts", 0), "to 10 %": numbers("solve_s", 1, " s"),
    "products of that": numbers("products_of_solve", 0, " %", 100), "256 choose in": numbers("choose_256_ms", 2, " ms"),
    "products of this": numbers("products_of_choose", 0, " %", 100)})


coarse = partial(listing, read("bench/coarse/h200.csv", left="all"), ["match_size", "shape", "batch", "way", "dtype"], {
    "a call": numbers("median_ms", 2, " ms"), "in a row": numbers("queued_ms", 2, " ms"),
    "memory": numbers("peak_mb", 0, " MB"), "faster": numbers("faster_queued", 1), "smaller": numbers("smaller", 0)})
prices = partial(listing, read("bench/prices/h200.csv"), ["shape", "batch", "match_size", "cost"], {
    "median": numbers("median_ms", 2, " ms"), "mean": numbers("mean_ms", 2, " ms"),
    "slowest": numbers("most_ms", 2, " ms")})


def couplings():
    def least(column):
        def write(records):
            value, = (record[column] for record in records)
            return value and ("< 0.001" if float(value) < 0.001 else f"{float(value):.2f}")
        return write

    return listing(read("bench/couplings/h200.csv"), ["coupling"], {
        "set up": numbers("set_up_s", 1, " s"), "256": numbers("batch_mean_ms", 2, " ms"),
        "one": numbers("one_mean_ms", 3, " ms"), "memory": numbers("memory_mb", 0, " MB"),
        "p, batch": least("batch_p"), "p, all": least("life_p"), "p, classes": least("class_p"),
        "class told": numbers("class_told", 1, " %", 100), "‖x − z‖": numbers("path_length", 2),
        "gain": numbers("gain_share", 1, " %", 100), "crossing": numbers("crossing_share", 1, " %", 100)})


def small():
    """Milliseconds of a call of a pool for a small batch."""
    rows = {f"{size:,} noises, batch {batch}": {"match_size": str(size), "batch": batch}
            for size in (1000, 10_000) for batch in "1248"}
    columns = {f"{label}, {how}": ({"build": build}, numbers(f"{column}_ms", 3))
               for column, how in (("queued", "in a row"), ("waiting", "alone"))
               for build, label in (("old", "583a1bc"), ("now", "now"))}
    return pivot(read("bench/small/h200.csv"), rows, columns)


REFERENCE = {  # coupling in the bench: run of the proof, run by class
    "random": ("random", "random"), "nearest-16": ("nearest-16", ""), "assigned-256": ("assigned-256", ""),
    "assigned-10000": ("optimal-10000", ""), "pool-1000": ("greedy-1000", ""),
    "pool-10000": ("greedy-10000", "one-pool"), "pool-10000-priced": ("priced-10000", ""),
    "pool-100000": ("greedy-100000", ""), "pool-100000-priced": ("priced-100000", ""),
    "coarse-10000": ("coarse-10000", ""), "coarse-100000": ("coarse-100000", ""),
    "semidiscrete-parts": ("semidiscrete-10000", ""), "semidiscrete": ("semidiscrete", "semidiscrete-one"),
    "assigned-256-by-class": ("", "assigned"), "pool-10000-priced-by-class": ("", "class-1000-priced"),
    "pool-100000-by-class": ("", "class-10000"), "semidiscrete-by-class": ("", "semidiscrete")}


def reference(record):
    """What each coupling costs, keeps of the prior, tells of the class, and has brought; empty where not measured."""
    def kept(column):
        def write(records):
            return "".join("no" if float(row[column]) < 0.001 else "yes" for row in records if row[column])
        return write

    measured = {"256": numbers("batch_mean_ms", 1, " ms"), "memory": numbers("memory_mb", 0, " MB"),
                "N(0, I) in a batch": kept("batch_p"), "over all": kept("life_p"), "in a class": kept("class_p"),
                "class told": numbers("class_told", 1, " %", 100), "crossing": numbers("crossing_share", 0, " %", 100)}
    lines = [["", *measured, *(f"{steps} steps" for steps in ("3", "10", "20", "50")),
              "by class, 10 steps", "50 steps", "guided, 10 steps"]]
    for name, (run, by_class) in REFERENCE.items():
        found = read(record, coupling=name)
        distances = [read("proof/distances.csv", run=run, images="2048000", steps=steps)
                     for steps in ("3", "10", "20", "50")]
        classes = [read("conditions/cifar10.csv", run=by_class, guidance="1.0", steps=steps) for steps in ("10", "50")]
        guided = read("conditions/cifar10.csv", run=by_class, steps="10")
        lines.append([name, *(write(found) for write in measured.values()),
                      *(numbers("frechet_distance" if rows in classes else "distance")(rows)
                        for rows in (*distances, *classes)), best_guided(guided) if by_class else ""])
    return lines


def best_guided(records):
    """The lowest mean distance over the weights of guidance, and its weight."""
    of_weights = {weight: [record for record in records if record["guidance"] == weight]
                  for weight in {record["guidance"] for record in records}}
    weight = min(of_weights, key=lambda weight: fmean(float(row["frechet_distance"]) for row in of_weights[weight]))
    return f"{numbers('frechet_distance')(of_weights[weight])} ({float(weight):g})"


def proof_speed():
    records = [record | {"pairs": RUNS[record["run"]].label} for record in read("proof/speed.csv")]
    rates = {name: numbers(name, 0) for name in ("images_per_second", "least", "most")}
    return listing(records, ["pairs"], rates | {"matching": numbers("matching", 1, " %", 100)})


def digits(folder):
    record = json.loads((RESULTS / "digits" / folder / "digits.json").read_text())
    pool = f"pool of {record['match_size']:,}"
    pairs = {"random": "random pairs", "optimal": "assignment within batches", "greedy": pool,
             "priced": f"{pool} with prices", "semidiscrete": "semidiscrete plan"}
    records = [{"pairs": pairs[run["method"]], **run["distance"]} for run in record["runs"]
               if run["trained_steps"] == record["steps"]]
    return listing(records, ["pairs"], {f"{steps} steps": numbers(steps, 2) for steps in ("1", "2", "3", "5", "10")})


def theory(column):
    ways = {"greedy, squared distance": "squared", "greedy, inner product": "inner", "optimal": "optimal"}
    columns = {label: ({"way": way}, numbers(column, 2, " %", 100)) for label, way in ways.items()}
    sizes = {f"pool of {size:,}": {"match_size": str(size)} for size in (100, 1000, 4000)}
    return pivot(read("theory/theory.csv"), sizes, columns)


def assignment_cpu():
    """Milliseconds of each library in one thread; how many times faster than scipy `optimal` is in one and in two."""
    def times(records):
        row, = records
        median, least, most = (three_digits(float(row[f"{name}_ms"])) for name in ("median", "least", "most"))
        return f"{median} ({least}–{most})"

    found = read("bench/assignment/cpu.csv")
    sizes = dict.fromkeys((row["images"], row["noises"]) for row in found)
    rows = {" × ".join(f"{int(count):,}" for count in size): dict(zip(("images", "noises"), size, strict=True))
            for size in sizes}
    libraries = {"scipy": "scipy", "`optimal`": "dansm", "lapx's lapjvh alone": "lapx, lapjvh, float64"}
    columns = {label: ({"threads": "1", "library": name}, times) for label, name in libraries.items()} | {
        f"faster, threads: {threads}": ({"threads": threads, "library": "dansm"}, numbers("faster"))
        for threads in ("1", "2")}
    return pivot(found, rows, columns)


def tiny():
    """Seconds of the toy and the digits, median and range."""
    def seconds(name):
        def write(records):
            row, = records
            return f"{row[f'{name}_s']} ({row[f'least_{name}_s']}–{row[f'most_{name}_s']})"
        return write

    found = read("bench/tiny/cpu.csv")
    rows = {f"`dansm {row['command']}`, {row['checkout']}, OpenMP threads: {row['threads']}":
            {name: row[name] for name in ("command", "checkout", "threads")} for row in found}
    return pivot(found, rows, {"wall, s": ({}, seconds("wall")), "CPU, s": ({}, seconds("cpu")),
                               "cores that other work had": ({}, numbers("others", 0, " %", 100)),
                               "rounds": ({}, numbers("rounds", 0))})


def match_cost():
    ways = "paper's loop", "nearest of k", "ours, squared", "ours, tf32", "ours, bf16"
    sizes = {f"{size:,}": ({"match_size": str(size)}, numbers("median_ms", 2)) for size in (10**3, 10**4, 10**5, 10**6)}
    return pivot(read("bench/h100/match.csv"), {way: {"way": way} for way in ways}, sizes)


if __name__ == "__main__":
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *RESULTS.rglob("*.md")]:
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
