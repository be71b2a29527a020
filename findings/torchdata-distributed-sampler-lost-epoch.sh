#!/usr/bin/env bash
# torchdata 0.11.0: a StatefulDataLoader without workers whose state was kept at the end of an epoch begins, after that
# state is loaded, with an epoch of no batches, if its sampler is torchdata's own StatefulDistributedSampler.
#
# Guess before: the loop after the load is a whole epoch, as with shuffle=True and with torch's DistributedSampler.
# Seen: 6, 6, 6 batches in the next three epochs with shuffle=True or DistributedSampler; 0, 6, 6 with
# StatefulDistributedSampler, and 6, 6, 6 with it and 2 workers. The sampler keeps the number of samples to skip until
# its iterator is first asked for one. The loader makes an iterator for the state, sees that the state is of an epoch's
# end, and makes another without asking the first: so the second skips them all. States from within an epoch are fine.
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
"$python" -m pip install --quiet --no-deps --target "$folder/site" torchdata==0.11.0 2>/dev/null
cat > "$folder/resume.py" <<'PY'
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


def loaders(kind, workers):
    """Two loaders alike, of 6 batches, each with the call that its sampler is to have before an epoch."""
    for _ in range(2):
        if kind is None:
            yield StatefulDataLoader(range(12), batch_size=2, shuffle=True, num_workers=workers), lambda epoch: None
        else:
            sampler = kind(range(24), num_replicas=2, rank=0)
            yield StatefulDataLoader(range(24), batch_size=2, sampler=sampler, num_workers=workers), sampler.set_epoch


def epochs_after(kind, workers=0):
    (first, set_first), (second, set_second) = loaders(kind, workers)
    set_first(0)
    assert len(list(first)) == 6
    second.load_state_dict(first.state_dict())
    seen = []
    for epoch in (1, 2, 3):
        set_second(epoch)
        seen.append(len(list(second)))
    print(f"{kind.__name__ if kind else 'shuffle=True'}, {workers} workers: batches of the epochs after a load: {seen}")
    return seen


assert epochs_after(None) == epochs_after(DistributedSampler) == [6, 6, 6]
assert epochs_after(StatefulDistributedSampler, workers=2) == [6, 6, 6]
assert epochs_after(StatefulDistributedSampler) == [0, 6, 6], "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" -W ignore "$folder/resume.py"
