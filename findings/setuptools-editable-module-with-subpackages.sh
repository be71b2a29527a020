#!/usr/bin/env bash
# setuptools 84.2.1: a module m.py with subpackages m.sub (a module may be a package: it sets __path__) works from a wheel,
# and is an empty namespace after an editable install of the same project.
#
# Guess before: "pip install ." and "pip install -e ." give the same import.
# Seen: the editable finder lists "m" among the namespaces, as "m.sub" is a package whose parent is none, and its path
# hook answers before the mapping to m.py is asked: m has no attributes and no file. Nothing warns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/project/sub"
cd "$folder/project"
cat > m.py <<'PY'
from pathlib import Path
here = Path(__file__).parent
__path__ = [str(home) for home in (here / "m", here) if (home / "sub").is_dir()]
answer = 42
PY
touch sub/__init__.py
cat > pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools==84.2.1"]
build-backend = "setuptools.build_meta"
[project]
name = "m"
version = "1"
[tool.setuptools]
py-modules = ["m"]
packages = ["m.sub"]
[tool.setuptools.package-dir]
"m.sub" = "sub"
TOML
python3 -m venv "$folder/wheel" && python3 -m venv "$folder/editable"
"$folder/wheel/bin/python" -m pip install --quiet . 2>/dev/null
"$folder/editable/bin/python" -m pip install --quiet -e . 2>/dev/null
cd "$folder"
ask='import m, m.sub; print(getattr(m, "answer", "no attribute answer"), m.__file__ and "a file" or "no file")'
wheel=$("$folder/wheel/bin/python" -c "$ask"); editable=$("$folder/editable/bin/python" -c "$ask")
echo "setuptools 84.2.1, installed: $wheel; editable: $editable"
[ "$wheel" = "42 a file" ] && [ "$editable" = "no attribute answer no file" ]
