"""Batches of a DataLoader whose samples are chosen by noises: each batch gets the noises that chose it."""

from itertools import islice

import pytest
import torch
from support import same
from torch.utils.data import DataLoader, Dataset

from dansm import BadInput, Semidiscrete
from dansm.scale.matching import CoupledBatchSampler, sampler, semidiscrete

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = torch.randn(60, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0] * 30 + [2] * 20 + [3] * 10)[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
WORKERS = [dict(num_workers=0), dict(num_workers=2), dict(num_workers=2, prefetch_factor=4, persistent_workers=True)]


class Numbered(Dataset):
    """Each sample with its number."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, number):
        return DATA[number], number


def coupled(batch_size=4, batches=12, groups=None, seed=1):
    coupling = Semidiscrete(DATA.to(DEVICE), groups, seed=seed)
    coupling.solve()
    return CoupledBatchSampler(coupling, batch_size, batches)


def loaded(batches, **settings):
    return DataLoader(Numbered(), batch_sampler=batches, **settings)


def are_chosen(coupling, z, numbers):
    """Whether these samples are what noises choose, by the definition, but for the rounding of bfloat16 on a GPU."""
    values = z.flatten(1) @ (DATA.to(z) - coupling.centre.view(4, 4)).flatten(1).T - coupling.potentials
    missing = values.amax(1) - values.gather(1, numbers.to(z.device)[:, None])[:, 0]
    return bool((missing <= 0.05 * z.is_cuda).all())


def noises(loader, count=None):
    """Those of the next `count` batches, each checked to belong to its batch."""
    found = []
    for x, numbers in islice(loader, count):
        assert x.equal(DATA[numbers])
        z = loader.batch_sampler.noise(x)
        assert are_chosen(loader.batch_sampler.coupling, z.to(DEVICE), numbers)
        found.append(z)
    return torch.stack(found)


# ------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("settings", WORKERS)
def test_each_batch_gets_the_noises_that_chose_it_epoch_after_epoch(settings):
    loader = loaded(coupled(), **settings)
    epochs = [noises(loader) for _ in range(3)]
    assert len(loader) == 12 and all(z.shape == (12, 4, 4, 4) for z in epochs)
    assert torch.cat(epochs).flatten(0, 1).unique(dim=0).shape[0] == 3 * 12 * 4  # no noise comes twice


@pytest.mark.parametrize("settings", WORKERS)
def test_a_loop_may_end_early_and_workers_change_nothing(settings):
    loader, plain = loaded(coupled(), **settings), loaded(coupled())
    for count in (3, 1, 5, None, 2):
        assert noises(loader, count).equal(noises(plain, count))


def test_batches_whose_noises_nobody_called_for_come_again():
    batches = coupled()
    assert list(batches) == list(batches)


def test_samples_and_labels_come_as_often_as_in_the_data():
    batches = coupled(50, 200, LABELS)
    taken = torch.tensor(list(batches)).flatten().bincount(minlength=60) / 10_000
    shares = torch.zeros(4).index_add_(0, LABELS, taken)
    torch.testing.assert_close(shares, torch.tensor([30, 0, 20, 10]) / 60, atol=0.02, rtol=0)
    assert (60 * taken - 1).square().mean().sqrt() < 0.25


def test_noises_are_like_the_batch_and_an_epoch_is_as_long_as_the_data():
    coupling = coupled().coupling
    batches = CoupledBatchSampler(coupling, 16)
    assert len(batches) == 3 and len(CoupledBatchSampler(coupling, 100)) == 1
    for indices in batches:
        x = DATA[indices].bfloat16()
        z = batches.noise(x)
        assert z.dtype == x.dtype and z.device == x.device and z.shape == x.shape


# ------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("done", [0, 5, 11, 12, 17, 24])
@pytest.mark.parametrize("settings", WORKERS[:2])
def test_a_sampler_resumes_after_the_last_batch_that_has_its_noises(done, settings, tmp_path):
    whole = torch.cat([noises(loader) for loader in [loaded(coupled())] for _ in range(3)])
    loader = loaded(coupled(), **settings)
    before = [noises(loader) for _ in range(done // 12)]
    if done % 12:
        before.append(noises(loader, done % 12))
    torch.save(loader.batch_sampler.state_dict(), tmp_path / "state.pt")

    other = loaded(coupled(seed=7), **settings)
    other.batch_sampler.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(other.batch_sampler.state_dict(), loader.batch_sampler.state_dict())
    next(iter(other))  # as trainers do to see a shape
    after = [noises(other) for _ in range(3 - done // 12)]
    assert len(after[0]) == 12 - done % 12
    assert torch.cat([*before, *after]).equal(whole)


def test_the_state_of_another_sampler_is_refused():
    state = coupled().state_dict()
    for other, said in ((coupled(5), "batch_size"), (coupled(4, 13), "batches"), (coupled(groups=LABELS), "labels")):
        with pytest.raises(BadInput, match=said):
            other.load_state_dict(state)
    with pytest.raises(BadInput, match="the saved sampler is None"):
        coupled().load_state_dict(coupled().coupling.state_dict()["before"])


# ------------------------------------------------------------------------------- batches that do not come in order


def test_by_its_indices_a_batch_is_found_after_others_that_were_left_out():
    batches = coupled()
    drawn = list(batches)
    for number in (1, 2, 6):
        z = batches.noise(DATA[drawn[number]], torch.tensor(drawn[number]))
        assert are_chosen(batches.coupling, z.to(DEVICE), torch.tensor(drawn[number]))
    with pytest.raises(BadInput, match="expected those of a batch after the last one"):  # as without in_order
        batches.noise(DATA[drawn[3]], drawn[3])
    assert batches.state_dict()["done"] == 7


@pytest.mark.parametrize("settings", WORKERS)
def test_noises_asked_too_often_are_refused(settings):
    loader = loaded(coupled(), **settings)
    with pytest.raises(BadInput, match="more often"):
        loader.batch_sampler.noise(DATA[:4])
    with pytest.raises(BadInput, match="more often"):
        for x, _ in loader:
            loader.batch_sampler.noise(x)
            loader.batch_sampler.noise(x)


@pytest.mark.parametrize("settings", WORKERS)
def test_a_batch_that_is_left_out_is_noticed_at_the_next(settings):
    loader = loaded(coupled(), **settings)
    batches = iter(loader)
    loader.batch_sampler.noise(next(batches)[0])
    next(batches)
    with pytest.raises(BadInput, match="less often"):
        loader.batch_sampler.noise(next(batches)[0])


def test_batches_may_be_collected_before_their_noises_are_taken():
    batches = coupled()
    loop = iter(batches)
    for _ in range(3):
        for indices in list(islice(loop, 4)):
            assert are_chosen(batches.coupling, batches.noise(DATA[indices]).to(DEVICE), torch.tensor(indices))


def test_a_loop_cannot_go_on_after_another_began():
    batches = coupled()
    first = iter(batches)
    next(first)
    next(iter(batches))
    with pytest.raises(BadInput, match="after another began"):
        next(first)


# ------------------------------------------------------------------------------- refusals


def test_what_cannot_be_sampled_is_refused():
    coupling = coupled().coupling
    for arguments, said in (((DATA, 4), "coupling is a Tensor: expected a Semidiscrete"),
                            ((coupling, 2.5), "batch_size is 2.5"), ((coupling, 0), "batch_size is 0"),
                            ((coupling, 4, "3"), "batches is '3'")):
        with pytest.raises(BadInput, match=said):
            CoupledBatchSampler(*arguments)
    batches = coupled()
    next(iter(batches))
    for x, said in ((DATA[:3], r"\(3, 4, 4\): expected that of its noises, \(4, 4, 4\)"),
                    (DATA[:4].flatten(1), "(4, 16)"), (DATA[:4].long(), "floating"), ([DATA], "a list")):
        with pytest.raises(BadInput, match=said):
            batches.noise(x)


def test_noises_in_a_worker_are_refused():
    batches = coupled()
    with pytest.raises(BadInput, match="in a worker"):
        next(iter(DataLoader(DATA, batch_sampler=batches, num_workers=1,
                             collate_fn=lambda parts: batches.noise(torch.stack(parts)))))


def test_each_process_draws_noises_of_its_own(monkeypatch):
    early, first = coupled(), noises(loaded(coupled()))
    monkeypatch.setattr(sampler, "process_number", lambda: 1)
    monkeypatch.setattr(semidiscrete, "process_number", lambda: 1)  # torch.distributed begins
    late = loaded(coupled())
    of_late = noises(late)
    assert not of_late.equal(first) and noises(loaded(early)).equal(of_late)
    state = coupled().state_dict()
    for made_for in (state["made_for"], state["coupling"]["made_for"]):
        made_for["process"] = 0
    with pytest.warns(match="that nobody has drawn"):
        late.batch_sampler.load_state_dict(state)
    assert len(torch.cat([noises(late), of_late, first]).unique(dim=0)) == len(of_late) + 2 * len(first)


def test_a_coupling_that_is_not_solved_is_refused():
    batches = CoupledBatchSampler(Semidiscrete(DATA, seed=0), 4)
    with pytest.raises(BadInput, match="the coupling is not solved: expected"):
        next(iter(batches))
