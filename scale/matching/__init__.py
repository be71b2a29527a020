"""The same noise pools and assignments at full speed, on a GPU or over several processes; couplings to compare with."""

from .gpu import working
from .others import Assignment, optimal, pairs_to_compare
from .pool import pool_class
from .products import products
from .sampler import CoupledBatchSampler
from .semidiscrete import FastSemidiscrete

__all__ = ["Assignment", "CoupledBatchSampler", "FastSemidiscrete", "optimal", "pairs_to_compare", "pool_class",
           "products", "working"]
