"""A pool for each group of samples: each the paper's loop on the group's samples, whatever order they come in."""

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pools import CHANGES, COSTS, KINDS, Changed, NaivePool, data, drawn_for, rows_in_order, saved_and_loaded
from support import ROOT

import dansm
from dansm import BadInput, NoisePool, noise_generator
from dansm.scale.matching import gpu, pool
from dansm.scale.matching.groups import FastGroupedPool, SpreadGroupedPool
from dansm.scale.matching.pool import FastPool, pool_class

pytest.importorskip("triton")
from dansm.scale.matching import group_kernels, kernels
from dansm.scale.matching.group_kernels import KernelGroupedPool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("short_lists")
WAYS = [pytest.param(FastGroupedPool, FastPool, id="fast"),
        pytest.param(KernelGroupedPool, kernels.KernelPool, id="kernels", marks=pytest.mark.slow)]
drawn_on_a_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU draws other noises")
either_way = pytest.mark.parametrize(("grouped", "kind"), WAYS)


def labels_of(count, groups, generator):
    """Unequal groups, the later the rarer."""
    return (groups * torch.rand(count, generator=generator) ** 2).long()


def loop(x, labels, pools):
    """What pools of their own hand out to the samples of each group."""
    z = torch.empty_like(x)
    for group in labels.unique().tolist():
        z[labels == group] = pools[group](x[labels == group])
    return z


# ------------------------------------------------------------------------------- the rule


def check_against_the_loop(grouped, kind, match_size, sizes, groups, data_kind, change, cost, seed):
    if change == "whole numbers" and data_kind != "the same":
        data_kind = "whole numbers"  # exact ties, see test_pool

    pool = grouped(match_size, (3, 2), groups=groups, cost=cost, dtype=torch.float64, seed=seed, device=DEVICE)
    pool.kind = type("Kind", (Changed, kind), {"change": staticmethod(CHANGES[change])})
    naive = [NaivePool(match_size, 6, cost, seed, CHANGES[change], 0, 1 + group) for group in range(groups)]
    generator = torch.Generator().manual_seed(seed + 1)
    for size in sizes:
        x, labels = data(data_kind, size, 6, generator).view(size, 3, 2), labels_of(size, groups, generator)
        assert torch.equal(pool(x.to(DEVICE), labels).cpu(), loop(x, labels, naive)), f"batch of {size}"


CASES = dict(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), groups=st.integers(1, 6),
             data_kind=st.sampled_from(KINDS), change=st.sampled_from(list(CHANGES)), cost=st.sampled_from(COSTS),
             seed=st.integers(0, 10**6))


@drawn_on_a_cpu
@given(match_size=st.integers(2, 40), **CASES)
@example(match_size=2, sizes=[40], groups=3, data_kind="random", change="as drawn", cost="squared", seed=0)
def test_each_groups_pool_is_the_papers_loop_noise_for_noise(**case):
    check_against_the_loop(FastGroupedPool, FastPool, **case)


@drawn_on_a_cpu
@pytest.mark.slow
@settings(max_examples=8)
@given(match_size=st.integers(2, 50), **CASES | {"sizes": st.lists(st.integers(0, 40), min_size=1, max_size=2)})
@example(match_size=45, sizes=[40] * 3, groups=2, data_kind="one cluster", change="as drawn", cost="squared", seed=0)
@example(match_size=20, sizes=[32, 32], groups=2, data_kind="the same", change="all the same", cost="inner", seed=0)
@example(match_size=5, sizes=[40], groups=2, data_kind="random", change="as drawn", cost="squared", seed=0)
def test_the_kernels_of_all_groups_are_the_papers_loop_noise_for_noise(**case):
    """Rounds where a pool ends inside a batch, parts of 32 samples, groups with few noises left beside others."""
    check_against_the_loop(KernelGroupedPool, kernels.KernelPool, **case)


def test_alone_dansm_refuses_groups(monkeypatch):
    monkeypatch.setattr(dansm, "scaled", lambda room: None)
    with pytest.raises(BadInput, match="groups is 3: expected None where"):
        NoisePool(9, (6,), groups=3)


