"""The same noise pools and assignments at full speed, on a GPU or over several processes; couplings to compare with."""

from dansm import NoisePool, Semidiscrete

from . import pool
from .gpu import working
from .inside import check_arguments
from .others import Assignment, optimal, pairs_to_compare
from .products import products
from .sampler import CoupledBatchSampler
from .semidiscrete import FastSemidiscrete

__all__ = ["Assignment", "CoupledBatchSampler", "FastSemidiscrete", "optimal", "pairs_to_compare", "pool_class",
           "products", "semidiscrete_class", "working"]


def pool_class(*arguments, **settings) -> type[NoisePool]:
    """The class that serves a pool with these arguments best. TypeError for arguments that no pool takes."""
    if "fast" not in settings:  # which has a message of its own
        check_arguments("NoisePool", pool.FastPool, arguments, settings)
    return pool.pool_class(*arguments, **settings)


def semidiscrete_class(*arguments, **settings) -> type[Semidiscrete]:
    """The class of a coupling with these arguments. TypeError for arguments that it does not take."""
    check_arguments("Semidiscrete", FastSemidiscrete, arguments, settings)
    return FastSemidiscrete
