"""Batches: every image once an epoch, mirrored half of the time, the same for any count of processes, and resumed."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dansm import BadInput
from dansm.scale.data import loader
from dansm.scale.data.loader import batches
from dansm.scale.data.pixels import to_uint8


def numbered(count, width=3):
    """Image i holds i at the left and i + 100 at the right, so that a batch tells which images it is made of."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 2, width)
    images[..., -1] += 100
    return images


def levels(x):
    """The whole numbers that [−1, 1] was made of."""
    return ((x + 1) * 127.5).round().long()


def stream(images, batch, count, **settings):
    return torch.cat(list(islice(batches(images, batch, **settings), count)))


def which(x):
    """The image each sample is, and whether it is mirrored."""
    left, right = levels(x)[:, 0, 0, 0], levels(x)[:, 0, 0, -1]
    return torch.minimum(left, right), left > right


@pytest.mark.parametrize(("count", "batch"), [(10, 5), (10, 3), (10, 10), (10, 25), (10, 1), (1, 4)])
def test_every_epoch_holds_every_image_once(count, batch):
    shown, _ = which(stream(numbered(count), batch, -(-4 * count // batch)))
    for epoch in shown[: 4 * count].split(count):
        assert epoch.sort().values.tolist() == list(range(count))


def test_an_epoch_depends_on_its_seed_and_its_number_alone():
    images = numbered(20)
    by_one, by_seven = stream(images, 1, 63, seed=3), stream(images, 7, 9, seed=3)
    assert torch.equal(by_one, by_seven)
    orders = {tuple(which(stream(images, 20, 4, seed=seed))[0].tolist()) for seed in range(5)}
    epochs = {tuple(order[i : i + 20]) for order in orders for i in range(0, 80, 20)}
    assert len(orders) == 5 and len(epochs) == 20  # no two epochs, of no two seeds, are alike


def test_half_of_the_images_are_mirrored_differently_each_epoch():
    images = torch.randint(0, 256, (100, 3, 4, 5), dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, -1] = torch.arange(100), torch.arange(100) + 100
    x = stream(images, 100, 20, seed=2)
    image, mirrored = which(x)
    for sample, i, flipped in zip(levels(x), image, mirrored, strict=True):
        assert torch.equal(sample, (images[i].flip(2) if flipped else images[i]).long())
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)
    first, second = (mirrored[epoch][image[epoch].argsort()] for epoch in (slice(100), slice(100, 200)))
    assert 0 < (first != second).sum() < 100


def test_black_is_minus_1_and_white_is_1_exactly_and_the_levels_come_back():
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    x = stream(images, 256, 1, flip=False)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_uint8(x).flatten().sort().values, images.flatten())


def test_batches_leave_the_images_as_they_are():
    images = numbered(5)
    before = images.clone()
    stream(images, 3, 4)
    assert torch.equal(images, before)


def by_the_rule(images, batch, *, seed, number, flip=True):
    """Batch `number` of the endless row of epochs, one sample after the other."""
    x = []
    for place in range(number * batch, (number + 1) * batch):
        draw = np.random.default_rng([seed, place // len(images)])
        row = draw.permutation(len(images))[place % len(images)]
        mirrored = flip and draw.random(len(images))[place % len(images)] < 0.5
        image = torch.as_tensor(images[row])
        image = image.flip(2) if mirrored else image
        x.append(image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float())
    return torch.stack(x)


sizes = st.integers(1, 30)


@given(count=sizes, share=st.integers(1, 12), ranks=st.integers(1, 4), start=st.integers(0, 20), seed=sizes,
       flip=st.booleans(), resident=st.booleans(), kind=st.sampled_from(["uint8", "float16", "float32"]))
def test_the_parts_of_all_ranks_joined_are_the_batches_by_the_rule(count, share, ranks, start, seed, flip, resident,
                                                                   kind):
    images = (255 * np.random.default_rng(0).random((count, 2, 2, 3))).astype(kind)
    parts = [batches(images, share * ranks, seed=seed, flip=flip, start=start, rank=rank, ranks=ranks,
                     resident=resident) for rank in range(ranks)]
    for number in range(start, start + 4):
        x = torch.cat([next(part) for part in parts])
        assert torch.equal(x, by_the_rule(images, share * ranks, seed=seed, number=number, flip=flip))
    for part in parts:
        part.close()


@given(count=sizes, share=st.integers(1, 12), ranks=st.integers(1, 4), start=st.integers(0, 20), seed=sizes,
       resident=st.booleans())
def test_labels_come_with_their_images_which_they_do_not_change(count, share, ranks, start, seed, resident):
    images, labels = numbered(count), np.arange(count) % 7
    settings = dict(seed=seed, start=start, ranks=ranks, resident=resident)
    for rank in range(ranks):
        plain = batches(images, share * ranks, rank=rank, **settings)
        labelled = batches(images, share * ranks, rank=rank, labels=labels, **settings)
        for _ in range(4):
            x, of_x = next(labelled)
            assert torch.equal(x, next(plain))
            assert of_x.dtype == torch.int64 and torch.equal(of_x, which(x)[0] % 7)
        plain.close()
        labelled.close()


@pytest.mark.parametrize("resident", [None, True, False])
def test_images_on_the_disk_give_the_batches_of_those_in_memory(tmp_path, resident):
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 4), np.uint8)
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c")
    assert torch.equal(stream(mapped, 12, 20, resident=resident), stream(torch.from_numpy(images), 12, 20))
    assert (mapped == images).all()


@pytest.mark.parametrize("settings", [{"ranks": 3}, {"ranks": 2, "rank": 2}, {"rank": -1}, {"ranks": 0}, {"start": -1}])
def test_ranks_that_do_not_share_a_batch_are_refused_at_once(settings):
    with pytest.raises(BadInput, match="expected"):
        batches(numbered(10), 8, **settings)


@pytest.mark.parametrize("images", [torch.zeros(4, 3, 2, 2, dtype=torch.int64), torch.zeros(4, 3, 2),
                                    np.zeros((0, 3, 2, 2), np.uint8), np.zeros((4, 3, 2, 2), ">f4"),
                                    np.zeros((4, 3, 2, 2))])
def test_what_is_no_array_of_images_is_refused_at_once(images):
    with pytest.raises(BadInput, match=r"uint8, float16 or float32"):
        batches(images, 2)


def on_disk(folder, count=30):
    np.save(folder / "a.npy", numbered(count).numpy())
    return np.load(folder / "a.npy", mmap_mode="c")


@pytest.mark.parametrize("labels", [None, np.arange(30)])
@pytest.mark.parametrize("resident", [True, False])
def test_the_threads_end_with_the_batches(tmp_path, resident, labels):
    before = set(threading.enumerate())
    row = batches(on_disk(tmp_path), 4, resident=resident, labels=labels)
    next(row)
    assert set(threading.enumerate()) - before
    row.close()
    assert not set(threading.enumerate()) - before


def test_what_goes_wrong_in_a_thread_is_raised_where_the_batch_is_asked_for(tmp_path, monkeypatch):
    row, take, before = batches(on_disk(tmp_path), 4), np.take, set(threading.enumerate())
    reads = iter(range(100))

    def failing(*arguments, **settings):
        if next(reads) >= 4:
            raise OSError(5, "Input/output error")
        return take(*arguments, **settings)

    monkeypatch.setattr(np, "take", failing)
    with pytest.raises(OSError, match="Input/output error"):
        for _ in range(10):
            next(row)
    assert not set(threading.enumerate()) - before
    with pytest.raises(StopIteration):
        next(row)


def test_no_more_than_a_few_batches_are_read_ahead(tmp_path, monkeypatch):
    row, gathered, take = batches(on_disk(tmp_path), 4), [], np.take
    monkeypatch.setattr(np, "take", lambda *arguments, **settings: gathered.append(0) or take(*arguments, **settings))
    for taken in range(1, 20):
        next(row)
        assert len(gathered) <= taken + loader.AHEAD + 1
    row.close()
    assert len(gathered) >= 19


def test_the_next_epoch_is_drawn_in_time_by_another_thread(monkeypatch):
    drawn, draw = {}, np.random.default_rng

    def watched(seed):
        drawn.setdefault(seed[1], threading.Event()).set()
        assert threading.current_thread() is not threading.main_thread()
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", watched)
    row = batches(numbered(10), 2)
    for number in range(25):
        next(row)
        assert drawn.setdefault(number // 5 + 1, threading.Event()).wait(60)
        assert number // 5 + 2 not in drawn
    row.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's")
@pytest.mark.parametrize("kind", ["uint8", "float16", "float32"])
def test_a_gpu_gets_the_same_batches_whether_the_images_live_there_or_not(tmp_path, kind):
    images = (255 * np.random.default_rng(0).random((1000, 3, 8, 8))).astype(kind)
    np.save(tmp_path / "a.npy", images)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="c")
    rows = [batches(mapped, 96, device="cuda", resident=resident) for resident in (None, True, False)]
    rows += [batches(torch.from_numpy(images), 96, device="cuda", resident=False)]
    here = batches(images, 96)
    busy = torch.randn(2000, 2000, device="cuda")
    for _ in range(100):
        xs = [next(row) for row in rows]
        for _ in range(5):
            busy = (busy @ busy).tanh()  # so that the copies are far ahead of what uses them
        assert xs[0].device.type == "cuda" and all(torch.equal(xs[0], x) for x in xs[1:])
        assert torch.allclose(xs[0].cpu(), next(here), atol=1e-6, rtol=0)
    for row in rows:
        row.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's")
def test_what_takes_more_than_half_of_a_gpu_does_not_live_there(monkeypatch):
    images = numbered(64)
    for free, there in ((2 * images.nbytes, True), (2 * images.nbytes - 1, False)):
        monkeypatch.setattr(loader, "free_memory", lambda _, free=free: free)
        assert loader._may_live_on(torch.device("cuda"), images) is there
