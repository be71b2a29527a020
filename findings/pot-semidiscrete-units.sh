#!/usr/bin/env bash
# POT 0.9.7: ot.semidiscrete.solve_semidiscrete finds even shares or fails by the unit of the coordinates alone, without
# a word: its first step and its first smoothing are fixed numbers, whatever the size of the costs.
#
# Guess before: with points and source given in another unit, the same problem, it finds an equally good plan.
# Seen: 200 points in 256 dimensions against N(0, I), default settings, 320,000 noises drawn. How far the points' shares
# of the source are off, rms of n · share − 1, by 200,000 others (which alone would show 0.03): in the unit of the
# source's deviation 0.57; in a quarter of it, all numbers four times as large, 1.5, and 16 % of the points get nothing;
# in eight of it, all numbers an eighth, 0.05.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet POT==0.9.7 scipy==1.17.1 numpy==2.4.6 2>/dev/null
cat > "$folder/solve.py" <<'PY'
import numpy as np
from ot.semidiscrete import solve_semidiscrete

generator = np.random.default_rng(0)
points = generator.standard_normal((200, 256)) * generator.uniform(0.3, 0.7, (200, 1))


def unevenness(unit):
    source, judge = np.random.default_rng(1), np.random.default_rng(9)
    potentials = solve_semidiscrete(points * unit, lambda count: source.standard_normal((count, 256)) * unit)
    taken = np.zeros(200)
    for _ in range(100):
        noises = judge.standard_normal((2000, 256)) * unit
        costs = (noises**2).sum(1)[:, None] + ((points * unit) ** 2).sum(1) - 2 * noises @ (points * unit).T
        taken += np.bincount((potentials - costs).argmax(1), minlength=200)
    return np.sqrt(((taken / 1000 - 1) ** 2).mean()), (taken == 0).mean()


seen = {unit: unevenness(unit) for unit in (4, 1, 1 / 8)}
for unit, (off, none) in seen.items():
    print(f"all numbers times {unit:5.3f}: shares are off by {off:5.3f}, {none:4.0%} of the points get nothing")
assert seen[4][0] > 1 and seen[1][0] > 0.3 and seen[1 / 8][0] < 0.1, "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/solve.py"
