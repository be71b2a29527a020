#!/usr/bin/env bash
# lapx 0.11.1: lapjvs solves float64 costs in float32 unless told not to, so a constant that all costs share, which
# changes no assignment, makes its assignment worse than the optimum, without a warning.
#
# Guess before: with float64 costs lapjvs finds scipy's total, whatever constant is added to every cost.
# Seen: of costs between 0 and 1, plus 1e5, its assignment costs 5 % more than the optimum, plus 1e7 forty times as much.
# (Squared distances of points far from the origin are such costs.) The cost it returns is that of its own assignment in float64, so only a comparison shows it. With
# prefer_float32=False, or with the minimum of each row subtracted first, it is optimal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lapx==0.11.1 scipy==1.17.1 numpy==2.4.6 2>/dev/null
cat > "$folder/solve.py" <<'PY'
import lap
import numpy as np
from scipy.optimize import linear_sum_assignment
base = np.random.default_rng(0).random((300, 300))
rows, columns = linear_sum_assignment(base)
best = base[rows, columns].sum()
total = lambda columns: base[np.arange(300), columns].sum()
seen = []
for offset in (0.0, 1e3, 1e5, 1e7):
    default = total(lap.lapjvs(base + offset)[2])
    exact = total(lap.lapjvs(base + offset, prefer_float32=False)[2])
    seen.append(default / best)
    print(f"offset {offset:>10,.0f}: lapjvs {default / best:6.3f}, prefer_float32=False {exact / best:6.3f} of the optimum")
assert seen[0] < 1.0001 and seen[2] > 1.05 and seen[3] > 2, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/solve.py"
