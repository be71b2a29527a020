"""What tests share: tiny networks, images and archives, and several processes as torchrun starts them."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import tarfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as group
from PIL import Image

import dansm
from dansm.scale.model import checkpoint

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.1)
FAST = ("--network", "small", "--batch", 8, "--match-size", 10, "--sample-steps", 2, "--device", "cpu")

# ------------------------------------------------------------------------------- runs


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files_of(folder):
    """Without the lock, which stays in a run's folder and says nothing."""
    found = folder.rglob("*") if folder.exists() else ()
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name != ".lock")


def state_of(out):
    """The newest checkpoint of a run's folder."""
    return checkpoint.load(checkpoint.newest(out))


def same(a, b):
    """Equal to the last bit, whatever it is made of."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


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


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


# ------------------------------------------------------------------------------- images


def noise_image(width, height, seed=0, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "P": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    if mode == "P":
        return Image.fromarray(pixels[..., 0]).convert("RGB").quantize(16)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


def make_images(folder, count=24, width=16, height=16):
    folder.mkdir(parents=True)
    for i in range(count):
        noise_image(width, height, seed=i).save(folder / f"{i:02d}.png")
    return folder


NAMES = ["b.png", "a10.jpg", "a9.webp", "sub/c.png", "Z.PNG", "sub/deeper/0.bmp", "sub-2/x.jpeg", "c.gif"]
PACKINGS = [".zip", ".deflated.zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]


def picture(seed, suffix=".png", size=(6, 4)):
    """The bytes of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, Image.registered_extensions()[suffix.lower()])
    return file.getvalue()


PICTURES = {name: picture(seed, Path(name).suffix) for seed, name in enumerate(NAMES)}


def as_folder(folder, content):
    for name, payload in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)
    return folder


def packed(path, content, kinds=None):
    """An archive of {name: bytes}, in that order; `kinds` gives a tar's other types of members."""
    if path.suffix == ".zip":
        how = zipfile.ZIP_DEFLATED if "deflated" in path.name else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", how) as archive:
            for name, payload in content.items():
                archive.writestr(zipfile.ZipInfo(name), payload, how)
        return path
    packing = {".tar": "", ".tgz": "gz"}.get(path.suffix, path.suffix[1:])
    with tarfile.open(path, f"w:{packing}") as archive:
        for name, payload in content.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(payload), (kinds or {}).get(name, tarfile.REGTYPE)
            member.linkname = "b.png"
            archive.addfile(member, io.BytesIO(payload))
    return path


def lsun(folder, content):
    """As LSUN packs it: image files under hexadecimal keys."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=2**24) as store, store.begin(write=True) as transaction:
        for key, payload in content.items():
            transaction.put(key.encode(), payload)
    return folder


# ------------------------------------------------------------------------------- processes


needs_gloo = pytest.mark.skipif(not group.is_available() or not group.is_gloo_available(), reason="no gloo")


def in_processes(folder, *commands, count=2, hook=None):
    """Run the commands one after the other in `count` processes as torchrun starts them, and wait for their end.

    In the words of a command, {rank} is the process's number. `hook(rank, folder)` is called in each first. Returns
    for each process its exit codes (in place of those it did not come to, what it ended with) and what it said.
    """
    children = start_processes(folder, *commands, count=count, hook=hook)
    return ended(children, folder)


def start_processes(folder, *commands, count=2, hook=None):
    context = multiprocessing.get_context("forkserver")  # one process that imports torch once, and forks the others
    context.set_forkserver_preload(["support", "torch._dynamo", "torchvision"])
    ports = [free_port() for _ in commands]
    commands = [[str(word) for word in command] for command in commands]
    children = [context.Process(target=one_process, args=(rank, count, ports, commands, folder, hook), daemon=True)
                for rank in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        for child in children:
            child.start()
    return children


def ended(children, folder, seconds=60):
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    said = [(folder / f"said-{rank}").read_text() for rank in range(len(children))]
    assert not late, (late, said)
    codes = [folder / f"codes-{rank}" for rank in range(len(children))]
    return [(json.loads(path.read_text()) if path.exists() else child.exitcode) for path, child in
            zip(codes, children, strict=True)], said


def one_process(rank, count, ports, commands, folder, hook):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "HOME": str(folder)}
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    dansm.NETWORKS["small"] = TINY
    torch.set_num_threads(1)
    if hook:
        hook(rank, folder)
    codes = []
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            dansm.main([word.replace("{rank}", str(rank)) for word in command])
        except SystemExit as ended:
            codes.append(ended.code)
    (folder / f"codes-{rank}").write_text(json.dumps(codes))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
