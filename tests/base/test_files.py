"""Files that are written whole or not at all."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT

from dansm import BadInput
from dansm.scale.base import files
from dansm.scale.base.files import make_folder, read_csv, read_json, replacing, write_csv, write_json


def test_a_block_that_ends_puts_the_new_file_in_place(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(BadInput, match=rf"{path}.*No space left"), replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    order = []
    flush, replace = files._flush, os.replace
    monkeypatch.setattr(files, "_flush", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    write_json(tmp_path / "a.json", {"x": 1})
    assert order == ["a.json.partial", "replace", tmp_path.name]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from dansm.scale.base.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_file_and_the_next_write_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, str(path), str(ROOT)], check=False)
    assert path.read_text() == "old"
    write_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_json_is_read_back_and_what_is_none_is_refused_naming_the_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, "é"]})
    assert read_json(path) == {"x": [1, "é"]}
    for content in (b"", b'{"x": 1', b"\xff\xfe\x00", b"\x80", b"[" * 10**5, b"5", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=str(path)):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_table_has_a_column_for_every_name_that_any_row_has(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": 2.5}, {"a": 3, "c": "x, y"}])
    assert (tmp_path / "a.csv").read_bytes() == b'a,b,c\n1,2.5,\n3,,"x, y"\n'
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b": "2.5", "c": ""}, {"a": "3", "b": "", "c": "x, y"}]
    assert read_csv(tmp_path / "none.csv") == []


def test_a_folder_is_made_or_refused_naming_option_and_file(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir() and list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=rf"--work is {tmp_path}/file/b.*{tmp_path}/file is a file"):
        make_folder(tmp_path / "file" / "b", "--work")
