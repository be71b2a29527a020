"""The pool in a training by torchcfm: its flow matchers, its network; on the 1,797 digits of scikit-learn.

The comment "was:" shows what the one line replaces. The pool replaces the optimal transport within a batch.

    python examples/with_torchcfm.py        half a minute on two cores
"""

import sys
from functools import partial
from statistics import fmean

import numpy as np
import torch

from dansm import NoisePool
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare, run
from dansm.tiny.digits import load_digits

try:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models import MLP
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


def train(images: torch.Tensor, matcher, steps: int, match_size: int, seed: int) -> tuple[dict, partial]:
    """Returns the mean length of the paths, and what draws samples. images: (N, D). match_size 1: random pairs."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # of the optimal transport's draws
    net = MLP(dim=images.shape[1], w=256, time_varying=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    pool, lengths = NoisePool(match_size, images.shape[1:], seed=seed), []
    for x1 in (images[torch.randint(len(images), (64,))] for _ in range(steps)):
        x0 = pool(x1)  # was: x0 = torch.randn_like(x1)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        optimizer.zero_grad()
        (net(torch.cat([xt, t[:, None]], 1)) - ut).square().mean().backward()
        optimizer.step()
        lengths.append(ut.norm(dim=1).mean().item())  # straight paths: the velocity is x1 − x0
    return {"path length": fmean(lengths)}, partial(sample, net, images.shape[1])


@torch.no_grad()
def sample(net: MLP, size: int, count: int, steps: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(count, size, generator=generator)
    for t in torch.arange(steps) / steps:
        x = x + net(torch.cat([x, t.expand(count, 1)], 1)) / steps
    return x


def main(steps: Steps = 800, seeds: Seeds = 2, match_size: MatchSize = 1000):
    images, plain = load_digits().flatten(1), ConditionalFlowMatcher()
    ways = {"random": (plain, 1), "batch OT": (ExactOptimalTransportConditionalFlowMatcher(), 1),
            f"pool of {match_size:,}": (plain, match_size)}
    ways = {name: partial(train, images, matcher, steps, size) for name, (matcher, size) in ways.items()}
    return compare(ways, images, seeds, f"Digits, {steps:,} steps of 64", step_counts=(1, 2, 5))


if __name__ == "__main__":
    run(main)
