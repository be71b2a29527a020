"""dansm tsne: noises and samples in the plane."""

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from dansm import BadInput

from ..base import files, machine, statistics, text
from ..model.load import load_models
from ..studies.pairs import data_pairs, load_data, own_pairs
from .options import Batch, Device, Labels, Out, Precision, SampleSteps, Seed, Size, command_app

SHUFFLES = 1000  # random pairings of a picture's points, to know how many crossings are usual

app = command_app()


@app.command()
def tsne(
    model: Annotated[Path | None, typer.Argument(
        help="folder of a dansm train, one of its checkpoints, or an export", show_default="matched pairs")] = None,
    data: Annotated[str | None, typer.Option(
        help="images or latents for the random pairs", show_default="the model's samples")] = None,
    size: Size = None,
    pairs: Annotated[int, typer.Option(min=2, help="pairs of noise and sample; the paper shows 20 to 23")] = 23,
    draws: Annotated[int, typer.Option(min=1, help="crossings are counted in all; one near the medians is drawn")] = 10,
    perplexity: Annotated[float, typer.Option(help="of t-SNE, less than twice the pairs; the paper's 22 to 30")] = 22,
    match_size: Annotated[int, typer.Option(min=2, help="noises in the pool, where no model is given")] = 1000,
    steps: SampleSteps = 50,
    names: Labels = None,
    batch: Batch = 64,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("runs/tsne"),
) -> None:
    """Draw noises and samples in the plane: random pairs above, a model's own below (the paper's second foundation).

    The picture kept is the one nearest to the median counts of crossing lines,
    as a single t-SNE may be a tangle. With a model and without --data both halves show the
    model's samples, so that they differ by the lines alone.
    """
    from ..studies import figures

    if not 0 < perplexity < 2 * pairs:
        raise BadInput(f"--perplexity is {perplexity:g} for {pairs} pairs, {2 * pairs} points: expected above 0 and "
                       f"below {2 * pairs}")
    device = machine.pick_device(device)
    loaded = [model.on(device, precision) for model in load_models([model] if model else [], [steps], labels=names)]
    name = f"own pairs of {loaded[0].label}" if loaded else f"matched, match size {match_size:,}"
    if data or not loaded:
        images, _, served = load_data(data, loaded, [] if loaded else [match_size], count=pairs, size=size)
    files.make_folder(out)
    drawn = []
    for number in range(draws):
        if loaded:
            numbers = range(number * pairs, (number + 1) * pairs)
            x, z, _ = own_pairs(loaded[0], numbers, steps, seed=seed, batch=batch, device=device)
        else:
            x, z = data_pairs(images, match_size, pairs, served, seed=seed + number, device=device)
        own = embed(x, z, perplexity, seed + number)
        above, z = own
        if loaded and data:
            x, z = data_pairs(images, 0, pairs, pairs, seed=seed + number, device=device)
            above, z = embed(x, z, perplexity, seed + number)
        shuffled = z[np.random.default_rng([seed + number, 0]).permutation(pairs)]
        halves = {"random pairs": (above, shuffled), name: own}
        drawn.append([{"name": title, "crossings": count_crossings(x, z), "samples": x.tolist(), "noises": z.tolist()}
                      for title, (x, z) in halves.items()])
    middle = np.median([[half["crossings"] for half in panels] for panels in drawn], 0)
    panels = min(drawn, key=lambda panels: abs(np.array([half["crossings"] for half in panels]) - middle).sum())
    for kept, *of_draws in zip(panels, *drawn, strict=True):
        kept["over_draws"] = statistics.mean_and_std([other["crossings"] for other in of_draws])
        kept["by_chance"] = crossings_by_chance(np.array(kept["samples"]), np.array(kept["noises"]), seed)
        text.say(f"{kept['name']}: {kept['crossings']} of {math.comb(pairs, 2)} pairs of lines cross;",
                 "by chance {mean:.1f} ± {std:.1f};".format(**kept["by_chance"]),
                 f"in {text.counted(draws, 'draw')}", "{mean:.2f} ± {std:.2f}".format(**kept["over_draws"]))
    files.write_json(out / "tsne.json", {
        "models": [model.described() for model in loaded], "data": data, "pairs": pairs, "draws": draws,
        "perplexity": perplexity, "steps": steps, "seed": seed, "shuffles": SHUFFLES, "panels": panels,
        "hardware": machine.hardware(device)})
    text.say_files(out, "tsne.json", *figures.draw_tsne(panels, draws, out / "tsne"))


def embed(x: torch.Tensor, z: torch.Tensor, perplexity: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and noises, (N, ...) each, in one t-SNE: (N, 2) and (N, 2)."""
    from sklearn.manifold import TSNE

    both = torch.cat([x.flatten(1), z.flatten(1)]).cpu().float().numpy()
    places = TSNE(2, perplexity=perplexity, random_state=seed, init="pca").fit_transform(both)
    return places[: len(x)], places[len(x) :]


def crossings_by_chance(a: np.ndarray, b: np.ndarray, seed: int) -> dict[str, float]:
    """Mean and standard deviation of the count of crossings over random pairings of the points a with b, (N, 2)."""
    numbers = np.random.default_rng([seed, 1])
    return statistics.mean_and_std([count_crossings(a, b[numbers.permutation(len(b))]) for _ in range(SHUFFLES)])


def count_crossings(a: np.ndarray, b: np.ndarray) -> int:
    """How many pairs of the segments a_i → b_i in the plane, (N, 2) each, cross."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return int(statistics.crossing_lines(a, b).sum()) // 2
