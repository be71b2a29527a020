"""Devices, their memory and their speed."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

from dansm import BadInput, NoisePool
from dansm.scale.base import machine
from dansm.scale.base.machine import (
    check_memory,
    free_memory,
    hardware,
    lacks_memory,
    left_in_container,
    number_type,
    peak,
    pick_device,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_the_fastest_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for cuda, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert pick_device("auto").type == expected


def test_a_device_that_is_not_there_is_refused_naming_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"--device is cuda.*auto, cpu"):
        pick_device("cuda")


def test_the_limit_of_a_container_counts(tmp_path):
    assert left_in_container(tmp_path / "none") == 2**62
    for name, text in (("memory.max", "max"), ("memory.current", "700"), ("memory.stat", "anon 5\ninactive_file 50\n")):
        (tmp_path / name).write_text(text + "\n")
    assert left_in_container(tmp_path) == 2**62
    (tmp_path / "memory.max").write_text("1000\n")
    assert left_in_container(tmp_path) == 350


def test_what_does_not_fit_is_refused_in_gigabytes():
    assert 0 < free_memory(CPU) < 2**50
    check_memory("--batch is 4", 1000, CPU)
    with pytest.raises(BadInput, match=r"--batch is 4: .*1,000,000\.0 GB"):
        check_memory("--batch is 4", 10**15, CPU)


def test_a_system_that_does_not_tell_its_memory_refuses_no_pool(tmp_path, monkeypatch):
    """Windows has neither /proc nor os.sysconf."""
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name[1:])
    monkeypatch.delattr(os, "sysconf")
    check_memory("--batch is 4", 10**15, CPU)
    assert NoisePool(10, (3,))(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(("error", "lacks"), [
    (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
    (RuntimeError("size mismatch"), False),
    (ValueError("out of memory"), False),
])
def test_an_error_for_want_of_memory_is_known_whatever_the_device_calls_it(error, lacks):
    assert lacks_memory(error) == lacks


@pytest.mark.parametrize(("precision", "device", "expected"), [
    ("auto", CPU, torch.float32), ("fp32", CPU, torch.float32), ("bf16", CPU, torch.bfloat16),
    ("bf16", CUDA, torch.bfloat16), ("fp16", CUDA, torch.float16), ("fp32", CUDA, torch.float32)])
def test_the_number_type_of_a_precision(precision, device, expected):
    assert number_type(precision, device) == expected


def test_auto_is_bf16_where_the_gpu_has_it_and_fp16_on_older_ones(monkeypatch):
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, supported=supported: supported)
        assert number_type("auto", CUDA) == expected


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(BadInput, match=r"fp16.*cpu"):
        number_type("fp16", CPU)


@pytest.mark.parametrize(("name", "expected"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12), ("NVIDIA GeForce GTX 970", None)])
def test_the_peak_of_a_gpu_is_its_makers(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak(CUDA) == expected
    assert peak(CPU) is None


def test_the_hardware_has_a_name():
    described = hardware(CPU)
    assert described["device"] == "cpu" and described["gpu"] is None and described["cores"] >= 1
    assert described["torch"] == torch.__version__


WITHOUT_COMPILER = """
import sys, torch
from dansm.scale.base.machine import leave_out_compiler

leave_out_compiler()
optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)])
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def test_an_optimizer_is_made_without_torchs_compiler():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, check=True, timeout=300)
