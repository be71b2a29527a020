#!/usr/bin/env bash
# torchdata 0.11.0: with workers, the sampler's part of a StatefulDataLoader's state is as old as the batches that are
# read ahead: the loader asks the sampler for it when it sends a batch to a worker, not when its own state is asked for.
#
# Guess before: its documentation says that a sampler's state_dict is called during the loader's, so a state kept in the
# loop knows what the loop has told the sampler so far (batches that are done, losses, weights).
# Seen: a batch sampler of 12 batches that goes on behind those that the loop has reported done. Without workers the
# loader's state_dict calls the sampler's once, and 7 batches come after a state kept at the 5th, 3 at the 9th.
# With 2 workers it does not call it; 12 batches come and 8: the sampler has forgotten the last 5 reports.
# A batch sampler that counts what it hands out itself gives 7 and 3 in both cases, and so does one without state.
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
from torchdata.stateful_dataloader import StatefulDataLoader


class Stateless:
    done = calls = 0

    def __len__(self):
        return 12

    def __iter__(self):
        for batch in range(self.done, 12):
            self.handing_out(batch)
            yield [2 * batch, 2 * batch + 1]

    def handing_out(self, batch):
        pass

    def report(self):
        """The loop is through with a batch."""


class Stateful(Stateless):
    def state_dict(self):
        self.calls += 1
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Counting(Stateful):
    def handing_out(self, batch):
        self.done = batch + 1


class Told(Stateful):
    def report(self):
        self.done += 1


def resumed(kind, workers, kept_at):
    """How many batches come after a state kept in the loop, and the sampler's calls when it was kept."""
    samplers = kind(), kind()
    first, second = (StatefulDataLoader(range(24), batch_sampler=sampler, num_workers=workers) for sampler in samplers)
    for batch, _ in enumerate(first, 1):
        samplers[0].report()
        if batch == kept_at:
            break
    before = samplers[0].calls
    state = first.state_dict()
    calls = samplers[0].calls - before
    second.load_state_dict(state)
    come = len(list(second))
    print(f"{kind.__name__:9}, {workers} workers, kept at batch {kept_at} of 12: {come:2} come, {calls} calls")
    return come, calls


seen = {(kind, workers): [resumed(kind, workers, kept_at) for kept_at in (5, 9)]
        for kind in (Stateless, Counting, Told) for workers in (0, 2)}
assert seen[Stateless, 0] == seen[Stateless, 2] == seen[Counting, 2] == [(7, 0), (3, 0)]
assert seen[Counting, 0] == seen[Told, 0] == [(7, 1), (3, 1)]
assert seen[Told, 2] == [(12, 0), (8, 0)], "the behaviour has changed"
PY
PYTHONPATH="$folder/site" "$python" -W ignore "$folder/resume.py"
