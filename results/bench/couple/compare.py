"""Compare solvers of the semidiscrete coupling by how even the shares are after as many noises.

    pip install ott-jax==0.6.0 POT==0.9.7
    PYTHONPATH=. python results/bench/couple/compare.py IMAGES [--images 2000] [--out compare.csv]

IMAGES is what dansm train takes. The shares of all are counted with the same noises, 100 for each image, that none of
them was given. A line for each solver, its settings, and noises drawn for each image: rms of n · share − 1, chance
taken off.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dansm.scale.base.files import write_csv
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8
from dansm.scale.matching.solver import Solver, evenness

BUDGETS = 50, 150, 500  # noises for each image
UNITS = 1, 4, 8, 16, 32, 64, 128  # by which POT's coordinates are divided


def ours(x, seed):
    solver = Solver(x, torch.full((len(x),), 1 / len(x)), torch.Generator().manual_seed(seed))
    for budget in BUDGETS:
        while (solver.steps + 1) * solver.batch <= budget * len(x):
            solver.step()
        yield "", budget, solver.mean


def pot(x, seed):
    from ot.semidiscrete import solve_semidiscrete

    numpy = x.double().numpy()
    for unit in UNITS:
        for budget in BUDGETS:
            generator = np.random.default_rng(seed)
            found = solve_semidiscrete(numpy / unit, lambda count, unit=unit, generator=generator: generator
                                       .standard_normal((count, x.shape[1])) / unit,
                                       max_iter=budget * len(x) // 32, batch_size=32)
            potentials = ((numpy / unit) ** 2).sum(1) / 2 - found / 2
            yield f"defaults, coordinates / {unit}", budget, torch.from_numpy(potentials * unit**2).float()


def ott(x, seed):
    import jax
    import optax
    from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
    from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
    from ott.solvers.linear.semidiscrete import SemidiscreteSolver

    batch, n = 256, len(x)
    geometry = SemidiscretePointCloud(lambda key, shape, dtype: jax.random.normal(key, shape, dtype),
                                      jax.numpy.asarray(x.numpy()), epsilon=0.0)
    scale = float(x.norm(dim=1).mean())
    optimizers = {f"sgd, {rate:g} of n · mean norm": optax.sgd(rate * n * scale) for rate in (0.1, 0.3, 1)}
    optimizers |= {f"adam, {rate:g} of mean norm": optax.adam(rate * scale) for rate in (0.03, 0.1, 0.3)}
    for name, optimizer in optimizers.items():
        for average in (0.99, 0.01):
            for budget in BUDGETS:
                steps = budget * n // batch
                solver = SemidiscreteSolver(num_iterations=steps, batch_size=batch, optimizer=optimizer,
                                            potential_ema=average, error_eval_every=steps)
                found = np.array(solver(jax.random.key(seed), SemidiscreteLinearProblem(geometry)).g)
                yield f"{name}, potential_ema {average}", budget, x.square().sum(1) / 2 - torch.from_numpy(found) / 2


def unevenness(x, potentials, noises=100, seed=99):
    """Counted with the same noises for all."""
    generator, taken = torch.Generator().manual_seed(seed), torch.zeros(len(x))
    for _ in range(noises * len(x) // 1000):
        values = torch.randn(1000, x.shape[1], generator=generator) @ x.T - potentials
        taken += values.argmax(1).bincount(minlength=len(x))
    return evenness(taken, torch.full((len(x),), 1 / len(x)), noises).error


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "compare.csv")
    parser.add_argument("--solvers", default="ours,pot,ott")
    given = parser.parse_args()
    images = torch.as_tensor(np.asarray(load_images(given.data)))
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(given.seed))[: given.images]
    x = from_uint8(images[rows.sort().values]).flatten(1)
    lines = []
    for solver in given.solvers.split(","):
        begin = time.monotonic()
        for settings, budget, potentials in globals()[solver](x, given.seed):
            seconds = round(time.monotonic() - begin, 2)
            lines.append({"solver": solver, "settings": settings, "images": len(x), "noises": budget,
                          "seed": given.seed, "off": round(unevenness(x, potentials), 4), "seconds": seconds})
            print(*lines[-1].values(), sep="  ", flush=True)
            write_csv(given.out, lines)
            begin = time.monotonic()
