"""Draw cells.gif: the plane of noises, divided among 24 samples, while their prices settle from zero.

    PYTHONPATH=. python results/toy/cells.py

The rule is that of dansm.Semidiscrete: a noise z takes the sample of the largest ⟨z, x_j⟩ − b_j, and b_j rises if
sample j is taken too often. A step here asks 100,000 noises, the same ones in each, so that chance does not shake the
film.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from PIL import Image
from torch import Tensor

from dansm.scale.base.colours import DATA, INK, NOISE, NOTE
from dansm.tiny import toy
from dansm.tiny.pictures import to_image

OUT = Path(__file__).with_name("cells.gif")
SAMPLES, NOISES, SEED = 24, 100_000, 3
SHOWN = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 33, 38, 44, 50, 60, 75, 95, 120, 160, 220)  # steps with a
# frame: ever more apart, as the first move most
REACH, DOTS = 2.7, 640  # of the plane: from −REACH to REACH, so many points wide
BY_SHARE = LinearSegmentedColormap.from_list("share", [NOISE, "#c3cfdd", "#f3f1ea", "#e6a58d", DATA])


def scene() -> tuple[Tensor, Tensor]:
    """The samples (SAMPLES, 2) and the noises (NOISES, 2) of the film."""
    return toy.points("two-moons", SAMPLES, "few", SEED), toy.points("noise", NOISES, "cells", SEED)


def settling(x: Tensor, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Potentials and shares of samples x: (n, 2), both (n,), at each step of SHOWN. z: (N, 2) noises."""
    values, scale = z @ x.T, x.norm(dim=1).mean() / math.sqrt(2 * math.log(len(x)))
    b, states = torch.zeros(len(x)), []
    for step in range(SHOWN[-1] + 1):
        shares = (values - b).argmax(1).bincount(minlength=len(x)) / len(z)
        if step in SHOWN:
            states.append((b, shares))
        b = b + 0.05 * scale * (len(x) * shares - 1).clamp(max=3)
    return states


def colours_of(shares: Tensor) -> np.ndarray:
    """Blue for a sample that is taken too rarely, pale where all is even, red where too often. (n,) → (n, 3)."""
    return BY_SHARE((len(shares) * shares.numpy()).clip(0, 2) / 2)[:, :3]


def frames(x: Tensor, z: Tensor) -> list[Image.Image]:
    """A picture for each step of SHOWN."""
    figure, (plane, bars) = plt.subplots(2, 1, figsize=(4.8, 5.9), height_ratios=(5, 1))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.925, bottom=0.06, hspace=0.03)
    ticks = torch.linspace(-REACH, REACH, DOTS)
    noises = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), 2)
    images = []
    for step, (b, shares) in zip(SHOWN, settling(x, z), strict=True):
        draw_plane(plane, x, (noises @ x.T - b).argmax(-1), shares)
        draw_bars(bars, shares)
        least, most = 100 * shares.min().item(), 100 * shares.max().item()
        figure.suptitle(f"step {step}: a sample gets {least:.1f} to {most:.1f} % of the noises", fontsize=13, y=0.98)
        images.append(to_image(figure, dpi=100))
    plt.close(figure)
    return images


def draw_plane(plane, x: Tensor, cells: Tensor, shares: Tensor) -> None:
    """Cells: (DOTS, DOTS), the sample that a noise there takes."""
    plane.clear()
    edges = (cells[1:, 1:] != cells[:-1, 1:]) | (cells[1:, 1:] != cells[1:, :-1])
    picture = np.where(edges[:, :, None], to_rgb(NOTE), colours_of(shares)[cells[1:, 1:]])
    plane.imshow(picture, origin="lower", extent=(-REACH, REACH, -REACH, REACH))
    for j, sample in enumerate(x.tolist()):  # a line from each to the middle of its cell
        cell = (cells == j).nonzero()
        if len(cell):
            centre = (cell.double().mean(0).flip(0) / DOTS * 2 - 1) * REACH
            plane.plot(*zip(sample, centre.tolist(), strict=True), color=INK, linewidth=1.6, alpha=0.6)
    plane.scatter(*x.T.numpy(), s=34, c=INK, edgecolors="white", linewidths=1.2, zorder=3)
    plane.axis("off")


def draw_bars(bars, shares: Tensor) -> None:
    """A bar for each sample, and a line at what it should get."""
    bars.clear()
    count = len(shares)
    heights = (count * shares).clamp(max=4.3).numpy()
    bars.bar(range(count), heights, color=colours_of(shares), edgecolor=NOTE, linewidth=0.8)
    bars.axhline(1, color=INK, linestyle="--", linewidth=1.5)
    bars.set(ylim=(0, 4.3), xlim=(-1, count))
    bars.axis("off")
    text = f"each sample's share of the noises; dashed: 1/{count}"
    bars.text(count / 2 - 0.5, -0.1, text, ha="center", va="top", fontsize=11.5)


def save_film(images: list[Image.Image], path: Path) -> None:
    """Save with one palette for all frames, and a rest at both ends."""
    some = Image.fromarray(np.vstack([np.asarray(image) for image in images[::4]]))
    palette = some.quantize(96, Image.Quantize.MAXCOVERAGE)
    films = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [1500, *[140] * (len(films) - 2), 3500]  # milliseconds
    films[0].save(path, save_all=True, append_images=films[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    save_film(frames(*scene()), OUT)
    print(OUT)
