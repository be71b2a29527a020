"""Checkpoints there and back: what a kill, a full disk, a changed bit or a stranger's file may not do."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import types
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from dansm.scale.base.locks import owning
from dansm.scale.model import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import same

import dansm
from dansm import BadInput

TINY = dict(channels=1, size=4, width=4, multipliers=[1], blocks=1, attention_at=[], dropout=0.0)


def trained(flow="rectified", step=7, decays=(0.9999,)):
    """A state as a training run saves it, and the network whose average it holds."""
    run = dansm.Training(dansm.UNet(**TINY))
    for weight in run.average.parameters():
        torch.nn.init.normal_(weight)
    weights = run.average.state_dict()
    averages = [{"decay": decay, "weights": {name: weight + number for name, weight in weights.items()}}
                for number, decay in enumerate(decays)]
    pool = dansm.NoisePool(5, (1, 4, 4), seed=0)
    pool(torch.randn(3, 1, 4, 4))
    training = {"net": run.net.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step,
                "averages": averages}
    return {"network": run.net.settings, "recipe": {"flow": flow, "times": "uniform"}, "training": training,
            "ranks": [{"pool": pool.state_dict(), "random": {"cpu": torch.get_rng_state()}}],
            "data": "digits"}, run.average


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def saved(out, *steps):
    """Checkpoints of those steps, none of them removed."""
    return [checkpoint.save(out, trained(step=step)[0], keep=99) for step in steps]


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------- there and back


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    state, _ = trained()
    path = checkpoint.save(tmp_path, state)
    assert path == tmp_path / "checkpoint-00000007.pt" and names_of(tmp_path) == [path.name]
    loaded = checkpoint.load(path)
    assert loaded.pop("dansm") == checkpoint.VERSION == 2
    assert same(loaded, state)


def test_a_checkpoint_is_a_whole_zip_archive_that_torch_reads_too(tmp_path):
    path = checkpoint.save(tmp_path, trained()[0])
    with zipfile.ZipFile(path) as parts:
        assert parts.testzip() is None and parts.comment.startswith(b"sha256:")
    assert same(torch.load(path, weights_only=True), checkpoint.load(path))


def test_the_last_ones_are_kept(tmp_path):
    for step in (5, 10, 100_000_000, 200_000_000):
        path = checkpoint.save(tmp_path, trained(step=step)[0])
        assert checkpoint.newest(tmp_path) == path
    assert names_of(tmp_path) == ["checkpoint-00000010.pt", "checkpoint-100000000.pt", "checkpoint-200000000.pt"]
    checkpoint.save(tmp_path, trained(step=200_000_001)[0], keep=1)
    assert names_of(tmp_path) == ["checkpoint-200000001.pt"]
    checkpoint.save(tmp_path, trained(step=200_000_001)[0], keep=0)  # the one just written stays
    assert names_of(tmp_path) == ["checkpoint-200000001.pt"]


def test_a_run_that_went_on_from_an_earlier_one_drops_the_later(tmp_path):
    saved(tmp_path, 10, 20, 30)
    checkpoint.save(tmp_path, trained(step=25)[0])
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-00000025.pt", "checkpoint-00000020.pt", "checkpoint-00000010.pt"]


def test_what_does_not_lead_to_the_new_one_is_dropped(tmp_path):
    first, _, third = saved(tmp_path, 10, 20, 30)
    checkpoint.save(tmp_path, trained(step=40)[0], drop=[third, first])
    assert names_of(tmp_path) == ["checkpoint-00000020.pt", "checkpoint-00000040.pt"]
    checkpoint.save(tmp_path, trained(step=40)[0], drop=checkpoint.checkpoints(tmp_path))
    assert names_of(tmp_path) == ["checkpoint-00000040.pt"]


def test_other_files_are_left_alone(tmp_path):
    others = ["checkpoint-best.pt", "checkpoint.pt", "checkpoint-12.pt", "checkpoint-00000001.pt.bak", "log.jsonl"]
    for name in others:
        (tmp_path / name).write_text("precious")
    saved(tmp_path, 1, 2)
    checkpoint.save(tmp_path, trained(step=3)[0], keep=1, drop=checkpoint.checkpoints(tmp_path))
    assert names_of(tmp_path) == sorted([*others, "checkpoint-00000003.pt"])
    assert all((tmp_path / name).read_text() == "precious" for name in others)


def test_an_empty_or_missing_folder_holds_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "missing") is None
    assert checkpoint.load_newest(tmp_path, print) is None


# ------------------------------------------------------------------------------- a save that is cut short


def killed(*_, **__):
    raise SystemExit("killed")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stop", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("how", [killed, full])
def test_a_save_that_is_cut_short_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, stop, how):
    (before,) = saved(tmp_path, 7)
    content = before.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"scale.checkpoint.{stop}", how)
        with pytest.raises(SystemExit if how is killed else BadInput) as error:
            checkpoint.save(tmp_path, trained(step=9)[0], keep=1)
    assert names_of(tmp_path) == [before.name] and before.read_bytes() == content
    if how is full:
        assert str(tmp_path / "checkpoint-00000009.pt") in str(error.value) and "No space left" in str(error.value)
    checkpoint.save(tmp_path, trained(step=9)[0], keep=1)
    assert names_of(tmp_path) == ["checkpoint-00000009.pt"]


def test_the_older_go_only_after_the_new_one_has_its_name_and_is_on_the_disk(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    steps = []

    def note(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **settings: steps.append(name) or call(*given, **settings))

    note(os, "fsync"), note(os, "replace"), note(Path, "unlink")
    checkpoint.save(tmp_path, trained(step=3)[0], keep=1)
    assert steps == ["fsync", "replace", "fsync", "unlink", "unlink"]


@contextmanager
def limited_files(size):
    """No file may grow beyond so many bytes, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1, 500, 20_000, 60_000])
