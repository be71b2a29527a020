"""The pictures of `tiny.toy`: noise is soft blue, data a warm red, and a line goes from one to the other."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, so that no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from PIL import Image
from torch import Tensor, nn

import dansm
from tiny import toy

NOISE, DATA, INK, NOTE, PALE = "#8fa8c4", "#c8441b", "#2b2f36", "#5b6470", "#d3d9e0"
FROM_NOISE_TO_DATA = LinearSegmentedColormap.from_list("flow", [NOISE, "#d98e6a", DATA])
MATCH_SIZES = (1, 10, 100, 1000)

plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "figure.facecolor": "white"})


def draw_pairs(x: Tensor, z: Tensor, path: Path) -> None:
    """The same data and noise, (1000, 2) each, paired at random and by pools of 10, 100 and 1,000."""
    figure, panels = make_panels(1, len(MATCH_SIZES))
    for panel, match_size in zip(panels[0], MATCH_SIZES, strict=True):
        noise = match_in_groups(x, z, match_size)
        some = slice(None, None, 4)  # of 1,000 lines one sees only a tangle
        draw_lines(panel, torch.stack([noise[some], x[some]]))
        title(panel, "random pairs" if match_size == 1 else f"match size {match_size:,}")
        note(panel, f"{toy.crossing_share(x, noise):.1%} of pairs cross\nmean length {dansm.path_length(x, noise):.2f}")
    save(figure, path)


def match_in_groups(x: Tensor, z: Tensor, match_size: int) -> Tensor:
    """What pools of `match_size` give out if they are filled from z, in order."""
    groups = zip(x.split(match_size), z.split(match_size), strict=True)
    return torch.cat([some[dansm.greedy(dansm.cost_matrix(samples, some))] for samples, some in groups])


@torch.no_grad()
def draw_paths(results: dict, nets: dict[str, nn.Module], z: Tensor, path: Path) -> None:
    """The learned paths of each method from the same noises, in 50 steps."""
    figure, panels = make_panels(1, len(nets))
    for panel, (method, net) in zip(panels[0], nets.items(), strict=True):
        draw_lines(panel, torch.stack(list(dansm.RectifiedFlow().path(net, z[::4], 50))))
        title(panel, name(results, method))
        note(panel, f"bend {first_seed(results, method)['straightness']:.2f}, 0 is straight")
    save(figure, path)


def draw_samples(results: dict, nets: dict[str, nn.Module], x: Tensor, z: Tensor, path: Path) -> None:
    """A row for each method, a column for each count of steps, with the W2²; beneath in pale the target."""
    figure, panels = make_panels(len(nets), len(toy.STEPS_SHOWN), side=2, limit=2.35)
    for row, (method, net) in zip(panels, nets.items(), strict=True):
        for panel, steps in zip(row, toy.STEPS_SHOWN, strict=True):
            draw_over_target(panel, results, method, net, x, z, steps)
            if steps == toy.STEPS_SHOWN[0]:
                title_row(panel, name(results, method))
    for panel, steps in zip(panels[0], toy.STEPS_SHOWN, strict=True):
        title(panel, "1 step" if steps == 1 else f"{steps} steps")
    save(figure, path)


def draw_shapes(results: dict[str, dict], nets: dict, shown: dict, steps: int, path: Path) -> None:
    """A column for each shape, samples of few steps with random pairs above and with greedy below."""
    figure, panels = make_panels(2, len(results), side=2, limit=2.35)
    for column, (shape, of_shape) in zip(panels.T, results.items(), strict=True):
        for panel, method in zip(column, ("random", "greedy"), strict=True):
            draw_over_target(panel, of_shape, method, nets[shape][method], *shown[shape], steps)
            if panel in panels[:, 0]:
                title_row(panel, name(of_shape, method) + f", {steps} steps")
        title(column[0], shape.replace("-", " "))
    save(figure, path)


def draw_over_target(panel, results: dict, method: str, net: nn.Module, x: Tensor, z: Tensor, steps: int) -> None:
    """Samples in `steps` steps, beneath them the target in pale, below them the W2²."""
    draw_dots(panel, x, PALE, 4)
    draw_dots(panel, dansm.RectifiedFlow().sample(net, z, steps), DATA, 1.2, alpha=0.6)
    note(panel, f"{first_seed(results, method)['w2'][str(steps)]:.3f}")


@torch.no_grad()
def draw_flow(results: dict, nets: dict[str, nn.Module], x: Tensor, z: Tensor, path: Path, frames: int = 24) -> None:
    """Noise on its way to data, random against greedy pairing: in 50 steps, then once more in 2."""
    figure, panels = make_panels(1, 2, side=3.2)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.07, top=0.9, wspace=0.02)
    methods = ("random", "greedy")
    moving = []
    for panel, method in zip(panels[0], methods, strict=True):
        draw_dots(panel, x, PALE, 5)
        title(panel, "random pairs" if method == "random" else name(results, method))
        trails = panel.add_collection(LineCollection([], colors=DATA, linewidths=0.6, alpha=0.35))
        moving.append((trails, draw_dots(panel, z, DATA, 3), note(panel, "")))
    images, durations = [], []
    for steps in (50, 2):
        states = [frames_of(dansm.RectifiedFlow().path(nets[method], z, steps), frames) for method in methods]
        for frame in range(frames + 1):
            for (trails, dots, label), state, method in zip(moving, states, methods, strict=True):
                trails.set_segments(state[max(0, frame - 6) : frame + 1].swapaxes(0, 1) if frame else [])
                dots.set_offsets(state[frame])
                dots.set_color(FROM_NOISE_TO_DATA(frame / frames))
                w2 = first_seed(results, method)["w2"][str(steps)]
                label.set_text(f"{steps} steps" + f", W2² to the target {w2:.3f}" * (frame == frames))
            images.append(to_image(figure, dpi=100))
            durations.append(700 if frame == 0 else 2600 if frame == frames else 70)
    plt.close(figure)
    images = [image.quantize(palette=all_colors(), dither=Image.Dither.NONE) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def all_colors() -> Image.Image:
    """A palette of ours, each colour paler and paler up to white, for all frames: with one of its own for each
    frame the ground would flicker."""
    colors = np.vstack([FROM_NOISE_TO_DATA(np.linspace(0, 1, 8))[:, :3], [to_rgb(c) for c in (INK, NOTE, PALE)]])
    colors = np.vstack([1 - (1 - colors) * share for share in (1, 0.75, 0.5, 0.25)] + [np.ones((1, 3))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colors).round().astype(np.uint8).tobytes())
    return palette


def frames_of(path, frames: int) -> np.ndarray:
    """Where the points of a sampler's path, (N, 2) each step, are at frames + 1 equal times: (frames + 1, N, 2)."""
    path = torch.stack(list(path))
    at = torch.linspace(0, len(path) - 1, frames + 1)
    before = at.long().clamp(max=len(path) - 2)
    return torch.lerp(path[before], path[before + 1], (at - before).to(path)[:, None, None]).cpu().numpy()


