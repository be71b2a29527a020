"""The same noise pools and assignments at full speed: on a GPU, over several processes."""

from .gpu import working
from .pool import pool_class
from .products import products

__all__ = ["pool_class", "products", "working"]
