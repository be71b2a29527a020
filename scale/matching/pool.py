"""The noise pool at full speed: `dansm.NoisePool` returns one of these classes wherever scale/ is installed."""

import math
from bisect import bisect_left
from functools import partial

import torch
from torch import Tensor

from dansm import (
    COSTS,
    NO_DISTANCE,
    BadInput,
    NoisePool,
    check_batch,
    check_choice,
    check_count,
    check_finite_batch,
    check_state,
    costs_from,
    greedy,
    has_distances,
    noise_generator,
    process_number,
    squared_norms,
)

from ..base.machine import free_memory
from ..base.text import warn
from . import draws, gpu, inside
from .prices import Prices, bytes_to_learn, references_of
from .products import products

SCOPES = ("rank", "global")
PRICED = "priced"
PRICES = 2**31 + 6  # a stream that no pool and no coupling has
COUNTED = 2**31 + 7  # and another one
AUTO = "auto"  # a match_size that `expected` samples empty EMPTIED times or more
EMPTIED = 10
MOST = {"cpu": 10_000}  # noises of such a pool, where each batch takes longer with more; on other devices:
MOST_ELSEWHERE = 100_000
SHARE = 4  # of the free memory it takes a quarter, as a training needs the rest


def pool_class(match_size=0, shape=(), *, device="cpu", dtype=torch.float32, tf32: bool = False, grid=None,
               match_scope: str = "rank", compile: bool = True, groups: int | None = None, **others) -> type[NoisePool]:
    """The class that serves a pool with these arguments best."""
    if "fast" in others:
        raise BadInput("fast is now called tf32: expected NoisePool(…, tf32=True)")
    check_choice("dtype", dtype, NoisePool.dtypes)
    check_choice("match_scope", match_scope, SCOPES)
    if grid is not None:
        from .coarse import CoarsePool

        return CoarsePool
    if match_scope == "global":
        from .groups import SpreadGroupedPool, SpreadPool

        return SpreadPool if groups is None else SpreadGroupedPool
    if compile and match_size not in (0, 1) and torch.device(device).type == "cuda":
        at = torch.empty(0, device=device).device
        if groups is None and (kernels := gpu.working("kernels", at, dtype, tf32)):
            small = isinstance(match_size, int) and match_size <= kernels.MANY
            if dtype == torch.bfloat16 and not small and (search := gpu.working("search_kernels", at)):
                return search.SearchPool
            return kernels.KernelPool
        # A GPU multiplies no float64 in the kernel that does so for all groups.
        if groups and dtype != torch.float64 and (kernels := gpu.working("group_kernels", at, dtype, tf32)):
            return kernels.KernelGroupedPool
    from .groups import FastGroupedPool

    return FastPool if groups is None else FastGroupedPool


