"""The pool in a training by lucidrains' denoising-diffusion-pytorch; on the 1,797 digits of scikit-learn.

One line differs from its own training: the comment "was:" shows what GaussianDiffusion draws if it is called without
`noise=`. It takes images of 0 to 1 and normalises them itself: the pool is given what `normalize` makes of them.

Leave `immiscible=False`. In version 2.3.4 that option assigns the noises that are added to the images, but the target
keeps their order of before: a network that predicts the noise in its input exactly has a loss of 1.9 (without: 0). The
pool gives each image its noise before the diffusion sees either, so input and target agree.

    python examples/with_denoising_diffusion.py        seconds on two cores
"""

import sys
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare_lengths, run
from dansm.tiny.digits import load_digits

try:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


def train(images: Tensor, steps: int, match_size: int, seed: int) -> dict:
    """Returns the means of loss and path length. images: (N, 1, 8, 8) in [0, 1]. match_size 1: random pairs."""
    torch.manual_seed(seed)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=2)
    diffusion = GaussianDiffusion(unet, image_size=8, objective="pred_noise")
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3)
    pool, losses, lengths = NoisePool(match_size, images.shape[1:], seed=seed), [], []
    for _ in range(steps):
        img = images[torch.randint(len(images), (32,))]
        normalized = diffusion.normalize(img)
        noise = pool(normalized)  # was: noise = torch.randn_like(normalized)
        loss = diffusion(img, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        lengths.append(path_length(normalized, noise))
    return {"path length": fmean(lengths), "loss": fmean(losses)}


def main(steps: Steps = 60, seeds: Seeds = 1, match_size: MatchSize = 1000):
    images = (load_digits() + 1) / 2
    return compare_lengths(partial(train, images, steps), seeds, f"GaussianDiffusion, {steps:,} steps", match_size)


if __name__ == "__main__":
    run(main)
