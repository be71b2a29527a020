"""Checkpoints there and back: what a kill, a full disk, a changed bit or a stranger's file may not do."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import state_to_save
from support import limited_files, same

from dansm import BadInput
from dansm.scale.model import checkpoint


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def saved(out, *steps):
    """Checkpoints of these steps, none of them removed."""
    return [checkpoint.save(out, state_to_save(step=step), keep=99) for step in steps]


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------- there and back


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    state = state_to_save(decays=(0.9, 0.5))
    path = checkpoint.save(tmp_path, state)
    assert path == tmp_path / "checkpoint-00000007.pt" and names_of(tmp_path) == [path.name]
    loaded = checkpoint.load(path)
    assert loaded.pop("dansm") == checkpoint.VERSION == 2
    assert same(loaded, state)


def test_a_checkpoint_is_a_whole_zip_archive_that_torch_reads_too(tmp_path):
    path = checkpoint.save(tmp_path, state_to_save())
    with zipfile.ZipFile(path) as parts:
        assert parts.testzip() is None and parts.comment.startswith(b"sha256:")
    assert same(torch.load(path, weights_only=True), checkpoint.load(path))


def test_old_names_of_settings_are_read_as_the_new_ones(tmp_path):
    old = {"pool": "bf16", "fast": True, "decay": (0.9,), "resident": "no", "lr": 0.1}
    path = checkpoint.save(tmp_path, state_to_save(recipe=old))
    new = {"pool_dtype": "bf16", "tf32": True, "ema_decay": (0.9,), "data_on_gpu": "no", "lr": 0.1}
    assert checkpoint.load(path)["recipe"] == state_to_save(recipe=new)["recipe"]


def test_the_last_ones_are_kept(tmp_path):
    for step in (5, 10, 100_000_000, 200_000_000):
        path = checkpoint.save(tmp_path, state_to_save(step=step))
        assert checkpoint.newest(tmp_path) == path
    assert names_of(tmp_path) == ["checkpoint-00000010.pt", "checkpoint-100000000.pt", "checkpoint-200000000.pt"]
    checkpoint.save(tmp_path, state_to_save(step=200_000_001), keep=1)
    assert names_of(tmp_path) == ["checkpoint-200000001.pt"]


def test_a_run_that_resumed_from_an_earlier_one_drops_the_later(tmp_path):
    saved(tmp_path, 10, 20, 30)
    checkpoint.save(tmp_path, state_to_save(step=25))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-00000025.pt", "checkpoint-00000020.pt", "checkpoint-00000010.pt"]


def test_what_does_not_lead_to_the_new_one_is_dropped(tmp_path):
    first, _, third = saved(tmp_path, 10, 20, 30)
    checkpoint.save(tmp_path, state_to_save(step=40), drop=[third, first])
    assert names_of(tmp_path) == ["checkpoint-00000020.pt", "checkpoint-00000040.pt"]
    checkpoint.save(tmp_path, state_to_save(step=40), drop=checkpoint.checkpoints(tmp_path))
    assert names_of(tmp_path) == ["checkpoint-00000040.pt"]


def test_other_files_are_left_alone(tmp_path):
    others = ["checkpoint-best.pt", "checkpoint.pt", "checkpoint-12.pt", "checkpoint-00000001.pt.bak", "log.jsonl"]
    for name in others:
        (tmp_path / name).write_text("precious")
    saved(tmp_path, 1, 2)
    checkpoint.save(tmp_path, state_to_save(step=3), keep=1, drop=checkpoint.checkpoints(tmp_path))
    assert names_of(tmp_path) == sorted([*others, "checkpoint-00000003.pt"])
    assert all((tmp_path / name).read_text() == "precious" for name in others)


def test_an_empty_or_missing_folder_holds_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "missing") is None
    assert checkpoint.load_newest(tmp_path) is None


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
        patch.setattr(stop, how)
        with pytest.raises(SystemExit if how is killed else BadInput) as error:
            checkpoint.save(tmp_path, state_to_save(step=9), keep=1)
    assert names_of(tmp_path) == [before.name] and before.read_bytes() == content
    if how is full:
        assert str(tmp_path / "checkpoint-00000009.pt") in str(error.value) and "No space left" in str(error.value)
    checkpoint.save(tmp_path, state_to_save(step=9), keep=1)
    assert names_of(tmp_path) == ["checkpoint-00000009.pt"]


def test_the_older_go_only_after_the_new_one_has_its_name_and_is_on_the_disk(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    steps = []

    def note(owner, name):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **settings: steps.append(name) or call(*given, **settings))

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        note(owner, name)
    checkpoint.save(tmp_path, state_to_save(step=3), keep=1)
    assert steps == ["fsync", "replace", "fsync", "unlink", "unlink"]


@pytest.mark.parametrize(("size", "more"), [(0, 0), (500, 0), (20_000, 0), (3_600_000, 1_000_000)])
def test_a_disk_that_takes_only_a_part_is_one_line_and_leaves_the_older(tmp_path, size, more):
    """A limit on the size of files, as torch's own writer meets it: in small pieces, and within a large tensor."""
    (before,) = saved(tmp_path, 1)
    content = before.read_bytes()
    state = state_to_save(step=2)
    state["training"]["net"]["large"] = torch.zeros(more)
    with limited_files(size), pytest.raises(BadInput, match=r"checkpoint-00000002\.pt.*File too large") as error:
        checkpoint.save(tmp_path, state)
    assert "\n" not in str(error.value)
    assert names_of(tmp_path) == [before.name] and before.read_bytes() == content


