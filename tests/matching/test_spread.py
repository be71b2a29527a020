"""match_scope "global": several processes give what one process gives for the joined batch."""

import pytest
import torch
import torch.multiprocessing as processes
from ranks import CASES, GROUPS, grouped_batches, one_rank, samples
from support import needs_gloo

from dansm import BadInput, NoisePool
from dansm.scale.matching import prices


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_pool_match_as_one_process_with_the_joined_batch(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(prices, "DIMENSIONS", 1)  # as the ranks do
    processes.spawn(one_rank, (ranks, str(tmp_path)), ranks)
    done = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for case, (match_size, batches, kind) in enumerate(CASES):
        match_size = match_size // ranks * ranks
        for cost in ("squared", "inner", "priced"):
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
    check_groups(ranks, tmp_path)


def check_groups(ranks, folder):
    done = [torch.load(folder / f"groups{rank}.pt") for rank in range(ranks)]
    number = 0
    for match_size, batches, coming in GROUPS:
        alone = NoisePool(match_size * ranks, (5,), dtype=torch.float64, groups=3, seed=4)
        for x, labels, sizes in grouped_batches(match_size, batches, coming, ranks):
            got = [out[number] for out, _ in done]
            assert [len(z) for z in got] == sizes
            if match_size:
                assert torch.equal(torch.cat(got), alone(x, labels)), (match_size, number)
            else:  # each rank has random noises of its own
                assert len(torch.cat(got).unique()) == x.numel()
            number += 1
    for rank, (_, refused) in enumerate(done):
        shape, nan, label, memory = refused
        if rank == 1:
            assert "(4, 3)" in shape and "NaN" in nan and "from 3 to 3" in label
        else:
            assert all("rank 1 is refused" in said for said in (shape, nan, label))
        assert "group 1 comes when 1 pools" in memory


def test_a_global_pool_outside_of_a_group_is_refused():
    with pytest.raises(BadInput, match=r"match_scope is global.*torchrun"):
        NoisePool(8, (2,), seed=0, match_scope="global")
    with pytest.raises(BadInput, match=r"match_scope is global.*torchrun"):
        NoisePool(8, (2,), seed=0, match_scope="global", groups=3)
    with pytest.raises(BadInput, match=r"match_scope is 'node'.*rank, global"):
        NoisePool(8, (2,), seed=0, match_scope="node")
