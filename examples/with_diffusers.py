"""The pool in a training by diffusers: its UNet, its schedulers, its pipeline; on the 1,797 digits of scikit-learn.

One line differs from diffusers' own training; the comment "was:" shows what it replaces.

- Latents: give the pool what the noise is added to, after the scaling factor, pool = NoisePool(10_000,
  latents.shape[1:], device=latents.device). It may be kept in bfloat16.
- Batches of one with gradient accumulation: the pool outlives a batch, so each image chooses among all its noises at
  any batch size; 64 batches of one get the very noises of one batch of 64. `micro` below is that batch size.
- Classes: a network that is given labels needs a pool for each class, NoisePool(…, groups=CLASSES), and the pool is
  given the labels too (docs/conditions.md). Without classes both are None.
- Time: diffusers counts from data (0) to noise (1,000), so its flows learn noise − image. The pool is the same.

    python examples/with_diffusers.py              a rectified flow, half a minute on two cores
    python examples/with_diffusers.py --classes    one that draws by class
    python examples/with_diffusers.py --ddpm       a diffusion, sampled by DDIM. It learns more slowly, and from matched
                                                   pairs most slowly: use --steps 2000, a few minutes
"""

import sys
from functools import partial
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from sklearn import datasets
from torch import Tensor

from dansm import BadInput, NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare, run
from dansm.tiny.digits import load_digits

try:
    from diffusers import DDIMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")

BATCH = 32
CLASSES = 10


def train(images: Tensor, scheduler, steps: int, match_size: int, seed: int, micro: int = BATCH,
          labels: Tensor | None = None):
    """Train on BATCH images a step, `micro` at a time. images: (N, 1, 8, 8), labels: (N,) for a network of classes.
    Returns the network and the mean length of the paths. match_size 1: random pairs."""
    torch.manual_seed(seed)
    classes = None if labels is None else CLASSES
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
                       add_attention=False, num_class_embeds=classes)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    pool = NoisePool(match_size, images.shape[1:], seed=seed, groups=classes)
    lengths = []
    for _ in range(steps):
        for rows in torch.randint(len(images), (BATCH,)).split(micro):
            clean_images = images[rows]
            class_labels = None if labels is None else labels[rows]
            noise = pool(clean_images, class_labels)  # was: noise = torch.randn_like(clean_images)
            noisy_images, timesteps, target = add_noise(scheduler, clean_images, noise)
            loss = F.mse_loss(unet(noisy_images, timesteps, class_labels).sample, target)
            (loss * len(clean_images) / BATCH).backward()
            lengths.append(path_length(clean_images, noise))
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval(), fmean(lengths)


def add_noise(scheduler, clean_images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The noisy images, their timesteps and what the network is to predict, for diffusers' two kinds of schedulers."""
    drawn = torch.randint(scheduler.config.num_train_timesteps, (len(clean_images),))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        timesteps = scheduler.timesteps[drawn]
        return scheduler.scale_noise(clean_images, timesteps, noise), timesteps, noise - clean_images
    return scheduler.add_noise(clean_images, noise, drawn), drawn, noise


def sample_ddim(unet: UNet2DModel, scheduler, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 8, 8) by diffusers' pipeline, which makes a DDIM scheduler of the one it is given."""
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=count, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(drawn).movedim(3, 1) * 2 - 1


@torch.no_grad()
def sample_flow(unet: UNet2DModel, scheduler, count: int, steps: int, generator: torch.Generator,
                class_labels: Tensor | None = None) -> Tensor:
    """(count, 1, 8, 8) by diffusers' scheduler, in equal steps: its own last step would have almost no length."""
    sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    sampler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for t in sampler.timesteps:
        x = sampler.step(unet(x, t, class_labels).sample, t, x).prev_sample
    return x


def sample_by_class(unet: UNet2DModel, scheduler, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 64 + CLASSES) of all classes in turn, see `beside_labels`."""
    class_labels = torch.arange(count) % CLASSES
    return beside_labels(sample_flow(unet, scheduler, count, steps, generator, class_labels), class_labels)


def beside_labels(images: Tensor, labels: Tensor) -> Tensor:
    """Pixels and classes together, whose Fréchet distance tells if an image is of its class. → (N, 64 + CLASSES)"""
    return torch.cat([images.flatten(1), F.one_hot(labels, CLASSES)], 1)


def main(
    ddpm: Annotated[bool, typer.Option("--ddpm", help="a diffusion that predicts the noise, not a flow")] = False,
    classes: Annotated[bool, typer.Option("--classes", help="a flow that is given the digit to draw")] = False,
    steps: Steps = 160,
    seeds: Seeds = 2,
    match_size: MatchSize = 1000,
    micro: Annotated[int, typer.Option(min=1, help="images at a time; gradients add up to those of a batch")] = BATCH,
):
    if ddpm and classes:
        raise BadInput("--ddpm and --classes are given: expected one of them, as DDIMPipeline draws without classes")
    images = load_digits()
    labels = torch.from_numpy(datasets.load_digits().target).long() if classes else None
    scheduler = DDPMScheduler() if ddpm else FlowMatchEulerDiscreteScheduler()
    sample = sample_ddim if ddpm else sample_flow
    title = f"{type(scheduler).__name__}, digits, {steps:,} steps of {BATCH}"

    def trained(match_size, seed):
        unet, length = train(images, scheduler, steps, match_size, seed, micro, labels)
        return {"path length": length}, partial(sample, unet, scheduler)

    ways = {"random": partial(trained, 1), f"pool of {match_size:,}": partial(trained, match_size)}
    if classes:
        sample = sample_by_class
        each = max(2, match_size // CLASSES)
        ways = {"random": partial(trained, 1), f"pool of {each:,} for each class": partial(trained, each)}
        return compare(ways, beside_labels(images, labels), seeds, f"{title}, by class", step_counts=(1, 2, 5))
    return compare(ways, images, seeds, title, step_counts=(2, 5, 10) if ddpm else (1, 2, 5))


if __name__ == "__main__":
    run(main)
