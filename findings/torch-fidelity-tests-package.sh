#!/usr/bin/env bash
# torch-fidelity 0.4.0: its wheel installs a top-level package "tests" next to "torch_fidelity".
#
# Guess before: a library for FID installs one package, torch_fidelity.
# Seen: site-packages/tests/__init__.py is there too. A project whose own tests/ folder has no __init__.py (pytest's
# importlib mode, no packages) then loses: in a process started by multiprocessing or torch.multiprocessing.spawn,
# "import tests.something" finds torch-fidelity's package, as a package with __init__.py goes before a namespace package
# whatever the order of sys.path entries that hold only a namespace.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --no-deps --target "$folder/site" torch-fidelity==0.4.0 2>/dev/null
mkdir -p "$folder/project/tests/room"
echo "answer = 42" > "$folder/project/tests/room/module.py"
cd "$folder/project"
echo "torch-fidelity 0.4.0 installs: $(ls "$folder/site" | grep -v -e dist-info -e '^bin$' | tr '\n' ' ')"
test -f "$folder/site/tests/__init__.py"
echo -n "alone: " && python3 -c "import tests.room.module as m; print('tests.room.module.answer is', m.answer)"
echo -n "with torch-fidelity installed: "
if PYTHONPATH="$folder/site" python3 -c "import tests.room.module" 2> "$folder/error"; then
  echo "imported: the behaviour has changed" && exit 1
fi
tail -n 1 "$folder/error" && grep -q "No module named 'tests.room'" "$folder/error"