@pytest.mark.parametrize("match_size", [0, 1])
def test_match_size_0_and_1_give_random_noises_of_each_group(match_size):
    pool = NoisePool(match_size, (3, 2), groups=2, seed=5)
    generators = [noise_generator(5, "cpu", 0, 0, 1 + group) for group in range(2)]
    labels = torch.tensor([1, 0, 1, 1])
    for _ in range(2):
        z = pool(torch.full((4, 3, 2), 9.0), labels)
        for group in range(2):
            count = (labels == group).sum()
            assert torch.equal(z[labels == group], torch.randn(count, 3, 2, generator=generators[group]))


@drawn_on_a_cpu
@either_way
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_whole_pools_hand_out_exactly_the_noises_drawn(grouped, kind, batch):
    """Two pools of 20 for each of three groups, in any order."""
    pool = grouped(20, (2, 3), groups=3, cost=COSTS[batch % 2], seed=11, device=DEVICE)
    labels = torch.arange(3).repeat(40)[torch.randperm(120)]
    x = 1 + 0.1 * torch.randn(120, 2, 3)
    z = torch.cat([pool(*part).cpu() for part in zip(x.to(DEVICE).split(batch), labels.split(batch), strict=True)])
    for group in range(3):
        for number, used in enumerate(z[labels == group].split(20), 1):
            assert rows_in_order(used) == rows_in_order(drawn_for(11, number, 20, 6, torch.float32, 0, 1 + group))


