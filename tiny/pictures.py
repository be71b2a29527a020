"""The pictures of `tiny.toy` and of the lesson: noise is soft blue, data a warm red, and a line goes from one to the
other."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, so that no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from dansm.scale.base.text import counted
from einops import rearrange
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor, nn

import dansm

from . import toy

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


def draw_lines(panel, path: Tensor, size: float = 4, width: float = 0.6) -> None:
    """path: (steps + 1, N, 2), from dot to dot, each line coloured by the time at which it is where it is."""
    if len(path) == 2:  # a straight line in pieces, for the sake of its colours
        path = torch.lerp(path[0], path[1], torch.linspace(0, 1, 21, device=path.device)[:, None, None])
    pieces = torch.stack([path[:-1], path[1:]], 2).cpu().numpy()  # (steps, N, 2 ends, 2)
    times = np.repeat(np.linspace(0, 1, len(pieces)), pieces.shape[1])
    draw_dots(panel, path[0], NOISE, size)
    panel.add_collection(LineCollection(pieces.reshape(-1, 2, 2), colors=FROM_NOISE_TO_DATA(times), linewidths=width))
    draw_dots(panel, path[-1], DATA, size)


def draw_dots(panel, x: Tensor, color: str, size: float, alpha: float = 1.0, layer: float = 3):
    return panel.scatter(*x.cpu().numpy().T, s=size, color=color, alpha=alpha, linewidths=0, zorder=layer)


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


def save(figure, path: Path, dpi: int = 150) -> Image.Image:
    """As a PNG of 128 colours: a third of the size, and to the eye the same."""
    image = to_image(figure, dpi=dpi, bbox_inches="tight", pad_inches=0.08).quantize(128)
    image.save(path, optimize=True)
    plt.close(figure)
    return image


def to_image(figure, **how) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **how)
    return Image.open(buffer).convert("RGB")


# The lesson. Its pictures go into a notebook too, which shows what a function returns; and its planes have frames and
# numbers, as a reader sees here for the first time that a sample is two numbers.

LESSON_DPI = 110  # a notebook holds its pictures
NAMES = {"random": "random pairs", "greedy": "matched pairs"}
LOOKS = {"random": dict(color="#75869b", marker="o", linestyle="--"), "greedy": dict(color=DATA, marker="s")}


def draw_lines_that_cross(x: Tensor, z: Tensor, path: Path) -> Image.Image:
    """x, z: (N, 2), paired at random. All points; one line with the times along it; sixty lines."""
    figure, (clouds, line, lines) = row_of_planes(3)
    draw_dots(clouds, z, NOISE, 6)
    draw_dots(clouds, x, DATA, 6)
    title(clouds, "noise z (pale), data x (dark)")
    draw_dots(line, x, PALE, 6, layer=1)
    ends = torch.tensor([[[-1.9, -1.9]], [[0.35, 1.15]]])
    draw_lines(line, ends, size=45, width=2)
    for t in (0, 0.25, 0.5, 0.75, 1):
        x_t = torch.lerp(*ends[:, 0], t)
        draw_dots(line, x_t[None], INK, 18 * (0 < t < 1))
        label(line, f"t = {t:g}", x_t, (8, -7))
    title(line, "one line: x_t = t·x + (1 − t)·z")
    draw_lines(lines, torch.stack([z[:60], x[:60]]), size=12, width=0.8)
    title(lines, "sixty lines, paired at random")
    return save(figure, path, dpi=LESSON_DPI)


def draw_average(x: Tensor, one_step: Tensor, bent: Iterable[Tensor], w2: dict[int, float], path: Path) -> Image.Image:
    """Two lines that meet; where the perfect network for random pairs ends in one step, and its paths in many.
    All (N, 2)."""
    figure, (meeting, one, many) = row_of_planes(3)
    for panel in (meeting, one, many):
        draw_dots(panel, x, PALE, 6, layer=1)
    ends = torch.tensor([[[-1.1, -1.24], [-2.3, 1.6]], [[-0.3, 1.44], [0.9, -1.4]]])
    middle, mean = ends.mean((0, 1)), ends[1].mean(0)
    draw_lines(meeting, ends, size=45, width=2)
    draw_dots(meeting, middle[None], INK, 30)
    arrow = dict(arrowstyle="-|>", color=INK, linewidth=2, shrinkA=0, shrinkB=0)
    meeting.annotate("", mean.tolist(), middle.tolist(), arrowprops=arrow)
    label(meeting, "the average", mean, (6, 0))
    title(meeting, "two lines meet at t = ½")
    draw_dots(one, one_step, INK, 14)
    label(one, "every noise\nends here", one_step.mean(0), (8, 0))
    title(one, f"perfect network, 1 step: W2² {w2[1]:.3f}")
    bent = torch.stack(list(bent))
    draw_lines(many, bent, size=8)
    title(many, f"{len(bent) - 1} steps: W2² {w2[len(bent) - 1]:.3f}")
    return save(figure, path, dpi=LESSON_DPI)


def draw_pool(data: Tensor, x: Tensor, z: Tensor, moments: Sequence[int], path: Path) -> Image.Image:
    """x, z: (N, 2), a whole pool in the order served; a plane for each count of samples served. Beneath in pale the
    data."""
    figure, planes = row_of_planes(len(moments))
    for panel, served in zip(planes, moments, strict=True):
        draw_dots(panel, data, PALE, 3, alpha=0.6, layer=1)
        draw_lines(panel, torch.stack([z[:served], x[:served]]), size=26, width=1.8)
        panel.scatter(*z[served:].numpy().T, s=26, facecolors="white", edgecolors=NOISE, linewidths=1.5, zorder=3)
        for number, place in enumerate(x[:served], 1):
            label(panel, str(number), place, (5, 5))
        title(panel, f"{served} served, {len(z) - served} left")
    return save(figure, path, dpi=LESSON_DPI)


def draw_prior(x: Tensor, noises: dict[str, Tensor], match_size: int, batch: int, path: Path) -> Image.Image:
    """The lengths of the lines to x in the order served, from the first of the noises, a pool's; and the lengths of all
    noises, beside that of N(0, I), whose density in the plane is r·exp(−r²/2). All (N, 2)."""
    figure, (order, prior) = row_of(2, width_ratios=(1.25, 1))
    lengths = (x - next(iter(noises.values()))).norm(dim=1)
    draw_dots(order, torch.stack([torch.arange(len(x)), lengths], 1), NOISE, 5).set_label("one line")
    smooth = lengths.unfold(0, 50, 1).mean(1)
    order.plot(torch.arange(len(smooth)) + 25, smooth, color=DATA, linewidth=2, zorder=4, label="mean of 50")
    for start in range(0, len(x), 2 * batch):
        order.axvspan(start, start + batch, color=PALE, alpha=0.4, linewidth=0)
    for end in range(match_size, len(x), match_size):
        order.axvline(end, color=INK, linestyle=":", linewidth=1.5)
        order.text(end, 0.96, " new pool", transform=order.get_xaxis_transform(), va="top", fontsize=9)
    order.set(xlim=(0, len(x)), ylim=(0, 1.1 * lengths.max().item()))
    order.legend(fontsize=9, loc="upper left", framealpha=1, edgecolor="none", markerscale=2)
    name_axes(order, f"samples served (stripes: batches of {batch})", "length of the line")
    bins = np.linspace(0, 4, 41)
    looks = dict(color=NOISE, alpha=0.7), dict(color=DATA, histtype="step", linewidth=1.8)
    for (name, noise), look in zip(noises.items(), looks, strict=True):
        prior.hist(noise.norm(dim=1).numpy(), bins, density=True, label=name, **look)
    prior.plot(bins, bins * np.exp(-(bins**2) / 2), color=INK, linestyle="--", label="N(0, I)")
    prior.legend(frameon=False, fontsize=9)
    name_axes(prior, "length of the noises used, ‖z‖", "density")
    return save(figure, path, dpi=LESSON_DPI)


def draw_match_sizes(measured: dict[int, dict[str, float]], shortest: float, path: Path) -> Image.Image:
    """What `toy.measure_pairs` finds for each match_size; the mean length of the best pairing."""
    figure, (crossing, lengths) = row_of(2)
    crossing.plot(list(measured), [100 * found["crossing"] for found in measured.values()], **LOOKS["greedy"])
    log_axis(crossing, "y", (0.5, 1, 2, 5, 10, 20))
    name_axes(crossing, "match_size", "pairs of lines that cross, %")
    for key, name, look in (("inter_path_mean", "between two lines where they are nearest", "random"),
                            ("path_length", "from end to end of a line", "greedy")):
        lengths.plot(list(measured), [found[key] for found in measured.values()], **LOOKS[look], label=name)
    lengths.axhline(shortest, color=INK, linestyle=":", linewidth=1.5)
    lengths.text(1, shortest - 0.05, "from end to end, best pairing", fontsize=9, va="top")
    lengths.set(ylim=(0, 2.2))
    for panel in (crossing, lengths):
        log_axis(panel, "x", (1, 10, 100, 1000, 10_000))
    lengths.legend(frameon=False, fontsize=9)
    name_axes(lengths, "match_size", "mean distance")
    return save(figure, path, dpi=LESSON_DPI)


def draw_trainings(losses: dict[str, list], least: float, paths: dict[str, Iterable[Tensor]],
                   found: dict[str, dict], path: Path) -> Image.Image:
    """Left the losses of both trainings and the least that random pairs allow; right the paths learned, (N, 2) each
    step, with the bend `toy.measure_flow` found."""
    figure, (curves, *planes) = row_of(3)
    for method, of_method in losses.items():
        smooth = torch.stack(list(of_method)).unfold(0, 20, 1).mean(1)
        curves.plot(torch.arange(len(smooth)) + 10, smooth, color=LOOKS[method]["color"])
        curves.text(len(smooth) / 2, smooth[len(smooth) // 2].item() + 0.1, NAMES[method], fontsize=9, ha="center")
    curves.axhline(least, color=INK, linestyle=":", linewidth=1.5)
    curves.text(len(smooth) / 2, least - 0.05, "perfect network, random pairs", fontsize=9, ha="center", va="top")
    curves.set(ylim=(0, 2))
    name_axes(curves, "training step", "loss, mean of 20 steps")
    for panel, (method, of_method) in zip(planes, paths.items(), strict=True):
        frame(panel, words=panel is planes[0])
        draw_lines(panel, torch.stack(list(of_method)), size=8)
        title(panel, f"{NAMES[method]}: bend {found[method]['straightness']:.2f}")
    return save(figure, path, dpi=LESSON_DPI)


def draw_few_steps(x: Tensor, samples: dict[str, dict[int, Tensor]], w2: dict[str, dict[str, float]],
                   path: Path) -> Image.Image:
    """A row for each method, a column for each count of steps, with the W2²; beneath in pale the data. All (N, 2)."""
    figure, planes = plt.subplots(len(samples), len(toy.STEPS_SHOWN), figsize=(9.6, 4.3), layout="constrained")
    for row, (method, of_method) in zip(planes, samples.items(), strict=True):
        for panel, (steps, found) in zip(row, of_method.items(), strict=True):
            frame(panel, words=False, limit=2.4)
            draw_dots(panel, x, PALE, 6, layer=1)
            draw_dots(panel, found, DATA, 3)
            title(panel, f"W2² {w2[method][str(steps)]:.3f}")
            if panel in planes[-1]:
                panel.set_xlabel(counted(steps, "step"))
        row[0].set_ylabel(NAMES[method])
    return save(figure, path, dpi=LESSON_DPI)


def draw_batches(crossing: dict[int, float], of_pool: float, x: Tensor, noises: dict[str, Tensor],
                 path: Path) -> Image.Image:
    """The share of lines that cross by batch size, assigned within each batch, and from the pool; and some lines of
    each, from their noises to x, all (N, 2)."""
    figure, (curves, *planes) = row_of(3)
    curves.plot(list(crossing), [100 * share for share in crossing.values()], **LOOKS["random"],
                label="assigned within the batch")
    curves.plot(list(crossing), [100 * of_pool] * len(crossing), **LOOKS["greedy"], label="pool")
    log_axis(curves, "x", crossing)
    log_axis(curves, "y", (0.5, 1, 2, 5, 10, 20, 50))
    curves.legend(frameon=False, fontsize=9)
    name_axes(curves, "batch size", "pairs of lines that cross, %")
    for panel, (name, noise) in zip(planes, noises.items(), strict=True):
        frame(panel, words=panel is planes[0])
        draw_lines(panel, torch.stack([noise[::20], x[::20]]), size=8)  # from all over the pools, which begin well
        title(panel, name)
    return save(figure, path, dpi=LESSON_DPI)


def draw_dimensions(images: Tensor, distances: dict[str, Tensor], shares: dict[str, dict[int, float]],
                    path: Path) -> Image.Image:
    """Some images (N, 1, H, W); how far all noises are from a sample, (N, M); lengths of lines by match_size, as shares
    of those of random pairs. Both of the plane, then of images."""
    figure, (some, near, curves) = row_of(3)
    spaced = F.pad(images[:36], (1, 1, 1, 1), value=-1)
    tiles = rearrange(spaced, "(row column) 1 h w -> (row h) (column w)", row=6)
    some.imshow(tiles.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    some.axis("off")
    title(some, "samples of 64 numbers")
    for (name, of_all), look in zip(distances.items(), LOOKS.values(), strict=True):
        relative = (of_all / of_all.mean(1, keepdim=True)).flatten()
        near.hist(relative.numpy(), np.linspace(0, 2.5, 76), density=True, histtype="step", color=look["color"],
                  linestyle=look.get("linestyle", "-"), linewidth=1.8, label=name)
    near.legend(frameon=False, fontsize=9)
    name_axes(near, "distance of a noise ÷ mean of all", "density")
    for (name, of_size), look in zip(shares.items(), LOOKS.values(), strict=True):
        curves.plot(list(of_size), [100 * share for share in of_size.values()], **look, label=name)
    log_axis(curves, "x", of_size)
    curves.set(ylim=(0, 105))
    curves.legend(frameon=False, fontsize=9)
    name_axes(curves, "match_size", "mean length, % of random pairs'")
    return save(figure, path, dpi=LESSON_DPI)


def row_of(count: int, height: float = 3.3, **how):
    """A figure of `count` panels as wide as a page; → (figure, panels)."""
    return plt.subplots(1, count, figsize=(9.6, height), layout="constrained", **how)


def row_of_planes(count: int):
    figure, panels = row_of(count, 9.6 / count + 0.2)
    for panel in panels:
        frame(panel, words=panel is panels[0])
    return figure, panels


def frame(panel, words: bool = True, limit: float = 2.7) -> None:
    """Make a panel a plane; the names of its two axes, if `words`, once in a picture is enough."""
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    panel.tick_params(labelsize=8, colors=NOTE, length=2)
    panel.spines[:].set_color(PALE)
    if words:
        panel.set_xlabel("first number", fontsize=9, color=NOTE)
        panel.set_ylabel("second number", fontsize=9, color=NOTE)


def label(panel, text: str, at: Tensor, offset: tuple[float, float]) -> None:
    """Words beside a point, readable over what lies below; the offset in points of type."""
    panel.annotate(text, at.tolist(), offset, textcoords="offset points", fontsize=9, va="center", zorder=5,
                   path_effects=[withStroke(linewidth=2.5, foreground="white")])


def name_axes(panel, x: str, y: str) -> None:
    panel.set(xlabel=x, ylabel=y)
    panel.grid(True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def log_axis(panel, which: str, ticks: Iterable[float]) -> None:
    """Make axis "x" or "y" logarithmic, its ticks plain numbers: 1,000 and not 10³."""
    panel.set(**{f"{which}scale": "log"})
    axis = {"x": panel.xaxis, "y": panel.yaxis}[which]
    axis.set_ticks(list(ticks), [f"{tick:,}" for tick in ticks])
    axis.set_ticks([], minor=True)
