#!/usr/bin/env bash
# ema-pytorch 0.8.3: PostHocEMA and KarrasEMA with update_every above 1 (its default is 100, the README's example has
# 10) do not average over the relative width sigma_rel they are asked for: their decay is that of a single step, applied
# once in update_every steps. The averages stay near the first weights.
#
# Expected, noted before the run: update_every saves time, and the averages have the widths asked for at each interval.
# Suspected: they are wider.
# Seen: a weight goes from 0 to 1 in 10,000 steps; its averages of sigma_rel 0.05 and 0.28 are to end at 0.947 and
# 0.539. With update_every=1 they do. With 10 they end at 0.642 and 0.105, by default at 0.151 and 0.012: by then 40 %
# and 94 % of them are the weights of the first step. synthesize_ema_model takes the snapshots for averages of the right
# widths: asked for sigma_rel 0.15 it gives 0.820, 0.242 and 0.041.
#
# PYTHON names an interpreter with torch 2.14.1 and numpy; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, numpy" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" ema-pytorch==0.8.3 2>/dev/null
cat > "$folder/average.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from ema_pytorch import PostHocEMA

STEPS = 10_000


class Model(torch.nn.Module):
    """`ramp` goes from 0 to 1 in STEPS steps; `start` is 1 until the first step is over, then 0."""

    def __init__(self):
        super().__init__()
        self.ramp = torch.nn.Parameter(torch.zeros(()))
        self.start = torch.nn.Parameter(torch.ones(()))


def averages(**settings):
    """The averages of both parameters by width, the ramp's average synthesized, and those expected of the ramp."""
    model = Model()
    ema = PostHocEMA(model, sigma_rels=(0.05, 0.28), checkpoint_every_num_steps=1000, checkpoint_dtype=torch.float32,
                     checkpoint_folder=f"{sys.argv[1]}/{settings}", **settings)
    for step in range(1, STEPS + 1):
        model.ramp.data.fill_(step / STEPS)
        model.start.data.fill_(step == 1)
        ema.update()
    ramps = [average.ema_model.ramp.item() for average in ema.ema_models]
    starts = [average.ema_model.start.item() for average in ema.ema_models]
    expected = [(gamma + 1) / (gamma + 2) for gamma in ema.gammas]
    return ramps, starts, ema.synthesize_ema_model(sigma_rel=0.15).ema_model.ramp.item(), expected


print("ema-pytorch", version("ema-pytorch"))
seen = {}
for settings in ({"update_every": 1}, {"update_every": 10}, {}):
    ramps, starts, synthesized, expected = averages(**settings)
    interval = settings.get("update_every", "default")
    seen[interval] = ramps, synthesized
    print(f"update_every={interval}: sigma_rel 0.05 and 0.28 end at {ramps[0]:.3f} and {ramps[1]:.3f} "
          f"(expected {expected[0]:.3f} and {expected[1]:.3f}), with {starts[0]:.1%} and "
          f"{starts[1]:.1%} of the first weights; 0.15 synthesized: {synthesized:.3f}")
assert all(abs(ramp - right) < 0.01 for ramp, right in zip(seen[1][0], expected)), "the behaviour has changed"
assert seen[10][0][0] < 0.7 and seen[10][0][1] < 0.2 and seen[10][1] < 0.3, "the behaviour has changed"
assert seen["default"][0][0] < 0.2 and seen["default"][0][1] < 0.02, "the behaviour has changed"
assert starts[0] > 0.3 and starts[1] > 0.9, "the behaviour has changed"
PY
PYTHONPATH="$folder/site" OMP_NUM_THREADS=1 "$python" "$folder/average.py" "$folder"
