"""Show that a sample of samples.png is flat where its noise was small, and noisy where it was large.

    PYTHONPATH=. python results/diffusion/size.py        writes size.csv and size.png next to itself
"""

import csv
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from dansm.scale.base.noise import path_noise

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CELL, GAP, SIDE = 64, 2, 8  # pixels of a sample, drawn twice as large, and of the line around it; samples a side


def samples() -> np.ndarray:
    """The samples of the grid, (64, 32, 32, 3) in [0, 255]."""
    grid = np.asarray(Image.open(HERE / "samples.png").convert("RGB"), float)
    corners = [GAP + n * (CELL + GAP) for n in range(SIDE)]
    return np.array([grid[y : y + CELL : 2, x : x + CELL : 2] for y in corners for x in corners])


def draw(images, sizes, roughness) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 4.2), layout="constrained")
    in_order = images[np.argsort(sizes)].reshape(SIDE, SIDE, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(256, 256, 3)
    left.imshow(in_order / 255)
    left.set(title="the 64 samples, the smallest noise first", xticks=[], yticks=[])
    right.scatter(sizes, roughness, s=22, color="#c8441b", edgecolor="#2b2d33", linewidth=0.4)
    right.axvline(1, color="#2b2d33", linestyle=":", linewidth=1)
    right.set(xlabel="size of the noise: root mean square of its 3,072 numbers",
              ylabel="roughness of the sample:\nmean step from pixel to pixel, of 255")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "size.png", dpi=110)


if __name__ == "__main__":
    images = samples()
    sizes = path_noise(range(len(images)), (3, 32, 32)).square().mean((1, 2, 3)).sqrt().numpy()
    roughness = np.abs(np.diff(images, axis=1)).mean((1, 2, 3))
    rows = [(n, f"{size:.5f}", f"{rough:.2f}") for n, (size, rough) in enumerate(zip(sizes, roughness, strict=True))]
    with open(HERE / "size.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "size_of_noise", "roughness"), *rows])
    draw(images, sizes, roughness)
    print(f"correlation of size and roughness: {np.corrcoef(sizes, roughness)[0, 1]:.2f}")