def test_a_disk_that_takes_only_a_part_is_said_in_one_line(tmp_path, size):
    """A real limit on the size of files, as torch's own writer meets it."""
    before = checkpoint.save(tmp_path, trained(step=1)[0]).read_bytes()
    message = r"checkpoint-00000002\.pt cannot be written: File too large; .*untouched"
    with limited_files(size), pytest.raises(BadInput, match=message) as error:
        checkpoint.save(tmp_path, trained(step=2)[0])
    assert "\n" not in str(error.value)
    assert names_of(tmp_path) == ["checkpoint-00000001.pt"]
    assert (tmp_path / "checkpoint-00000001.pt").read_bytes() == before


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_disk_that_is_full_in_the_middle_of_a_tensor_is_named_not_torchs_own_word_for_it(tmp_path, share):
    """As a large tensor meets it, which goes to the disk at once, past Python's buffer."""
    state, _ = trained(step=2)
    state["training"]["net"]["large"] = torch.zeros(1_000_000)
    saved(tmp_path, 1)
    with limited_files(int(share * 4_000_000)), pytest.raises(BadInput) as error:
        checkpoint.save(tmp_path, state)
    assert "checkpoint-00000002.pt cannot be written: File too large; what was saved" in str(error.value)
    assert names_of(tmp_path) == ["checkpoint-00000001.pt"]


