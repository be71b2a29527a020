"""The coarse pool: exact noise for samples of any size, matched by the sums of their blocks."""

import copy
import math
import pickle
import runpy

import pytest
import torch
import torch.multiprocessing as processes
from hypothesis import example, given
from hypothesis import strategies as st
from pools import drawn_for, saved_and_loaded
from ranks import one_rank_with_a_grid
from scipy.stats import kstest
from support import ROOT, needs_gloo
from torch.utils.data import DataLoader

import dansm
from dansm import BadInput, NoisePool, noise_generator
from dansm.scale.base.files import read_csv
from dansm.scale.matching import coarse as coarse_module
from dansm.scale.matching.coarse import CoarsePool, blocks_of

COSTS = ["squared", "inner", "priced"]
SIZES = [(8, 8), (16, 4), (7, 9), (4, 5), (3, 2), (1, 1)]  # equal blocks, unequal ones, some of them empty
CPU = torch.device("cpu")


def sums(x, *grid):
    """Px, written out: position r of n lies in block r · blocks // n, whose sum is divided by the root of its size."""
    first = x.ndim - len(grid)
    for axis, blocks in enumerate(grid, first):
        if blocks is None:
            continue
        n = x.shape[axis]
        cut = [[r for r in range(n) if r * blocks // n == block] for block in range(blocks)]
        x = torch.stack([x.index_select(axis, torch.tensor(part, dtype=torch.int64)).sum(axis) /
                         math.sqrt(max(1, len(part))) for part in cut], axis)
    return x


def coarse(x, sizes, *grid):
    """What is matched: Px, as if x had these sizes along its last axes."""
    counts = [math.prod(size for size, blocks in zip(of, grid, strict=True) if blocks)
              for of in (sizes, x.shape[x.ndim - len(grid):])]
    return sums(x, *grid) * math.sqrt(counts[0] / max(1, counts[1]))


def images(count, channels=2, size=(8, 8), seed=0):
    """Smooth ones, of unequal brightness, as the sums over blocks see them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, 1, 1, generator=generator) + 0.3 * torch.randn(
        count, channels, *size, generator=generator)


def check_keys(z, drawn, error=1e-5):
    """The sums of the blocks of z are those drawn, in another order."""
    exactly = dict(compute_mode="donot_use_mm_for_euclid_dist")
    least, key = torch.cdist(sums(z, 4, 4).flatten(1).double(), drawn.double(), **exactly).min(1)
    assert least.max() < error and sorted(key.tolist()) == list(range(len(drawn)))


def pool_of(match_size=20, shape=(2, 8, 8), grid=(4, 4), seed=0, **settings):
    return NoisePool(match_size, shape, grid=grid, seed=seed, **settings)


# ------------------------------------------------------------------------------- the rule


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), data=st.data())
@example(sizes=[8, 8], data=None)
@example(sizes=[7, 3], data=None)
def test_sums_are_over_blocks_that_differ_by_one_at_most_and_their_rows_are_orthonormal(sizes, data):
    grids = st.lists(st.none() | st.integers(1, 6), min_size=len(sizes), max_size=len(sizes)).filter(any)
    grid = data.draw(grids) if data else [4, 4]
    count = math.prod(sizes)
    one_each = torch.eye(count, dtype=torch.float64).view(count, *sizes)
    blocks = blocks_of(torch.Size(sizes), tuple(grid), CPU, torch.float64)
    got = blocks.sums(one_each, torch.float64)
    torch.testing.assert_close(got, sums(one_each, *grid))
    matrix = got.flatten(1).T
    empty = (matrix == 0).all(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.diag(1.0 - empty.double()))
    assert not (matrix == 0).all(0).any()  # each number lies in a block


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_get_the_keys_that_an_ordinary_pool_gives_to_them_when_coarse(size, cost):
    pool, keys = pool_of(150, cost=cost), NoisePool(150, (2, 4, 4), cost=cost, seed=0)
    for x in images(600, size=size).split(40):
        z = pool(x)
        filled = sums(torch.ones(2, *size), 4, 4) > 0  # an empty block has no sum
        torch.testing.assert_close(sums(z, 4, 4), keys(coarse(x, (8, 8), 4, 4)) * filled)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_over_a_whole_pool_the_sums_are_exactly_the_keys_drawn(size):
    check_keys(pool_of(64)(images(64, size=size)), drawn_for(0, 1, 64, 32))


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (2, 3)], ids=str)
def test_over_a_whole_pool_noises_are_standard_normal_and_uncorrelated(size):
    count = 4000
    z = pool_of(count, (1, 6, 6), (3, 3))(images(count, 1, size)).flatten(1).double()
    assert kstest(z.flatten(), "norm").pvalue > 1e-3
    assert z.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (z.T @ z / count - torch.eye(z.shape[1])).abs().max() < 7 / math.sqrt(count)


def test_a_match_finds_what_a_fresh_noise_does_not():
    x = images(200)
    assert dansm.path_length(x, pool_of(1000)(x)) < dansm.path_length(x, torch.randn_like(x)) - 0.2


@pytest.mark.parametrize("match_size", [0, 1])
def test_pools_of_no_choice_give_fresh_noise_for_any_size(match_size):
    pool = pool_of(match_size)
    for size in SIZES:
        z = pool(images(400, size=size))
        assert kstest(z.flatten(), "norm").pvalue > 1e-3 and not torch.equal(z, pool(images(400, size=size)))


@given(batches=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
       grid=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_one_pool_serves_batches_of_any_sizes_in_turn(batches, grid):
    pool, keys = pool_of(7, (1, 5, 5), grid, cost="squared"), NoisePool(7, (1, *grid), cost="squared", seed=0)
    for count, height, width in batches:
        x = torch.full((count, 1, height, width), 0.5, dtype=torch.float64)
        z = pool(x)
        assert z.shape == x.shape and z.isfinite().all()
        expected = keys(coarse(x, (5, 5), *grid)).float()
        if height and width:
            filled = sums(torch.ones(1, height, width), *grid) > 0
            torch.testing.assert_close(sums(z, *grid).float(), expected * filled)


@pytest.mark.parametrize("size", [(16, 24), (8, 16)], ids=str)
def test_no_size_gets_noises_of_its_own_kind(size):
    """An image and the same one resized take the same key."""
    x = images(20)
    large = x.repeat_interleave(size[0] // 8, 2).repeat_interleave(size[1] // 8, 3)
    torch.testing.assert_close(sums(pool_of(100)(large), 4, 4), sums(pool_of(100)(x), 4, 4))


# ------------------------------------------------------------------------------- videos and sequences


def test_videos_of_any_length_height_and_width():
    pool = pool_of(50, (3, 8, 8, 8), (2, 4, 4))
    for size in [(8, 8, 8), (5, 8, 12), (1, 9, 7)]:
        x = torch.randn(6, 3, *size)
        assert pool(x).shape == x.shape
    assert pool.noise.shape == (64, 3 * 2 * 4 * 4)  # 50, in whole lines of memory


def of_lengths(x, *lengths):
    return torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]


def sequences(seed=0, length=12, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 1, channels, generator=generator) + torch.randn(5, length, channels, generator=generator)


def test_a_padded_sequence_gets_the_noise_sums_of_the_sequence_alone():
    padded, alone = (pool_of(30, (12, 3), (4, None)) for _ in range(2))
    x, lengths = sequences(), (12, 3, 7, 1, 8)
    z = padded(x, mask=of_lengths(x, *lengths))
    for sample, noise, length in zip(x, z, lengths, strict=True):
        expected = alone(sample[None, :length])
        torch.testing.assert_close(sums(noise[None, :length], 4, None), sums(expected, 4, None))


@pytest.mark.parametrize("shape", [(12, 3), (12,), (12, 1, 3)], ids=str)
def test_what_lies_in_the_padding_changes_no_noise(shape):
    x = sequences().view(5, 12, 1, 3)[:, :, 0, 0].contiguous() if len(shape) == 1 else sequences().view(5, *shape)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.6  # not at the end alone
    mask[3] = False
    other = x.clone()
    for wrong in (1e3, math.nan, math.inf):
        other[~mask] = wrong
        pools = [pool_of(30, shape, (4, *[None] * (len(shape) - 1))) for _ in range(2)]
        z = pools[0](x, mask=mask)
        assert torch.equal(pools[1](other, mask=mask), z) and z.isfinite().all()


def test_blocks_divide_the_real_elements_wherever_they_are():
    mask = torch.tensor([[True, False, True, True, False, True]])
    x = torch.tensor([[1.0, 50, 2, 3, 50, 4]])
    z = pool_of(30, (6,), 2)(x, mask=mask)
    expected = NoisePool(30, (2,), seed=0)(torch.tensor([[1.5, 3.5]]) * math.sqrt(3))  # 6 numbers, in blocks of 3
    torch.testing.assert_close(sums(z[mask][None], 2), expected)


def test_noise_under_a_mask_is_standard_normal_everywhere():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 1, 2, generator=generator) + torch.randn(3000, 6, 2, generator=generator)
    mask = torch.rand(3000, 6, generator=generator).argsort(1) < 5
    z = pool_of(3000, (6, 2), (4, None))(x, mask=mask)
    assert kstest(z[mask].flatten(), "norm").pvalue > 1e-3 and kstest(z[~mask].flatten(), "norm").pvalue > 1e-3
    z = z.flatten(1)
    assert (z.T @ z / 3000 - torch.eye(12)).abs().max() < 7 / math.sqrt(3000)


def test_a_mask_of_all_real_elements_is_none():
    x = sequences()
    z = [pool_of(30, (12, 3), (4, None))(x, mask=mask) for mask in (None, of_lengths(x, *[12] * 5))]
    torch.testing.assert_close(*z)


# ------------------------------------------------------------------------------- as other pools


def test_each_group_has_keys_of_its_own():
    pool, keys = pool_of(20, groups=3), NoisePool(20, (2, 4, 4), groups=3, seed=0)
    for seed in range(6):
        x, labels = images(15, seed=seed), torch.arange(15) % 3
        torch.testing.assert_close(sums(pool(x, labels), 4, 4), keys(sums(x, 4, 4), labels))
    for arguments in ((pool, x), (pool_of(), x, labels)):
        with pytest.raises(BadInput, match="labels are"):
            arguments[0](*arguments[1:])


@pytest.mark.slow
@pytest.mark.usefixtures("short_lists")
@pytest.mark.parametrize("groups", [None, 3])
def test_by_kernels_it_hands_out_the_same_noises(groups, monkeypatch):
    pytest.importorskip("triton")
    from dansm.scale.matching import group_kernels, kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = [(x.to(device), torch.arange(10) % 3 if groups else None) for x in images(40, size=(7, 9)).split(10)]
    plain = pool_of(40, groups=groups, device=device, compile=False)
    expected = [plain(*batch) for batch in batches]
    kind = group_kernels.KernelGroupedPool if groups else kernels.KernelPool
    monkeypatch.setattr(coarse_module, "pool_class", lambda *_, **__: kind)
    pool = pool_of(40, groups=groups, device=device)
    assert type(pool.keys) is kind
    torch.testing.assert_close([pool(*batch) for batch in batches], expected)


def test_pairs_are_made_by_it():
    x = images(30)
    labels = torch.arange(30) % 2
    for groups in (None, 2):
        pool, expected = pool_of(40, groups=groups), pool_of(40, groups=groups)
        for _, z, *_ in dansm.pairs([(x, labels)] * 2, pool=pool, groups=groups):
            assert torch.equal(z, expected(x, labels if groups else None))
    x, z = next(dansm.pairs([x], "random", pool=pool_of(0)))
    assert torch.equal(z, torch.randn(x.shape, generator=noise_generator(0, "cpu", 0, 0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_noises_come_in_the_type_and_layout_of_the_batch(dtype, size):
    x = images(6, size=size).to(dtype).requires_grad_()
    z = pool_of()(x)
    assert (z.dtype, z.device, z.requires_grad) == (dtype, x.device, False)
    torch.testing.assert_close(z, pool_of()(x.detach().float()).to(dtype))
    turned = x.detach().to(memory_format=torch.channels_last)
    again = pool_of()(turned)
    assert again.stride() == turned.stride() and torch.equal(again, z)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_pools_of_other_number_types_work_out_the_sums_at_least_in_float32(size):
    x = images(20, size=size)
    check_keys(pool_of(dtype=torch.bfloat16)(x), drawn_for(0, 1, 20, 32, torch.bfloat16))
    check_keys(pool_of(dtype=torch.float64)(x.double()), drawn_for(0, 1, 20, 32, torch.float64), 1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_batches_of_one_take_the_keys_of_a_whole_batch(size):
    x = images(50, size=size)
    whole, single = pool_of(cost="squared"), pool_of(cost="squared")
    torch.testing.assert_close(sums(torch.cat([single(sample[None]) for sample in x]), 4, 4), sums(whole(x), 4, 4))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_what_a_trainer_has_set_changes_no_noise(size):
    x, pool, plain = images(12, size=size), pool_of(), pool_of()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        z = pool(x)
    assert not z.is_inference() and torch.equal(z, plain(x))
    with torch.device("meta"):
        z = pool(x)
    assert torch.equal(z, plain(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_continues_with_the_same_noises(copied):
    pool, x = pool_of(), images(30)
    pool(x[:7])
    other = copied(pool)
    assert torch.equal(other(x), pool(x))
    assert isinstance(other, NoisePool) and isinstance(other, CoarsePool)


def test_in_a_loaders_workers_it_is_refused():
    pool = pool_of()
    loader = DataLoader(images(4), batch_size=2, num_workers=1, collate_fn=lambda x: pool(torch.stack(x)),
                        multiprocessing_context="fork")
    with pytest.raises(BadInput, match="a NoisePool is called in a worker"):
        next(iter(loader))


def test_a_compiled_step_gets_the_noises_of_the_plain_one():
    torch.compiler.reset()
    pools = [pool_of(30, (12, 3), (4, None)) for _ in range(2)]
    step = torch.compile(lambda pool, x, mask: x - pool(x, mask=mask), backend="aot_eager", fullgraph=True)
    for seed, lengths in enumerate([(12, 3, 7, 1, 8), (1, 2, 3, 4, 5), None]):
        x = sequences(seed)
        mask = of_lengths(x, *lengths) if lengths else None
        assert torch.equal(step(pools[0], x, mask), x - pools[1](x, mask=mask))


def test_it_has_what_others_ask_a_pool_for():
    pool = pool_of(cost="inner", expected=10_000)
    assert (pool.match_size, pool.cost, pool.seed, pool.grouped) == (20, "inner", 0, False)
    assert pool.shape == (2, 8, 8) and pool.noise.device == CPU
    chosen = pool_of("auto", expected=1000)
    assert chosen.match_size == 100 and chosen.why
    assert pool_of(None, memory=0.5).match_size > 5 * NoisePool(None, (2, 64, 64), memory=0.5).match_size


def test_its_bench_compares_it_with_whole_noises(tmp_path, monkeypatch):
    monkeypatch.setattr(coarse_module, "COSTS_AT_ONCE", coarse_module.COSTS_AT_ONCE)  # which it sets
    measure = runpy.run_path(str(ROOT / "results" / "bench" / "coarse" / "measure.py"))
    measure["main"](["--device", "cpu", "--tiny", "--seconds", "0.01", "--out", str(tmp_path / "rows.csv")])
    rows = [row for row in read_csv(tmp_path / "rows.csv") if row["left"] == "all"]
    assert {(row["shape"], row["batch"], row["way"]) for row in rows} == {
        (shape, batch, way) for shape, batch in (("4×16×16", "1"), ("3×16×16", "8")) for way in ("whole", "coarse")}
    assert all((row["way"] == "coarse") == bool(row["faster"]) for row in rows)


@needs_gloo
@pytest.mark.slow
def test_ranks_share_one_pool_and_none_waits_for_a_batch_that_is_refused(tmp_path):
    processes.spawn(one_rank_with_a_grid, (2, str(tmp_path)), 2)
    (x, z, said), (x_other, z_other, said_other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    keys = NoisePool(16, (2, 4, 4), seed=3)(sums(torch.cat([x, x_other]), 4, 4))
    torch.testing.assert_close(sums(torch.cat([z, z_other]), 4, 4), keys)
    assert "(B, 2, any, any)" in said_other and "rank 1 is refused" in said
    assert not torch.equal(z - z.mean(), z_other - z_other.mean())


# ------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"cost": "squared", "dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("served", [0, 9, 33])
def test_a_saved_pool_resumes_with_the_same_noises(served, settings):
    x = images(served + 60)
    labels = torch.arange(len(x)) % 2
    parts = [(part, of_part) if "groups" in settings else (part,)
             for part, of_part in zip(x.split(7), labels.split(7), strict=True)]
    pool = pool_of(**settings)
    for part in parts[: served // 7]:
        pool(*part)
    resumed = pool_of(seed=9, **settings)
    resumed.load_state_dict(saved_and_loaded(pool))
    for part in parts[served // 7 :]:
        assert torch.equal(resumed(*part), pool(*part))


def test_a_state_of_another_grid_or_shape_is_refused_naming_both():
    state = pool_of(grid=(4, 4)).state_dict()
    with pytest.raises(BadInput, match=r"2, 8, 8.*2, 8, 12"):
        pool_of(shape=(2, 8, 12)).load_state_dict(state)
    for other in (pool_of(grid=(2, 8)), pool_of(grid=(2, 4, 4))):
        with pytest.raises(BadInput, match=rf"None, 4, 4.*{', '.join(map(str, other.grid))}"):
            other.load_state_dict(state)
    with pytest.raises(BadInput, match="grid"):
        NoisePool(20, (2, 4, 4), seed=0).load_state_dict(state)
    with pytest.raises(BadInput, match="None, 4, 4"):
        pool_of().load_state_dict(NoisePool(20, (2, 4, 4), seed=0).state_dict())
    with pytest.raises(BadInput, match=r"20.*21"):
        pool_of(21).load_state_dict(state)
    for wrong in (None, {}, {"made_for": 3}, {"made_for": {"grid": [None, 4, 4]}}):
        with pytest.raises(BadInput):
            pool_of().load_state_dict(wrong)


# ------------------------------------------------------------------------------- refused


NO_GRIDS = [(), 0, -1, (8, 0), (8, -2), (8.0, 8), (8, math.nan), "8,8", ("8", "8"), True, (8, True), (None, None),
            (1, 1, 1, 1), {8}, torch.ones(2)]


@pytest.mark.parametrize("grid", NO_GRIDS, ids=str)
def test_what_is_no_grid_is_refused_naming_it_and_the_shape(grid):
    with pytest.raises(BadInput, match=r"grid is .*\(2, 8, 8\)"):
        pool_of(grid=grid)


@pytest.mark.parametrize("grid", [(9, 8), (8, 9), 9, (None, 9), (3, 8, 8), (3, None, None)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"match_size": "auto", "expected": 1000}], ids=str)
def test_a_grid_finer_than_the_samples_is_refused_naming_both(grid, settings):
    with pytest.raises(BadInput) as refused:
        pool_of(grid=grid, **settings)
    assert f"grid is {grid}" in str(refused.value) and "(2, 8, 8)" in str(refused.value)


def test_the_finest_grid_has_a_block_for_each_number():
    pool, whole = pool_of(grid=(2, 8, 8)), NoisePool(20, (2, 8, 8), seed=0)
    x = images(50)
    torch.testing.assert_close(pool(x), whole(x))


@pytest.mark.parametrize("size", [(4, 3, 8, 8), (4, 2, 8), (4, 2, 8, 8, 8), (2, 8, 8), (), (4,)], ids=str)
@pytest.mark.parametrize("match_size", [0, 20])
def test_a_batch_of_other_channels_or_axes_is_refused_naming_both(size, match_size):
    pool = pool_of(match_size)
    for called in (pool, pool.check):
        with pytest.raises(BadInput) as refused:
            called(torch.zeros(size))
        assert str(size) in str(refused.value) and "(B, 2, any, any)" in str(refused.value)


@pytest.mark.parametrize("x", [torch.zeros(4, 2, 8, 8, dtype=torch.uint8), [[1.0]], None], ids=type)
def test_what_is_no_batch_of_floats_is_refused(x):
    with pytest.raises(BadInput, match="the batch is"):
        pool_of()(x)


MASKS = [torch.ones(5, 12), torch.ones(5, 11, dtype=torch.bool), torch.ones(12, dtype=torch.bool),
         torch.ones(5, 12, 3, dtype=torch.bool), [[True] * 12] * 5]


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(getattr(mask, "shape", "list")))
def test_a_mask_of_another_shape_or_type_is_refused_naming_what_is_expected(mask):
    with pytest.raises(BadInput, match=r"mask is .*bool.*\(5, 12\)"):
        pool_of(30, (12, 3), (4, None))(sequences(), mask=mask)


@pytest.mark.parametrize("grid", [(4, 2), (2,), (None, 2)], ids=str)
def test_a_mask_needs_a_grid_of_the_first_axis_alone(grid):
    with pytest.raises(BadInput, match=r"mask is given.*grid"):
        pool_of(30, (12, 3), grid)(sequences(), mask=torch.ones(5, 12, dtype=torch.bool))


@pytest.mark.parametrize("match_size", [0, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e15])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_data_that_is_not_finite_is_refused_and_takes_nothing(size, value, match_size):
    pool, untouched = pool_of(match_size), pool_of(match_size)
    x = images(4, size=size)
    wrong = x.clone()
    wrong[2, 1, 0, 1] = value
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(wrong)
    assert torch.equal(pool(x), untouched(x))


@pytest.mark.parametrize("match_size", [0, 20])
@pytest.mark.parametrize(("shape", "grid", "size"), [((2, 8, 8), (4, 4), (8, 8)), ((2, 8, 8), (4, 4), (7, 9)),
                                                     ((2, 64, 64), (64, 64), (8, 8)), ((12, 3), (4, None), None)])
def test_sums_that_are_too_large_are_told_by_the_batch_that_was_given(shape, grid, size, match_size):
    pool = pool_of(match_size, shape, grid)
    x, mask = torch.zeros(5, 2, *size or ()), {}
    if size is None:
        x, mask = torch.zeros(5, 9, 3), {"mask": torch.ones(5, 9, dtype=torch.bool)}
    for value in (9e14, -9.5e14):
        with pytest.raises(BadInput) as refused:
            pool(x + value, **mask)
        assert str(tuple(x.shape)) in str(refused.value) and f"{abs(value):.3g}" in str(refused.value)
    assert pool(x + 1e14 / 8, **mask).isfinite().all()
