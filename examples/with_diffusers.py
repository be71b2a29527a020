"""The pool in a training by diffusers: its UNet, its schedulers, its pipeline; on the 1,797 digits of scikit-learn.

One line differs from diffusers' own way: the one with "was:" behind it, which says what stood there.

- Latents: give the pool what the noise is added to, after the scaling factor, pool = NoisePool(10_000,
  latents.shape[1:], device=latents.device). It may be kept in bfloat16.
- Batches of one, gradients accumulated: the pool outlives a batch, so each image has all its noises to choose from
  whatever the batch; 64 batches of one get the very noises of one batch of 64. `micro` below is that batch.
- Time: diffusers counts from data (0) to noise (1,000), so what a flow of its kind learns is noise − image. To the
  pool it makes no difference.

    python examples/with_diffusers.py           a rectified flow, half a minute on two cores
    python examples/with_diffusers.py --ddpm    a diffusion, sampled by DDIM's steps. It learns more slowly, from the
                                                pool's pairs later still: judge it after --steps 2000, some minutes
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from dansm.tiny.comparison import MatchSize, Seeds, Steps, Trained, compare, run
from dansm.tiny.digits import load_digits
from diffusers import DDIMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor

from dansm import NoisePool, path_length

BATCH = 32


def make_unet() -> UNet2DModel:
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
                       add_attention=False)


def train(images: Tensor, scheduler, steps: int, match_size: int, seed: int, micro: int = BATCH):
    """Returns the network and the lengths of the paths. images: (N, 1, 8, 8); each of the steps is on BATCH of them,
    `micro` at a time. match_size 1 is a random noise for each image: vanilla training."""
    torch.manual_seed(seed)
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    pool = NoisePool(match_size, images.shape[1:], seed=seed)
    lengths = []
    for _ in range(steps):
        for clean_images in images[torch.randint(len(images), (BATCH,))].split(micro):
            noise = pool(clean_images)  # was: noise = torch.randn_like(clean_images)
            noisy_images, timesteps, target = add_noise(scheduler, clean_images, noise)
            loss = F.mse_loss(unet(noisy_images, timesteps).sample, target)
            (loss * len(clean_images) / BATCH).backward()
            lengths.append(path_length(clean_images, noise))
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval(), lengths


def add_noise(scheduler, clean_images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As diffusers' two kinds of schedulers have it: the noisy images, their timesteps, what the network is to say."""
    drawn = torch.randint(scheduler.config.num_train_timesteps, (len(clean_images),))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        timesteps = scheduler.timesteps[drawn]
        return scheduler.scale_noise(clean_images, timesteps, noise), timesteps, noise - clean_images
    return scheduler.add_noise(clean_images, noise, drawn), drawn, noise


def sample_ddim(unet, scheduler, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 8, 8) by diffusers' pipeline, which makes a DDIM scheduler of the one it is given."""
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=count, num_inference_steps=steps, generator=generator, output_type="np").images
    return torch.from_numpy(drawn).movedim(3, 1) * 2 - 1


@torch.no_grad()
def sample_flow(unet, scheduler, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 8, 8) by diffusers' scheduler, in equal steps: by itself it ends in one of next to nothing."""
    sampler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    sampler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for t in sampler.timesteps:
        x = sampler.step(unet(x, t).sample, t, x).prev_sample
    return x


def main(
    ddpm: Annotated[bool, typer.Option("--ddpm", help="a diffusion that says the noise, in place of a flow")] = False,
    steps: Steps = 160,
    seeds: Seeds = 2,
    match_size: MatchSize = 1000,
    micro: Annotated[int, typer.Option(min=1, help="images at a time; gradients add up to those of a batch")] = BATCH,
) -> list:
    torch.set_num_threads(1)  # to so small a network more are no help, and on a busy machine they wait for each other
    images = load_digits()
    scheduler = DDPMScheduler() if ddpm else FlowMatchEulerDiscreteScheduler()
    sample = sample_ddim if ddpm else sample_flow

    def trained(match_size, seed):
        unet, lengths = train(images, scheduler, steps, match_size, seed, micro)
        return Trained({"path length": fmean(lengths)}, partial(sample, unet, scheduler))

    ways = {"random": partial(trained, 1), f"pool of {match_size:,}": partial(trained, match_size)}
    title = f"{type(scheduler).__name__}, digits, {steps:,} steps of {BATCH}"
    return compare(ways, images, seeds, title, step_counts=(2, 5, 10) if ddpm else (1, 2, 5))


if __name__ == "__main__":
    run(main)