def test_another_error_of_torch_is_not_taken_for_the_disks(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("scale.checkpoint.torch.save", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        checkpoint.save(tmp_path, trained()[0])
    assert names_of(tmp_path) == []


def test_what_a_kill_left_half_written_goes_at_the_next_save_or_lock_and_is_never_read(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / "checkpoint-00000002.partial"
    half.write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000001.pt" and half.exists()
    checkpoint.save(tmp_path, trained(step=3)[0])
    assert not half.exists()
    half.write_bytes(b"half")
    with owning(tmp_path):
        assert not half.exists()


# ------------------------------------------------------------------------------- damage and strangers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint's path and bytes."""
    path = checkpoint.save(tmp_path_factory.mktemp("whole"), trained()[0])
    return path, path.read_bytes()


@settings(max_examples=400)
@given(st.data())
def test_a_changed_bit_anywhere_is_refused(whole, data):
    path, content = whole
    tail = st.integers(len(content) - 12_000, len(content) - 1)  # the table of contents and the checksum
    byte = data.draw(st.integers(0, len(content) - 1) | tail)
    changed = bytearray(content)
    changed[byte] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    with pytest.raises(BadInput, match=r"checkpoint-00000007\.pt cannot be used.*expected"):
        checkpoint.load(path)


@settings(max_examples=100)
@given(st.data())
def test_a_file_cut_short_or_grown_is_refused(whole, data):
    path, content = whole
    size = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 300, len(content) - 1))
    for changed in (content[:size], content[size:], content + content[:1 + size]):
        if changed != content:
            path.write_bytes(changed)
            with pytest.raises(BadInput, match="cannot be used"):
                checkpoint.load(path)


def test_what_is_whole_is_still_read_after_those_tests(whole):
    path, content = whole
    path.write_bytes(content)
    assert checkpoint.load(path)["training"]["step"] == 7


@pytest.mark.parametrize("part", ["network", "recipe", "training", "ranks"])
def test_a_checkpoint_that_lacks_a_part_is_refused_naming_it(tmp_path, part):
    state, _ = trained()
    del state[part]
    checkpoint.write(tmp_path / "a.pt", state)
    with pytest.raises(BadInput, match=rf"a\.pt is no checkpoint of version 2 but without {part}: expected"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("training", [{"step": 1.5}, {"step": -1}, {"averages": []}, {"averages": {}},
                                      {"averages": [{"decay": 0.9}]}, {"averages": [{"weights": {}, "decay": "x"}]}])
def test_a_training_of_other_parts_is_refused(tmp_path, training):
    state, _ = trained()
    checkpoint.write(tmp_path / "a.pt", {**state, "training": {**state["training"], **training}})
    with pytest.raises(BadInput, match=r"without (a step|averages)"):
        checkpoint.load(tmp_path / "a.pt")


class Bomb:
    """Pickled, it is the order to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_checkpoints(folder):
    """Files that are no checkpoint of ours, by what they are."""
    state = trained()[0]
    checkpoint.write(folder / "whole.pt", state)
    whole = (folder / "whole.pt").read_bytes()
    (folder / "text.pt").write_text("a text")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "shorter by a byte.pt").write_bytes(whole[:-1])
    (folder / "pickle.pt").write_bytes(pickle.dumps(Bomb(folder / "bang")))
    torch.save({"dansm": checkpoint.VERSION, "x": Bomb(folder / "bang")}, folder / "code.pt")
    checkpoint.write(folder / "code, with a checksum.pt", {**state, "x": Bomb(folder / "bang")})
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    checkpoint.write(folder / "later.pt", {**state, "dansm": checkpoint.VERSION + 1})
    (folder / "folder.pt").mkdir()
    (folder / "whole.pt").unlink()
    return [*sorted(folder.iterdir()), folder / "missing.pt"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_is_refused_by_name_and_no_code_in_it_runs(tmp_path):
    paths = broken_checkpoints(tmp_path)
    assert len(paths) == 12
    for path in paths:
        with pytest.raises(BadInput) as refused:
            checkpoint.load(path)
        said = str(refused.value)
        assert str(path) in said and "expected" in said and "\n" not in said, path
        assert "version 3" in said or path.stem != "later", said
        assert "may be code" in said or path.stem != "code, with a checksum", said
    assert not (tmp_path / "bang").exists()


def test_the_bomb_of_these_tests_would_go_off(tmp_path):
    checkpoint.write(tmp_path / "a.pt", {"x": Bomb(tmp_path / "bang")})
    assert not (tmp_path / "bang").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)["x"].close()
    assert (tmp_path / "bang").exists()


def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    saved(tmp_path, 1)
    monkeypatch.setattr("scale.checkpoint.torch.load", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.load_newest(tmp_path, print)


def test_a_damaged_newest_is_named_and_the_one_before_it_used(tmp_path):
    first, second, third, fourth = saved(tmp_path, 1, 2, 3, 4)
    flip(second, 30_000)
    third.write_bytes(third.read_bytes()[:-1])
    checkpoint.write(fourth, {**trained(step=4)[0], "dansm": 9})
    said = []
    path, state = checkpoint.load_newest(tmp_path, said.append)
    assert path == first and state["training"]["step"] == 1
    assert [line.partition(" ")[0] for line in said] == [str(fourth), str(third), str(second)]
    assert all(line.endswith("checkpoint-00000001.pt is used in its place") for line in said)
    assert "version 9" in said[0] and "cut short" in said[1] and "changed" in said[2]
    checkpoint.save(tmp_path, trained(step=2)[0])
    assert names_of(tmp_path) == [first.name, second.name] and checkpoint.load(second)["training"]["step"] == 2


def test_where_none_can_be_read_all_are_named(tmp_path):
    for path in saved(tmp_path, 1, 2):
        flip(path, 1000)
    with pytest.raises(BadInput) as refused:
        checkpoint.load_newest(tmp_path, print)
    said = f"{tmp_path} holds no checkpoint that can be read (checkpoint-00000002.pt, checkpoint-00000001.pt): "
    assert str(refused.value).startswith(said + str(tmp_path / "checkpoint-00000002.pt"))


def test_a_folder_with_a_checkpoint_of_version_1_is_not_taken_for_an_empty_one(tmp_path):
    torch.save({"dansm": 1, "network": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match=r"checkpoint\.pt.*of another version"):
        checkpoint.load_newest(tmp_path, print)


# ------------------------------------------------------------------------------- models


def test_the_model_of_a_checkpoint_is_the_average_ready_to_sample(tmp_path):
    state, average = trained()
    path = checkpoint.save(tmp_path, state)
    for place in (path, tmp_path):
        net, flow, about = checkpoint.load_model(place, "cpu", "heun")
        x, t = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 900.0])
        assert torch.equal(net(x, t), average(x, t)) and not net.training
        assert isinstance(flow, dansm.RectifiedFlow) and flow.solver == "heun"
        assert (about["file"], about["step"], about["decay"], about["data"]) == (path, 7, 0.9999, "digits")


def test_a_folders_model_is_of_the_newest_that_can_be_read(tmp_path):
    first, second = saved(tmp_path, 1, 2)
    flip(second, 5000)
    said = []
    assert checkpoint.load_model(tmp_path, "cpu", say=said.append)[2]["file"] == first
    assert len(said) == 1 and str(second) in said[0]


def test_a_diffusion_has_no_solver_to_choose(tmp_path):
    path = checkpoint.save(tmp_path, trained("diffusion")[0])
    assert isinstance(checkpoint.load_model(path, "cpu")[1], dansm.Diffusion)
    with pytest.raises(BadInput, match=r"--solver is heun.*diffusion"):
        checkpoint.load_model(path, "cpu", "heun")


@pytest.mark.parametrize(("latents", "bound"), [(None, 1.0), ({}, None), ({"factor": 0.5}, None)])
def test_a_diffusion_is_bounded_where_the_run_was_of_images_whatever_their_channels(tmp_path, latents, bound):
    path = checkpoint.save(tmp_path, trained("diffusion")[0] | {"latents": latents})
    checkpoint.export(path, tmp_path / "weights.safetensors")
    for place in (path, tmp_path / "weights.safetensors"):
        _, flow, about = checkpoint.load_model(place, "cpu")
        assert flow.bound == bound and about["latents"] == latents


@pytest.mark.parametrize(("channels", "latents"), [(1, None), (3, None), (4, {})])
def test_what_earlier_versions_wrote_tells_images_by_their_channels(tmp_path, channels, latents):
    state, net = trained()[0], dansm.UNet(**TINY | {"channels": channels})
    state |= {"network": net.settings}
    state["training"]["averages"][0]["weights"] = net.state_dict()
    checkpoint.export(checkpoint.save(tmp_path, state), tmp_path / "weights.safetensors")
    with checkpoint.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        beside = {key: value for key, value in file.metadata().items() if key != "latents"}
    save_file(net.state_dict(), tmp_path / "weights.safetensors", beside)
    for place in (tmp_path, tmp_path / "weights.safetensors"):
        assert checkpoint.load_model(place, "cpu")[2]["latents"] == latents


def test_the_target_of_a_recipe_is_that_of_its_flow(tmp_path):
    for target in dansm.TARGETS:
        state = trained("diffusion")[0]
        state["recipe"]["target"] = target
        assert checkpoint.load_model(checkpoint.save(tmp_path, state), "cpu")[1].target == target


def test_what_is_exported_is_the_average_and_says_how_to_sample_from_it(tmp_path):
    state, average = trained(decays=(0.5, 0.9))
    path, out = checkpoint.save(tmp_path, state), tmp_path / "deep" / "weights.safetensors"
    checkpoint.export(tmp_path, out)
    assert same(load_file(out), average.state_dict()) and names_of(out.parent) == [out.name]
    with checkpoint.safe_open(out, "pt") as file:
        beside = {key: json.loads(value) for key, value in file.metadata().items()}
    assert beside == {"dansm": 2, "network": state["network"], "flow": "rectified", "times": "uniform", "step": 7,
                      "decay": 0.5, "data": "digits", "recipe": state["recipe"], "latents": None,
                      "images": None}
    exported, direct = (checkpoint.load_model(place, "cpu", "heun") for place in (out, path))
    assert same(exported[0].state_dict(), direct[0].state_dict()) and not exported[0].training
    assert exported[1].solver == "heun"
    assert {**exported[2], "file": None} == {**direct[2], "file": None} and exported[2]["file"] == out


def test_another_average_is_asked_for_by_its_number(tmp_path):
    state, _ = trained(decays=(0.5, 0.9))
    checkpoint.save(tmp_path, state)
    assert checkpoint.export(tmp_path, tmp_path / "a.safetensors", average=1)["decay"] == 0.9
    assert same(load_file(tmp_path / "a.safetensors"), state["training"]["averages"][1]["weights"])
    with pytest.raises(BadInput, match=r"--average is 2: .* holds 0: decay 0\.5, 1: decay 0\.9; expected one of 0 … 1"):
        checkpoint.load_model(tmp_path, "cpu", average=2)
    with pytest.raises(BadInput, match="--average is 1"):
        checkpoint.load_model(tmp_path / "a.safetensors", "cpu", average=1)


def without(part):
    return lambda weights, beside: beside.pop(part)


def damaged_exports():
    """(what is done to the weights and to what stands beside them, what is said of it)."""
    first = "first.weight"
    return [(without("network"), "lacks network"), (without("flow"), "lacks flow"), (without("dansm"), "lacks dansm"),
            (lambda weights, beside: beside.clear(), "lacks dansm, network, flow"),
            (lambda weights, beside: beside.update(dansm="3"), "version 3"),
            (lambda weights, beside: beside.update(step='"x"'), "another's"),
            (lambda weights, beside: beside.update(network="{"), "cannot be read"),
            (lambda weights, beside: beside.update(network="{}"), "lacks the weights"),
            (lambda weights, beside: beside.update(network='{"colour": 3}'), "is no checkpoint"),
            (lambda weights, beside: beside.update(flow='"curved"'), "is no checkpoint"),
            (lambda weights, beside: weights.pop(first), f"lacks the weights {first}:"),
            (lambda weights, beside: weights.update(more=torch.zeros(2)), "has the weights more,"),
            (lambda weights, beside: weights.update({first: torch.zeros(2, 3)}), rf"{first} of shape \(2, 3\)")]


@pytest.mark.parametrize(("damage", "words"), damaged_exports())
def test_weights_of_others_are_refused_naming_what_is_missing(tmp_path, damage, words):
    out = tmp_path / "weights.safetensors"
    checkpoint.save(tmp_path, trained()[0])
    about, weights = checkpoint.export(tmp_path, out), load_file(out)
    beside = {key: json.dumps(about[key]) for key in checkpoint.DESCRIBED}
    damage(weights, beside)
    save_file(weights, out, beside or None)
    with pytest.raises(BadInput, match=words) as refused:
        checkpoint.load_model(out, "cpu")
    assert str(out) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"a text", b"\xff" * 100, None])
def test_what_is_no_safetensors_is_refused(tmp_path, content):
    out = tmp_path / "weights.safetensors"
    if content is not None:
        out.write_bytes(content)
    with pytest.raises(BadInput, match=r"weights\.safetensors .*expected a file that dansm export wrote"):
        checkpoint.load_model(out, "cpu")


def test_a_truncated_export_is_refused(tmp_path):
    out = tmp_path / "weights.safetensors"
    checkpoint.save(tmp_path, trained()[0])
    checkpoint.export(tmp_path, out)
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoint.load_model(out, "cpu")


def test_an_export_to_another_kind_of_file_or_of_nothing_is_refused_and_writes_nothing(tmp_path):
    out = tmp_path / "out" / "weights.safetensors"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"weights\.pt: expected a name that ends in \.safetensors"):
        checkpoint.export(tmp_path, tmp_path / "weights.pt")
    with pytest.raises(BadInput, match="empty holds no checkpoint"):
        checkpoint.export(tmp_path / "empty", out)
    with pytest.raises(BadInput, match="exported already"):
        checkpoint.export(out, out)
    state, _ = trained()
    del state["training"]["averages"][0]["weights"]["first.weight"]
    checkpoint.save(tmp_path, state)
    with pytest.raises(BadInput, match=r"lacks the weights first\.weight"):
        checkpoint.export(tmp_path, out)
    assert not out.parent.exists()


def test_an_export_onto_a_full_disk_leaves_the_one_before(tmp_path):
    out = tmp_path / "weights.safetensors"
    checkpoint.save(tmp_path, trained()[0])
    checkpoint.export(tmp_path, out)
    before = out.read_bytes()
    with limited_files(1000), pytest.raises(BadInput, match=r"weights\.safetensors cannot be written: .*too large"):
        checkpoint.export(tmp_path, out)
    assert out.read_bytes() == before and not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------- one run at a time

HOLD = """if True:
    import sys
    from pathlib import Path
    from dansm.scale.base.locks import owning as lock
    with lock(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains into the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_into_a_folder_is_refused_naming_the_first(tmp_path, holder):
    host = os.uname().nodename
    for _ in range(2):  # a refusal leaves the lock as it is
        with pytest.raises(BadInput, match=f"process {holder.pid} on {host}") as refused, owning(tmp_path):
            pytest.fail("two at once")
        assert str(tmp_path) in str(refused.value) and "expected" in str(refused.value)


def test_a_refused_run_removes_nothing_of_the_first(tmp_path, holder):
    (tmp_path / "checkpoint-00000002.partial").write_bytes(b"being written")
    with pytest.raises(BadInput), owning(tmp_path):
        pass
    assert (tmp_path / "checkpoint-00000002.partial").exists()


def test_a_kill_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with owning(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_lock_ends_with_what_it_is_around(tmp_path):
    with pytest.raises(ZeroDivisionError), owning(tmp_path):
        raise ZeroDivisionError
    with owning(tmp_path), pytest.raises(BadInput, match=f"process {os.getpid()}"), owning(tmp_path):
        pass


def test_a_file_system_without_locks_lets_one_in_with_a_warning(tmp_path, monkeypatch):
    import fcntl

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.warns(UserWarning, match="cannot be locked"), owning(tmp_path):
        pass


def test_without_fcntl_a_byte_of_the_file_is_locked(tmp_path, monkeypatch):
    """As on Windows, whose module stands in here as it is documented."""
    taken = set()

    def locking(descriptor, mode, count):
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        assert (mode, count) == ("without waiting", 1) and at > 1000  # nobody may read what is locked
        if at in taken:
            raise OSError(errno.EACCES, "Permission denied")
        taken.add(at)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK="without waiting", locking=locking))
    with owning(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(BadInput, match=f"process {os.getpid()} on"), owning(tmp_path):
            pass
