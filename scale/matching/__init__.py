"""Noise pools at full speed: on a GPU, over several processes, and linear assignment."""

from .gpu import working
from .pool import pool_class
from .products import products

__all__ = ["pool_class", "products", "working"]
