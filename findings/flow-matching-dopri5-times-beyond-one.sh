#!/usr/bin/env bash
# flow_matching 1.0.10: ODESolver.sample(method="dopri5") over time_grid [0, 1] calls the velocity model at times beyond
# 1, which no flow is trained for, and its sample is interpolated from a step that ends there.
#
# Guess before: a model that is sampled over [0, 1] is called at times in [0, 1] alone, by each method.
# Seen: 6 of 44 calls have times beyond 1, the last 1.19; by bosh3 1 of 71. By midpoint, euler and rk4 none. The solver
# is torchdiffeq 0.2.5, whose step_t would end a step at 1; sample() has no argument that passes it on.
#
# PYTHON names an interpreter with torch 2.14.1 and scipy; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, scipy, numpy" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy scipy 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" flow_matching==1.0.10 torchdiffeq==0.2.5 2>/dev/null
cat > "$folder/times.py" <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper

times = []

class Model(ModelWrapper):
    def forward(self, x, t, **extras):
        times.append(float(t))
        return torch.sin(3 * x) - x

beyond = {}
for method, step_size in (("dopri5", None), ("bosh3", None), ("midpoint", 0.3), ("euler", 0.3), ("rk4", 0.3)):
    times.clear()
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    ODESolver(velocity_model=Model(torch.nn.Identity())).sample(x_init=noise, method=method, step_size=step_size,
                                                                time_grid=torch.tensor([0.0, 1.0]))
    beyond[method] = sum(t > 1 for t in times)
    print(f"{method}: {beyond[method]} of {len(times)} calls at times beyond 1, the last at {max(times):.2f}")
assert beyond["dopri5"] and beyond["bosh3"], "the behaviour has changed"
assert not (beyond["midpoint"] or beyond["euler"] or beyond["rk4"]), "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/times.py"
