"""What other processes of tests/matching do. It stands apart, as a new process imports it by its name."""

import torch
import torch.distributed as group

from dansm import BadInput, NoisePool
from dansm.scale.matching import prices

# match_size, samples of each rank in each batch (by rank, in turn), kind of data
CASES = [
    (24, [[3, 3, 3], [2, 0, 5], [9, 1, 7]], "random"),  # unequal batches, an empty one, a refill inside
    (120, [[6, 6, 6]] * 20, "random"),  # several pools, the rounds and the nearly empty end
    (60, [[8, 8, 8]] * 3, "one cluster"),  # everybody wants the same noises
    (60, [[8, 8, 8]] * 3, "equal"),  # only the labels decide
    (12, [[30, 2, 30]], "random"),  # a batch of several pools
]

# match_size of each of three groups, samples of each rank in each batch, the groups that come on each rank
GROUPS = [
    (6, [[9, 4, 2], [0, 7, 7], [5, 5, 5]], [[0, 1, 2], [0, 2], [1]]),
    (0, [[3, 2, 4]], [[0, 2], [0], [0, 1]]),
]


def samples(case, kind, sizes):
    generator = torch.Generator().manual_seed(case)
    x = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=generator)
    return {"random": x, "one cluster": 2 + 1e-3 * x, "equal": torch.zeros_like(x)}[kind]


def groups_of(case, sizes, coming):
    """The group of each sample, rank 0's first."""
    generator = torch.Generator().manual_seed(case)
    return torch.cat([torch.tensor(groups)[torch.randint(len(groups), (size,), generator=generator)]
                      for size, groups in zip(sizes, coming, strict=False)])


def grouped_batches(match_size, batches, coming, ranks):
    """(x, labels, sizes) of every batch, of all ranks together."""
    for number, sizes in enumerate(batches):
        sizes = sizes[:ranks]
        case = 1000 * match_size + number
        yield samples(case, "random", sizes), groups_of(case, sizes, coming), sizes


class Paired:
    """A dataset that makes the mistake to draw noises where samples are read."""

    def __init__(self, noises, shape):
        self.noises, self.shape = noises, shape

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.noises(torch.zeros(1, *self.shape))


class Drawing:
    def __init__(self, coupling):
        self.coupling = coupling

    def __call__(self, x):
        return self.coupling.draw(len(x))[0]


def one_rank_that_begins_late(rank, ranks, folder):
    """Save the noises of pools made before torch.distributed began, and of pools made after."""
    kinds = dict(match_size=12), dict(match_size=12, groups=2), dict(match_size=0)
    x, labels = torch.zeros(8, 3), torch.arange(8) % 2

    def made():
        return [NoisePool(shape=(3,), seed=0, **kind) for kind in kinds]

    def noises(pool):
        return torch.cat([pool(x, labels) if pool.grouped else pool(x), pool.fresh(x)])

    before = made()
    group.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=ranks)
    torch.save([(noises(early), noises(late)) for early, late in zip(before, made(), strict=True)],
               f"{folder}/late-{rank}.pt")
    group.destroy_process_group()


def one_rank_with_groups(rank, ranks):
    """What this rank is handed out, by a pool that is saved and resumed after the first batch."""
    out, refused = [], []
    for match_size, batches, coming in GROUPS:
        settings = dict(shape=(5,), dtype=torch.float64, groups=3, match_scope="global")
        pool = NoisePool(match_size * ranks, seed=4, **settings)
        for x, labels, sizes in grouped_batches(match_size, batches, coming, ranks):
            out.append(pool(x.split(sizes)[rank], labels.split(sizes)[rank]))
            state = pool.state_dict()
            pool = NoisePool(match_size * ranks, seed=9, **settings)
            pool.load_state_dict(state)
    # What one rank refuses all refuse, and the next batch is served again. A second group fits on rank 1 alone.
    settings = dict(match_size=2**12 * ranks, shape=(1024,), seed=1, groups=3, match_scope="global")
    memory = NoisePool(**settings)._bytes(settings["match_size"]) / 1e9
    pool = NoisePool(**settings, memory=memory + (0.1 if rank == 1 else 0.01))
    x, labels = torch.zeros(4, 1024), torch.tensor([0, 0, 0, 0])
    for bad in ((x[:, :3], labels), (x * torch.nan, labels), (x, labels + 3), (x, labels + rank)):
        try:
            pool(*(bad if rank == 1 else (x, labels)))
            refused.append("nothing")
        except BadInput as error:
            refused.append(str(error))
        assert pool(x, labels).shape == x.shape
    return out, refused