class FastPool(inside.OfOneProcess, NoisePool):
    """`dansm.NoisePool` that costs a batch next to nothing: the same noises, fewer operations, bounded memory.

    It takes the arguments of `NoisePool`, and:

    match_size   None makes it as large as `memory` allows; "auto" such that the `expected` samples empty it ten times
                 or more, of 100,000 noises at most (on a CPU 10,000), in `memory` or a quarter of what is free. From a
                 saved state such a pool takes its size. `why` tells what decided
    cost         "priced" too, the default: what a noise costs whoever takes it, ‖z‖² by "squared", is told from the
                 first samples that come, see `dansm.scale.matching.prices`. Samples get nearer noises, the last of a
                 pool almost as near as the first
    tf32         multiply float32 in tf32 on a GPU. Faster; up to four samples in a hundred take another noise, equally
                 near on average (paths change by less than 4e-5 of their length)
    memory       gigabytes that the pool and its matching may use; without it, what the device has free
    match_scope  "rank", or "global": under torch.distributed all ranks match their samples against one pool, see
                 `dansm.scale.matching.spread`
    expected     samples in all that will be matched, by all processes together where they share the pool: a pool
                 that these do not empty is warned of
    compile      on a GPU, match by Triton kernels, which take a few seconds to compile. Without it: the same noises,
                 2–4 ms a batch at 10,000

    The pool keeps its free noises in front. When a batch has taken some, the last ones move into their places, and
    behind them the next pool is drawn piece by piece, from its end on: no batch pays for a refill but the very first.
    A pool of ten, number 1, after a batch of three:

        place   0  1  2  3  4  5  6 │ 7  8  9      left = 7 noises are free
        index   0  7  2  3  9  5  6 │ next pool    a noise's index is its place when the pool began; it decides ties
                   ↑        ↑                      1, 4 and 8 were taken; 7 and 9 moved into the gaps
                                                   drawn = 3 noises of pool number 2 are there already

    Raises BadInput as `NoisePool` does, and for a pool that does not fit, before anything is allocated.
    """

    costs = (PRICED, *COSTS)
    served_at_once = 256  # samples; with more the matrix product gains nothing
    costs_at_once = 2**28  # a gigabyte
    cost_copies = 5  # of the costs of one batch, that exist at the same time
    rank, ranks = 0, 1  # among the ranks that share the pool
    groups = 1  # whose pools share the memory

    def __init__(self, match_size: int | str | None, shape, *, cost: str | None = None, device="cpu",
                 dtype=torch.float32, seed: int | None = None, tf32: bool = False, memory: float | None = None,
                 match_scope: str = "rank", compile: bool = True, groups: None = None, grid: None = None,
                 expected: int | None = None):
        super().__init__(0, shape, cost=cost, device=device, dtype=dtype, seed=seed)
        self.tf32 = tf32
        self.own = squared_norms(self.noise)  # what each noise costs whoever takes it
        self.data_check = DataCheck(self.shape, self.noise.device)
        self.chunk = max(1, self.numbers_per_chunk // self.shape.numel())
        expected = expected if expected is None else check_count("expected", expected)
        self.memory, self.is_auto, self.why = memory, isinstance(match_size, str) and match_size == AUTO, ""
        self._resize(self._chosen(expected) if self.is_auto else match_size)
        if expected is not None and self.match_size > 1 and expected < self.groups * self.match_size:
            safe = expected // (EMPTIED * self.groups)
            warn(f"{expected:,} samples do not empty {self.groups * self.match_size:,} noises, of which they take the "
                 f"nearest: these are not N(0, I); a match_size of at most {safe:,} is safe")
        self.prices = Prices(self.match_size, self.noise) if self.cost == PRICED else None
        self._forget()
        self._enter()

    def __call__(self, x: Tensor, labels: Tensor | None = None, mask: None = None) -> Tensor:
        """Match x: (B, *shape), of any B, dtype and device → z like x, in its memory layout, z_i matched to x_i.

        What torch.compile compiles may call it, with fullgraph=True too. BadInput in a worker of a DataLoader."""
        if torch.compiler.is_compiling():
            return inside.matched(self, x, labels, mask)
        self.check_worker()
        if mask is not None:
            raise BadInput(f"a mask is given to a pool of whole samples {tuple(self.shape)}: expected "
                           "NoisePool(…, grid=(16, None)), or no mask")
        self.settle()
        with torch.inference_mode(False), torch.no_grad():  # tensors of that mode could never be written to again
            return laid_out_like(x, self._answer(x, labels))

    def _answer(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return super().__call__(x, labels)

    def fresh(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return inside.fresh(self, x)
        self.check_worker()
        self.settle()
        return laid_out_like(x, super().fresh(x))

    def settle(self) -> None:
        """Draw the noises of this process, if it has got another number before the first pool: a pool may be made
        before torch.distributed begins."""
        if self.number == 0 and self.ranks == 1 and (process := process_number()) != (self.stream or (0,))[0]:
            self.stream = (process, *self.stream[1:])
            self.generator = noise_generator(self.seed, self.noise.device, 0, *self.stream)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.match_size}, {tuple(self.shape)}, cost={self.cost!r}, seed={self.seed})"

    def _match(self, samples: Tensor) -> Tensor:
        at_once = self._samples_at_once(self.rows)
        parts = [samples] if len(samples) <= at_once else samples.split(at_once)
        z = [self._serve(part) for part in parts]
        return z[0] if len(z) == 1 else torch.cat(z)

    def _serve(self, x: Tensor) -> Tensor:
        """Match x: (B, D) from this pool and, where it ends, from the next."""
        if self.left == 0:
            self._refill()
        now = x[: self._at_most(self.left)]
        z = self._take(now)
        self._learn(now)
        self._draw_ahead()
        return z if len(z) == len(x) else torch.cat([z, self._serve(x[len(z) :])])

    def _own_costs(self, noise: Tensor) -> Tensor:
        """What noises (M, D) cost whoever takes them, (M,)."""
        cost = COSTS["squared" if self.cost == PRICED else self.cost]
        if self.prices and self.prices.known:
            cost = self.prices
        return torch.cat([cost(part) for part in noise.split(max(1, 2**21 // noise.shape[1]))])

    def _at_most(self, samples: int) -> int:
        """How many of these samples to serve before prices may change, so that they change after the same sample
        whatever the batches."""
        return min(samples, self.prices.missing or samples) if self.prices else samples

    def _learn(self, samples: Tensor) -> None:
        """Look at samples (B, D) that were served. Once enough are known, all noises get their prices."""
        generator = partial(noise_generator, self.seed, self.noise.device, PRICES, *self.stream)
        if self.prices and self.prices.learn(samples, generator):
            self.own[: self.left] = self._own_costs(self.noise[: self.left])
            self.due = self.rows
            self.drawn = 0  # of the next pool: they are drawn again, the same, with their prices

    def _take(self, samples: Tensor) -> Tensor:
        """The nearest free noises, (B, D) → (B, D) with B ≤ left, which leave the pool."""
        order = self.index[: self.left].argsort()  # so that the lower index wins where costs are equal
        picks = order[greedy_anywhere(self._costs(samples).index_select(1, order))]
        taken = self.noise[picks]
        self._fill_gaps(picks)
        return taken

    def _costs(self, samples: Tensor) -> Tensor:
        """The costs of all free noises, (B, left)."""
        return costs_from(products(samples, self.noise[: self.left], self.tf32), self.own[: self.left])

    def _fill_gaps(self, picks: Tensor) -> None:
        """Move the last free noises into the places of those picked: (B,)."""
        end = self.left - len(picks)
        last = torch.arange(end, self.left, device=picks.device)
        last = last[torch.isin(last, picks, invert=True)]
        gaps = picks[picks < end]
        for stored in (self.noise, self.own, self.index):
            stored[gaps] = stored[last]
        self.left = end

    # ------------------------------------------------------------------------------- drawing

    def _refill(self) -> None:
        """Begin the next pool, and draw what is not drawn yet."""
        self._allocate()
        self._draw_ahead()
        self._begin()

    def _begin(self) -> None:
        """Make everything that is drawn ahead the current pool."""
        self.number += 1
        self.drawn = 0
        self.left = self.due = self.rows
        self.index = torch.arange(self.rows, device=self.noise.device, dtype=torch.int32)

    def _allocate(self) -> None:
        if len(self.noise):
            return
        rows = -(-self.rows // 16) * 16  # whole lines of memory, which a GPU multiplies fastest
        try:
            self.noise = self.noise.new_empty(rows, self.noise.shape[1])
            self.own = self.own.new_empty(rows)
        except RuntimeError as error:  # memory that was free when the pool was made
            needed = self._bytes(self.match_size) / 1e9
            raise BadInput(f"match_size is {self.match_size:,}: the pool needs {needed:,.1f} GB, more than "
                           f"{self.noise.device} has left; expected a smaller one") from error

    def _draw_ahead(self) -> None:
        """Draw the next pool from its end to its front, as far as places for it are free."""
        while self.left <= self.due and self.drawn < self.rows:
            chunk = (self.first + self.rows - self.drawn - 1) // self.chunk
            places = self._places(chunk)
            self.due = places.start  # with more left, the next batches need not ask
            if self.due < self.left:
                break
            self._draw(self.number + 1, chunk, self.noise[places])
            self.own[places] = self._own_costs(self.noise[places])
            self.drawn += places.stop - places.start

    def _draw(self, number: int, chunk: int, ours: Tensor) -> Tensor:
        """Draw one chunk of pool `number`, and put the noises of it that this rank keeps into `ours`."""
        start, places = chunk * self.chunk - self.first, self._places(chunk)
        if self.counted:
            return self._fill(ours, number, self.first + places.start)
        rows = min(self.chunk, self.match_size - chunk * self.chunk)
        whole = ours if len(ours) == rows else ours.new_empty(rows, ours.shape[1])
        whole.normal_(generator=noise_generator(self.seed, ours.device, number, chunk, *self.stream))
        return ours if whole is ours else ours.copy_(whole[places.start - start : places.stop - start])

    def _drawn(self, number: int) -> Tensor:
        noise = self.noise.new_empty(self.match_size, self.noise.shape[1])
        return self._fill(noise, number, 0) if self.counted else super()._drawn(number)

    @property
    def counted(self) -> bool:
        """Whether noises depend on the seed and their place alone: torch's own differ between GPUs."""
        return self.noise.is_cuda

    def _fill(self, noise: Tensor, number: int, first: int, by=draws) -> Tensor:
        """Fill noise: (rows, D) with those of pool `number` from `first` on."""
        return by.fill(noise, draws.key_of(self.seed, number, COUNTED, *self.stream), first)

    def _places(self, chunk: int) -> slice:
        """Where the chunk lies among this rank's noises when its pool begins."""
        start = chunk * self.chunk - self.first
        return slice(max(start, 0), min(start + self.chunk, self.rows))

    def _forget(self) -> None:
        """Go back to before the first batch, when no pool was drawn."""
        self.number = self.left = self.drawn = 0  # left: the count of free noises
        self.due = self.rows
        self.index = self.index.new_empty(0)

    # ------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        self.settle()
        state = super().state_dict() | {"index": self.index[: self.left].clone()}
        if self.prices:
            state |= {"prices": self.prices.state_dict(), "own": self.own[: self.left].clone()}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Resume where `state_dict` was taken, by a pool made with the same arguments, of any seed. From the state of
        another process, of a pool over another number of them, or of a GPU and an earlier version, which drew other
        noises, go on with the next pool, whose noises nobody has."""
        self.settle()
        made_for = self._made_for()
        saved = state.get("made_for") if isinstance(state, dict) else None
        if self.is_auto and isinstance(saved, dict) and "match_size" in saved:
            made_for["match_size"] = saved["match_size"]
        foreign = inside.from_elsewhere(state, made_for)
        check_state(state | {"made_for": made_for} if foreign else state, made_for)
        if self.prices and not self.prices.are_in(state):
            raise BadInput("the state of a priced pool lacks prices: expected what NoisePool.state_dict() returned")
        if made_for["match_size"] != self.match_size:
            self._resize(made_for["match_size"])
        self._forget()
        self.seed, self.number = state["seed"], state["number"]
        if self.prices:
            self.prices.load_state_dict(state["prices"])
        if foreign:
            inside.warn_of_fresh_noises(state["made_for"], made_for)
            fresh = inside.stream_after(state)
            self.number = fresh if self.ranks == 1 else self.number  # which those that share a pool have in common
            self.generator = noise_generator(self.seed, self.noise.device, 0, *self.stream or (self.rank,), fresh)
            return
        self.generator.set_state(state["generator"].cpu())
        if len(state["index"]):
            self._draw_again(state["index"].to(self.noise.device))
            if self.prices:  # told of other noises together, they could round another way
                self.own[: self.left] = state["own"].to(self.own)

    def _draw_again(self, index: Tensor) -> Tensor:
        """Draw this pool again and keep the noises `index`, in that order. Returns the place of every index, or −1."""
        self._allocate()
        self.left = len(index)
        self.index = torch.zeros(self.rows, device=index.device, dtype=torch.int32)
        self.index[: self.left] = index
        place = torch.full_like(self.index, -1)
        place[index.long()] = torch.arange(self.left, device=index.device, dtype=torch.int32)
        for chunk in range(self.first // self.chunk, -(-(self.first + self.rows) // self.chunk)):
            places = place[self._places(chunk)]
            noise = self._draw(self.number, chunk, self.noise.new_empty(len(places), self.noise.shape[1]))
            free = places >= 0
            self.noise[places[free]] = noise[free]
            self.own[places[free]] = self._own_costs(noise)[free]
        self._draw_ahead()
        return place

    # ------------------------------------------------------------------------------- memory and checks

    def check(self, x: Tensor) -> None:
        self.data_check(x)

    def _resize(self, match_size: int | None) -> None:
        """Take another size, before the pool is drawn."""
        self.match_size = self._fitting(match_size)
        self.rows = self.match_size // self.ranks  # of the pool's noises, those that this rank keeps,
        self.first = self.rank * self.rows  # from this one on
        self.noise = self.noise.new_empty(0, self.noise.shape[1])

    def _chosen(self, expected: int | None) -> int:
        """The match_size for "auto"."""
        if expected is None:
            raise BadInput("match_size is auto and expected is None: expected the count of all samples to be matched")
        share = 1 if self.memory is not None else SHARE
        largest, _ = self._largest(None, self.groups, share)
        limits = [(expected // (EMPTIED * self.groups), "which the training empties ten times"),
                  (MOST.get(self.noise.device.type, MOST_ELSEWHERE), "the most that auto takes"),
                  (largest, "all that fits into memory")]
        size, self.why = min(limits)
        size = size // self.ranks * self.ranks
        if size < 2:
            fits = largest >= max(2, self.ranks)
            cause = "the training empties no pool ten times" if fits else "no pool of two or more fits into memory"
            size, self.why = 0, f"random pairs, as {cause}"
        return size

    def _largest(self, match_size: int | None, pools: int, share: int = 1) -> tuple[int, str]:
        """The largest match_size with which `pools` pools fit into this share of the memory, and what limits it."""
        memory = self.memory
        if memory is not None and not (isinstance(memory, int | float) and 0 < memory < math.inf):
            raise BadInput(f"memory is {memory!r}: expected a number of gigabytes, more than 0")
        free = free_memory(self.noise.device) // share
        limit = f"{self.noise.device} has {free / 1e9:,.1f} GB free"
        if memory is not None and 1e9 * memory < free:
            free, limit = int(1e9 * memory), f"memory is {round(memory, 3)} GB"
        largest = bisect_left(range(2**31), True, key=lambda size: self._bytes(size, pools) > free) - 1
        return self._agreed(match_size, largest), limit

    def _fitting(self, match_size: int | None) -> int:
        """The match_size asked for if it fits, or for None the largest that does."""
        pools = self.groups if match_size is None else 1
        largest, limit = self._largest(match_size, pools)
        if match_size is None:
            if largest < 2:
                needed = self._bytes(2, pools) / 1e9
                noises = "two noises" if pools == 1 else f"two noises for each of {pools:,} groups"
                raise BadInput(f"match_size is None: {noises} need {needed:,.2f} GB and {limit}; expected more")
            return largest
        if isinstance(match_size, str):
            raise BadInput(f'match_size is {match_size!r}: expected a whole number, "auto" or None')
        match_size = check_count("match_size", match_size, at_least=0)
        if match_size % self.ranks:
            raise BadInput(f"match_size is {match_size}: expected a multiple of {self.ranks}, the number of ranks")
        if match_size > max(1, largest):
            raise BadInput(f"match_size is {match_size:,}: the pool needs {self._bytes(match_size) / 1e9:,.1f} GB and "
                           f"{limit}; expected at most {max(0, largest):,}")
        return match_size

    def _made_for(self) -> dict:
        counted = {"counted": True} if self.counted else {}
        return super()._made_for() | {"rank": self.rank, "ranks": self.ranks} | counted

    def _agreed(self, match_size: int | None, largest: int) -> int:
        """The largest match_size that fits on every rank that shares the pool."""
        return largest

    def _kept(self, match_size: int) -> int:
        """Bytes of a pool of as many noises between two calls."""
        rows, size = -(-match_size // self.ranks // 16) * 16, self.shape.numel() * self.noise.element_size()
        references = references_of(match_size, self.shape.numel()) if self.cost == PRICED else 0
        return rows * (size + 16) + references * size

    def _bytes(self, match_size: int, pools: int = 1) -> int:
        """Upper bound, in bytes, on what the pools and one call to them allocate, not counting the batch."""
        rows, size = match_size // self.ranks, self.noise.element_size()
        samples = self._samples_at_once(rows) * self.ranks
        costs = self.cost_copies * max(size, 4)
        handed_out = 3 * samples * self.shape.numel() * size  # the samples, their noises, and those that move
        drawn = 2 * max(self.numbers_per_chunk, self.shape.numel()) * max(size, 4)
        if self.cost == PRICED:  # when prices are told, nothing is drawn
            drawn = max(drawn, bytes_to_learn(match_size, self.shape.numel(), size))
        return pools * self._kept(match_size) + self._costs_each(rows) * samples * costs + handed_out + drawn

    def _samples_at_once(self, rows: int) -> int:
        """How many samples of one rank to match together: their costs take at most a gigabyte, their noises 32 MB."""
        fit = self.costs_at_once // max(1, self._costs_each(rows))
        return max(1, min(self.served_at_once, fit, 2**23 // self.shape.numel()))

    def _costs_each(self, rows: int) -> int:
        """How many costs of one sample exist at once."""
        return rows


def laid_out_like(x: Tensor, z: Tensor) -> Tensor:
    """z, of the shape, number type and device of x, in the memory layout of x: channels_last for instance."""
    return z if z.stride() == x.stride() else torch.empty_like(x).copy_(z)


def greedy_anywhere(cost: Tensor) -> Tensor:
    """`dansm.greedy` without a copy to the CPU where the costs are on a GPU and noises are plenty."""
    return greedy(cost) if cost.device.type == "cpu" or cost.shape[1] < 4 * len(cost) else greedy_by_rounds(cost)


def greedy_by_rounds(cost: Tensor) -> Tensor:
    """The picks of `dansm.greedy`, with all samples choosing at once (deferred acceptance, Gale and Shapley 1962).

    Every waiting sample names its nearest noise that no earlier sample holds. A noise that several name is held by the
    earliest of them; the others name again, and so does the sample it is taken from. All noises prefer the earlier
    sample, and under one common preference the outcome is the serial one.
    """
    order = torch.arange(len(cost), device=cost.device)
    nobody = len(cost)
    holder = torch.full((cost.shape[1],), nobody, device=cost.device)
    least, picks = cost.min(1)
    waiting = order
    while len(waiting):
        if not least.isfinite().all():
            raise BadInput("a sample's least cost is NaN or infinite: expected a finite one among the noises left")
        holder.scatter_reduce_(0, picks[waiting], waiting, "amin")
        waiting = order[holder[picks] != order]
        held = holder <= waiting[:, None]
        least, picks[waiting] = cost[waiting].masked_fill_(held, torch.inf).min(1)
    return picks


class DataCheck:
    """Refuses batches of another shape, integers, NaN, and values beyond 1e15, without making a GPU wait.

    A GPU writes its finding into `found`, which is read when the next batch comes: what is wrong with one batch is
    reported at one of the next. (Where kernels match they find infinite or NaN costs, which values from about 1e19 on
    have.)
    """

    @torch.inference_mode(False)  # see FastPool.__call__
    def __init__(self, shape: torch.Size, device: torch.device):
        self.shape, self.device = shape, device
        on_gpu = device.type == "cuda"
        self.found = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self.ever_found = torch.zeros(1, dtype=torch.int32, device=device) if on_gpu else None

    def __reduce__(self):  # a copy needs memory of its own that the GPU can write to
        return DataCheck, (self.shape, self.device)

    def __call__(self, x: Tensor, numbers: bool = True) -> None:
        """numbers: False leaves the values to whoever matches, and checks only the form of x."""
        check_batch(x, self.shape)
        if self.found.item():
            if self.ever_found is not None:
                torch.cuda.synchronize(self.ever_found.device)  # nothing more is on its way
                self.ever_found.zero_()
            self.found.zero_()
            raise BadInput(f"the batch before this one {NO_DISTANCE}")
        if not numbers or not x.numel():
            return
        if self.ever_found is not None and x.is_cuda:
            self.found.copy_(self.ever_found.logical_or_(~has_distances(x)), non_blocking=True)
        else:
            check_finite_batch(x)
