"""The pool inside other people's steps: compiled, in a loader's workers, in any memory layout."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.multiprocessing as processes
from ranks import Drawing, Paired, one_rank_that_begins_late
from support import needs_gloo
from torch.utils.data import DataLoader

import dansm
from dansm import BadInput, NoisePool
from dansm.scale.matching import inside, pool, sampler, semidiscrete

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (3, 4, 4)
pytestmark = pytest.mark.filterwarnings("ignore:.*before solve")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def batches(count=6, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *SHAPE, generator=generator).to(DEVICE) for _ in range(count)]


def pool_of(match_size=12, **settings):
    return NoisePool(match_size, SHAPE, device=DEVICE, seed=3, **settings)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("settings", [{}, {"groups": 3}, {"match_size": 0}, {"dtype": torch.bfloat16}], ids=str)
def test_a_compiled_step_gets_the_noises_of_the_plain_one(settings, fullgraph):
    weight = torch.randn(48, 48, device=DEVICE, requires_grad=True)
    pools = pool_of(**settings), pool_of(**settings)

    def step(pool, x, *labels):
        z = pool(x, *labels)
        first, again = z.flatten(1), pool(x, *labels).flatten(1)  # of the same batch: another noise
        return ((x - z).flatten(1) @ weight - first).square().mean(), z, again

    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    for i, x in enumerate(batches()):
        labels = [torch.arange(len(x)) % 3] * ("groups" in settings)
        x = x.requires_grad_(i % 2 == 1)
        loss, *noises = compiled(pools[0], x, *labels)
        expected, *noises_expected = step(pools[1], x, *labels)
        assert all(map(torch.equal, noises, noises_expected)) and not torch.equal(*noises)
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert weight.grad.isfinite().all()


def test_a_noise_that_a_compiled_step_does_not_use_has_left_the_pool_all_the_same():
    pools = pool_of(), pool_of()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        pools[0](x)
        return 2 * x

    for x in batches(2):
        step(x)
        pools[1](x)
    x, = batches(1, seed=1)
    assert torch.equal(pools[0](x), pools[1](x))


@pytest.mark.parametrize("settings", [{}, {"groups": 3}, {"grid": (2, 2)}, {"match_size": 0}], ids=str)
def test_a_compiled_step_gets_the_fresh_noises_of_the_plain_one(settings):
    pools = pool_of(**settings), pool_of(**settings)
    compiled = torch.compile(lambda x: (pools[0].fresh(x), pools[0].fresh(x)), fullgraph=True, backend="aot_eager")
    for x in batches(3):
        noises = compiled(x)
        assert all(torch.equal(noise, pools[1].fresh(x)) for noise in noises) and not torch.equal(*noises)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", ["semidiscrete", "semidiscrete, asked"])
def test_a_compiled_step_draws_the_pairs_of_the_plain_one(kind, fullgraph):
    first = KINDS[kind]()
    data, couplings = torch.cat(batches(4)), (copy.deepcopy(first), pickle.loads(pickle.dumps(first)))
    weight = torch.randn(48, 48, device=DEVICE, requires_grad=True)

    def step(coupling, x, *labels):
        coupling.draw(2)  # nobody uses it, and it is drawn all the same
        z, taken = coupling.draw(len(x), *labels)
        return ((data[taken] - z).flatten(1) @ weight).square().sum(), z, taken

    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    for count in (5, 7, 300, 0, 3):  # also more than are drawn ahead
        labels = [torch.arange(count) % 2] * (kind == "semidiscrete, asked")
        loss, *drawn_there = compiled(couplings[0], data[:1].expand(count, *SHAPE), *labels)
        expected, *drawn_here = step(couplings[1], data[:1].expand(count, *SHAPE), *labels)
        assert all(map(torch.equal, drawn_there, drawn_here))
        torch.testing.assert_close(loss, expected)
        loss.backward()
    assert weight.grad.isfinite().all()
    with pytest.raises(BadInput, match="no sample of the data has label 2"):
        compiled(couplings[0], data[:2], torch.tensor([0, 2]))


def test_what_a_compiled_step_may_not_give_is_refused_when_it_runs():
    step = torch.compile(pool_of().__call__, backend="eager")
    with pytest.raises(BadInput, match="NaN"):
        step(batches(1)[0] / 0 * 0)
        step(batches(1)[0])  # a GPU tells when the next batch comes


@pytest.mark.parametrize("asked", ["pool", "fresh", "labels", "draw"])
@pytest.mark.parametrize(("error", "told"), [
    (BadInput, "(are|is).* torch.complex64"), (RuntimeError, "(are|is) of torch.complex64: expected real numbers")])
def test_complex_numbers_are_refused_before_inductor_fails_for_them(asked, error, told):
    x, numbers = batches(1)[0].to(torch.complex64), torch.zeros(5, dtype=torch.complex64, device=DEVICE)
    plain, grouped, coupling = pool_of(), pool_of(groups=3), dansm.Semidiscrete(torch.cat(batches(4)))
    call = {"pool": lambda: plain(x), "fresh": lambda: plain.fresh(x), "labels": lambda: grouped(x.real, numbers),
            "draw": lambda: coupling.draw(5, numbers)}[asked]
    with pytest.raises(error, match=told):
        torch.compile(call, fullgraph=error is not BadInput)()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_compiled_step_asks_the_copy_that_it_is_given(copied):
    first = pool_of()
    first(batches(1)[0])
    second, third = copied(first), copied(first)
    step = torch.compile(lambda pool, x: pool(x), backend="eager", fullgraph=True)
    for x in batches(4, seed=2):
        assert torch.equal(step(second, x), third(x))


@pytest.mark.parametrize("match_size", [0, 12])
@pytest.mark.parametrize("compiled", [False, True])
def test_noises_have_the_memory_layout_of_their_batch(match_size, compiled):
    ours = pool_of(match_size)
    call = torch.compile(ours.__call__, backend="aot_eager") if compiled else ours
    plain = pool_of(match_size)
    for number, x in enumerate(batches()):
        there = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :1].expand(-1, 3, -1, -1),
                 x.double(), x[:0]][number]
        z = call(there)
        assert z.stride() == torch.empty_like(there).stride() == torch.randn_like(there).stride()
        assert torch.equal(z, plain(there.contiguous())) and z.dtype == there.dtype


MADE = {"pool": lambda: NoisePool(12, SHAPE, seed=0).__call__, "fresh": lambda: NoisePool(12, SHAPE, seed=0).fresh,
        "groups": lambda: partial(NoisePool(12, SHAPE, seed=0, groups=2), labels=torch.tensor([1])),
        "grid": lambda: NoisePool(12, SHAPE, seed=0, grid=(2, 2)).__call__,
        "semidiscrete": lambda: Drawing(dansm.Semidiscrete(torch.randn(5, *SHAPE)))}


@pytest.mark.parametrize("kind", MADE)
def test_in_a_loaders_workers_noises_are_refused_and_told_where_to_be_drawn(kind):
    data = Paired(MADE[kind](), SHAPE)
    assert len(list(DataLoader(data))) == 4  # without workers all is one process
    name = "Semidiscrete" if kind == "semidiscrete" else "NoisePool"
    with pytest.raises(BadInput, match=rf"(?s)a {name} is called in a worker .*expected .* the process that trains"):
        list(DataLoader(data, num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(BadInput, match=rf"a {name} is sent to another process.*expected .* the process that trains"):
        list(DataLoader(data, num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
def test_number_types_without_room_for_noises_are_refused(dtype):
    with pytest.raises(BadInput, match=f"the batch is of {dtype}: expected floating point data"):
        pool_of()(torch.zeros(2, *SHAPE).to(dtype))
    with pytest.raises(BadInput, match=f"the data are of {dtype}"):
        dansm.Semidiscrete(torch.zeros(2, *SHAPE).to(dtype))


@needs_gloo
def test_a_pool_made_before_torch_distributed_begins_has_the_noises_of_its_process(tmp_path):
    processes.spawn(one_rank_that_begins_late, (2, str(tmp_path)), 2)
    first, second = (torch.load(tmp_path / f"late-{rank}.pt") for rank in range(2))
    for (before, after), (_, other) in zip(first, second, strict=True):
        assert torch.equal(before, after)
        assert not (after[:, None] == other).all(2).any()
    assert all(torch.equal(before, after) for before, after in second)


@pytest.mark.parametrize("settings", [{}, {"groups": 4}, {"grid": (2, 2)}])
def test_a_pool_that_the_samples_will_not_empty_is_warned_of_once_at_the_line_that_makes_it(settings, recwarn):
    pools = settings.get("groups", 1)
    pool_of(expected=12 * pools, **settings)
    pool_of(0, expected=1, **settings)
    pool_of(1, expected=1, **settings)
    assert not recwarn.list
    with pytest.warns(match=rf"samples do not empty {12 * pools} noises.*a match_size of at most 1 is safe") as said:
        source = pool_of(expected=12 * pools - 1 if pools == 1 else 40, **settings)
        drawn("groups" if source.grouped else "pool", source, 4)
    assert [warning.filename for warning in said] == [__file__]
    for wrong in (0, 1.5, "x"):
        with pytest.raises(BadInput, match="expected is"):
            pool_of(expected=wrong, **settings)


KINDS = {"pool": lambda: pool_of(), "groups": lambda: pool_of(groups=2), "random": lambda: pool_of(0),
         "float64": lambda: pool_of(dtype=torch.float64), "bfloat16": lambda: pool_of(dtype=torch.bfloat16),
         "coarse": lambda: pool_of(grid=(2, 2)),
         "semidiscrete": lambda: dansm.Semidiscrete(torch.cat(batches(4)), torch.arange(20) % 2, seed=0)}
KINDS["semidiscrete, asked"] = KINDS["semidiscrete"]


def drawn(kind, source, count):
    """The noises of so many batches, (5 · count, D)."""
    x, labels = batches(1)[0], torch.arange(5) % 2
    if kind.startswith("semidiscrete"):
        asked = [labels] * (kind == "semidiscrete, asked")
        return torch.cat([source.draw(5, *asked)[0].flatten(1) for _ in range(count)])
    return torch.cat([source(x, *[labels] * source.grouped).flatten(1) for _ in range(count)])


def as_process(monkeypatch, number):
    for module in (dansm, pool, semidiscrete, sampler):
        monkeypatch.setattr(module, "process_number", lambda: number)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_goes_on_from_the_state_of_another_with_noises_that_nobody_has_drawn(kind, monkeypatch):
    first = KINDS[kind]()
    known, states = [], []
    for _ in range(2):  # the second within the life of the same pools
        known.append(drawn(kind, first, 1))
        states.append(first.state_dict())
    known.append(drawn(kind, first, 20))
    as_process(monkeypatch, 1)
    known.append(drawn(kind, KINDS[kind](), 20))  # what this process drew before it was stopped
    for state in states:
        resumed = []
        for _ in range(2):
            source = KINDS[kind]()
            with pytest.warns(match="the saved state is of process 0, this is process 1: .*nobody has drawn") as said:
                source.load_state_dict(state)
            assert [warning.filename for warning in said] == [__file__]
            resumed.append(drawn(kind, source, 5))
        assert torch.equal(*resumed)
        known.append(resumed[0])
    assert len(torch.cat(known).unique(dim=0)) == 52 * 5
    again = KINDS[kind]()  # and its own state is exact
    again.load_state_dict(source.state_dict())
    assert torch.equal(drawn(kind, again, 3), drawn(kind, source, 3))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("semidiscrete")])
def test_on_a_gpu_that_draws_others_a_run_goes_on_with_noises_that_nobody_has_drawn(kind, monkeypatch):
    """H100s and H200s have 132 multiprocessors, an A100 has 108: torch draws other noises there from one seed."""
    def source_on(multiprocessors):
        found = {"multiprocessors": multiprocessors} if multiprocessors else {}
        for module in (inside, semidiscrete):
            monkeypatch.setattr(module, "card", lambda device: found)
        return KINDS[kind]()

    first = source_on(132)
    known = [drawn(kind, first, 1)]
    state = first.state_dict()
    known.append(drawn(kind, first, 20))
    same = source_on(132)
    same.load_state_dict(state)
    assert torch.equal(drawn(kind, same, 20), known[1])
    other = source_on(108)
    with pytest.warns(match="of 132 multiprocessors, this is .* of 108 multiprocessors: .*nobody has drawn"):
        other.load_state_dict(state)
    known.append(drawn(kind, other, 5))
    assert len(torch.cat(known).unique(dim=0)) == 26 * 5
    earlier = source_on(0).state_dict()  # of a version that did not tell the card
    source_on(132).load_state_dict(earlier)


def test_the_state_of_a_pool_that_was_shared_serves_a_pool_of_one_process():
    alone = pool_of()
    drawn("pool", alone, 4)
    state = alone.state_dict()
    state["made_for"] |= {"rank": 2, "ranks": 3}
    with pytest.warns(match="the saved state is of rank 2 of 3, this is process 0: it goes on"):
        pool_of().load_state_dict(state)
    for wrong in ({"match_size": 13}, {"cost": "inner"}, {"rank": 1, "shape": [3, 4, 5]}):
        with pytest.raises(BadInput, match="expected the same"):
            pool_of().load_state_dict(state | {"made_for": state["made_for"] | wrong})
    with pytest.raises(BadInput, match=r"expected what NoisePool.state_dict\(\) returned"):
        pool_of().load_state_dict({"made_for": state["made_for"]})
    for source in (pool_of(), KINDS["semidiscrete"]()):
        with pytest.raises(BadInput, match="expected"):
            source.load_state_dict(source.state_dict() | {"made_for": "x"})


def test_a_group_that_the_other_process_never_met_begins_with_noises_that_this_one_has_not_drawn(monkeypatch):
    first = pool_of(groups=3)
    drawn("groups", first, 2)  # of groups 0 and 1
    state, x = first.state_dict(), batches(1)[0]
    as_process(monkeypatch, 1)
    before, resumed = pool_of(groups=3), pool_of(groups=3)
    with pytest.warns(match="nobody has drawn"):
        resumed.load_state_dict(state)
    known = [source(x, torch.full((5,), 2)).flatten(1) for source in (before, resumed)]
    assert len(torch.cat(known).unique(dim=0)) == 10


def test_a_pool_made_in_inference_mode_serves_a_compiled_step():
    with torch.inference_mode():
        ours = pool_of()
    x, = batches(1)
    assert torch.equal(torch.compile(ours.__call__, backend="eager")(x), pool_of()(x))


# ------------------------------------------------------------------------------- a size by itself


@pytest.mark.parametrize(("settings", "size"), [
    (dict(expected=480), 48), (dict(expected=480, groups=4), 12),
    (dict(expected=10**9), 10_000 if DEVICE.type == "cpu" else 100_000),
    (dict(expected=10**9, memory=0.3), None), (dict(expected=19), 0), (dict(expected=20), 2),
])
def test_an_automatic_pool_is_emptied_ten_times_and_fits(settings, size, recwarn):
    pool = pool_of("auto", **settings)
    assert pool.match_size == size or (size is None and pool._bytes(pool.match_size) < 0.3e9)
    assert pool.why and not recwarn.list
    drawn("groups" if "groups" in settings else "pool", pool, 4)


@pytest.mark.parametrize(("settings", "cause"), [
    (dict(expected=10**9, memory=1e-3), "memory"), (dict(expected=10**9, memory=1e-3, groups=4), "memory"),
    (dict(expected=19), "training"), (dict(expected=19, memory=0.3), "training")])
def test_an_automatic_pool_tells_why_there_is_none(settings, cause):
    pool = pool_of("auto", **settings)
    assert pool.match_size == 0 and [word for word in ("memory", "training") if word in pool.why] == [cause]


@pytest.mark.parametrize("settings", [{}, {"groups": 4}])
def test_an_automatic_pool_takes_the_size_of_a_saved_one(settings):
    kind = "groups" if settings else "pool"
    source, other = pool_of("auto", expected=480, **settings), pool_of("auto", expected=4800, **settings)
    drawn(kind, source, 4)
    drawn(kind, other, 4)
    other.load_state_dict(source.state_dict())
    assert other.match_size == source.match_size
    assert torch.equal(drawn(kind, source, 8), drawn(kind, other, 8))
    with pytest.raises(BadInput, match="expected the same"):
        pool_of(7, **settings).load_state_dict(source.state_dict())


def test_an_automatic_pool_needs_to_know_how_many_samples_come():
    with pytest.raises(BadInput, match="match_size is auto and expected is None"):
        pool_of("auto")
    with pytest.raises(BadInput, match="match_size is 'many'"):
        pool_of("many", expected=480)
