#!/usr/bin/env bash
# ott-jax 0.6.0: SemidiscreteSolver's potential_ema of 0.99, its default, is the weight of the newest potentials, not of
# their past: the potentials that it returns are the last ones all but unaveraged.
#
# Guess before: with the default it returns a mean over the last hundred steps or so, which moves a hundredth as much.
# Seen: over the last 100 of 400 steps the kept average moves by 0.99 of what the potentials themselves move in a step;
# with potential_ema=0.01 by 0.04 of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet ott-jax==0.6.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>/dev/null
cat > "$folder/solve.py" <<'PY'
import jax
import numpy as np
import optax
from ott.geometry.semidiscrete_pointcloud import SemidiscretePointCloud
from ott.problems.linear.semidiscrete_linear_problem import SemidiscreteLinearProblem
from ott.solvers.linear.semidiscrete import SemidiscreteSolver

points = jax.random.normal(jax.random.key(0), (40, 8))
geometry = SemidiscretePointCloud(lambda key, shape, dtype: jax.random.normal(key, shape, dtype), points, epsilon=0.0)


def moved(**settings):
    """How far the kept average moves in a step, over how far the potentials do; the median of the last steps."""
    steps = []
    solver = SemidiscreteSolver(num_iterations=400, batch_size=64, optimizer=optax.sgd(2.0), error_eval_every=400,
                                callback=lambda state: steps.append((np.array(state.g), np.array(state.g_ema))), **settings)
    solver(jax.random.key(1), SemidiscreteLinearProblem(geometry))
    jax.effects_barrier()
    potentials, averages = (np.diff(np.stack(part)[-100:], axis=0) for part in zip(*steps))
    return np.median(np.linalg.norm(averages, axis=1) / np.linalg.norm(potentials, axis=1))


default, slow = moved(), moved(potential_ema=0.01)
print(f"a step of the average over one of the potentials: {default:.3f} by default, {slow:.3f} with potential_ema=0.01")
assert default > 0.95 and slow < 0.2, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/solve.py"