@either_way
@pytest.mark.parametrize(("dtype", "of_batch"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64),
                                                 (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_a_grouped_pool_in_another_precision_is_the_loop_over_single_pools(grouped, kind, dtype, of_batch):
    if grouped is KernelGroupedPool and dtype == torch.float64 and DEVICE.type == "cuda":
        assert type(NoisePool(25, (4,), groups=3, dtype=dtype, device=DEVICE)) is FastGroupedPool
        return
    x, labels = torch.randn(60, 4).to(DEVICE, of_batch), torch.randint(3, (60,))
    pool = grouped(25, (4,), groups=3, dtype=dtype, seed=2, device=DEVICE)
    alone = {group: kind(25, (4,), dtype=dtype, seed=2, device=DEVICE) for group in range(3)}
    for group, single in alone.items():
        single.stream = 0, 1 + group
    for part, of_part in zip(x.split(25), labels.split(25), strict=True):
        z = pool(part, of_part)
        assert torch.equal(z, loop(part, of_part.to(DEVICE), alone))
        assert (z.dtype, z.shape, z.device) == (of_batch, part.shape, part.device)


@either_way
def test_a_batch_of_any_layout_and_labels_of_any_kind_give_the_same_noises(grouped, kind):
    x, labels = torch.randn(12, 3, 4, 4, device=DEVICE), torch.randint(5, (12,))

    def served(x, labels):
        return grouped(8, (3, 4, 4), groups=5, seed=0, device=DEVICE)(x, labels)

    expected = served(x, labels)
    for other in (labels.to(torch.uint8), labels.int(), labels.to(DEVICE), labels.repeat_interleave(2)[::2]):
        assert torch.equal(served(x, other), expected)
    assert torch.equal(served(x.to(memory_format=torch.channels_last), labels), expected)
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(served(turned, labels), expected)
    flat, turned = (grouped(8, (48,), groups=5, seed=0, device=DEVICE)(each, labels) for each in (
        x.flatten(1), x.flatten(1).T.contiguous().T))
    assert torch.equal(flat, expected.flatten(1)) and torch.equal(turned, flat)
    assert torch.equal(served(x.cpu().requires_grad_(), labels), expected.cpu())
    with torch.inference_mode():
        assert torch.equal(served(x, labels), expected)


@either_way
def test_a_pool_continues_after_batches_of_none_and_in_inference_mode(grouped, kind):
    x, labels = torch.randn(30, 3, device=DEVICE), torch.randint(3, (30,))
    pool, untouched = (grouped(7, (3,), groups=3, seed=0, device=DEVICE) for _ in range(2))
    assert pool(x[:0], labels[:0]).shape == (0, 3) and not pool.pools
    with torch.inference_mode():
        first = pool(x[:10], labels[:10])
    assert not first.is_inference()
    assert torch.equal(torch.cat([first, pool(x[10:], labels[10:])]),
                       torch.cat([untouched(x[:10], labels[:10]), untouched(x[10:], labels[10:])]))


# ------------------------------------------------------------------------------- groups


@either_way
def test_groups_that_never_come_make_no_pool_and_a_thousand_work(grouped, kind):
    pool = grouped(4, (3,), groups=1000, seed=0, device=DEVICE)
    assert pool.pools == {} and pool.noise.numel() == 0
    pool(torch.randn(3, 3, device=DEVICE), torch.tensor([999, 5, 999], dtype=torch.int16))
    assert sorted(pool.pools) == [5, 999]
    labels = torch.randperm(1000)[:100]
    pool(torch.randn(100, 3, device=DEVICE), labels)
    assert pool.pools.keys() == {5, 999, *labels.tolist()}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_labels_of_one_byte_suit_more_groups_than_a_byte_has(dtype):
    x, labels = torch.randn(6, 3), torch.tensor([3, 100, 3, 0, 100, 3])
    pools = [NoisePool(4, (3,), groups=256 + 1, seed=0) for _ in range(2)]
    assert torch.equal(pools[0](x, labels.to(dtype)), pools[1](x, labels))


def test_groups_share_no_noise_and_processes_neither(monkeypatch):
    x, labels = torch.zeros(16, 3), torch.arange(2).repeat(8)
    noises = []
    for process in range(2):
        for module in (dansm, pool):
            monkeypatch.setattr(module, "process_number", lambda process=process: process)
        for match_size in (8, 1):
            noises.append(NoisePool(match_size, (3,), groups=2, seed=0)(x, labels))
    assert len(torch.cat(noises).unique(dim=0)) == 4 * 16


def test_the_class_is_that_of_the_kernels_where_they_work(monkeypatch):
    monkeypatch.setattr(gpu, "working", lambda module, *way: group_kernels if module == "group_kernels" else None)
    on_gpu = dict(match_size=10, shape=(2,), groups=3, device="cuda")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *_, device: torch.zeros(0))
        assert pool_class(**on_gpu) is KernelGroupedPool
        monkeypatch.setattr(gpu, "working", lambda *way: None)
        assert pool_class(**on_gpu) is FastGroupedPool
    assert pool_class(**on_gpu | {"match_size": 1}) is FastGroupedPool
    assert pool_class(**on_gpu | {"match_scope": "global"}) is SpreadGroupedPool


# ------------------------------------------------------------------------------- saved state


@either_way
@pytest.mark.parametrize("served", [0, 5, 40])
def test_a_saved_pool_resumes_with_the_same_noises(grouped, kind, served):
    x, labels = torch.randn(served + 60, 3, device=DEVICE), torch.randint(3, (served + 60,))
    labels[:served].clamp_(max=1)  # the third comes after the resume only
    pool = grouped(12, (3,), groups=3, seed=7, device=DEVICE)
    for part in zip(x[:served].split(9), labels[:served].split(9), strict=True):
        pool(*part)
    for other in (grouped, FastGroupedPool):
        resumed = other(12, (3,), groups=3, seed=99, device=DEVICE)
        resumed.load_state_dict(saved_and_loaded(pool))
        again = copy.deepcopy(pool)
        for part in zip(x[served:].split(25), labels[served:].split(25), strict=True):
            assert torch.equal(resumed(*part), again(*part))


@either_way
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copy_of_a_pool_continues_with_the_same_noises(grouped, kind, copied):
    x, labels = torch.randn(40, 3, device=DEVICE), torch.randint(3, (40,))
    pool, expected = (grouped(9, (3,), groups=3, seed=0, device=DEVICE) for _ in range(2))
    pool(x[:7], labels[:7]), expected(x[:7], labels[:7])
    assert torch.equal(copied(pool)(x, labels), expected(x, labels))


def test_a_used_pool_can_be_set_back_and_another_kinds_state_is_refused():
    x, labels = torch.randn(30, 3), torch.randint(3, (30,))
    pool = NoisePool(9, (3,), groups=3, seed=0)
    pool(x[:7], labels[:7].clamp(max=1))
    state = pool.state_dict()
    expected = pool(x, labels)
    pool.load_state_dict(state)
    assert torch.equal(pool(x, labels), expected)
    for other in (NoisePool(9, (3,), seed=0), NoisePool(9, (3,), groups=4, seed=0)):
        with pytest.raises(BadInput, match="expected the same"):
            other.load_state_dict(state)


# ------------------------------------------------------------------------------- the kernels' own


@pytest.mark.slow
def test_ten_groups_take_no_more_launches_than_one(monkeypatch):
    launched, listed = [], [group_kernels._multiply, kernels._shortlist]
    launch = kernels.fast_launch
    monkeypatch.setattr(kernels, "fast_launch", lambda kernel, *rest, **how: launched.append(kernel) or launch(
        kernel, *rest, **how))
    pool = KernelGroupedPool(20, (3,), groups=10, seed=0, device=DEVICE)
    x, labels = torch.randn(30, 3, device=DEVICE), torch.arange(10).repeat(3)
    pool(x, labels)
    assert launched == [*listed, kernels._choose, kernels._hand_out]  # 20 are left of each
    launched.clear()
    pool(x, labels)
    assert launched == [*listed, kernels._choose, kernels._hand_out]  # 17
    launched.clear()
    pool(torch.cat([x, x[:1]]), torch.cat([labels, torch.zeros(1, dtype=torch.int64)]))
    assert launched == [group_kernels._multiply, kernels._choose, kernels._hand_out]  # 14: in turn
    launched.clear()
    pool.pools.pop(3)  # one with 20 left, the others in turn
    pool(x, labels)
    assert launched == [*listed, kernels._choose, kernels._choose, kernels._hand_out]


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dansm.scale.matching.group_kernels import _multiply as kernel
types = dict(products="*fp32", x="*fp32", noise="*fp32", table="*i64", units="i32")
for unit in 64, 4, 1:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    whole_lines = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if "*" in types.get(name, "")}
    source = ASTSource(kernel, signature, {"UNIT": unit, "PRECISION": "tf32x3"}, whole_lines)
    code = triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(unit, "cp.async.cg" in code, "cp.async.ca" in code)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 10), reason="needs torch 2.10: Triton's compiler is called otherwise")
