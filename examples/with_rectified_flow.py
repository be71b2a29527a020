"""The pool in a training by lucidrains' rectified-flow-pytorch; on the 1,797 digits of scikit-learn.

One line differs from its own training: the comment "was:" shows what RectifiedFlow draws if it is called without
`noise=`. It takes images of 0 to 1 and normalises them itself: the pool is given what `data_normalize_fn` makes of
them, as they are trained on. Leave `immiscible=False`, which would assign the noises of each batch once more.

    python examples/with_rectified_flow.py        seconds on two cores
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
    from rectified_flow_pytorch import RectifiedFlow, Unet
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


def train(images: Tensor, steps: int, match_size: int, seed: int) -> dict:
    """Returns the means of loss and path length. images: (N, 1, 8, 8) in [0, 1]. match_size 1: random pairs."""
    torch.manual_seed(seed)
    flow = RectifiedFlow(Unet(dim=8, dim_mults=(1, 2), channels=1, attn_dim_head=8, attn_heads=2))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    pool, losses, lengths = NoisePool(match_size, images.shape[1:], seed=seed), [], []
    for _ in range(steps):
        data = images[torch.randint(len(images), (32,))]
        normalized = flow.data_normalize_fn(data)
        noise = pool(normalized)  # was: noise = torch.randn_like(normalized)
        loss = flow(data, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        lengths.append(path_length(normalized, noise))
    return {"path length": fmean(lengths), "loss": fmean(losses)}


def main(steps: Steps = 60, seeds: Seeds = 1, match_size: MatchSize = 1000):
    images = (load_digits() + 1) / 2
    return compare_lengths(partial(train, images, steps), seeds, f"RectifiedFlow, {steps:,} steps", match_size)


if __name__ == "__main__":
    run(main)
