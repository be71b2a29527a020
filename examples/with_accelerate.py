"""The pool in a training by accelerate on two processes, saved and resumed; on the 1,797 digits of scikit-learn.

One line differs from usual training; the comment "was:" shows what it replaces. Each process has a pool of its own, but
`register_for_checkpointing` keeps what the first process gives it: `Pools` gives it the states of all of them.

    python examples/with_accelerate.py        seconds on two cores; the next call resumes. It starts itself by torchrun:
    on CPUs `accelerate launch` 1.15.0 starts one process, whatever --num_processes says
"""

import os
import sys
from pathlib import Path
from subprocess import call

import torch

from dansm import NoisePool, path_length
from dansm.tiny.comparison import MatchSize, Steps, run
from dansm.tiny.digits import load_digits

try:
    from accelerate import Accelerator, utils
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing: expected it installed, as by pip install 'dansm[peers]'")


class Pools(list):  # [pool] of this process; their states are of all
    def state_dict(self) -> dict:
        return {"pools": utils.gather_object([self[0].state_dict()])}

    def load_state_dict(self, state: dict) -> None:
        self[0].load_state_dict(state["pools"][Accelerator().process_index])


def main(folder: Path = Path("runs/with_accelerate"), steps: Steps = 200, match_size: MatchSize = 1000):
    accelerator, images = Accelerator(cpu=True), load_digits().flatten(1)
    torch.manual_seed(accelerator.process_index)  # other images and times on each process
    net = torch.nn.Linear(65, 64)
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=1e-3))
    pool = NoisePool(match_size, (64,), seed=0)
    accelerator.register_for_checkpointing(Pools([pool]))
    if folder.exists():
        accelerator.load_state(folder)  # and torch's random numbers of each process
    for _ in range(steps):
        x = images[torch.randint(len(images), (32,))]
        z = pool(x)  # was: z = torch.randn_like(x)
        t = torch.rand(32, 1)
        accelerator.backward(torch.nn.functional.mse_loss(net(torch.cat([t * x + (1 - t) * z, t], 1)), x - z))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)
    print(f"process {accelerator.process_index}: last paths {path_length(x, z):.3f}, saved in {folder}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # without these two lines gloo's threads sometimes abort a process as it ends


if __name__ == "__main__" and "WORLD_SIZE" in os.environ:
    run(main)
elif __name__ == "__main__":
    sys.exit(call([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *sys.argv]))
