"""Pixels as files have them, 0 … 255, and as networks do, −1 … 1."""

from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """0 … 255 to float32 in [−1, 1]; of any shape."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[−1, 1] to 0 … 255, rounded and clamped; of any shape."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()
