"""What matching changes, measured without a model: how near greedy comes to the optimum, where along the images'
principal directions the gain lies, and which noises a training sees."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import dansm

from ..base.colours import INK, NOTE, PALE
from ..base.machine import hardware
from ..base.text import with_bar
from ..matching.others import nearest_of_k, optimal
from ..matching.products import products
from .pairs import summarize
from .style import COLUMN, SERIES, STYLE, save

MATCH_SIZES = (100, 1000, 4000)
NEAREST_OF = 1000
WAYS = ("squared", "inner", "optimal")  # greedy by either cost, and the linear assignment
LINES = 40  # drawn in the figure; more would be a tangle
BINS = np.linspace(-5, 5, 41)
GAINS = {"optimal": SERIES["own"] | {"label": "optimal"}, "inner": SERIES["random"] | {"label": "greedy, inner"},
         "squared": SERIES["matched"] | {"label": "greedy, squared"}}
SMALL = {"font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "legend.fontsize": 6.5, "xtick.labelsize": 6.5,
         "ytick.labelsize": 6.5}  # for four panels in one column


def measure(images: Tensor, draws: int) -> dict:
    """Everything that the page reports. images: (N, D) in [−1, 1], N ≥ 4,000.

    Each draw takes 4,000 images and noises, and pairs these in 40 pools of 100, in 4 of 1,000 and in one of 4,000.
    """
    variances, directions = torch.linalg.eigh(torch.cov(images.T))
    directions = directions.flip(1)  # the first is the one along which images differ most
    first = directions[:, 0]
    middle = MATCH_SIZES[len(MATCH_SIZES) // 2]
    rows, prior_rows, picture = [], [], None
    for draw in with_bar(range(draws), "pairing images with noises"):
        order = np.random.default_rng(draw).permutation(len(images))[: max(MATCH_SIZES)]
        x = images[torch.from_numpy(order)]
        z = torch.randn(x.shape, generator=dansm.noise_generator(draw))
        rows.append({"draw": draw, "match_size": 1, "way": "random", **spread_along(x, z, directions)})
        for match_size in MATCH_SIZES:
            rows += [{"draw": draw, "match_size": match_size, **row}
                     for row in measure_pools(x, z, match_size, directions)]
        nearest = nearest_of_k(x[:NEAREST_OF], NEAREST_OF, generator=dansm.noise_generator(draw, "cpu", 1))
        seen = {"drawn": z, "matched": match_in_pools(x, z, middle, "squared"), "nearest": nearest}
        prior_rows += [{"draw": draw, **row} for row in measure_prior(seen, first)]
        picture = picture or picture_data(x, seen, first)
    return {"data": {"images": len(images), "numbers": images.shape[1],
                     "squared_norm": images.square().sum(1).mean().item(),
                     "share_of_first_direction": (variances[-1] / variances.sum()).item()},
            "draws": draws, "match_sizes": list(MATCH_SIZES), "nearest_of": NEAREST_OF, "pictured_match_size": middle,
            "summary": summarize(rows, "match_size", "way"), "prior": summarize(prior_rows, "way"), "rows": rows,
            "prior_rows": prior_rows, "picture": picture, "hardware": hardware("cpu")}


def measure_pools(x: Tensor, z: Tensor, match_size: int, directions: Tensor) -> list[dict]:
    """A row for each of WAYS, and one for "free": each sample has the nearest noise of its pool, shared or not."""
    rows = []
    for way in (*WAYS, "free"):
        paired = match_in_pools(x, z, match_size, way)
        rows.append({"way": way, **gains(x, paired, z, match_size), **spread_along(x, paired, directions),
                     **variance_by_age(paired @ directions[:, 0], match_size)})
    best = rows[WAYS.index("optimal")]["gain"]
    return [{**row, "share_of_optimal": row["gain"] / best} for row in rows]


def match_in_pools(x: Tensor, z: Tensor, match_size: int, way: str) -> Tensor:
    """The noises of x if each match_size samples share as many of z, in order. x, z: (N, D) → (N, D)."""
    paired = []
    for samples, noises in zip(x.split(match_size), z.split(match_size), strict=True):
        inner_products = products(samples, noises)  # faster than `dansm.cost_matrix`, and rounded as in results/theory
        cost = dansm.costs_from(inner_products, dansm.COSTS["inner" if way == "inner" else "squared"](noises))
        if way == "free":
            picks = cost.argmin(1)
        else:
            picks = optimal(cost).picks if way == "optimal" else dansm.greedy(cost)
        paired.append(noises[picks])
    return torch.cat(paired)


def gains(x: Tensor, paired: Tensor, z: Tensor, match_size: int) -> dict[str, float]:
    """How much shorter, as a share, squared paths are than over all pairings of their pool, in all and in each quarter
    of the pools' lives. x, paired, z: (N, D)."""
    length = (x - paired).square().sum(1).double()
    at_random = torch.cat([samples.square().sum(1) + noises.square().sum(1).mean() - 2 * samples @ noises.mean(0)
                           for samples, noises in zip(x.split(match_size), z.split(match_size), strict=True)]).double()
    length, at_random = (values.view(-1, 4, match_size // 4).sum((0, 2)) for values in (length, at_random))
    quarters = (1 - length / at_random).tolist()
    return {"gain": 1 - (length.sum() / at_random.sum()).item(),
            **{f"quarter_{i}": gain for i, gain in enumerate(quarters, 1)}}


def variance_by_age(along: Tensor, match_size: int) -> dict[str, float]:
    """The variance in each quarter of their pools' lives of noises along one direction, (N,) as they were taken."""
    quarters = along.view(-1, 4, match_size // 4).transpose(0, 1).flatten(1)
    return {f"first_variance_{i}": quarter.var().item() for i, quarter in enumerate(quarters, 1)}


def spread_along(x: Tensor, z: Tensor, directions: Tensor) -> dict[str, float]:
    """What noises tell about their images. x, z: (N, D); directions: (D, D), the images' principal ones as columns.

    first_correlation  along the first direction
    first_crossing     share of pairs of paths that change sides along it, which is crossing
    explained          share of all the images' variance that a linear guess from the noise gets, direction by direction
    """
    a, b = x @ directions, z @ directions
    a, b = a - a.mean(0), b - b.mean(0)
    correlation = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    variance = a.square().mean(0)
    crossing = (a[:, None, 0] - a[:, 0]) * (b[:, None, 0] - b[:, 0]) < 0
    return {"first_correlation": correlation[0].item(),
            "first_crossing": crossing.sum().item() / (len(a) * (len(a) - 1)),
            "explained": ((variance * correlation.square()).sum() / variance.sum()).item()}


def measure_prior(seen: dict[str, Tensor], first: Tensor) -> list[dict]:
    """Whether each set of noises (N, D) is the one drawn, its variance along `first` (D,), and its mean square."""
    drawn = seen["drawn"][seen["drawn"][:, 0].argsort()]
    return [{"way": way, "first_variance": (noises @ first).var().item(), "mean_square": noises.square().mean().item(),
             "the_noises_drawn": torch.equal(noises[noises[:, 0].argsort()], drawn)}
            for way, noises in seen.items()]


def picture_data(x: Tensor, seen: dict[str, Tensor], first: Tensor) -> dict:
    """Some paths along the first direction, ends in their standard deviations, and how the noises seen lie along it."""
    along = {"images": x @ first, "random": seen["drawn"] @ first, "matched": seen["matched"] @ first}
    ends = {way: ((points - points.mean()) / points.std())[:LINES].tolist() for way, points in along.items()}
    density = {way: np.histogram((seen[way] @ first).numpy(), BINS, density=True)[0].tolist()
               for way in ("matched", "nearest")}
    return {**ends, "bins": BINS.tolist(), "density": density}


@matplotlib.rc_context(STYLE | SMALL)
def draw(result: dict, path: Path) -> list[str]:
    """Write path.png and path.svg: paths along the first direction, the noises seen along it, the gains of pools."""
    figure = Figure((COLUMN, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    left, right = above.subplots(1, 2, sharey=True)
    summary = {(row["match_size"], row["way"]): row for row in result["summary"]}
    pool = result["pictured_match_size"]
    draw_paths(left, result["picture"], "random", f"random: {summary[1, 'random']['first_crossing']['mean']:.0%} cross")
    draw_paths(right, result["picture"], "matched",
               f"pool of {pool:,}: {summary[pool, 'squared']['first_crossing']['mean']:.0%} cross")
    left.set_ylabel("place along the images'\nfirst principal direction")
    left, right = below.subplots(1, 2, width_ratios=(1, 1.1))
    draw_prior(left, result)
    draw_gains(right, summary, result["match_sizes"])
    return save(figure, path)


def draw_paths(panel, picture: dict, way: str, title: str) -> None:
    panel.plot([0, 1], [picture[way], picture["images"]], color=SERIES[way]["color"], linewidth=0.6)
    panel.set_title(title)
    noise, image = panel.set_xticks([0, 1], ["noise", "image"])
    noise.label1.set_horizontalalignment("left")
    image.label1.set_horizontalalignment("right")
    panel.set(xlim=(-0.03, 1.03), yticks=[], ylim=(-3.2, 3.2))
    panel.spines["left"].set_visible(False)


def draw_prior(panel, result: dict) -> None:
    bins = np.array(result["picture"]["bins"])
    middles = (bins[1:] + bins[:-1]) / 2
    normal = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    panel.fill_between(middles, normal, color=PALE, linewidth=0, label="N(0, 1)")
    for way, label, style in (("matched", f"pool of {result['pictured_match_size']:,}", GAINS["squared"]),
                              ("nearest", f"nearest of {result['nearest_of']:,}", GAINS["optimal"])):
        panel.stairs(result["picture"]["density"][way], bins, color=style["color"], linestyle=style["linestyle"],
                     linewidth=1, label=label)
    panel.set(xlim=(-4, 4), yticks=[], xlabel="noise along that direction", ylim=(0, 0.62))
    panel.spines["left"].set_visible(False)
    panel.legend(frameon=False, loc="upper left", borderaxespad=0, handlelength=1.6)


def draw_gains(panel, summary: dict[tuple, dict], sizes: list[int]) -> None:
    def points(way, measure, style, **changes):
        mean, std = ([100 * summary[size, way][measure][key] for size in sizes] for key in ("mean", "std"))
        panel.errorbar(sizes, mean, std, **style, **changes, markersize=3.5, elinewidth=0.7)

    for way, style in GAINS.items():
        points(way, "gain", style, linewidth=0.9)
        if way != "optimal":  # all quarters of an optimal pairing gain alike
            points(way, "quarter_4", style | {"label": None}, markerfacecolor="white", linewidth=0)
    panel.plot([], [], "s", color=INK, markerfacecolor="white", markersize=3.5, label="hollow: last quarter")
    panel.axhline(0, color=NOTE, linewidth=0.5)
    panel.set(xscale="log", xlabel="match_size", ylabel="squared length saved, %", ylim=(-1.6, 7.8))
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
    panel.minorticks_off()
    panel.legend(frameon=False, loc="upper left", borderaxespad=0, handlelength=1.8)
