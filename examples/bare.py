"""Your own training loop in plain PyTorch: a rectified flow on the 1,797 digits that come with scikit-learn.

One line differs from usual training; the comment "was:" shows what it replaces. The pool goes into the checkpoint, 8
bytes for each noise that is left and some of the digits; a resumed run ends with the same weights to the last bit.

    python examples/bare.py        25 seconds on two cores; --steps 4000 for more
"""

from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare, run
from dansm.tiny.digits import load_digits

BATCH = 64


class Velocity(nn.Sequential):
    """(B, 1, 8, 8) at times t: (B, 1, 1, 1) → (B, 1, 8, 8)."""

    def __init__(self, width: int = 256):
        super().__init__(nn.Linear(64 + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                         nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(torch.cat([x.flatten(1), t.flatten(1)], 1)).view_as(x)


def train(images: Tensor, steps: int, match_size: int, seed: int, checkpoint: Path | None = None):
    """Train until step `steps`, resuming from `checkpoint` if that file exists. images: (N, 1, 8, 8). Returns the
    network and the mean length of the paths in each step. match_size 1: random pairs."""
    torch.manual_seed(seed)
    net = Velocity()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    pool = NoisePool(match_size, images.shape[1:], seed=seed)
    parts = {"net": net, "optimizer": optimizer, "pool": pool}
    done, lengths = 0, []
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["done"]
        torch.set_rng_state(saved["random"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for _ in range(done, steps):
        x = images[torch.randint(len(images), (BATCH,))]
        z = pool(x)  # was: z = torch.randn_like(x)
        t = torch.rand(len(x), 1, 1, 1)
        loss = F.mse_loss(net(t * x + (1 - t) * z, t), x - z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths.append(path_length(x, z))

    if checkpoint:
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "random": torch.get_rng_state(), "done": steps}, checkpoint)
    return net, lengths


@torch.no_grad()
def sample(net: Velocity, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 1, 8, 8) by Euler's steps from noise (t = 0) to data (t = 1)."""
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for step in range(steps):
        x = x + net(x, torch.full((count, 1, 1, 1), step / steps)) / steps
    return x


def resumes(images: Tensor, steps: int, match_size: int) -> bool:
    """Whether a run that stops half way and resumes ends with the weights of one that does not stop."""
    whole, _ = train(images, steps, match_size, seed=0)
    with TemporaryDirectory() as folder:
        for until in (steps // 2, steps):
            resumed, _ = train(images, until, match_size, seed=0, checkpoint=Path(folder, "checkpoint.pt"))
    return all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def main(steps: Steps = 1500, seeds: Seeds = 2, match_size: MatchSize = 1000):
    images = load_digits()
    same = resumes(images, min(steps, 200), match_size)
    print("stopped and resumed:", "the same weights to the last bit" if same else "OTHER WEIGHTS")

    def trained(match_size, seed):
        net, lengths = train(images, steps, match_size, seed)
        return {"path length": fmean(lengths)}, partial(sample, net)

    ways = {"random": partial(trained, 1), f"pool of {match_size:,}": partial(trained, match_size)}
    return compare(ways, images, seeds, f"Digits, {steps:,} steps of {BATCH}")


if __name__ == "__main__":
    run(main)
