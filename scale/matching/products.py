"""Inner products of samples and noises, as fast as each device computes them."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

NEW = torch.__version__ >= (2, 10)  # torch 2.6 has no out_dtype


def products(x: Tensor, z: Tensor, tf32: bool = False, out: Tensor | None = None) -> Tensor:
    """`dansm.inner_products` of x: (B, D) and z: (M, D) → (B, M), in float32 at least; into `out` if given.

    tf32  multiply float32 on a GPU with ten bits of mantissa, several times faster
    """
    with without_autocast(x.device):
        if x.dtype in (torch.bfloat16, torch.float16):
            if x.is_cuda and NEW:
                return torch.mm(x, z.T, out_dtype=torch.float32, out=out)
            with _cuda_float32("ieee"):
                return torch.cat([x.float() @ rows.float().T for rows in z.split(4096)], 1, out=out)
        if out is None and _suits_onednn(x, z):
            return F.linear(x.to_mkldnn(), z).to_dense()
        with _cuda_float32("tf32" if tf32 else "ieee"):
            return torch.mm(x, z.T, out=out)


def without_autocast(device: torch.device):
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


@contextmanager
def exactly(device: torch.device):
    """Multiply tensors as their number types have it, whatever a trainer around has set."""
    with without_autocast(device), _cuda_float32("ieee"):
        yield


def _suits_onednn(x: Tensor, z: Tensor) -> bool:
    """Whether oneDNN pays for its preparations: for large float32 products it is 1.6 times as fast as torch.mm on an
    AMD EPYC, and as exact. That of torch 2.6 copies z, so it would take more memory than a pool promises."""
    large = x.device.type == "cpu" and x.dtype == z.dtype == torch.float32 and x.numel() * len(z) > 2**28
    return large and NEW and torch.backends.mkldnn.is_available() and not x.requires_grad


@contextmanager
def _cuda_float32(precision: str):
    settings, name = torch.backends.cuda.matmul, "fp32_precision"
    if not hasattr(settings, name):  # before torch 2.9
        name, precision = "allow_tf32", precision == "tf32"
    before = getattr(settings, name)
    setattr(settings, name, precision)
    try:
        yield
    finally:
        setattr(settings, name, before)
