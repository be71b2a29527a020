"""Installed as users install it, and dansm.py alone: in a folder with modules of the user's own."""

import os
import shutil
import subprocess
import sys

import pytest
from support import ROOT, make_images

OPTIONS = ["--network", "small", "--width", "8", "--batch", "4", "--match-size", "8", "--steps", "2", "--sample-steps",
           "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the project is installed into, alone."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    return site


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
