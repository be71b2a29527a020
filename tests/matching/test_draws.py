"""Noises that every GPU draws alike: known numbers, N(0, I), and the same however they are drawn."""

import pytest
import torch
from scipy import stats

from dansm import NoisePool
from dansm.scale.matching import draws, pool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows(count=6, width=10, key=5, first=0, dtype=torch.float32):
    return draws.fill(torch.empty(count, width, dtype=dtype, device=DEVICE), key, first)


def test_the_random_words_are_philoxs():
    zero = torch.zeros(1, dtype=torch.int64)
    words = [word.item() for word in draws.philox(zero, zero, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's test vector


BITS = [[-1087239836, -1072729783, 1062921762, 1046878418, -1107082641],
        [1044776038, -1094280311, 1032638869, 1057635248, 1069052841]]


def test_every_device_draws_these():
    assert rows(2, 5, draws.key_of(3, 1), first=40_000).view(torch.int32).tolist() == BITS


def test_they_are_normal_and_independent():
    z = rows(1000, 402, draws.key_of(0, 1)).double().cpu()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    for one, other in ((z[:, 0::2], z[:, 1::2]), (z[:, :-2], z[:, 2:]), (z[:-1], z[1:])):
        for power in (1, 2):
            a, b = (part**power - (part**power).mean() for part in (one, other))
            deviation = (a * b).mean() * a.numel() ** 0.5 / (a.std() * b.std())
            assert abs(deviation) < 4
    assert 4.2 < z.abs().max() < 6.5


@pytest.mark.parametrize("width", [1, 3, 4, 7, 16])
def test_a_number_depends_on_its_row_and_column_alone(width, monkeypatch):
    whole = rows(20, width, first=100)
    assert torch.equal(rows(7, width, first=105), whole[5:12])
    assert torch.equal(rows(20, width + 4, first=100)[:, :width], whole)
    monkeypatch.setattr(draws, "AT_ONCE", 3)
    assert torch.equal(rows(20, width, first=100), whole)
    assert not torch.equal(rows(20, width, first=100, key=6), whole)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(rows(20, width, first=100, dtype=dtype), whole.to(dtype))


def test_streams_of_a_seed_differ():
    assert len({draws.key_of(*stream) for stream in ((0, 1), (0, 2), (1, 1), (0, 1, 1), (0, 1, 0, 1))}) == 5
    assert all(0 <= draws.key_of(seed) < 2**64 for seed in range(50))


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 20, 521])
def test_the_kernel_draws_the_same_to_the_last_bit(width):
    kernels = pytest.importorskip("dansm.scale.matching.draw_kernels")
    for dtype in (torch.float32, torch.float64):
        for key in (5, 2**64 - 5):
            drawn = kernels.fill(torch.empty(11, width, dtype=dtype, device=DEVICE), key, 2**31 - 12)
            assert torch.equal(drawn, rows(11, width, key, 2**31 - 12, dtype))


@pytest.fixture
def counted(monkeypatch):
    """Pools draw on a CPU as they do on a GPU."""
    monkeypatch.setattr(pool.FastPool, "counted", True)


def life(source, batches=8, batch=5):
    generator = torch.Generator().manual_seed(1)
    return torch.cat([source(torch.randn(batch, *source.shape, generator=generator)) for _ in range(batches)])


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_hands_out_these_noises_whatever_the_chunks(dtype, monkeypatch):
    source = NoisePool(20, (3, 4), seed=7, dtype=dtype)
    handed_out = life(source)
    for number, part in enumerate(handed_out.flatten(1).split(20), 1):
        drawn = draws.fill(torch.empty(20, 12, dtype=dtype), draws.key_of(7, number, pool.COUNTED), 0).float()
        assert sorted(part.tolist()) == sorted(drawn.tolist())
    monkeypatch.setattr(pool.FastPool, "numbers_per_chunk", 36)
    assert torch.equal(life(NoisePool(20, (3, 4), seed=7, dtype=dtype)), handed_out)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("settings", [{}, {"groups": 2}])
def test_a_pool_resumes_with_the_same_noises(settings):
    x, labels = torch.randn(5, 4), [torch.tensor([0, 1, 1, 0, 1])] * len(settings)
    source = NoisePool(12, (4,), seed=7, **settings)
    for _ in range(3):
        source(x, *labels)
    resumed = NoisePool(12, (4,), seed=0, **settings)
    resumed.load_state_dict(source.state_dict())
    for _ in range(5):
        assert torch.equal(resumed(x, *labels), source(x, *labels))


@pytest.mark.parametrize("multiprocessors", [None, 132])
def test_a_state_of_torchs_own_noises_leads_to_noises_nobody_has_drawn(multiprocessors, monkeypatch):
    source = NoisePool(12, (4,), seed=7)
    drawn = [life(source, 1)]
    state = source.state_dict()
    if multiprocessors:
        state["made_for"]["multiprocessors"] = multiprocessors
    drawn.append(life(source, 4))
    monkeypatch.setattr(pool.FastPool, "counted", True)
    resumed = NoisePool(12, (4,), seed=7)
    with pytest.warns(match="an earlier version, which drew other noises on GPUs.*nobody has drawn"):
        resumed.load_state_dict(state)
    assert len(torch.cat([*drawn, life(resumed, 4)]).unique(dim=0)) == 9 * 5