def first_seed(results: dict, method: str) -> dict:
    """The training that the pictures show."""
    return next(training for training in results["trainings"] if training["method"] == method)


def make_panels(rows: int, columns: int, side: float = 2.6, limit: float = 2.7):
    """A figure of square panels without axes, `side` inches each; → (figure, panels[row][column])."""
    figure, panels = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False)
    figure.subplots_adjust(wspace=0.03, hspace=0.12)
    for panel in panels.flat:
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        panel.axis("off")
    return figure, panels


def draw_lines(panel, path: Tensor) -> None:
    """path: (steps + 1, N, 2), from dot to dot, each line coloured by the time at which it is where it is."""
    if len(path) == 2:  # a straight line in pieces, for the sake of its colours
        path = torch.lerp(path[0], path[1], torch.linspace(0, 1, 21, device=path.device)[:, None, None])
    pieces = torch.stack([path[:-1], path[1:]], 2).cpu().numpy()  # (steps, N, 2 ends, 2)
    times = np.repeat(np.linspace(0, 1, len(pieces)), pieces.shape[1])
    draw_dots(panel, path[0], NOISE, 4)
    panel.add_collection(LineCollection(pieces.reshape(-1, 2, 2), colors=FROM_NOISE_TO_DATA(times), linewidths=0.6))
    draw_dots(panel, path[-1], DATA, 4)


def draw_dots(panel, x: Tensor, color: str, size: float, alpha: float = 1.0):
    return panel.scatter(*x.cpu().numpy().T, s=size, color=color, alpha=alpha, linewidths=0, zorder=3)


def title(panel, text: str):
    return panel.set_title(text, fontsize=11, pad=4)


def title_row(panel, text: str):
    return panel.text(-0.1, 0.5, text.replace(", ", "\n"), transform=panel.transAxes, rotation=90, ha="center",
                      va="center", fontsize=10)


def note(panel, text: str):
    return panel.text(0.5, 0.0, text, transform=panel.transAxes, ha="center", va="top", fontsize=9.5, color=NOTE)


def name(results: dict, method: str) -> str:
    match_size = results["summary"][method]["match_size"]
    return {"random": "random pairs", "greedy": f"greedy, match size {match_size:,}",
            "optimal": f"optimal, match size {match_size:,}", "nearest": f"nearest of {match_size:,}"}[method]


def save(figure, path: Path) -> None:
    """As a PNG of 128 colours: a third of the size, and to the eye the same."""
    to_image(figure, dpi=150, bbox_inches="tight", pad_inches=0.08).quantize(128).save(path, optimize=True)
    plt.close(figure)


def to_image(figure, **how) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **how)
    return Image.open(buffer).convert("RGB")
