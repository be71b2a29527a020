"""Compare solvers of the semidiscrete coupling by how even the shares are after as many noises.

    pip install ott-jax==0.6.0 POT==0.9.7
    PYTHONPATH=. python results/bench/couple/compare.py IMAGES [--images 2000] [--out compare.csv]

IMAGES is what dansm train takes. The shares of all are counted with the same noises, 100 for each image, that none of
the solvers was given. A row for each solver, its settings, and noises drawn for each image: rms of n · share − 1, less
what chance adds. Rows that --out has of other images, solvers or settings stay.
"""

import argparse
import csv
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dansm.scale.base.files import write_csv
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8
from dansm.scale.matching.solver import Solver, evenness

BUDGETS = 50, 100, 150, 500, 1000  # noises for each image
AVERAGES = 0.99, 0.01, 0.003, 0.001  # weights of the newest potentials in ott-jax's average; 0.99 is its default


def ours(x, args):
    solver = Solver(x, torch.full((len(x),), 1 / len(x)), torch.Generator().manual_seed(args.seed))
    for budget in args.budgets:
        while (solver.steps + 1) * solver.batch <= budget * len(x):
            solver.step()
        yield budget, {"": solver.mean}


def pot(x, args):
    """Its defaults, on coordinates divided by each of args.units."""
    from ot.semidiscrete import solve_semidiscrete

    batch, potentials = 32, x.double().square().sum(1) / 2
    for unit in args.units:
        generator, numpy, found = np.random.default_rng(args.seed), x.double().numpy() / unit, {}
        last = {budget * len(x) // batch: budget for budget in args.budgets}

        def noises(count, unit=unit, generator=generator, found=found, last=last):
            solver = sys._getframe(1).f_locals  # its average so far, for all budgets in one run
            if solver["t"] - 1 in last:
                found[last[solver["t"] - 1]] = solver["g_avg"]
            return generator.standard_normal((count, x.shape[1])) / unit

        found[args.budgets[-1]] = solve_semidiscrete(numpy, noises, max_iter=max(last), batch_size=batch)
        for budget, of_budget in found.items():
            yield budget, {f"defaults, coordinates / {unit}":
                           (potentials - torch.from_numpy(of_budget) * unit**2 / 2).float()}


def ott(x, args):
    """Its steps with SGD, at one rate or one that falls as 1 / √step, and with Adam, at several rates: all at once with
    the same noises, and averaged as the solver does."""
    import jax
    import optax
    from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
    from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
    from ott.solvers.linear.semidiscrete import SemidiscreteSolver, SemidiscreteState

    batch, n, scale = 256, len(x), float(x.norm(dim=1).mean())
    problem = SemidiscreteLinearProblem(SemidiscretePointCloud(
        lambda key, shape, dtype: jax.random.normal(key, shape, dtype), jax.numpy.asarray(x.numpy()), epsilon=0.0))
    kinds = {  # names, and what of these are numbers; SGD at one rate falls with the step to the power of 0
        "sgd": ([*[(f"{rate:g} of n · mean norm", rate, 0.0) for rate in args.sgd],
                 *[(f"{rate:g} of n · mean norm / √step", rate, 0.5) for rate in args.falling]],
                lambda rate, power: optax.sgd(lambda step: rate * n * scale / (1.0 + step) ** power)),
        "adam": ([(f"{rate:g} of mean norm", rate) for rate in args.adam], lambda rate: optax.adam(rate * scale))}
    settings = {kind: [f"{kind}, {name}" for name, *_ in given] for kind, (given, _) in kinds.items()}
    values = {kind: jax.numpy.array([of_one for _, *of_one in given]) for kind, (given, _) in kinds.items()}
    key, _ = jax.random.split(jax.random.key(args.seed))  # as the solver's __call__ does

    def solver_of(kind, given):
        return SemidiscreteSolver(num_iterations=1, batch_size=batch, optimizer=kinds[kind][1](*given))

    def first(kind, given):
        empty, zeros = jax.numpy.zeros(1), jax.numpy.zeros(n)
        return SemidiscreteState(it=jax.numpy.array(0), epsilon=jax.numpy.nan, g=zeros, g_ema=zeros, losses=empty,
                                 opt_state=solver_of(kind, given).optimizer.init(zeros), grad_norms=empty, errors=empty)

    @jax.jit
    def steps(begin, end, states, averages):
        def step(number, carried):
            states, averages = carried
            noise_key = jax.random.fold_in(key, number)
            states = {kind: jax.vmap(lambda given, state, kind=kind: solver_of(kind, given).step(
                noise_key, state, problem))(values[kind], state) for kind, state in states.items()}
            averages = {kind: {weight: optax.incremental_update(states[kind].g, average, weight)
                               for weight, average in of_kind.items()} for kind, of_kind in averages.items()}
            return states, averages

        return jax.lax.fori_loop(begin, end, step, (states, averages))

    states = {kind: jax.vmap(partial(first, kind))(values[kind]) for kind in kinds}
    averages = {kind: dict.fromkeys(AVERAGES, state.g) for kind, state in states.items()}
    begin, half = 0, x.square().sum(1) / 2
    for budget in args.budgets:
        states, averages = steps(begin, budget * n // batch, states, averages)
        begin = budget * n // batch
        yield budget, {f"{name}, potential_ema {weight}": half - torch.from_numpy(np.array(of_one)) / 2
                       for kind, of_kind in averages.items() for weight, of_weight in of_kind.items()
                       for name, of_one in zip(settings[kind], of_weight, strict=True)}


def unevenness(x, found, noises=100, seed=99):
    """The errors of several potentials, counted with the same noises for all."""
    generator, taken = torch.Generator().manual_seed(seed), {name: torch.zeros(len(x)) for name in found}
    for _ in range(noises * len(x) // 1000):
        values = torch.randn(1000, x.shape[1], generator=generator) @ x.T
        for name, potentials in found.items():
            taken[name] += (values - potentials).argmax(1).bincount(minlength=len(x))
    share = torch.full((len(x),), 1 / len(x))
    return {name: evenness(of_name, share, noises).error for name, of_name in taken.items()}


def written(out, rows):
    """Add rows to those of a file, in place of those of the same settings."""
    given = {}
    before = list(csv.DictReader(out.open())) if out.exists() else []
    for row in [*before, *rows]:
        given[tuple(str(row[name]) for name in ("solver", "settings", "images", "noises", "seed"))] = row
    write_csv(out, list(given.values()))


def numbers(kind):
    return lambda text: [kind(number) for number in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "compare.csv")
    parser.add_argument("--solvers", default="ours,pot,ott")
    parser.add_argument("--budgets", type=numbers(int), default=BUDGETS)
    parser.add_argument("--units", type=numbers(int), default=(1, 4, 8, 16, 32, 64))
    parser.add_argument("--sgd", type=numbers(float), default=(0.003, 0.01, 0.03, 0.1, 0.3))
    parser.add_argument("--falling", type=numbers(float), default=(0.1, 0.3, 1, 3))
    parser.add_argument("--adam", type=numbers(float), default=(0.03, 0.1, 0.3, 1))
    args = parser.parse_args()
    images = torch.as_tensor(np.asarray(load_images(args.data)))
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    x = from_uint8(images[rows.sort().values]).flatten(1)
    for solver in args.solvers.split(","):
        for budget, found in globals()[solver](x, args):
            off = unevenness(x, found)
            rows = [{"solver": solver, "settings": settings, "images": len(x), "noises": budget, "seed": args.seed,
                     "off": round(off[settings], 4)} for settings in found]
            for row in rows:
                print(*row.values(), sep="  ", flush=True)
            written(args.out, rows)
