"""match_scope "global": several processes give what one process gives for the joined batch."""

import pytest
import torch
import torch.distributed as group
import torch.multiprocessing as processes

from dansm import BadInput, NoisePool

needs_gloo = pytest.mark.skipif(not group.is_available() or not group.is_gloo_available(), reason="no gloo")

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


@needs_gloo
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_pool_match_as_one_process_with_the_joined_batch(ranks, tmp_path):
    processes.spawn(one_rank, (ranks, str(tmp_path)), ranks)
    done = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for case, (match_size, batches, kind) in enumerate(CASES):
        match_size = match_size // ranks * ranks
        for cost in ("squared", "inner"):
            alone = NoisePool(match_size, (5,), cost=cost, dtype=torch.float64, seed=case)
            alone.chunk = 7
            for number, sizes in enumerate(batches):
                expected = alone(samples(100 * case + number, kind, sizes[:ranks]))
                got = torch.cat([results[case, cost][0][number] for results, *_ in done])
                assert torch.equal(got, expected), (case, cost, number)
            assert all(results[case, cost][1] > 0 for results, *_ in done)
    for rank, (_, (uneven, unseeded, nan, shape, seeds, largest), _, _) in enumerate(done):
        assert ("NaN" if rank == 0 else "rank 0 is refused") in nan
        assert ("(3, 4)" if rank == 1 else "rank 1 is refused") in shape
        assert "match_size and seed of the ranks" in seeds
        assert largest == done[0][1][5] and int(largest) > 1e4 and int(largest) % ranks == 0
        assert f"match_size is {ranks + 1}: expected a multiple of {ranks}" in uneven
        assert "expected a seed" in unseeded
    unmatched, own = [noise for *_, noise in done], [noise for _, _, noise, _ in done]
    assert not torch.equal(own[0], own[1]) and torch.equal(own[0], NoisePool(8, (4,), seed=1)(torch.zeros(2, 4)))
    assert not torch.equal(unmatched[0], unmatched[1])  # each rank has vanilla noise of its own


def test_a_global_pool_outside_of_a_group_is_refused():
    with pytest.raises(BadInput, match=r"match_scope is global.*torchrun"):
        NoisePool(8, (2,), seed=0, match_scope="global")
    with pytest.raises(BadInput, match=r"match_scope is 'node'.*rank, global"):
        NoisePool(8, (2,), seed=0, match_scope="node")
