"""The pictures of toy, digits and lesson: noise is soft blue, data a warm red, a line goes from one to the other."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, hsv_to_rgb
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from dansm.scale.base.colours import DATA, INK, NOISE, NOTE, OPTIMAL, PALE
from dansm.scale.base.statistics import mean_and_std

FROM_NOISE_TO_DATA = LinearSegmentedColormap.from_list("flow", [NOISE, "#d98e6a", DATA])

plt.switch_backend("Agg")  # files only, so that no screen is needed
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.titlesize": 11,
                     "axes.titlepad": 4, "legend.frameon": False, "legend.fontsize": 9})


def draw_planes(planes: dict[str, tuple[Tensor, str]], path: Path) -> None:
    """A row of planes by title: (paths (steps + 1, N, 2), note below)."""
    figure, panels = make_panels(1, len(planes))
    for panel, (name, (lines, text)) in zip(panels[0], planes.items(), strict=True):
        draw_lines(panel, lines, name)
        note(panel, text)
    save(figure, path)


def draw_samples(grid: dict[str, dict[str, tuple[Tensor, Tensor, str]]], path: Path) -> Image.Image:
    """A grid of (target, samples, note below) by the names of its rows and columns: samples over the pale target."""
    figure, panels = make_panels(len(grid), len(next(iter(grid.values()))), side=2, limit=2.35)
    for row, (name, columns) in zip(panels, grid.items(), strict=True):
        row[0].text(-0.1, 0.5, name.replace(", ", "\n"), transform=row[0].transAxes, rotation=90, ha="center",
                    va="center", fontsize=10)
        for panel, (target, samples, text) in zip(row, columns.values(), strict=True):
            draw_dots(panel, target, PALE, 4)
            draw_dots(panel, samples, DATA, 1.2, alpha=0.6)
            note(panel, text)
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(name)
    return save(figure, path)


def draw_flow(target: Tensor, movies: dict[str, dict[int, tuple[Tensor, str]]], path: Path, frames: int = 24) -> None:
    """A moving picture, a panel for each title: (states (steps + 1, N, 2), note at the end) by steps, one by one."""
    figure, panels = make_panels(1, len(movies), side=3.2)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.07, top=0.9, wspace=0.02)
    moving = []
    for panel, (name, movie) in zip(panels[0], movies.items(), strict=True):
        draw_dots(panel, target, PALE, 5)
        panel.set_title(name)
        trails = panel.add_collection(LineCollection([], colors=DATA, linewidths=0.6, alpha=0.35))
        moving.append((movie, trails, draw_dots(panel, target, DATA, 3), note(panel, "")))
    counts, images = list(movie), []
    for steps in counts:
        for frame in range(frames + 1):
            for movie, trails, dots, text in moving:
                states, end = movie[steps]
                states = F.interpolate(states.cpu().permute(1, 2, 0), frames + 1, mode="linear", align_corners=True)
                states = states.permute(2, 0, 1).numpy()  # (frames + 1, N, 2), at equal times
                trails.set_segments(states[max(0, frame - 6) : frame + 1].swapaxes(0, 1) if frame else [])
                dots.set_offsets(states[frame])
                dots.set_color(FROM_NOISE_TO_DATA(frame / frames))
                text.set_text(f"{steps} steps{end}" if frame == frames else f"{steps} steps")
            images.append(to_image(figure, dpi=100))
    plt.close(figure)
    durations = [700, *[70] * (frames - 1), 2600] * len(counts)  # milliseconds
    some = Image.fromarray(np.vstack([np.asarray(image) for image in images[::4]]))
    colours = some.quantize(64, Image.Quantize.MAXCOVERAGE)  # one palette for all frames, or the ground would flicker
    images = [image.quantize(palette=colours, dither=Image.Dither.NONE) for image in images]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def draw_cells(x: Tensor, potentials: dict[str, Tensor], z: Tensor, path: Path) -> Image.Image:
    """The plane of noises in the colours of the samples that take them, x: (n, 2), by the name of potentials (n,); the
    least and the largest share that a sample gets of the noises z: (N, 2), and lines from some of these."""
    figure, planes = page_row(0, len(potentials))
    ticks = torch.linspace(-2.7, 2.7, 541)
    noises = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), 2)  # (height, width, 2)
    pale, strong = colours_by_direction(x, 0.4, 0.93), colours_by_direction(x, 0.9, 0.72)
    for panel, (name, b) in zip(planes, potentials.items(), strict=True):
        cells, taken = ((noise @ x.T - b).argmax(-1) for noise in (noises, z))
        edges = (cells[1:, 1:] != cells[:-1, 1:]) | (cells[1:, 1:] != cells[1:, :-1])
        panel.imshow(np.where(edges[:, :, None], 1, pale[cells[1:, 1:]]), origin="lower", extent=(-2.7, 2.7, -2.7, 2.7))
        shares = taken.bincount(minlength=len(x)) / len(z)
        lines = torch.stack([z[:10], x[taken[:10]]])
        draw_lines(panel, lines, f"potentials: {name}\nshares: {shares.min():.1%} to {shares.max():.1%}", 16, 1.2)
        panel.scatter(*z[:10].T.numpy(), s=16, c=NOISE, edgecolors=INK, linewidths=0.6, zorder=4)
        panel.scatter(*x.T.numpy(), s=20, c=strong, edgecolors="white", linewidths=0.7, zorder=4)
    return save(figure, path, LESSON_DPI)


def colours_by_direction(x: Tensor, saturation: float, value: float) -> np.ndarray:
    """A colour for each point of x: (n, 2) → (n, 3): the hue is its direction from the centre, paler near to it."""
    hue = torch.atan2(x[:, 1], x[:, 0]) / (2 * np.pi) % 1
    far = x.norm(dim=1) / x.norm(dim=1).max()
    return hsv_to_rgb(torch.stack([hue, saturation * (0.3 + 0.7 * far), torch.full_like(hue, value)], 1))


CLASSES = DATA, "#1f6f8b"
LOOKS_OF_WAYS = (dict(color=NOISE, marker="o", linestyle="--"), dict(color=INK, marker="X"),
                 dict(color=DATA, marker="s"), dict(color=OPTIMAL, marker="^", linestyle=":"))


def draw_conditions(shown: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]], rows: list[dict], path: Path) -> None:
    """A column for each way: above the noises (N, 2) that the classes (N,) get, below samples (M, 2) by theirs (M,);
    beside them W2² by steps, rows {"way", "class_told", "w2_…_steps"} of all seeds."""
    columns = range(len(shown))
    layout = [[*[f"{kind} {column}" for column in columns], ".", "chart"] for kind in ("noises", "samples")]
    widths = [*[1 for _ in columns], 0.4, 1.6]
    figure, panels = plt.subplot_mosaic(layout, figsize=(13, 4.5), width_ratios=widths)
    figure.subplots_adjust(wspace=0.04, hspace=0.18)
    lines = {way: [row for row in rows if row["way"] == way] for way in shown}
    for column, (way, (z, of_noise, x, of_sample)) in enumerate(shown.items()):
        told = fmean(row["class_told"] for row in lines[way])
        w2 = fmean(row["w2_50_steps"] for row in lines[way])
        for kind, points, labels, text in (("noises", z, of_noise, f"class told: {told:.0%}"),
                                           ("samples", x, of_sample, f"W2² of a class: {w2:.3f}")):
            panel = panels[f"{kind} {column}"]
            panel.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal")
            panel.axis("off")
            colours = np.array(CLASSES)[labels.cpu().numpy()]
            panel.scatter(*points.cpu().numpy().T, s=3, c=colours, alpha=0.7, linewidths=0)
            note(panel, text)
        panels[f"noises {column}"].set_title(way, fontsize=10)
    for kind, text in (("noises", "noises in training"), ("samples", "samples in 50 steps")):
        panels[f"{kind} 0"].text(-0.03, 0.5, text, transform=panels[f"{kind} 0"].transAxes, rotation=90, ha="right",
                                 va="center")
    curves = panels["chart"]
    steps = [int(column.split("_")[1]) for column in rows[0] if column.endswith("_steps")]
    for (way, same), look in zip(lines.items(), LOOKS_OF_WAYS, strict=True):
        spreads = [mean_and_std([row[f"w2_{count}_steps"] for row in same]) for count in steps]
        curves.errorbar(steps, [value["mean"] for value in spreads], [value["std"] for value in spreads],
                        **look, markersize=4, capsize=2, label=way)
    floor = fmean(row["w2_floor"] for row in rows)
    curves.axhline(floor, color=INK, linestyle=":", linewidth=1)
    curves.text(1, floor * 0.95, "other points of the data", fontsize=8.5, va="top")
    name_axes(curves, "sampling steps", "W2² of a class to its data", steps, (0.01, 0.03, 0.1, 0.3, 1))
    curves.legend(loc="center right", bbox_to_anchor=(1.04, 0.72), fontsize=8)
    save(figure, path)


# ------------ The lesson ----------------------------------------------------------------------------------------------
# Its pictures go into a notebook too, which shows what a function returns.

LESSON_DPI = 110  # a notebook holds its pictures
NAMES = {"random": "random pairs", "greedy": "matched pairs"}
LOOKS = {"random": dict(color="#75869b", marker="o", linestyle="--"), "greedy": dict(color=DATA, marker="s")}


def draw_lines_that_cross(x: Tensor, z: Tensor, path: Path) -> Image.Image:
    """All points; one line with the times along it; sixty lines. x, z: (N, 2), paired at random."""
    figure, (clouds, line, lines) = page_row(0, 3)
    draw_dots(clouds, z, NOISE, 6)
    draw_dots(clouds, x, DATA, 6)
    clouds.set_title("noise z (pale), data x (dark)")
    draw_dots(line, x, PALE, 6, layer=1)
    ends = torch.tensor([[[-1.9, -1.9]], [[0.35, 1.15]]])
    draw_lines(line, ends, "one line: x_t = t·x + (1 − t)·z", size=45, width=2)
    for t in (0, 0.25, 0.5, 0.75, 1):
        x_t = torch.lerp(*ends[:, 0], t)
        if 0 < t < 1:
            draw_dots(line, x_t[None], INK, 18)
        label(line, f"t = {t:g}", x_t, (8, -7))
    draw_lines(lines, torch.stack([z[:60], x[:60]]), "sixty lines, paired at random", size=12, width=0.8)
    return save(figure, path, LESSON_DPI)


def draw_average(x: Tensor, one_step: Tensor, bent: Iterable[Tensor], w2: dict[int, float], path: Path) -> Image.Image:
    """Two lines that meet; where the perfect network for random pairs ends in one step, and its paths. All (N, 2)."""
    figure, (meeting, one, many) = page_row(0, 3)
    for panel in (meeting, one, many):
        draw_dots(panel, x, PALE, 6, layer=1)
    ends = torch.tensor([[[-1.1, -1.24], [-2.3, 1.6]], [[-0.3, 1.44], [0.9, -1.4]]])
    middle, mean = ends.mean((0, 1)), ends[1].mean(0)
    draw_lines(meeting, ends, "two lines meet at t = ½", size=45, width=2)
    draw_dots(meeting, middle[None], INK, 30)
    arrow = dict(arrowstyle="-|>", color=INK, linewidth=2, shrinkA=0, shrinkB=0)
    meeting.annotate("", mean.tolist(), middle.tolist(), arrowprops=arrow)
    label(meeting, "the average", mean, (6, 0))
    draw_dots(one, one_step, INK, 14)
    label(one, "every noise\nends here", one_step.mean(0), (8, 0))
    one.set_title(f"perfect network, 1 step: W2² {w2[1]:.3f}")
    bent = torch.stack(list(bent))
    draw_lines(many, bent, f"{len(bent) - 1} steps: W2² {w2[len(bent) - 1]:.3f}", size=8)
    return save(figure, path, LESSON_DPI)


def draw_pool(data: Tensor, x: Tensor, z: Tensor, moments: Sequence[int], path: Path) -> Image.Image:
    """A whole pool in the order served, x, z: (N, 2); a plane for each count of samples served, over the pale data."""
    figure, planes = page_row(0, len(moments))
    for panel, served in zip(planes, moments, strict=True):
        draw_dots(panel, data, PALE, 3, alpha=0.6, layer=1)
        title = f"{served} served, {len(z) - served} left"
        draw_lines(panel, torch.stack([z[:served], x[:served]]), title, size=26, width=1.8)
        panel.scatter(*z[served:].numpy().T, s=26, facecolors="white", edgecolors=NOISE, linewidths=1.5, zorder=3)
        for number, place in enumerate(x[:served], 1):
            label(panel, str(number), place, (5, 5))
    return save(figure, path, LESSON_DPI)


def draw_prior(x: Tensor, noises: dict[str, Tensor], match_size: int, batch: int, path: Path) -> Image.Image:
    """Lengths of the lines from the first of the noises, a pool's, to x in the order served; of all noises. (N, 2)."""
    figure, (order, prior) = page_row(2, width_ratios=(1.25, 1))
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
    name_axes(order, f"samples served (stripes: batches of {batch})", "length of the line")
    order.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none", markerscale=2)
    bins = np.linspace(0, 4, 41)
    looks = dict(color=NOISE, alpha=0.7), dict(color=DATA, histtype="step", linewidth=1.8)
    for (name, noise), look in zip(noises.items(), looks, strict=True):
        prior.hist(noise.norm(dim=1).numpy(), bins, density=True, label=name, **look)
    prior.plot(bins, bins * np.exp(-(bins**2) / 2), color=INK, linestyle="--", label="N(0, I)")  # its density in 2D
    name_axes(prior, "length of the noises used, ‖z‖", "density")
    return save(figure, path, LESSON_DPI)