def test_products_load_16_bytes_at_a_time_where_rows_begin_at_such():
    """In what Triton compiles for an H100, which takes no GPU: .cg copies 16 bytes, .ca fewer."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["64 True False", "4 True False", "1 False True"]


@pytest.mark.slow
@pytest.mark.own_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 100, 101])
def test_products_of_more_samples_noises_and_numbers_than_a_tile_has(width, dtype):
    """Whole numbers, which no order of adding rounds; rows that begin anywhere in memory."""
    pool = KernelGroupedPool(90, (width,), groups=2, dtype=dtype, seed=2, device=DEVICE)
    pool.kind = type("Kind", (Changed, kernels.KernelPool), {"change": staticmethod(CHANGES["whole numbers"])})
    plain = NoisePool(90, (width,), groups=2, dtype=dtype, seed=2, device=DEVICE, compile=False)
    plain.kind = type("Kind", (Changed, FastPool), {"change": staticmethod(CHANGES["whole numbers"])})
    labels = (torch.arange(170) % 6 == 0).long()
    for begin in 1, 4:
        x = torch.randn(begin + 170 * width, device=DEVICE).round()[begin:].view(170, width)
        assert torch.equal(pool(x, labels), plain(x, labels))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_data_that_is_not_finite_is_refused_when_the_next_batch_comes_and_breaks_nothing(wrong):
    pool = KernelGroupedPool(18, (3,), groups=2, seed=1, device=DEVICE)
    x, labels = torch.randn(10, 3, device=DEVICE), torch.arange(2).repeat(5)
    x[3] = wrong
    pool(x, labels)
    assert pool.pools[0].index.tolist()  # now a GPU has come to it
    with pytest.raises(BadInput, match="NaN, infinite or huge"):
        pool(x[:2], labels[:2])
    pool(x[:2], labels[:2])  # told once
    for single in pool.pools.values():
        index = single.index[: single.left].long()
        assert len(index.unique()) == single.left == 12
        assert torch.equal(single.place[index].cpu(), torch.arange(12, dtype=torch.int32))


@pytest.mark.slow
def test_the_trial_notices_kernels_that_pick_wrong(monkeypatch):
    way = torch.float32, False
    group_kernels.try_out(DEVICE, *way)
    monkeypatch.setattr(kernels, "choose", lambda z, *_, **__: z.zero_())
    with pytest.raises(RuntimeError, match="other noises"):
        group_kernels.try_out(DEVICE, *way)


# ------------------------------------------------------------------------------- memory


def test_none_takes_what_fits_for_all_groups_and_memory_bounds_them_together():
    one, ten = (NoisePool(None, (4, 32, 32), memory=1.0, groups=groups, seed=0) for groups in (1, 10))
    assert one.match_size == NoisePool(None, (4, 32, 32), memory=1.0, seed=0).match_size
    assert ten._bytes(ten.match_size, 10) <= 1e9 < ten._bytes(ten.match_size + 1, 10)
    assert 0.4e9 < 10 * ten.match_size * 4096 * 4 < 1e9
    small = NoisePool(None, (64,), memory=0.15, groups=10, seed=0)
    small(torch.randn(10, 64), torch.arange(10))  # all groups fit
    assert sum(pool.noise.nbytes for pool in small.pools.values()) < 0.15e9


def test_a_pool_of_which_one_group_does_not_fit_is_refused_at_once():
    with pytest.raises(BadInput, match=r"match_size is 100,000: .*GB.*memory is 1.0 GB.*at most"):
        NoisePool(10**5, (4, 32, 32), memory=1.0, groups=10)
    with pytest.raises(BadInput, match="two noises for each of 10,000 groups need"):
        NoisePool(None, (4, 32, 32), memory=0.1, groups=10_000)


@either_way
def test_the_group_whose_pool_does_not_fit_any_more_is_refused_before_the_batch_takes_a_noise(grouped, kind):
    pool, untouched = (grouped(60, (2**16,), groups=50, memory=0.2, seed=0, device=DEVICE) for _ in range(2))
    x = torch.randn(50, 2**16, device=DEVICE)
    with pytest.raises(BadInput) as refused:
        pool(x, torch.arange(50))
    made = len(pool.pools)
    message = str(refused.value)
    assert 3 < made < 20 and f"group {made} comes when {made} pools take 0." in message and "of 0.2 GB" in message
    assert "match_size is 60" in message and "\n" not in message
    untouched(x[:made], torch.arange(made))
    pool(x[:made], torch.arange(made))
    assert torch.equal(pool(x[:9], torch.arange(9) % 3), untouched(x[:9], torch.arange(9) % 3))
    with pytest.raises(BadInput, match=f"group 49 comes when {made} pools"):
        pool(x[:1], torch.tensor([49]))


def test_memory_that_is_gone_when_a_group_comes_is_told_with_its_number(monkeypatch):
    pool = NoisePool(10, (3,), groups=3, seed=0)
    monkeypatch.setattr("dansm.scale.matching.pool.free_memory", lambda device: 1000)
    with pytest.raises(BadInput, match=r"group 2 comes when 0 pools.*cpu has 0.0 GB free"):
        pool(torch.zeros(1, 3), torch.tensor([2]))


# ------------------------------------------------------------------------------- refused


LABELS = [None, [0, 1, 2], torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64),
          torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2]), torch.zeros(3, 1, dtype=torch.int64)]


@either_way
@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_that_cannot_be_are_refused_and_take_nothing(grouped, kind, labels):
    pool = grouped(8, (2,), groups=3, seed=0, device=DEVICE)
    with pytest.raises(BadInput, match=r"the labels are .*expected a tensor \(3,\) of whole numbers from 0 to 2"):
        pool(torch.zeros(3, 2, device=DEVICE), labels)
    assert not pool.pools


def test_a_pool_without_groups_is_given_no_labels():
    for match_size in (1, 8):
        with pytest.raises(BadInput, match=r"labels are given to a pool without groups"):
            NoisePool(match_size, (2,), seed=0)(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("groups", [0, -1, 2.5, "ten", True])
def test_a_number_of_groups_that_cannot_be_is_refused(groups):
    with pytest.raises(BadInput, match="groups is"):
        NoisePool(8, (2,), groups=groups)
