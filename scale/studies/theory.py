"""The theory's page in numbers: how near greedy comes to the optimum, what the prior keeps, and where the gain lies.

    dansm theory --data data/train --out results/theory        50,000 CIFAR-10 images

Each draw takes 4,000 images and as many noises. The same are paired in pools of each size: 40 pools of 100, 4 of 1,000,
one of 4,000. A gain is by how much the mean squared path is shorter than the mean over all pairings of a pool.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import dansm

from ..base.files import make_folder, write_csv, write_json
from ..base.machine import check_memory, hardware
from ..base.statistics import mean_and_std
from ..base.text import console, counted, say_files
from ..data.loader import load_images
from ..data.pixels import from_uint8
from ..evaluate.evaluate import check_pictures
from .figures import COLUMN, DATA, INK, NOISE, NOTE, PALE, SERIES, STYLE, save
from .foundations import make_table, with_bar

MATCH_SIZES = (100, 1000, 4000)
WAYS = ("squared", "inner", "optimal")  # greedy by either cost, and the linear assignment
NEAREST_OF = 1000
LINES = 40  # drawn in the figure: of more one sees only a tangle
BINS = np.linspace(-5, 5, 41)


def load_pixels(source: str) -> Tensor:
    """(N, D) in [−1, 1]. BadInput for latents."""
    images = load_images(source)
    check_pictures(images)
    numbers = math.prod(images.shape[1:])
    needed = 12 * len(images) * numbers + 24 * numbers**2  # bytes: what is converted, and what is made on the way
    check_memory(f"--data is {source}, {len(images):,} images of {numbers:,} numbers", needed, "cpu")
    return from_uint8(torch.as_tensor(np.asarray(images)).flatten(1))


def measure(images: Tensor, draws: int, match_sizes=MATCH_SIZES, nearest_of: int = NEAREST_OF,
            seed: int = 0) -> dict:
    """All numbers of the page. images: (N, D), N at least the largest of match_sizes, which the others divide."""
    values, directions = torch.linalg.eigh(torch.cov(images.T))
    directions = directions.flip(1)  # the one along which images differ most is the first
    rows, priors, picture = [], [], None
    for draw in with_bar(range(seed, seed + draws), "pairing images with noises"):
        x, z = draw_ends(images, max(match_sizes), draw)
        rows.append({"draw": draw, "match_size": 1, "way": "random", **spread_along(x, z, directions)})
        for match_size in match_sizes:
            found = measure_pools(x, z, match_size, directions)
            rows += [{"draw": draw, "match_size": match_size, **row} for row in found]
        middle = match_sizes[len(match_sizes) // 2]
        matched = match_in_pools(x, z, middle, "squared")
        kept = dansm.nearest_of_k(x[:nearest_of], nearest_of, generator=dansm.noise_generator(draw, "cpu", 1))
        seen = {"drawn": z, "matched": matched, "nearest": kept}
        priors += [{"draw": draw, **row} for row in measure_prior(seen, directions[:, 0])]
        picture = picture or picture_data(x, seen, directions[:, 0])
    return {"data": {"images": len(images), "numbers": images.shape[1],
                     "squared_norm": images.square().sum(1).mean().item(),
                     "share_of_first_direction": (values[-1] / values.sum()).item()},
            "draws": draws, "match_sizes": list(match_sizes), "nearest_of": nearest_of, "pictured_match_size": middle,
            "summary": summarize(rows, ("match_size", "way")), "prior": summarize(priors, ("way",)),
            "rows": rows, "prior_rows": priors, "picture": picture, "hardware": hardware("cpu")}


def draw_ends(images: Tensor, count: int, draw: int) -> tuple[Tensor, Tensor]:
    """`count` different images in random order and as many noises, (count, D) each."""
    order = np.random.default_rng(draw).permutation(len(images))[:count]
    z = torch.randn(count, images.shape[1], generator=dansm.noise_generator(draw))
    return images[torch.from_numpy(order)], z


# ---------------------------------------------------------------------------------------------------
# How near greedy comes to the optimum
# ---------------------------------------------------------------------------------------------------


def measure_pools(x: Tensor, z: Tensor, match_size: int, directions: Tensor) -> list[dict]:
    """A row for each of WAYS, and one for samples that need not share: each has the nearest of its pool's noises."""
    rows = []
    for way in (*WAYS, "free"):
        paired = match_in_pools(x, z, match_size, way)
        rows.append({"way": way, **gains(x, paired, z, match_size), **spread_along(x, paired, directions),
                     **variance_by_age(paired @ directions[:, 0], match_size)})
    best = next(row["gain"] for row in rows if row["way"] == "optimal")
    return [{**row, "share_of_optimal": row["gain"] / best} for row in rows]


