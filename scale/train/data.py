"""The data that a recipe names."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from rich.progress import track

from ..base.processes import ranks
from ..base.text import console, counted, say
from ..data import loader
from ..data.latents import known_of
from ..model.recipe import Recipe
from .together import first_before_others


def read_data(recipe: Recipe) -> tuple:
    """The recipe's data as `loader.load_images` gives it, and how many files were left out."""
    left_out = []
    downloads = recipe.data == "cifar10"
    with first_before_others() if downloads else nullcontext():
        images = loader.load_images(recipe.data, size=recipe.size or None, skip_unreadable=recipe.skip_unreadable,
                                    cache=Path(recipe.cache) if recipe.cache else None, share=ranks()[1] > 1,
                                    left_out=left_out, track=track_reading)
    if left_out:
        more = ", …" if len(left_out) > 3 else ""
        say(f"left out {len(left_out):,} of {counted(len(images) + len(left_out), 'image')}, not readable:",
            ", ".join(map(str, left_out[:3])) + more)
    kind = "image" if known_of(images) is None else "latent"
    say(f"{counted(len(images), kind)} of {'×'.join(map(str, images.shape[1:]))}")
    if kind == "latent" and recipe.flip:
        say("half of the latents are mirrored: these are not the latents of the mirrored images, which dansm encode",
            "--flips makes")
    return images, len(left_out)


def track_reading(parts: Iterable, total: int) -> Iterable:
    return track(parts, "reading images", total=total, console=console)
