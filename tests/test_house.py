"""The structure of the house: no import circle, arrows one way, nothing heavy where it is not needed."""

import ast
import subprocess
import sys

import pytest
from support import ROOT

MAY_IMPORT = {  # room: the rooms below it
    "dansm": set(),
    "base": {"dansm"},
    "tiny": {"dansm", "base"},
    "matching": {"dansm", "base"},
    "data": {"dansm", "base"},
    "model": {"dansm", "base", "matching", "data"},
    "evaluate": {"dansm", "base", "data", "model"},
    "train": {"dansm", "base", "matching", "data", "model", "evaluate"},
    "studies": {"dansm", "base", "matching", "data", "model", "evaluate", "train"},
    "bench": {"dansm", "base", "matching", "data", "model", "evaluate", "train", "studies"},
    "commands": {"dansm", "base", "tiny", "matching", "data", "model", "evaluate", "train", "studies", "bench"},
}
FILES = [ROOT / "dansm.py", *sorted((ROOT / "scale").rglob("*.py")), *sorted((ROOT / "tiny").glob("*.py"))]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts) if parts == ("dansm",) else ".".join(("dansm", *parts))
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module):
    parts = module.split(".")
    if len(parts) == 1:
        return "dansm"
    return parts[1] if parts[1] == "tiny" or len(parts) == 2 else parts[2]


def imports_of(module):
    """(module, whether at import time) of every import of ours, in functions too."""
    path = MODULES[module]
    tree = ast.parse(path.read_text())
    at_import_time = {id(node) for statement in tree.body for node in walk_outside_functions(statement)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in MODULES else start for alias in node.names]
        for name in names:
            if name in MODULES and name != module:
                yield name, id(node) in at_import_time


def walk_outside_functions(node):
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from walk_outside_functions(child)


def test_no_module_imports_itself_by_way_of_others():
    below = {module: {name for name, at_import in imports_of(module) if at_import} for module in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module):], module])
        if module not in done:
            path.append(module)
            for name in sorted(below[module]):
                visit(name)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_run_one_way(module):
    room = room_of(module)
    rooms = {room_of(name) for name, _ in imports_of(module) if name not in ("dansm.scale", "dansm.tiny")}
    assert rooms <= MAY_IMPORT.get(room, set()) | {room}


def test_dansm_reaches_into_scale_at_two_places_and_has_at_most_900_lines():
    text = (ROOT / "dansm.py").read_text()
    assert text.count('scaled("') == 2  # matching and the commands
    assert not [name for name, at_import_time in imports_of("dansm")]
    assert len(text.splitlines()) <= 900
    pool = next(node for node in ast.parse(text).body if getattr(node, "name", "") == "NoisePool")
    assert pool.end_lineno - pool.lineno < 110


LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
import dansm
dansm.NoisePool(10, (2,), seed=0)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_dansm_loads_nothing_that_it_may_not_need():
    command = [sys.executable, "-c", LOADED, str(ROOT)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "scipy", "matplotlib", "sklearn", "typer", "PIL", "diffusers"} & set(loaded)
