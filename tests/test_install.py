"""Installed as users install it, and dansm.py alone: in a folder with modules of the user's own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from support import ROOT, make_images

OPTIONS = ["--network", "small", "--width", "8", "--batch", "4", "--match-size", "8", "--steps", "2", "--sample-steps",
           "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    wheel, = folder.glob("*.whl")
    return wheel


def pip(command, *arguments, python=sys.executable):
    """Run pip for an interpreter, which need not have pip itself."""
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), command, "--quiet", *map(str, arguments)],
                   check=True, timeout=300)


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that the project is installed into, alone."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", site, wheel)
    return site


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the project alone installed, that sees torch and the others of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("install", "--no-deps", wheel, python=folder / "bin" / "python")
    return folder


@pytest.fixture
def project(tmp_path):
    """A user's folder, with modules that are called as our folders are."""
    folder = tmp_path / "project"
    make_images(folder / "images", count=8, width=8, height=8)
    (folder / "scale.py").write_text("raise SystemExit('scale is the user\\'s own')\n")
    (folder / "tiny.py").write_text("raise SystemExit('tiny is the user\\'s own')\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").write_text("raise SystemExit('tests are the user\\'s own')\n")
    return folder


def run(command, folder, site):
    """What a command prints, run in `folder` with the installed project, not the checkout."""
    done = ended(command, folder, os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ended(command, folder, environment=None):
    command = [*map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
                          timeout=300)


VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.slow
def test_a_wheel_has_all_that_is_needed_and_no_more(wheel):
    assert wheel.name == f"dansm-{VERSION}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    of_ours = {name for name in names if not name.startswith(f"dansm-{VERSION}.dist-info/")}
    files = [path.relative_to(ROOT) for room in ("scale", "tiny") for path in (ROOT / room).rglob("*")
             if path.is_file() and path.suffix not in (".pyc", ".ipynb")]
    assert of_ours == {"dansm.py", *(f"dansm/{path.as_posix()}" for path in files)}
    assert {"dansm/scale/model/recipes/cifar10.toml", "dansm/tiny/play.html"} <= of_ours
    assert f"dansm-{VERSION}.dist-info/licenses/LICENSE" in names


FIRST = """
import torch
from dansm import NoisePool
pool = NoisePool(100, (4, 8, 8), seed=0)
z = pool(torch.randn(30, 4, 8, 8))
assert z.shape == (30, 4, 8, 8) and z.isfinite().all()
import dansm
from dansm.scale.model.recipe import RECIPES
print(dansm.__file__, len(list(RECIPES.glob("*.toml"))), type(pool).__name__)
"""


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_works_from_an_empty_folder(environment, tmp_path):
    def said(*command):
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = ended([environment / "bin" / command[0], *command[1:]], tmp_path, outside | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    file, recipes, pool = said("python", "-c", FIRST).split()
    assert Path(file).is_relative_to(environment) and pool == "FastPool"
    assert int(recipes) == len(list((ROOT / "scale" / "model" / "recipes").glob("*.toml")))
    for room in ("scale", "tiny"):
        assert said("python", "-c", f"import importlib.util as u; print(u.find_spec('{room}'))") == "None\n"
    assert said("dansm", "--version") == said("python", "-m", "dansm", "--version") == f"dansm {VERSION}\n"
    assert "toy" in said("dansm", "--help")
    said("python", "-m", "dansm", "toy", "--shape", "two-moons", "--steps", "2", "--out", "toy")
    assert (tmp_path / "toy" / "results.csv").exists() and (tmp_path / "toy" / "cells.png").exists()


@pytest.mark.slow
def test_nothing_is_installed_but_dansm(site):
    names = {path.name for path in site.iterdir()} - {"__pycache__", "bin"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"dansm.py", "dansm"}
    assert {path.name for path in (site / "dansm").iterdir()} - {"__pycache__"} == {"scale", "tiny"}


USED = """
import sys, torch, dansm
pool = dansm.NoisePool(10, (2,), seed=0)
print(pool(torch.zeros(3, 2)).shape[0], type(pool).__name__, "user" if "scale" in sys.modules else "ours")
import dansm.scale.matching.gpu, dansm.tiny.shapes
print(dansm.__file__)
"""


@pytest.mark.slow
def test_a_users_own_scale_and_tiny_are_not_taken_for_ours(site, project):
    said = run([sys.executable, "-c", USED], project, site)
    assert said.split() == ["3", "FastPool", "ours", str(site / "dansm.py")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["python -m dansm", "dansm", "torchrun"])
def test_training_by_every_way_to_call_the_command(site, project, how):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dansm"]
    command = {"python -m dansm": [sys.executable, "-m", "dansm"], "dansm": [sys.executable, site / "bin" / "dansm"],
               "torchrun": torchrun}[how]
    said = run([*command, "train", "images", *OPTIONS, "--out", "out"], project, site)
    assert (project / "out" / "checkpoint-00000002.pt").exists() and "8 images in 2 steps" in said


BARE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
import dansm
dansm.main(sys.argv[1:])
"""
EXTRAS = {"matplotlib", "sklearn", "safetensors", "diffusers", "lmdb", "torch_fidelity", "efficientnet_lite_pytorch",
          "lap"}


@pytest.mark.slow
def test_without_the_extras_a_command_works_or_names_the_one_it_needs(project):
    (project / "store").mkdir()
    (project / "store" / "data.mdb").write_bytes(b"")
    (project / "weights.safetensors").write_bytes(b"")
    script = BARE.format(names=EXTRAS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    train = ["train", "images", *OPTIONS, "--out", "run"]
    for command, extra in [
            (["--help"], None), (train, None), (["toy"], "toy"), (["export", "run"], "train"),
            (["sample", "weights.safetensors"], "train"),
            (["train", "store", *OPTIONS], "lsun"), (["evaluate", "run", "--count", "4"], "eval")]:
        done = ended([sys.executable, "-c", script, *command], project, environment)
        if extra is None:
            assert done.returncode == 0, (command, done.stderr)
        else:
            assert done.returncode == 2 and f"dansm[{extra}]" in done.stderr, (command, done.stderr)
            assert done.stderr.count("\n") == 1, (command, done.stderr)


ALONE = """
import torch, dansm
torch.manual_seed(0)
pool = dansm.NoisePool(10, (3, 8, 8), seed=0)
pairs = dansm.pairs(torch.randn(12, 3, 8, 8).split(4), pool=pool)
run = dansm.Training(dansm.UNet(size=8, **dansm.NETWORKS["small"] | dict(width=8)))
losses = [loss.item() for loss in dansm.train(run, dansm.RectifiedFlow(), pairs)]
coupling = dansm.Semidiscrete(torch.randn(6, 5), seed=0)
coupling.solve()
assert coupling.draw(9)[0].shape == (9, 5)
print(type(pool).__name__, len(losses), dansm.__file__)
"""


@pytest.mark.slow
def test_dansm_alone_in_an_empty_folder_matches_and_trains_the_plain_way(tmp_path):
    shutil.copy(ROOT / "dansm.py", tmp_path)
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "__init__.py").write_text("raise SystemExit('scale is the user\\'s own')\n")
    done = ended([sys.executable, "-c", ALONE], tmp_path)
    assert done.stdout.split() == ["NoisePool", "3", str(tmp_path / "dansm.py")], done.stderr
    done = ended([sys.executable, "dansm.py", "toy"], tmp_path)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "dansm: "), done.stderr


VENDORED = """
import dansm, torch
from own import dansm as copied
x = torch.randn(20, 3)
for module in (dansm, copied):
    print(type(module.NoisePool(10, (3,), seed=0)).__name__, type(module.Semidiscrete(x, seed=0)).__name__)
assert torch.equal(dansm.NoisePool(10, (3,), seed=0)(x), copied.NoisePool(10, (3,), seed=0)(x))
try:
    copied.NoisePool(10, (3,), groups=2)
except copied.BadInput as refusal:
    print(str(refusal).split(":")[0].replace(" ", "-"))
"""


@pytest.mark.slow
def test_a_copy_in_another_package_goes_the_plain_way_beside_the_installed_project(site, tmp_path):
    (tmp_path / "own").mkdir()
    shutil.copy(ROOT / "dansm.py", tmp_path / "own")
    said = run([sys.executable, "-c", VENDORED], tmp_path, site).split()
    assert said == ["FastPool", "FastSemidiscrete", "NoisePool", "Semidiscrete", "groups-is-2"]
