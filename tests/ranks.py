"""What each process of tests/matching/test_spread.py does. It stands apart, as a new process imports it by its name."""

import torch
import torch.distributed as group

from dansm import BadInput, NoisePool

# match_size, samples of each rank in each batch (by rank, in turn), kind of data
CASES = [
    (24, [[3, 3, 3], [2, 0, 5], [9, 1, 7]], "random"),  # unequal batches, an empty one, a refill inside
    (120, [[4, 4, 4]] * 12, "random"),  # several pools, the rounds and the nearly empty end
    (60, [[8, 8, 8]] * 3, "one cluster"),  # everybody wants the same noises
    (60, [[8, 8, 8]] * 3, "equal"),  # only the labels decide
    (12, [[30, 2, 30]], "random"),  # a batch of several pools
]


def samples(case, kind, sizes):
    generator = torch.Generator().manual_seed(case)
    x = torch.randn(sum(sizes), 5, dtype=torch.float64, generator=generator)
    return {"random": x, "one cluster": 2 + 1e-3 * x, "equal": torch.zeros_like(x)}[kind]


def one_rank(rank, ranks, folder):
    group.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    results = {}
    for case, (match_size, batches, kind) in enumerate(CASES):
        match_size = match_size // ranks * ranks
        for cost in ("squared", "inner"):
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
    torch.save((results, refused, own, NoisePool(0, (4,), seed=1, match_scope="global")(torch.zeros(2, 4))),
               f"{folder}/{rank}.pt")
    group.destroy_process_group()
