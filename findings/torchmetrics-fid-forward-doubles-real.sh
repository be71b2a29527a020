#!/usr/bin/env bash
# torchmetrics 1.9.0: FrechetInceptionDistance(reset_real_features=False), called as fid(images, real=False), doubles
# what it knows of the real images in each call. The first real batches outweigh all later ones, without a warning.
#
# Guess before: its documentation gives forward and update the same input, so a loop that calls fid(fakes, real=False)
# to see a value for each batch ends with the same distance as a loop that calls fid.update(fakes, real=False).
# Seen: 40 rounds, each of 64 real images by update and 64 fakes, all from one distribution. By update the distance is
# 0.0033 from 2,560 real images. By a call it is 0.0205 from 140,737,488,355,200: the first batch has half
# of the weight. With one real batch the 58th call fails: the count, an int64, overflows. KernelInceptionDistance keeps
# features instead of sums: after 10 rounds it holds 130,944 of 640 real images. With the default,
# reset_real_features=True, the first call fails, as it forgets the real images.
#
# PYTHON names an interpreter with torch 2.14.1; without one it is installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" torchmetrics==1.9.0 lightning-utilities==0.15.3 \
  packaging typing_extensions 2>/dev/null
cat > "$folder/distance.py" <<'PY'
import warnings

warnings.simplefilter("ignore")
import torch
import torchmetrics
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


class Pixels(torch.nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1).float() / 255


def images():
    return torch.randint(256, (64, 3, 2, 2), dtype=torch.uint8, generator=generator)


print("torchmetrics", torchmetrics.__version__)
distances, counts = {}, {}
for way in ("update", "call"):
    generator = torch.Generator().manual_seed(0)
    fid = FrechetInceptionDistance(Pixels(), reset_real_features=False)
    for _ in range(40):
        fid.update(images(), real=True)
        give = fid.update if way == "update" else fid
        give(images(), real=False)
    distances[way], counts[way] = float(fid.compute()), int(fid.real_features_num_samples)
    print(f"FID by {way}: {distances[way]:.4f} from {counts[way]:,} real, {int(fid.fake_features_num_samples):,} fakes")

kid = KernelInceptionDistance(Pixels(), reset_real_features=False, subsets=1, subset_size=64)
for _ in range(10):
    kid.update(images(), real=True)
    kid(images(), real=False)
kept = sum(map(len, kid.real_features))
print(f"KID by call: {kept:,} real features of 640 images")

rounds, error = 0, ""
fid = FrechetInceptionDistance(Pixels(), reset_real_features=False)
fid.update(images(), real=True)
while not error and rounds < 100:
    try:
        fid(images(), real=False)
        rounds += 1
    except RuntimeError as failure:
        error = str(failure)
print(f"after {rounds} calls: {error}")
assert counts == {"update": 2560, "call": 64 * (2**41 - 2)}, "the behaviour has changed"
assert distances["call"] > 5 * distances["update"] and kept == 64 * (2**11 - 2), "the behaviour has changed"
assert rounds < 60 and error.startswith("More than one sample"), "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/distance.py"