def one_rank(rank, ranks, folder):
    group.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    prices.DIMENSIONS = 1
    results = {}
    for case, (match_size, batches, kind) in enumerate(CASES):
        match_size = match_size // ranks * ranks
        for cost in ("squared", "inner", "priced"):
            pool = NoisePool(match_size, (5,), cost=cost, dtype=torch.float64, seed=case, match_scope="global")
            pool.chunk = 7  # so that chunks lie across the ranks' borders
            out = []
            for number, sizes in enumerate(batches):
                x = samples(100 * case + number, kind, sizes[:ranks]).split(sizes[:ranks])[rank]
                out.append(pool(x))
                if number == 1:  # a resumed run goes on with the same noises
                    state = pool.state_dict()
                    pool = NoisePool(match_size, (5,), cost=cost, dtype=torch.float64, seed=99, match_scope="global")
                    pool.chunk = 7
                    pool.load_state_dict(state)
            results[case, cost] = out, pool.received
    refused = []
    for wrong in (dict(match_size=ranks + 1, seed=0), dict(match_size=ranks, seed=None)):
        try:
            NoisePool(shape=(5,), match_scope="global", **wrong)
        except BadInput as error:
            refused.append(str(error))
    # What one rank refuses all refuse, and the next batch is served again.
    pool = NoisePool(8 * ranks, (5,), seed=1, match_scope="global")
    wrong = {0: torch.full((3, 5), torch.nan), 1: torch.zeros(3, 4)}
    for bad in wrong:
        try:
            pool(wrong[bad] if rank == bad else torch.zeros(3, 5))
            refused.append("nothing")
        except BadInput as error:
            refused.append(str(error))
    assert pool(torch.zeros(3, 5)).shape == (3, 5)
    # Ranks that were made unlike are refused on all.
    try:
        NoisePool(ranks, (5,), seed=rank, match_scope="global")
        refused.append("nothing")
    except BadInput as error:
        refused.append(str(error))
    largest = NoisePool(None, (5,), memory=0.5 + 0.1 * rank, seed=0, match_scope="global").match_size
    refused.append(str(largest))
    own = NoisePool(8, (4,), seed=1)(torch.zeros(2, 4))  # pools of the ranks' own, from the same seed
    torch.save(one_rank_with_groups(rank, ranks), f"{folder}/groups{rank}.pt")
    torch.save((results, refused, own, NoisePool(0, (4,), seed=1, match_scope="global")(torch.zeros(2, 4))),
               f"{folder}/{rank}.pt")
    group.destroy_process_group()


def one_rank_with_a_grid(rank, ranks, folder):
    """Save this rank's samples, their noises and what is told when rank 1 has a batch without a channel."""
    group.init_process_group("gloo", init_method=f"file://{folder}/grid", rank=rank, world_size=ranks)
    pool = NoisePool(16, (2, 8, 8), grid=(4, 4), seed=3, match_scope="global")
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(rank))
    z, said = pool(x), ""
    try:
        pool(x[:, rank:])
    except BadInput as error:
        said = str(error)
    assert pool(x).shape == x.shape
    torch.save((x, z, said), f"{folder}/{rank}.pt")
    group.destroy_process_group()
