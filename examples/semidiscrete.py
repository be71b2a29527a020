"""Noises that choose their samples, in torch's DataLoader: a plain loop, accelerate or Lightning train a flow on the
1,797 digits that come with scikit-learn and their mirror images.

A plan for all samples is found before training; the sampler's noises choose each batch by it. A random change would
part an image from its noise, so mirror images are samples of their own. All three end with the same numbers.

    python examples/semidiscrete.py --trainer lightning        or plain, accelerate; a minute on two cores
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dansm import Semidiscrete, path_length
from dansm.scale.matching import CoupledBatchSampler
from dansm.tiny.comparison import Seeds, Steps, compare, run
from dansm.tiny.digits import load_digits


class Mirrored(Dataset):
    """Images (n, C, H, W), and after the last their mirror images."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return 2 * len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        image = self.images[number % len(self.images)]
        return image if number < len(self.images) else image.flip(-1)


def flow_loss(net: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    x, z, t = x.flatten(1), z.flatten(1), torch.rand(len(x), 1, device=x.device)
    return F.mse_loss(net(torch.cat([t * x + (1 - t) * z, t], 1)), x - z)


def train_plainly(net: nn.Module, loader: DataLoader, noise: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for x in loader:
        z = noise(x)  # was: z = torch.randn_like(x)
        optimizer.zero_grad()
        flow_loss(net, x, z).backward()
        optimizer.step()


def train_by_accelerate(net: nn.Module, loader: DataLoader, noise: Callable[[Tensor], Tensor]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=1e-3))  # all but the loader
    for x in loader:
        x = x.to(accelerator.device)
        z = noise(x)  # was: z = torch.randn_like(x)
        optimizer.zero_grad()
        accelerator.backward(flow_loss(net, x, z))
        optimizer.step()


def train_by_lightning(net: nn.Module, loader: DataLoader, noise: Callable[[Tensor], Tensor]) -> None:
    from lightning import LightningModule, Trainer

    class Flow(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, x: Tensor, number: int) -> Tensor:
            z = noise(x)  # was: z = torch.randn_like(x)
            return flow_loss(self.net, x, z)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    trainer = Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Flow(), loader)


@torch.no_grad()
def sample(net: nn.Module, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """(count, 64) by Euler's steps from noise (t = 0) to data (t = 1)."""
    x = torch.randn(count, 64, generator=generator)
    for step in range(steps):
        x = x + net(torch.cat([x, torch.full((count, 1), step / steps)], 1)) / steps
    return x


TRAINERS = {"plain": train_plainly, "accelerate": train_by_accelerate, "lightning": train_by_lightning}


def main(trainer: Literal["plain", "accelerate", "lightning"] = "plain", steps: Steps = 800, seeds: Seeds = 2):
    if trainer != "plain":
        importlib.import_module(trainer)  # or its absence would be told after the plan is found
    data = Mirrored(load_digits())
    samples = torch.stack([data[number] for number in range(len(data))])
    solved = Semidiscrete(samples, seed=0)
    solved.solve(0.2)

    def trained(coupled: bool, seed: int):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
        coupling = Semidiscrete(samples, seed=seed)
        coupling.load_solution(solved.solution())
        sampler = CoupledBatchSampler(coupling, batch_size=64, batches=steps)
        lengths = []

        def noise(x: Tensor) -> Tensor:
            z = sampler.noise(x) if coupled else torch.randn_like(x)
            lengths.append(path_length(x, z))
            return z

        TRAINERS[trainer](net, DataLoader(data, batch_sampler=sampler), noise)
        return {"path length": fmean(lengths)}, partial(sample, net)

    ways = {"random": partial(trained, False), "semidiscrete": partial(trained, True)}
    return compare(ways, samples.flatten(1), seeds, f"Digits and mirror images, {trainer}, {steps:,} steps of 64",
                   step_counts=(1, 2, 5))


if __name__ == "__main__":
    try:
        run(main)
    except ModuleNotFoundError as error:
        sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install {error.name}")