def test_what_a_kill_left_half_written_is_never_read_and_goes_at_the_next_save(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / "checkpoint-00000002.pt.partial"
    half.write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "checkpoint-00000001.pt" and half.exists()
    checkpoint.save(tmp_path, state_to_save(step=3))
    assert not half.exists()


# ------------------------------------------------------------------------------- damage and strangers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint's path and bytes."""
    path = checkpoint.save(tmp_path_factory.mktemp("whole"), state_to_save())
    return path, path.read_bytes()


@settings(max_examples=200)
@given(st.data())
def test_a_changed_bit_anywhere_is_refused(whole, data):
    path, content = whole
    tail = st.integers(len(content) - 12_000, len(content) - 1)  # the table of contents and the checksum
    byte = data.draw(st.integers(0, len(content) - 1) | tail)
    changed = bytearray(content)
    changed[byte] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    with pytest.raises(BadInput, match=r"checkpoint-00000007\.pt"):
        checkpoint.load(path)


@given(st.data())
def test_a_file_cut_short_or_grown_is_refused(whole, data):
    path, content = whole
    size = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 300, len(content) - 1))
    for changed in (content[:size], content[size:], content + content[:1 + size]):
        if changed != content:
            path.write_bytes(changed)
            with pytest.raises(BadInput, match=r"checkpoint-00000007\.pt"):
                checkpoint.load(path)
    path.write_bytes(content)
    assert checkpoint.load(path)["training"]["step"] == 7


class Bomb:
    """Pickled, it is the order to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def broken_checkpoints(folder):
    """Files that are no checkpoint of ours, by what they are."""
    state = state_to_save()
    checkpoint.write(folder / "whole.pt", state)
    whole = (folder / "whole.pt").read_bytes()
    (folder / "whole.pt").unlink()
    (folder / "text.pt").write_text("a text")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "shorter by a byte.pt").write_bytes(whole[:-1])
    (folder / "pickle.pt").write_bytes(pickle.dumps(Bomb(folder / "bang")))
    torch.save({"dansm": 2, "x": Bomb(folder / "bang")}, folder / "code.pt")
    checkpoint.write(folder / "code, with a checksum.pt", {**state, "x": Bomb(folder / "bang")})
    torch.save({"weights": torch.zeros(3)}, folder / "another program's.pt")
    checkpoint.write(folder / "later.pt", {**state, "dansm": checkpoint.VERSION + 1})
    checkpoint.write(folder / "without a recipe.pt", {"network": state["network"]})
    (folder / "folder.pt").mkdir()
    return [*sorted(folder.iterdir()), folder / "missing.pt"]


def test_what_is_no_checkpoint_is_refused_by_name_and_no_code_in_it_runs(tmp_path):
    paths = broken_checkpoints(tmp_path)
    assert len(paths) == 12
    for path in paths:
        with pytest.raises(BadInput) as refused:
            checkpoint.load(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value), path
        assert "version 3" in str(refused.value) or path.stem != "later"
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
    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.load_newest(tmp_path)


def test_damaged_ones_are_named_and_the_newest_that_is_whole_is_used(tmp_path, capsys):
    first, second, third, fourth = saved(tmp_path, 1, 2, 3, 4)
    flip(second, 15_000)
    third.write_bytes(third.read_bytes()[:-1])
    checkpoint.write(fourth, {**state_to_save(step=4), "dansm": 9})
    path, state = checkpoint.load_newest(tmp_path)
    assert path == first and state["training"]["step"] == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in said] == [str(fourth), str(third), str(second)]
    checkpoint.save(tmp_path, state_to_save(step=2))
    assert names_of(tmp_path) == [first.name, second.name] and checkpoint.load(second)["training"]["step"] == 2


def test_where_none_can_be_read_the_newest_is_named(tmp_path):
    for path in saved(tmp_path, 1, 2):
        flip(path, 1000)
    with pytest.raises(BadInput, match=r"checkpoint-00000002\.pt"):
        checkpoint.load_newest(tmp_path)
