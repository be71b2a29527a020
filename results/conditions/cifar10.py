"""Draw what classes gain from each way of pairing, from cifar10.csv.

    PYTHONPATH=. python results/conditions/cifar10.py                    writes cifar10.png next to itself
    PYTHONPATH=. python results/conditions/cifar10.py runs/evaluate/*    and first adds to cifar10.csv what folders such
                                                                         as random-0 (run-seed) have in evaluate.csv
"""

import csv
import sys
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from dansm.scale.base.colours import NOTE, OPTIMAL, POOLS, RANDOM, SEMIDISCRETE
from dansm.scale.base.files import write_csv
from dansm.scale.studies.style import PAGE, STYLE

HERE = Path(__file__).parent
MEASURES = "frechet_distance", "frechet_distance_class_mean", "label_accuracy"
RUNS = {"random": ("random pairs", dict(color=RANDOM, marker="o", linestyle=(0, (4, 2)))),
        "one-pool": ("one pool of 10,000", dict(color=NOTE, marker="^", linestyle=(0, (1, 1.2)))),
        "class-1000": ("a pool of 1,000 for each class", dict(color=POOLS[1000], marker="D", linestyle="-")),
        "class-1000-priced": ("a pool of 1,000 for each class, with prices",
                              dict(color=POOLS[1000], marker="P", linestyle=(0, (4, 1.5)))),
        "class-10000": ("a pool of 10,000 for each class", dict(color=POOLS[10_000], marker="s", linestyle="-")),
        "assigned": ("assigned within batches and classes", dict(color=OPTIMAL, marker="v", linestyle="-.")),
        "semidiscrete": ("semidiscrete within each class", dict(color=SEMIDISCRETE, marker="*", linestyle="-")),
        "semidiscrete-one": ("semidiscrete, labels ignored",
                             dict(color=SEMIDISCRETE, marker="x", linestyle=(0, (1, 1.2)))),
        "semidiscrete-5m": ("", {})}  # not drawn: it has seen more images


def collect(folders: list[Path]) -> list[dict]:
    """The rows of cifar10.csv and of these evaluations, by run and seed; those of real images once."""
    with open(HERE / "cifar10.csv", newline="") as file:
        found = {key_of(row): row for row in csv.DictReader(file)}
    for folder in folders:
        for row in csv.DictReader((folder / "evaluate.csv").read_text().splitlines()):
            run, seed, images = folder.name[:-2], folder.name[-1], 256 * int(row["trained_steps"] or 0)
            if row["model"] == "real images":
                run, seed, images = row["model"], "0", ""
            measures = {name: f"{float(row[name]):.4f}" for name in MEASURES}
            new = {"run": run, "seed": seed, "images": images, "steps": row["steps"], "guidance": row["guidance"],
                   **measures, "gpu": row["gpu"]}
            found[key_of(new)] = new
    return [found[key] for key in sorted(found)]


def key_of(row: dict) -> tuple:
    return (["real images", *RUNS].index(row["run"]), row["seed"], float(row["guidance"] or 0), int(row["steps"] or 0))


def draw_lines(axes, along: str, measure: str, **picked: str) -> None:
    """A line for each way: the mean over the seeds, with their standard deviation."""
    for run, (label, style) in RUNS.items():
        if not label:
            continue
        values = {}
        for row in rows:
            if row["run"] == run and picked.items() <= row.items():
                values.setdefault(float(row[along]), []).append(float(row[measure]))
        x = sorted(values)
        spread = [stdev(values[at]) if len(values[at]) > 1 else 0 for at in x]
        axes.errorbar(x, [fmean(values[at]) for at in x], spread, label=label, linewidth=1.1, markersize=3, capsize=1.5,
                      elinewidth=0.7, **style)


if __name__ == "__main__":
    if folders := [Path(name) for name in sys.argv[1:]]:
        write_csv(HERE / "cifar10.csv", collect(folders))
    with open(HERE / "cifar10.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with matplotlib.rc_context(STYLE):
        figure, (steps, weights, told) = plt.subplots(1, 3, figsize=(PAGE, 2.5), layout="constrained")
        draw_lines(steps, "steps", "frechet_distance", guidance="1.0")
        steps.set(xscale="log", yscale="log", ylabel="Fréchet distance", xlabel="sampling steps", title="no guidance",
                  xticks=[3, 5, 10, 20, 50], xticklabels=["3", "5", "10", "20", "50"], yticks=[10, 20, 40, 80],
                  yticklabels=["10", "20", "40", "80"])
        draw_lines(weights, "guidance", "frechet_distance", steps="20")
        weights.set(xlabel="guidance", title="20 steps", ylabel="Fréchet distance", xticks=[1, 1.5, 2, 3])
        real = next(float(row["label_accuracy"]) for row in rows if row["run"] == "real images")
        told.axhline(real, color=NOTE, linewidth=0.6)
        told.text(3, real - 0.01, "real images", color=NOTE, fontsize=6.5, ha="right", va="top")
        draw_lines(told, "guidance", "label_accuracy", steps="20")
        told.set(xlabel="guidance", title="20 steps", ylabel="samples of the right class", xticks=[1, 1.5, 2, 3],
                 yticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1], yticklabels=["50 %", "60 %", "70 %", "80 %", "90 %", "100 %"])
        for axes in steps, weights, told:
            axes.minorticks_off()
        figure.legend(*steps.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(HERE / "cifar10.png", dpi=200)
