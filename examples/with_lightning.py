"""The pool in a training by Lightning, with its state in the checkpoints; on the 1,797 digits of scikit-learn.

The comment "was:" shows what the one line replaces. Of several processes the first one's pool is saved.

    python examples/with_lightning.py        seconds on two cores
"""

import sys
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Seeds, Steps, compare_lengths, run
from dansm.tiny.digits import load_digits

try:
    from lightning import LightningModule, Trainer
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


class Flow(LightningModule):
    def __init__(self, pool: NoisePool):
        super().__init__()
        self.net, self.pool, self.lengths = torch.nn.Linear(65, 64), pool, []

    def training_step(self, x: Tensor, number: int) -> Tensor:
        z = self.pool(x)  # was: z = torch.randn_like(x)
        self.lengths.append(path_length(x, z))
        t = torch.rand(len(x), 1).to(x)
        return torch.nn.functional.mse_loss(self.net(torch.cat([t * x + (1 - t) * z, t], 1)), x - z)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["pool"] = self.pool.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.pool.load_state_dict(checkpoint["pool"])


def train(steps: int, match_size: int, seed: int) -> dict:
    torch.manual_seed(seed)
    flow = Flow(NoisePool(match_size, (64,), seed=seed))
    loader = DataLoader(load_digits().flatten(1), batch_size=64, shuffle=True)
    Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False).fit(flow, loader)
    return {"path length": fmean(flow.lengths)}


def main(steps: Steps = 100, seeds: Seeds = 1, match_size: MatchSize = 1000):
    return compare_lengths(partial(train, steps), seeds, f"Lightning, {steps:,} steps", match_size)


if __name__ == "__main__":
    run(main)
