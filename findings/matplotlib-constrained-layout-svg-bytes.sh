#!/usr/bin/env bash
# matplotlib 3.11.2 with kiwisolver 1.5.1: equal figures with layout="constrained" and subfigures are not the same SVG in
# every process, even with svg.hashsalt set and no date.
#
# Guess before: with a fixed svg.hashsalt and metadata Date None, equal code writes equal bytes.
# Seen: axes get places that differ in the last bit of a float (0.6847056277056275 or …277), in about one process in twenty.
# The places are drawn alike, but the ids of clip paths are hashes of them, so the file's bytes differ: a record under
# version control changes without a change. (matplotlib's own hashsalt is meant for this.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet matplotlib==3.11.2 kiwisolver==1.5.1 2>/dev/null
cat > "$folder/draw.py" <<'PY'
import hashlib, io, sys
import matplotlib
from matplotlib.figure import Figure
matplotlib.rcParams["svg.hashsalt"] = "fixed"
other_objects = [object() for _ in range(int(sys.argv[1]))]  # as any program has: the solver orders by address
figure = Figure((3.4, 3.5), layout="constrained")
above, below = figure.subfigures(2, 1, height_ratios=[2, 1])
for axes in above.subplots(3, 1):
    axes.imshow([[0, 1, 2, 3]])
    axes.set(xticks=[], yticks=[])
    axes.set_title("title", loc="left")
below.subplots().plot([1, 2], [3, 4])
file = io.BytesIO()
figure.savefig(file, format="svg", metadata={"Date": None})
print(hashlib.sha256(file.getvalue()).hexdigest()[:12])
PY
for number in $(seq 1 150); do "$folder/venv/bin/python" "$folder/draw.py" $((number * 37)); done | sort | uniq -c > "$folder/hashes"
echo "matplotlib 3.11.2, kiwisolver 1.5.1: 150 processes, equal figures, $(wc -l < "$folder/hashes") different files"
cat "$folder/hashes"
[ "$(wc -l < "$folder/hashes")" -gt 1 ]
