"""What the machine has: its devices, their memory, their speed."""

import inspect
import os
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

from dansm import BadInput, check_choice

# Dense bf16 rate in 1e12 operations a second that the maker states (V100, T4: fp16). Longer names come first.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312,
         "A40": 150, "A10": 125, "L40": 181, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "V100": 125,
         "T4": 65}


def pick_device(name: str) -> torch.device:
    """The device of that name, or the fastest one for "auto"."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[check_choice("--device", name, available)]:
        found = ", ".join(device for device in available if available[device])
        raise BadInput(f"--device is {name}, which this machine has not: expected one of auto, {found}")
    return torch.device(name)


def hardware(device) -> dict:
    """What the figures of a run depend on, to be stored next to them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"device": str(device), "gpu": gpu, "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version()}


# ---------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------


def free_memory(device) -> int:
    """Bytes that could be allocated on the device."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (available := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return min(1024 * int(available[1]), left_in_container())
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**62  # Windows: nothing is refused beforehand


def left_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the memory limit of a container leaves, counting cached files as free."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        files = int(re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())[1])
    except (OSError, ValueError, TypeError):  # no container, or one without a limit, which reads "max"
        return 2**62
    return max(0, limit - used + files)


def check_memory(what: str, needed: int, device) -> None:
    """BadInput if fewer than `needed` bytes are free on the device."""
    free = free_memory(device)
    if needed > free:
        raise BadInput(f"{what}: that needs {needed / 1e9:,.1f} GB, {device} has {free / 1e9:,.1f} GB free; expected a "
                       "smaller one")


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out. Torch raises a RuntimeError, worded differently by each device."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


# ---------------------------------------------------------------------------------------------------
# Speed and precision
# ---------------------------------------------------------------------------------------------------


def peak(device: torch.device) -> float | None:
    """The GPU's stated peak in operations a second; None for an unknown one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = [rate for part, rate in PEAKS.items() if re.search(rf"\b{part}\b", name)]
    return 1e12 * rates[0] if rates else None


def number_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of activations and products for a --precision; weights, gradients and sums stay in float32."""
    if precision == "auto":
        if device.type != "cuda":
            precision = "fp32"
        else:
            precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise BadInput(f"precision is fp16, on {device.type}: expected bf16 or fp32, fp16 is for GPUs")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def float64(x: Tensor, device: torch.device) -> Tensor:
    """x in float64, on the device or, where that is Apple's and has no float64, on the CPU."""
    return x.to(device).double() if device.type == "cuda" else x.cpu().double()


def leave_out_compiler() -> None:
    """Keep torch from importing its compiler where an optimizer is made, which takes as long as importing torch. For
    commands, which compile no optimizer."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(torch.optim.Optimizer, name)
        setattr(torch.optim.Optimizer, name, inspect.unwrap(method))


def make_deterministic() -> None:
    """Let everything that follows in this process give the same result to the last bit each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
