"""The pool in a training by facebookresearch's flow_matching; on the 1,797 digits of scikit-learn.

One line differs from flow_matching's own training; the comment "was:" shows what it replaces. There too t runs from
noise (x_0, at 0) to data (x_1, at 1).

    python examples/with_flow_matching.py        seconds on two cores
"""

import sys
from functools import partial
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare_lengths, run
from dansm.tiny.digits import load_digits

try:
    from flow_matching.path import CondOTProbPath
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


class Velocity(nn.Sequential):
    """(B, 64) at times t: (B,) → (B, 64)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.cat([x, t[:, None]], 1))


def train(images: Tensor, steps: int, match_size: int, seed: int) -> dict:
    """Returns the means of loss and path length. images: (N, 64). match_size 1: random pairs."""
    torch.manual_seed(seed)
    net = Velocity(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    path, pool, losses, lengths = CondOTProbPath(), NoisePool(match_size, (64,), seed=seed), [], []
    for _ in range(steps):
        x_1 = images[torch.randint(len(images), (64,))]
        x_0 = pool(x_1)  # was: x_0 = torch.randn_like(x_1)
        drawn = path.sample(x_0=x_0, x_1=x_1, t=torch.rand(64))
        loss = F.mse_loss(net(drawn.x_t, drawn.t), drawn.dx_t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        lengths.append(path_length(x_1, x_0))
    return {"path length": fmean(lengths), "loss": fmean(losses)}


def main(steps: Steps = 400, seeds: Seeds = 1, match_size: MatchSize = 1000):
    images = load_digits().flatten(1)
    return compare_lengths(partial(train, images, steps), seeds, f"flow_matching, {steps:,} steps", match_size)


if __name__ == "__main__":
    run(main)
