#!/usr/bin/env bash
# accelerate 1.15.0: a prepared DataLoader is one batch ahead of the loop, without workers too, so a sampler that is
# registered for checkpointing is saved one batch too far: a resumed run leaves out a batch that was never trained on.
#
# Guess before: prepare adds devices and processes; on one process, on the CPU, without workers, the batches of a loop
# and its sampler's state are those of the DataLoader itself.
# Seen: a batch sampler that counts the batches it hands out and goes on from there; save_state in the loop at the 5th
# of 12 batches (0 to 11), and load_state into new objects. Of the DataLoader itself batches 5 to 11 come after that; of
# the prepared one batches 6 to 11: 5 is in neither run. The loader asks for the next batch before it hands one out,
# to know which is the last; it makes up for that only in its own state, of use_stateful_dataloader=True.
#
# PYTHON names an interpreter with torch 2.14.1 and what accelerate needs; without one they are installed (5.5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}
if ! "$python" -c "import torch, numpy, packaging, psutil, yaml, huggingface_hub, safetensors" 2>/dev/null; then
  python3 -m venv "$folder/venv" && python="$folder/venv/bin/python"
  "$python" -m pip install --quiet torch==2.14.1 numpy packaging psutil pyyaml huggingface_hub safetensors 2>/dev/null
fi
"$python" -m pip install --quiet --no-deps --target "$folder/site" accelerate==1.15.0 2>/dev/null
cat > "$folder/resume.py" <<'PY'
import sys

from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler


class Batches(Sampler):
    def __init__(self):
        self.next = 0

    def __len__(self):
        return 12

    def __iter__(self):
        for batch in range(self.next, 12):
            self.next = batch + 1
            yield [batch, batch]
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def start(prepared):
    accelerator, sampler = Accelerator(cpu=True), Batches()
    accelerator.register_for_checkpointing(sampler)
    loader = DataLoader(range(12), batch_sampler=sampler)
    return accelerator, accelerator.prepare(loader) if prepared else loader


def batches(prepared, folder):
    """The batches before save_state, and those after load_state."""
    accelerator, loader = start(prepared)
    before = []
    for batch in loader:
        before.append(batch[0].item())
        if len(before) == 5:
            accelerator.save_state(folder)
            break
    accelerator, loader = start(prepared)
    accelerator.load_state(folder)
    after = [batch[0].item() for batch in loader]
    print(f"prepared={prepared}: batches {before}, and resumed {after}")
    return before, after


assert batches(False, f"{sys.argv[1]}/own") == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11])
assert batches(True, f"{sys.argv[1]}/prepared") == ([0, 1, 2, 3, 4], [6, 7, 8, 9, 10, 11]), "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" "$folder/resume.py" "$folder" 2>&1
