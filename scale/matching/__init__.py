"""The same noise pools and assignments at full speed, on a GPU or over several processes; couplings to compare with."""

from dansm import NoisePool

from . import pool
from .gpu import working
from .inside import check_arguments
from .others import Assignment, optimal, pairs_to_compare
from .products import products
from .sampler import CoupledBatchSampler
from .semidiscrete import FastSemidiscrete

__all__ = ["Assignment", "CoupledBatchSampler", "FastSemidiscrete", "optimal", "pairs_to_compare", "pool_class",
           "products", "working"]


def pool_class(*arguments, **settings) -> type[NoisePool]:
    """The class that serves a pool with these arguments best. TypeError for arguments that no pool takes."""
    if "fast" not in settings:  # which has a message of its own
        check_arguments(pool.FastPool, arguments, settings)
    return pool.pool_class(*arguments, **settings)
