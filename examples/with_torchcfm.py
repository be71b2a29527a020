"""The pool in a training by torchcfm: its flow matchers, its network; on the 1,797 digits of scikit-learn.

One line differs from torchcfm's own training; the comment "was:" shows what it replaces. In torchcfm too t runs from
noise (x0, at 0) to data (x1, at 1).

The pool replaces the optimal transport within a batch: use it with the plain ConditionalFlowMatcher. A plan of
ExactOptimalTransportConditionalFlowMatcher sees the noises of one batch only, so a batch of one, all that fits where
samples are large, leaves nothing to plan; a pool's noises outlive the batch. Pairs are drawn from a plan with
replacement, so some samples of a batch come twice and others not at all; a pool hands out each noise once.

    python examples/with_torchcfm.py        half a minute on two cores
"""

import sys
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from dansm import NoisePool
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare, run
from dansm.tiny.digits import load_digits

try:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models import MLP
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")

BATCH = 64


def draw_paths(matcher: ConditionalFlowMatcher, pool: NoisePool, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times t: (B,), the places xt: (B, D) on the paths to x1: (B, D), and the velocities ut: (B, D) there."""
    x0 = pool(x1)  # was: x0 = torch.randn_like(x1)
    return matcher.sample_location_and_conditional_flow(x0, x1)


def train(images: Tensor, matcher, steps: int, match_size: int, seed: int) -> tuple[MLP, float]:
    """Returns the network and the mean length of the paths. images: (N, D). match_size 1: random pairs."""
    set_seed(seed)
    net = MLP(dim=images.shape[1], w=256, time_varying=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    pool = NoisePool(match_size, images.shape[1:], seed=seed)
    lengths = []
    for _ in range(steps):
        t, xt, ut = draw_paths(matcher, pool, images[torch.randint(len(images), (BATCH,))])
        vt = net(torch.cat([xt, t[:, None]], 1))
        loss = (vt - ut).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths.append(length(ut))
    return net, fmean(lengths)


def length_in_batches_of_one(images: Tensor, matcher, match_size: int, seed: int, count: int) -> float:
    """Mean length of `count` paths drawn one at a time, over whole pools: the first of a pool are short."""
    set_seed(seed)
    pool = NoisePool(match_size, images.shape[1:], seed=seed)
    drawn = images[torch.randint(len(images), (count,))]
    return fmean(length(draw_paths(matcher, pool, x1)[2]) for x1 in drawn.split(1))


def length(ut: Tensor) -> float:
    """Mean length of straight paths: their velocity is constant."""
    return ut.norm(dim=1).mean().item()


def set_seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # numpy draws from an optimal transport plan


@torch.no_grad()
def sample(net: MLP, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, D) by Euler's steps from noise (t = 0) to data (t = 1)."""
    x = torch.randn(count, net.net[-1].out_features, generator=generator)
    for step in range(steps):
        x = x + net(torch.cat([x, torch.full((count, 1), step / steps)], 1)) / steps
    return x


def main(steps: Steps = 800, seeds: Seeds = 2, match_size: MatchSize = 1000):
    images = load_digits().flatten(1)

    def trained(matcher, size, seed):
        net, together = train(images, matcher, steps, size, seed)
        alone = length_in_batches_of_one(images, matcher, size, seed, 2 * match_size)
        return {f"path, batch {BATCH}": together, "path, batch 1": alone}, partial(sample, net)

    ways = {"random": partial(trained, ConditionalFlowMatcher(), 1),
            "batch OT": partial(trained, ExactOptimalTransportConditionalFlowMatcher(), 1),
            f"pool of {match_size:,}": partial(trained, ConditionalFlowMatcher(), match_size)}
    return compare(ways, images, seeds, f"Digits, {steps:,} steps of {BATCH}", step_counts=(1, 2, 5))


if __name__ == "__main__":
    run(main)