def draw_match_sizes(measured: dict[int, dict[str, float]], shortest: float, path: Path) -> Image.Image:
    """What `toy.measure_pairs` returns for each match_size; the mean length of the best pairing."""
    figure, (crossing, lengths) = page_row(2)
    sizes = (1, 10, 100, 1000, 10_000)
    crossing.plot(list(measured), [100 * found["crossing"] for found in measured.values()], **LOOKS["greedy"])
    name_axes(crossing, "match_size", "pairs of lines that cross, %", sizes, (0.5, 1, 2, 5, 10, 20))
    for key, name, look in (("inter_path_mean", "between two lines where they are nearest", "random"),
                            ("path_length", "from end to end of a line", "greedy")):
        lengths.plot(list(measured), [found[key] for found in measured.values()], **LOOKS[look], label=name)
    lengths.axhline(shortest, color=INK, linestyle=":", linewidth=1.5)
    lengths.text(1, shortest - 0.05, "from end to end, best pairing", fontsize=9, va="top")
    lengths.set(ylim=(0, 2.2))
    name_axes(lengths, "match_size", "mean distance", sizes)
    return save(figure, path, LESSON_DPI)


def draw_trainings(losses: dict[str, list], least: float, paths: dict[str, Iterable[Tensor]],
                   found: dict[str, dict], path: Path) -> Image.Image:
    """The losses of both trainings, the least that random pairs allow; the paths learned, (N, 2) a step, their bend."""
    figure, (curves, *planes) = page_row(1, 2)
    for method, of_method in losses.items():
        smooth = torch.stack(list(of_method)).unfold(0, 20, 1).mean(1)
        curves.plot(torch.arange(len(smooth)) + 10, smooth, color=LOOKS[method]["color"])
        curves.text(len(smooth) / 2, smooth[len(smooth) // 2].item() + 0.1, NAMES[method], fontsize=9, ha="center")
    curves.axhline(least, color=INK, linestyle=":", linewidth=1.5)
    curves.text(len(smooth) / 2, least - 0.05, "perfect network, random pairs", fontsize=9, ha="center", va="top")
    curves.set(ylim=(0, 2))
    name_axes(curves, "training step", "loss, mean of 20 steps")
    for panel, (method, states) in zip(planes, paths.items(), strict=True):
        title = f"{NAMES[method]}: bend {found[method]['straightness']:.2f}"
        draw_lines(panel, torch.stack(list(states)), title, size=8)
    return save(figure, path, LESSON_DPI)


def draw_batches(crossing: dict[int, float], of_pool: float, x: Tensor, noises: dict[str, Tensor],
                 path: Path) -> Image.Image:
    """Share of lines that cross by batch size, assigned within it, and from the pool; some lines. x, noises: (N, 2)."""
    figure, (curves, *planes) = page_row(1, 2)
    curves.plot(list(crossing), [100 * share for share in crossing.values()], **LOOKS["random"],
                label="assigned within the batch")
    curves.plot(list(crossing), [100 * of_pool] * len(crossing), **LOOKS["greedy"], label="pool")
    name_axes(curves, "batch size", "pairs of lines that cross, %", crossing, (0.5, 1, 2, 5, 10, 20, 50))
    for panel, (name, noise) in zip(planes, noises.items(), strict=True):
        draw_lines(panel, torch.stack([noise[::20], x[::20]]), name, size=8)  # from all over, as pools begin well
    return save(figure, path, LESSON_DPI)


def draw_dimensions(images: Tensor, distances: dict[str, Tensor], shares: dict[str, dict[int, float]],
                    path: Path) -> Image.Image:
    """Images (N, 1, H, W); all noises' distances from samples (N, M), and lengths as shares of random pairs', by space.
    """
    figure, (some, near, curves) = page_row(3)
    show_images(some, images[:36], rows=6)
    some.set_title("samples of 64 numbers")
    for (name, of_all), look in zip(distances.items(), LOOKS.values(), strict=True):
        relative = (of_all / of_all.mean(1, keepdim=True)).flatten()
        near.hist(relative.numpy(), np.linspace(0, 2.5, 76), density=True, histtype="step", color=look["color"],
                  linestyle=look.get("linestyle", "-"), linewidth=1.8, label=name)
    name_axes(near, "distance of a noise ÷ mean of all", "density")
    for (name, of_size), look in zip(shares.items(), LOOKS.values(), strict=True):
        curves.plot(list(of_size), [100 * share for share in of_size.values()], **look, label=name)
    curves.set(ylim=(0, 105))
    name_axes(curves, "match_size", "mean length, % of random pairs'", of_size)
    return save(figure, path, LESSON_DPI)


# ------------ What all share ------------------------------------------------------------------------------------------


def make_panels(rows: int, columns: int, side: float = 2.6, limit: float = 2.7):
    """A figure of square panels without axes, `side` inches each; → (figure, panels[row, column])."""
    figure, panels = plt.subplots(rows, columns, figsize=(side * columns, side * rows), squeeze=False)
    figure.subplots_adjust(wspace=0.03, hspace=0.12)
    for panel in panels.flat:
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        panel.axis("off")
    return figure, panels


def page_row(charts: int, planes: int = 0, **settings):
    """A figure as wide as a page, a row of charts and then of planes with frames and numbers; → (figure, panels)."""
    height = 3.3 if charts else 9.6 / planes + 0.2
    figure, panels = plt.subplots(1, charts + planes, figsize=(9.6, height), layout="constrained", **settings)
    for panel in panels[charts:]:
        panel.set(xlim=(-2.7, 2.7), ylim=(-2.7, 2.7), aspect="equal", xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        panel.tick_params(labelsize=8, colors=NOTE, length=2)
        panel.spines[:].set_color(PALE)
    if planes:  # named once, which is enough
        panels[charts].set_xlabel("first number", fontsize=9, color=NOTE)
        panels[charts].set_ylabel("second number", fontsize=9, color=NOTE)
    return figure, panels


def save(figure, path: Path, dpi: int = 150) -> Image.Image:
    """Save a PNG of 128 colours: a third of the size, and to the eye the same."""
    image = to_image(figure, dpi=dpi, bbox_inches="tight", pad_inches=0.08).quantize(128)
    image.save(path, optimize=True)
    plt.close(figure)
    return image


def to_image(figure, **settings) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 0}, **settings)  # read again at once
    return Image.open(buffer).convert("RGB")


def draw_lines(panel, path: Tensor, title: str, size: float = 4, width: float = 0.6) -> None:
    """Lines from dot to dot, coloured by time. path: (steps + 1, N, 2)."""
    if len(path) == 2:  # a straight line in pieces, for the sake of its colours
        path = torch.lerp(path[0], path[1], torch.linspace(0, 1, 21, device=path.device)[:, None, None])
    pieces = torch.stack([path[:-1], path[1:]], 2).cpu().numpy()  # (steps, N, 2 ends, 2)
    times = np.repeat(np.linspace(0, 1, len(pieces)), pieces.shape[1])
    draw_dots(panel, path[0], NOISE, size)
    panel.add_collection(LineCollection(pieces.reshape(-1, 2, 2), colors=FROM_NOISE_TO_DATA(times), linewidths=width))
    draw_dots(panel, path[-1], DATA, size)
    panel.set_title(title)


def draw_dots(panel, x: Tensor, color: str, size: float, alpha: float = 1.0, layer: float = 3):
    return panel.scatter(*x.cpu().numpy().T, s=size, color=color, alpha=alpha, linewidths=0, zorder=layer)


def note(panel, text: str):
    return panel.text(0.5, 0.0, text, transform=panel.transAxes, ha="center", va="top", fontsize=9.5, color=NOTE)


def label(panel, text: str, at: Tensor, offset: tuple[float, float]) -> None:
    """Text next to a point, readable over what lies below; the offset in points of type."""
    panel.annotate(text, at.tolist(), offset, textcoords="offset points", fontsize=9, va="center", zorder=5,
                   path_effects=[withStroke(linewidth=2.5, foreground="white")])


def show_images(panel, images: Tensor, rows: int) -> None:
    """Show images (N, 1, H, W) in [−1, 1] as tiles, dark on light."""
    spaced = F.pad(images.cpu(), (1, 1, 1, 1), value=-1)
    tiles = rearrange(spaced, "(row column) 1 h w -> (row h) (column w)", row=rows)
    panel.imshow(tiles.numpy(), cmap="gray_r", vmin=-1, vmax=1)
    panel.axis("off")


def name_axes(panel, x: str, y: str, x_ticks: Iterable[float] = (), y_ticks: Iterable[float] = ()) -> None:
    """Name the axes and the labelled curves of a chart. An axis with ticks becomes logarithmic: 1,000 and not 10³."""
    panel.set(xlabel=x, ylabel=y)
    for axis, ticks in (panel.xaxis, list(x_ticks)), (panel.yaxis, list(y_ticks)):
        if ticks:
            panel.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
            axis.set_ticks([], minor=True)
    panel.grid(True, alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend()