def match_in_pools(x: Tensor, z: Tensor, match_size: int, way: str) -> Tensor:
    """The noises of x, (N, D), if each match_size samples share as many of z, (N, D), in order. → (N, D)."""
    paired = []
    for samples, noises in zip(x.split(match_size), z.split(match_size), strict=True):
        cost = dansm.cost_matrix(samples, noises, "inner" if way == "inner" else "squared")
        if way == "free":
            picks = cost.argmin(1)
        else:
            picks = dansm.optimal(cost).picks if way == "optimal" else dansm.greedy(cost)
        paired.append(noises[picks])
    return torch.cat(paired)


def gains(x: Tensor, paired: Tensor, z: Tensor, match_size: int) -> dict[str, float]:
    """By how much the mean squared path is shorter than at random, over whole pools and over each quarter of them."""
    length = (x - paired).square().sum(1).double()
    at_random = torch.cat([samples.square().sum(1) + noises.square().sum(1).mean() - 2 * samples @ noises.mean(0)
                           for samples, noises in zip(x.split(match_size), z.split(match_size), strict=True)]).double()
    length, at_random = (of.view(-1, 4, match_size // 4).sum((0, 2)) for of in (length, at_random))
    quarters = (1 - length / at_random).tolist()
    return {"gain": 1 - (length.sum() / at_random.sum()).item(),
            **{f"quarter_{i}": gain for i, gain in enumerate(quarters, 1)}}


def variance_by_age(along: Tensor, match_size: int) -> dict[str, float]:
    """Of noises in the order they were taken, `along` the images' first principal direction, (N,): their variance in
    each quarter of the pools' lives. In N(0, I) it is 1; of a quarter of a pool it need not be."""
    quarters = along.view(-1, 4, match_size // 4).transpose(0, 1).flatten(1)
    return {f"first_variance_{i}": quarter.var().item() for i, quarter in enumerate(quarters, 1)}


# ---------------------------------------------------------------------------------------------------
# Where the gain lies
# ---------------------------------------------------------------------------------------------------


def spread_along(x: Tensor, z: Tensor, directions: Tensor) -> dict[str, float]:
    """What noises say of their images, x and z: (N, D), along the images' principal directions, (D, D), a column
    each.

    first_correlation  along the first of them
    first_crossing     share of pairs of paths that change sides along it, which is crossing
    explained          share of all the images' variance that a linear guess from the noise gets, direction by direction
    """
    a, b = x @ directions, z @ directions
    a, b = a - a.mean(0), b - b.mean(0)
    correlation = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    variance = a.square().mean(0)
    return {"first_correlation": correlation[0].item(), "first_crossing": crossing(a[:, 0], b[:, 0]),
            "explained": ((variance * correlation.square()).sum() / variance.sum()).item()}


def crossing(a: Tensor, b: Tensor) -> float:
    """Of all pairs of lines from b_i to a_i, (N,) each, the share that cross."""
    crossed = sum(((a[i] - a[i + 1 :]) * (b[i] - b[i + 1 :]) < 0).sum().item() for i in range(len(a)))
    return crossed / math.comb(len(a), 2)


# ---------------------------------------------------------------------------------------------------
# The prior
# ---------------------------------------------------------------------------------------------------


def measure_prior(seen: dict[str, Tensor], first: Tensor) -> list[dict]:
    """Of the noises that were drawn and those that trainings see, (N, D) each: their variance along the images' first
    principal direction, (D,), and their mean square, both 1 in N(0, I); and whether they are those drawn."""
    z = in_order(seen["drawn"])
    return [{"way": way, "first_variance": (noises @ first).var().item(), "mean_square": noises.square().mean().item(),
             "the_noises_drawn": torch.equal(in_order(noises), z)} for way, noises in seen.items()]


def in_order(z: Tensor) -> Tensor:
    """Sorted by the first number: equal for equal sets of noises."""
    return z[z[:, 0].argsort()]


# ---------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------


def summarize(rows: list[dict], by: tuple[str, ...]) -> list[dict]:
    """Mean and standard deviation over the draws of each measure, for each group of rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    found = []
    for key, group in groups.items():
        measures = [name for name, value in group[0].items() if isinstance(value, float)]
        values = {name: [row[name] for row in group] for name in measures}
        found.append({**dict(zip(by, key, strict=True)),
                      **{name: mean_and_std(of) for name, of in values.items()}})
    return found


def picture_data(x: Tensor, seen: dict[str, Tensor], first: Tensor) -> dict:
    """What the figure shows besides the summary: some paths along the first direction, each end in its own standard
    deviations, and how the noises seen lie along it."""

    def ends(of):
        along = of @ first
        return ((along - along.mean()) / along.std())[:LINES].tolist()

    return {"images": ends(x), "random": ends(seen["drawn"]), "matched": ends(seen["matched"]), "bins": BINS.tolist(),
            "density": {way: np.histogram((seen[way] @ first).numpy(), BINS, density=True)[0].tolist()
                        for way in ("matched", "nearest")}}


# ---------------------------------------------------------------------------------------------------
# The figure
# ---------------------------------------------------------------------------------------------------

GAINS = {"optimal": SERIES["own"] | {"label": "optimal"}, "inner": SERIES["random"] | {"label": "greedy, inner"},
         "squared": SERIES["matched"] | {"label": "greedy, squared"}}
SMALL = {"font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "legend.fontsize": 6.5, "xtick.labelsize": 6.5,
         "ytick.labelsize": 6.5}  # four panels in one column


@matplotlib.rc_context(STYLE | SMALL)
def draw(result: dict, path: Path) -> list[str]:
    """A column of a paper wide. Above, paths along the images' first principal direction; below, the noises that a
    training sees along it, and the gain of whole pools and of their last quarters. Returns the names of the files."""
    figure = Figure((COLUMN, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    draw_paths(above.subplots(1, 2, sharey=True), result)
    prior, gain = below.subplots(1, 2, width_ratios=(1, 1.1))
    draw_prior(prior, result)
    draw_gains(gain, result)
    return save(figure, path)


def draw_paths(panels, result: dict) -> None:
    names = {"random": "random", "matched": f"pool of {result['pictured_match_size']:,}"}
    crossing = {row["way"]: row["first_crossing"]["mean"] for row in result["summary"]
                if row["match_size"] in (1, result["pictured_match_size"])}
    for panel, (way, name) in zip(panels, names.items(), strict=True):
        share = crossing["random" if way == "random" else "squared"]
        ends = result["picture"][way], result["picture"]["images"]
        panel.plot([0, 1], ends, color=NOISE if way == "random" else DATA, linewidth=0.6)
        panel.set_title(f"{name}: {share:.0%} cross")
        for label, side in zip(panel.set_xticks([0, 1], ["noise", "image"]), ("left", "right"), strict=True):
            label.label1.set_horizontalalignment(side)
        panel.set(xlim=(-0.03, 1.03), yticks=[], ylim=(-3.2, 3.2))
        panel.spines["left"].set_visible(False)
    panels[0].set_ylabel("place along the images'\nfirst principal direction")


def draw_prior(panel, result: dict) -> None:
    bins = np.array(result["picture"]["bins"])
    middles = (bins[1:] + bins[:-1]) / 2
    normal = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    panel.fill_between(middles, normal, color=PALE, linewidth=0, label="N(0, 1)")
    names = {"matched": f"pool of {result['pictured_match_size']:,}", "nearest": f"nearest of {result['nearest_of']:,}"}
    for way, style in (("matched", GAINS["squared"]), ("nearest", GAINS["optimal"])):
        panel.stairs(result["picture"]["density"][way], bins, color=style["color"], linestyle=style["linestyle"],
                     linewidth=1, label=names[way])
    panel.set(xlim=(-4, 4), yticks=[], xlabel="noise along that direction", ylim=(0, 0.62))
    panel.spines["left"].set_visible(False)
    panel.legend(frameon=False, loc="upper left", borderaxespad=0, handlelength=1.6)


def draw_gains(panel, result: dict) -> None:
    of = {(row["match_size"], row["way"]): row for row in result["summary"]}
    sizes = result["match_sizes"]
    for way, style in GAINS.items():
        for measure, face in (("gain", style["color"]), ("quarter_4", "white")):
            mean, std = ([100 * of[size, way][measure][key] for size in sizes] for key in ("mean", "std"))
            whole = measure == "gain"
            if whole or way != "optimal":  # each quarter of an optimal pairing gains alike
                panel.errorbar(sizes, mean, std, color=style["color"], marker=style["marker"], markerfacecolor=face,
                               markersize=3.5, linewidth=0.9 if whole else 0, elinewidth=0.7,
                               linestyle=style["linestyle"], label=style["label"] if whole else None)
    hollow = dict(marker="s", markerfacecolor="white", markersize=3.5, linewidth=0)
    panel.plot([], [], color=INK, label="hollow: last quarter", **hollow)
    panel.axhline(0, color=NOTE, linewidth=0.5)
    panel.set(xscale="log", xlabel="match_size", ylabel="squared length saved, %", ylim=(-1.6, 7.8))
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="upper left", borderaxespad=0, handlelength=1.8)


def print_gains(result: dict) -> None:
    """The tables of the page: what each way of pairing wins at each size, and what is left of it in a last quarter; and
    which noises the first and the last quarter take."""
    of = {(row["match_size"], row["way"]): row for row in result["summary"]}
    columns = *WAYS, *(f"{way},\nlast ¼" for way in WAYS)
    table = make_table("Mean squared path, shorter than at random by", *columns)
    for size in result["match_sizes"]:
        found = [of[size, way][measure] for measure in ("gain", "quarter_4") for way in WAYS]
        table.add_row(f"{size:,}", *(f"{100 * each['mean']:.2f} %\n± {100 * each['std']:.2f} %" for each in found))
    console.print(table)
    columns = [f"{way},\n{which} ¼" for way in WAYS for which in ("first", "last")]
    table = make_table("Variance of the noises taken, along the images' first direction (N(0, I): 1)", *columns)
    for size in result["match_sizes"]:
        found = [of[size, way][f"first_variance_{i}"] for way in WAYS for i in (1, 4)]
        table.add_row(f"{size:,}", *(f"{each['mean']:.2f}\n± {each['std']:.2f}" for each in found))
    console.print(table)


def write(result: dict, out: Path) -> None:
    print_gains(result)
    write_json(out / "theory.json", result)
    write_csv(out / "theory.csv", result["rows"])
    say_files(out, "theory.json", "theory.csv", *draw(result, out / "theory"))


def theory(data: str, draws: int, out: Path) -> None:
    images = load_pixels(data)
    if len(images) < max(MATCH_SIZES):
        raise dansm.BadInput(f"--data is {data}, which holds {counted(len(images), 'image')}: expected at least "
                             f"{max(MATCH_SIZES):,}, as many as the largest pool has noises")
    out = make_folder(out)
    write(measure(images, draws), out)
