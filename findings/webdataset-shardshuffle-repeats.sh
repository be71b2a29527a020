#!/usr/bin/env bash
# webdataset 1.0.2: WebDataset(shardshuffle=N) takes the shards in the same order in each epoch, with and without a
# seed. A shuffle buffer behind it moves samples by its own length alone.
#
# Expected, noted before the run: each epoch has another order of shards, with detshuffle=True one given by the seed and
# the epoch. Suspected: detshuffle repeats where the workers are started anew for each epoch.
# Seen: the generator is seeded with one number, drawn when the dataset is made, again at the start of each epoch. In 4
# epochs of 100 shards there is one order of shards: without workers, with workers, with workers that persist. Behind a
# buffer of a tenth of the samples, a sample's place in an epoch correlates with its place in the next by 0.90 (0 for
# independent orders). With detshuffle=True there are 4 orders, but 1 with workers that do not persist: they count their
# epochs from 0 each time. webdataset's pull request 502, open, reports the first.
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
"$python" -m pip install --quiet --no-deps --target "$folder/site" webdataset==1.0.2 braceexpand==0.1.7 PyYAML==6.0.4 \
  2>/dev/null
cat > "$folder/epochs.py" <<'PY'
import sys
from importlib.metadata import version
from itertools import pairwise

import numpy as np
import torch
import webdataset

SHARDS, SAMPLES, EPOCHS = 100, 20, 4
with webdataset.ShardWriter(f"{sys.argv[1]}/%06d.tar", maxcount=SAMPLES, verbose=0) as writer:
    for number in range(SHARDS * SAMPLES):
        writer.write({"__key__": f"{number:06d}", "cls": number})
urls = f"{sys.argv[1]}/{{000000..{SHARDS - 1:06d}}}.tar"


def epochs(buffer=0, workers=0, persistent=False, **settings):
    """The sample numbers in the order of each epoch. → (EPOCHS, SHARDS · SAMPLES)"""
    data = webdataset.WebDataset(urls, shardshuffle=SHARDS, **settings)
    if buffer:
        data = data.shuffle(buffer)
    loader = torch.utils.data.DataLoader(data.decode().to_tuple("cls"), batch_size=None, num_workers=workers,
                                         persistent_workers=persistent)
    return np.array([[number for (number,) in loader] for _ in range(EPOCHS)])


def orders(**settings):
    """How many orders of shards there are in EPOCHS epochs."""
    seen = epochs(**settings)
    assert (np.sort(seen) == np.arange(SHARDS * SAMPLES)).all(), "samples are missing"
    count = len(np.unique(seen, axis=0))
    print(f"{settings or 'default'}: {count} orders in {EPOCHS} epochs")
    return count


print("webdataset", version("webdataset"))
places = np.argsort(epochs(buffer=200))
correlations = [np.corrcoef(*pair)[0, 1] for pair in pairwise(places)]
print("places in neighbouring epochs correlate by", *(f"{value:.3f}" for value in correlations))
assert min(correlations) > 0.8, "the behaviour has changed"
same = [orders(), orders(seed=3), orders(workers=2), orders(workers=2, persistent=True),
        orders(detshuffle=True, workers=2)]
other = [orders(detshuffle=True), orders(detshuffle=True, workers=2, persistent=True)]
assert same == [1] * 5 and other == [EPOCHS] * 2, "the behaviour has changed"
PY
PYTHONPATH="$folder/site" OMP_NUM_THREADS=1 "$python" "$folder/epochs.py" "$folder"
