"""A pool for samples of any size: it matches sums over blocks, and draws the rest of each noise afresh."""

import math
import operator
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor

from dansm import BadInput, NoisePool, check_finite_batch, check_shape, check_tensor, has_distances

from . import inside
from .pool import laid_out_like, pool_class
from .products import exactly

COSTS_AT_ONCE = 2**26  # of one batch, 256 MB: keys take little memory themselves


def of_the_keys(name: str) -> property:
    return property(lambda pool: getattr(pool.keys, name))


class CoarsePool(inside.OfOneProcess, NoisePool):
    """A pool of coarse noises, for samples of any height, width and length: NoisePool(match_size, shape, grid=(8, 8)).

        pool = NoisePool(10_000, (16, 128, 128), grid=(8, 8))   # 16 × 8 × 8 numbers for each noise
        z = pool(x)                                             # x: (B, 16, H, W), of any H and W
        pool = NoisePool(10_000, (256, 64), grid=(16, None))    # sequences of 64 channels, in 16 blocks each
        z = pool(x, mask=mask)                                  # x: (B, N, 64), of any N; mask: (B, N), True where real

    The last axes are cut into blocks, as many as `grid` says, of sizes that differ by one at most. In noise, the sum of
    each block over the root of its size is N(0, 1), and independent of the others: in z these sums are Pz, for a matrix
    P of orthonormal rows. The pool keeps keys k, which are N(0, I), in an ordinary pool, and matches them with Px. What
    it hands out has the key's sums, and otherwise those of a fresh noise e:

        z = e + Pᵀ(k − Pe)      so Pz = k, and z is N(0, I) as e and k are

    Px grows with the root of a block's size, so large samples would take the longer keys and leave the shorter to small
    ones, and noises would tell the size. So Px is scaled: each sample is matched as if it were resized to `shape`.

    It takes the arguments of `FastPool` and `FastGroupedPool`, for the keys, and:

    shape  of a usual sample: along axes in blocks a batch may have any other sizes
    grid   blocks along each of the last axes, at most as many as the axis of `shape` is long; None leaves an axis
           whole. In a batch with a shorter axis some blocks are empty
    mask   with each batch, for a grid of the first axis alone: the blocks of a sample divide its real elements. The
           others get fresh noise, and may hold anything

    Raises BadInput as `FastPool` does.
    """

    match_size, cost, seed, why, tf32 = map(of_the_keys, ("match_size", "cost", "seed", "why", "tf32"))
    grouped, groups, rank, ranks = map(of_the_keys, ("grouped", "groups", "rank", "ranks"))
    noise, generator = map(of_the_keys, ("noise", "generator"))

    def __init__(self, match_size: int | str | None, shape, *, grid, **settings):
        self.shape = check_shape(shape)
        self.grid = checked_grid(grid, self.shape)  # for every axis
        shape = key_shape(self.shape, self.grid)
        kind = pool_class(match_size, shape, **settings)
        self.keys = kind.__new__(kind)
        self.keys.costs_at_once = COSTS_AT_ONCE  # before it reckons its memory
        self.keys.__init__(match_size, shape, **settings)
        self._enter()

    def __call__(self, x: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Match x: (B, ...), of any B, dtype and device → z like x, in its memory layout, z_i matched to x_i."""
        if torch.compiler.is_compiling():
            return inside.matched(self, x, labels, mask)
        self.check_worker()
        with torch.inference_mode(False), torch.no_grad():  # see FastPool.__call__
            try:
                blocks, coarse = self._coarse(x, mask)
            except BadInput:
                if self.ranks > 1:  # the other ranks wait for this one
                    with suppress(BadInput):
                        self.keys(torch.empty(0, device="cpu"))
                raise
            key = self.keys(coarse, labels)
            z = torch.randn(x.shape, dtype=key.dtype, device=key.device, generator=self.generator)
            blocks.set_sums(z, key)
            return laid_out_like(x, z.to(x))

    def fresh(self, x: Tensor) -> Tensor:
        return self.keys.fresh(x)

    def __repr__(self) -> str:
        return (f"{type(self).__name__}({self.match_size}, {tuple(self.shape)}, grid={shown(self.grid)}, "
                f"cost={self.cost!r}, seed={self.seed})")

    def check(self, x: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.keys.check(self._coarse(x, None)[1])

    def _coarse(self, x: Tensor, mask: Tensor | None) -> tuple["EqualBlocks | UnequalBlocks", Tensor]:
        """The blocks of x, and what is matched with the keys: Px as if x had the sizes of `shape`."""
        self._check_form(x, mask)
        x = x.detach().to(self.noise.device)
        exact = torch.promote_types(self.noise.dtype, torch.float32)
        if mask is None:
            blocks = blocks_of(x.shape[1:], self.grid, x.device, exact)
            growth = math.sqrt(self._numbers(self.shape) / max(1, self._numbers(x.shape[1:])))
        else:
            real = over_samples(mask.to(x.device), x)
            x = x.masked_fill(~real, 0)
            blocks = UnequalBlocks({1: averages(real.flatten(1), self.grid[0], exact)})
            growth = (self.shape[0] / real.sum(1, keepdim=True, dtype=exact).clamp(min=1)).sqrt()
        if x.device.type == "cpu":  # a GPU's values are looked at with the sums
            check_finite_batch(x)
        coarse = blocks.sums(x, exact)
        coarse = coarse if mask is None and growth == 1 else coarse * growth
        if x.device.type == "cpu" and coarse.numel() and not has_distances(coarse):
            largest = x.abs().max().item()
            raise BadInput(f"the batch of shape {tuple(x.shape)} holds values up to {largest:.3g} in size, whose sums "
                           f"over the blocks of the grid {shown(self.grid)} exceed 1e15: expected smaller ones")
        return blocks, coarse

    def _numbers(self, sizes: torch.Size) -> int:
        """How many numbers lie in the blocks of one channel, for samples of these sizes."""
        return math.prod(size for size, blocks in zip(sizes, self.grid, strict=True) if blocks)

    def _check_form(self, x: Tensor, mask: Tensor | None) -> None:
        """BadInput for a batch or a mask that this pool cannot take."""
        check_tensor(x)
        pairs = list(zip(self.grid, self.shape, strict=True))
        if x.ndim != 1 + len(pairs) or any(blocks is None and size != given for (blocks, size), given in
                                           zip(pairs, x.shape[1:], strict=True)):
            sizes = ", ".join(str(size) if blocks is None else "any" for blocks, size in pairs)
            raise BadInput(f"the pool has the grid {shown(self.grid)} for samples of shape {tuple(self.shape)}, the "
                           f"batch is {tuple(x.shape)}: expected (B, {sizes})")
        if mask is None:
            return
        if self.grid[0] is None or any(blocks is not None for blocks in self.grid[1:]):
            raise BadInput(f"a mask is given, the grid of samples of shape {tuple(self.shape)} is {shown(self.grid)}: "
                           "expected a grid of the first axis alone, as (16, None)")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise BadInput(f"the mask is {given}: expected torch.bool of shape {tuple(x.shape[:2])}, True where the "
                           "elements are real")

    # ------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        return self.keys.state_dict() | {"made_for": self._made_for()}

    def load_state_dict(self, state: dict) -> None:
        """Resume where `state_dict` was taken, see `FastPool`."""
        saved = state.get("made_for") if isinstance(state, dict) else None
        if isinstance(saved, dict):
            ours = self._made_for()
            if any(saved.get(name) != ours[name] for name in ("shape", "grid")):
                raise BadInput(f"the saved pool is {saved}, this one {ours}: expected the same")
            of_keys = saved | {"shape": list(self.keys.shape)}
            del of_keys["grid"]
            state = state | {"made_for": of_keys}
        self.keys.load_state_dict(state)

    def _made_for(self) -> dict:
        return self.keys._made_for() | {"shape": list(self.shape), "grid": list(self.grid)}


# ------------------------------------------------------------------------------------------- grids


def checked_grid(grid, shape: torch.Size) -> tuple[int | None, ...]:
    """The blocks along each axis of the shape, None for axes that stay whole. BadInput for what is no grid of it."""
    try:
        parts = tuple(grid) if isinstance(grid, list | tuple | torch.Size) else (grid,)
        counts = tuple(None if part is None else operator.index(part) for part in parts)
        fine = not any(isinstance(part, bool) for part in parts)
        fine &= all(count is None or count > 0 for count in counts) and any(counts) and len(counts) <= len(shape)
    except TypeError:
        fine = False
    if not fine:
        raise BadInput(f"grid is {grid!r}: expected whole numbers from 1 on, or None, for the last axes of the shape "
                       f"{tuple(shape)}, and not None alone")
    axes = shape[len(shape) - len(counts):]
    if any(count and count > size for count, size in zip(counts, axes, strict=True)):
        raise BadInput(f"grid is {grid!r}, finer than samples of shape {tuple(shape)}: expected at most {tuple(axes)}")
    return (None,) * (len(shape) - len(counts)) + counts


def key_shape(shape: torch.Size, grid) -> torch.Size:
    """The shape of a key of a pool, which is that of a sample without a grid."""
    blocks = checked_grid(grid, shape) if grid else (None,) * len(shape)
    return torch.Size(count or size for count, size in zip(blocks, shape, strict=True))


def shown(grid: tuple[int | None, ...]) -> str:
    """The grid as it may be given, without axes before the first in blocks."""
    first = next(axis for axis, blocks in enumerate(grid) if blocks)
    return str(grid[first:])


# ------------------------------------------------------------------------------------------- blocks


class EqualBlocks:
    """Blocks of one size, in samples of which each axis in blocks is a multiple of the grid: a view and one sum."""

    def __init__(self, sizes: torch.Size, grid: tuple[int | None, ...]):
        self.cut, self.of_sums, self.axes, size = [], [], [], 1
        for length, blocks in zip(sizes, grid, strict=True):
            self.cut.append(blocks or length)
            self.of_sums.append(blocks or length)
            if blocks:
                self.cut.append(length // blocks)
                self.of_sums.append(1)
                self.axes.append(len(self.cut))
                size *= length // blocks
        self.root = math.sqrt(max(1, size))

    def sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Px: the sum of each block over the root of its size."""
        return self._totals(x, dtype).div_(self.root)

    def set_sums(self, z: Tensor, key: Tensor) -> None:
        """Change z, of the type of the key, so that Pz is the key."""
        missing = torch.sub(key, self._totals(z, key.dtype), alpha=1 / self.root)
        z.view(len(z), *self.cut).add_(missing.view(len(z), *self.of_sums), alpha=1 / self.root)

    def _totals(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.reshape(len(x), *self.cut).sum(self.axes, dtype=dtype)


class UnequalBlocks:
    """Blocks of any size, by a matrix for each axis in blocks: axis → (B or 1, blocks, length)."""

    def __init__(self, matrices: dict[int, Tensor]):
        self.matrices = matrices

    def sums(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        for axis, matrix in self.matrices.items():
            x = along(axis, matrix, x)
        return x

    def set_sums(self, z: Tensor, key: Tensor) -> None:
        missing = key - self.sums(z, key.dtype)
        for axis, matrix in self.matrices.items():
            missing = along(axis, matrix.mT, missing)
        z += missing


def blocks_of(sizes: torch.Size, grid: tuple[int | None, ...], device: torch.device,
              dtype: torch.dtype) -> EqualBlocks | UnequalBlocks:
    """The blocks of samples of these sizes."""
    axes = [(axis, length, blocks) for axis, (length, blocks) in enumerate(zip(sizes, grid, strict=True), 1) if blocks]
    if all(length % blocks == 0 for _, length, blocks in axes):
        return EqualBlocks(sizes, grid)
    return UnequalBlocks({axis: averages_of_axis(length, blocks, device, dtype) for axis, length, blocks in axes})


@lru_cache(maxsize=32)
def averages_of_axis(length: int, blocks: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`averages` of an axis that is all real, (1, blocks, length)."""
    return averages(torch.ones(1, length, dtype=torch.bool, device=device), blocks, dtype)


def averages(mask: Tensor, blocks: int, dtype: torch.dtype) -> Tensor:
    """Cut the real elements of each sample into blocks: the r-th of n belongs to block ⌊r · blocks / n⌋. mask: (B, N)
    → matrices (B, blocks, N) of orthonormal rows, which are zero for empty blocks."""
    order = mask.cumsum(1) - 1
    count = mask.sum(1, keepdim=True).clamp(min=1)
    block = order * blocks // count
    belongs = (block[:, None] == torch.arange(blocks, device=mask.device)[:, None]) & mask[:, None]
    return belongs / belongs.sum(2, keepdim=True, dtype=dtype).clamp(min=1).sqrt()


def over_samples(mask: Tensor, x: Tensor) -> Tensor:
    """mask: (B, N) shaped to be used with x: (B, N, ...)."""
    return mask.view(*mask.shape, *[1] * (x.ndim - 2))


def along(axis: int, matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the axis of x: (B, ...) by a matrix (B or 1, rows, length of the axis), exactly."""
    first = x.movedim(axis, 1)
    with exactly(x.device):
        product = matrix @ first.reshape(*first.shape[:2], first.shape[2:].numel())
    return product.view(len(x), matrix.shape[1], *first.shape[2:]).movedim(1, axis)
