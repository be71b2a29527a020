"""Runs by --method semidiscrete: noises get the samples that they choose, and a resumed run goes on with them."""

import re
from contextlib import nullcontext
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from runs import contents_of, losses_of, same_run
from support import FAST, in_processes, log_of, needs_gloo, noise_image, same, state_of

from dansm.scale.base.files import write_json
from dansm.scale.data.labels import Labels
from dansm.scale.data.latents import write_shard
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import from_uint8, to_uint8
from dansm.scale.matching.solver import Solver
from dansm.scale.model import checkpoint
from dansm.scale.model.recipe import Recipe
from dansm.scale.train import coupled_batches, coupling
from dansm.scale.train.coupled_batches import CoupledBatches
from dansm.scale.train.watch import Watch

NAMES = ["bird", "cat", "dog"]
METHOD = ("--method", "semidiscrete", "--log-steps", 1, *FAST, "--batch", 64)  # of 256 noises that are drawn at once
LABELS = ("--labels", "folders")
RESIDENT, READ_AHEAD, ON_DISK = ("--data-on-gpu", "yes"), ("--data-on-gpu", "no"), ("--cache", "decoded")


@pytest.fixture
def images(tmp_path):
    """Fifteen images: five birds, seven cats, three dogs."""
    for name, numbers in zip(NAMES, (range(5), range(5, 12), range(12, 15)), strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in numbers:
            noise_image(8, 8, seed=i).save(tmp_path / "images" / name / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def latents(tmp_path):
    """Fifteen means and variances of latents, as dansm encode leaves them."""
    folder = tmp_path / "latents"
    folder.mkdir()
    numbers = np.random.default_rng(0).normal(size=(15, 8, 4, 4)).astype(np.float16)
    write_shard(folder, 0, numbers[:9], [])
    write_shard(folder, 1, numbers[9:], [])
    write_json(folder / "index.json", {"dansm_latents": 2, "autoencoder": "x", "factor": 1.0, "shift": 0.0,
                                       "moments": True, "flips": False, "size": 32, "source": "y", "images": 15})
    return folder


@pytest.fixture
def train(run, images, tmp_path):
    """Trains into the folder `out`; returns what it printed."""

    def train(*options, data=images, out="out"):
        code, said, err = run("train", data, *METHOD, "--out", tmp_path / out, *options)
        assert (code, err) == (0, "")
        return said

    return train


@pytest.fixture
def not_trained(refused, images, tmp_path):
    """Calls the command, which must be refused and leave all as it was; returns the message."""

    def not_trained(*options, data=images):
        before = contents_of(tmp_path / "out")
        message = refused("train", data, *METHOD, "--out", tmp_path / "out", *options)
        assert contents_of(tmp_path / "out") == before
        return message

    return not_trained


@pytest.fixture
def pairs(monkeypatch):
    """The (x, z) or (x, z, labels) that are trained on."""
    seen, real = [], Watch.pairs

    def watched(*arguments):
        for pair in real(*arguments):
            seen.append(pair)
            yield pair

    monkeypatch.setattr(Watch, "pairs", watched)
    return seen


def mirrored_too(images):
    x = from_uint8(torch.as_tensor(load_images(str(images))))
    return torch.cat([x, x.flip(3)])


def best(z, data, potentials):
    """The sample that each noise chooses, by the rule."""
    return (z.flatten(1) @ data.flatten(1).T - potentials).argmax(1)


# ------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(("labels", "place"), [(None, ON_DISK), ("no", RESIDENT), ("yes", RESIDENT), ("yes", ON_DISK)])
def test_a_step_gets_the_samples_that_its_noises_choose_and_their_labels(train, pairs, images, tmp_path, labels, place):
    train("--steps", 6, *place, *((*LABELS, "--match-labels", labels) if labels else ()))
    data, of_data = mirrored_too(images), torch.repeat_interleave(torch.arange(3), torch.tensor([5, 7, 3])).repeat(2)
    potentials = state_of(tmp_path / "out")["ranks"][0]["pool"]["potentials"]
    x, z, *of_x = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    if labels == "yes":
        chosen = torch.empty(len(z), dtype=torch.int64)
        for label in range(3):
            members = (of_data == label).nonzero()[:, 0]
            own = of_x[0] == label
            chosen[own] = members[best(z[own], data[members], potentials[members])]
    else:
        chosen = best(z, data, potentials)
    assert torch.equal(x, data[chosen]) and len(chosen.unique()) == 30  # mirrored ones among them
    assert not labels or torch.equal(of_x[0], of_data[chosen])
    assert all(line["distance"] < 0.98 * line["distance_random"] for line in log_of(tmp_path / "out"))


def test_where_the_data_lives_changes_no_pair(train, pairs):
    for out, place in enumerate((RESIDENT, READ_AHEAD, ON_DISK)):
        train("--steps", 5, *place, *LABELS, out=str(out))
    assert same(pairs[:5], pairs[5:10]) and same(pairs[:5], pairs[10:])


def test_every_image_comes_equally_often_and_classes_as_often_as_in_the_data(train, pairs, images):
    train("--steps", 8, "--batch", 500, *LABELS)
    x, z, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    came = (x.flatten(1)[:, None] == mirrored_too(images).flatten(1)).all(2).sum(0)
    assert came.sum() == 4000 and came.min() > 4000 / 30 / 2 and came.max() < 4000 / 30 * 2
    for label, size in enumerate((5, 7, 3)):
        members = labels == label
        assert members.sum().item() == pytest.approx(4000 * size / 15, rel=0.2)
        assert z[members].mean().abs() < 0.02 and z[members].std().item() == pytest.approx(1, abs=0.02)


def test_no_image_is_mirrored_where_none_is_to_be(train, pairs, images):
    train("--steps", 1, "--no-flip")
    x = torch.cat([x for x, _ in pairs])
    assert (x.flatten(1)[:, None] == mirrored_too(images)[:15].flatten(1)).all(2).any(1).all()


def test_latents_of_moments_are_drawn_each_time_and_matched_by_their_means(train, pairs, latents, tmp_path):
    train("--steps", 5, data=latents)
    means = torch.from_numpy(load_images(str(latents))[:]).float()
    x, z = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    chosen = best(z, means, state_of(tmp_path / "out")["ranks"][0]["pool"]["potentials"])
    assert len(chosen.unique()) == 15
    for number in range(15):
        of_one = x[chosen == number]
        assert len(of_one.unique(dim=0)) == len(of_one)
    assert (x - means[chosen]).mean().abs() < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's")
@pytest.mark.parametrize("resident", [True, False])
def test_no_batch_waits_for_a_gpu(tmp_path, resident):
    images = torch.randint(0, 256, (500, 3, 8, 8), dtype=torch.uint8)
    recipe = Recipe("x", method="semidiscrete", batch=64, flip=True, part=300, cache=str(tmp_path))
    device = torch.device("cuda")
    batches = CoupledBatches(images, recipe, device, Labels(np.arange(500) % 2, ["a", "b"], "x"))
    batches.solve()
    pairs = batches.pairs(nullcontext, seed=0, start=0, rank=0, ranks=1, device=device, resident=resident)
    seen = [next(pairs)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen += [next(pairs) for _ in range(60)]  # over the 1,024 noises that are drawn at once
    finally:
        torch.cuda.set_sync_debug_mode("default")
        pairs.close()
    data, of_data = torch.cat([images, images.flip(3)]), torch.arange(1000) % 500 % 2
    x, z, labels = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    picks = (to_uint8(x)[:, None, 0, 0] == data[:, 0, 0]).all(2).int().argmax(1)
    assert torch.equal(to_uint8(x), data[picks]) and torch.equal(labels, of_data[picks])
    assert (x - z).square().mean() < 0.98 * (x - z.roll(1, 0)).square().mean()


def test_it_is_said_which_settings_the_method_has_no_use_for(train):
    said = train("--steps", 1, "--part", 10, "--couple-error", 0.5)
    assert "--part" not in said and "--couple-error" not in said
    said = train("--steps", 1, "--cost", "inner", "--match-size", 3, out="b")
    for option in ("--cost", "--match-size"):
        assert f"{option} has no effect with --method semidiscrete" in said
    said = train("--steps", 1, "--method", "random", "--part", 9, out="c")
    assert "--part has no effect with --method random" in said


def test_it_is_said_how_classes_are_matched(train):
    assert "each is matched within itself" in train("--steps", 1, *LABELS)
    assert "a noise tells the class" in train("--steps", 1, *LABELS, "--match-labels", "no", "--fresh")


# ------------------------------------------------------------------------------- resumed


@pytest.mark.parametrize("options", [(), READ_AHEAD, LABELS, (*LABELS, *ON_DISK), (*LABELS, "--match-labels", "no"),
                                     ("--part", 7), ("--accumulate", 2)],
                         ids=lambda options: " ".join(map(str, options)))
def test_a_run_resumed_in_the_middle_is_the_run_that_never_stopped(train, tmp_path, options):
    """The noises drawn ahead end within the run, and batches that were read ahead are neither lost nor repeated."""
    train("--steps", 9, *options, out="once")
    train("--steps", 3, *options, out="twice")
    assert "resuming from step 3" in train("--steps", 9, *options, out="twice")
    assert same_run(tmp_path / "once", tmp_path / "twice")
    assert all(one[-2:] != other[-2:] for one, other in pairwise(losses_of(tmp_path / "once")))


def test_a_resumed_run_solves_nothing_as_its_checkpoint_has_the_potentials(train, tmp_path, monkeypatch):
    train("--steps", 2)
    monkeypatch.setattr(Solver, "step", lambda solver: pytest.fail("a step of the solver"))
    monkeypatch.setattr(coupling, "POTENTIALS", tmp_path / "another home")
    assert "resuming from step 2" in train("--steps", 4)


@pytest.mark.parametrize("options", [RESIDENT, (*READ_AHEAD, "--flip")])
def test_a_run_of_latents_resumed_is_the_run_that_never_stopped(train, latents, tmp_path, options):
    train("--steps", 9, *options, data=latents, out="once")
    train("--steps", 4, *options, data=latents, out="twice")
    train("--steps", 9, *options, data=latents, out="twice")
    assert same_run(tmp_path / "once", tmp_path / "twice")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("options", [LABELS, (*READ_AHEAD, "--accumulate", 2)])
def test_two_processes_resumed_are_the_run_that_never_stopped(images, tmp_path, options):
    command = ["train", images, *options, *METHOD, "--batch", 8]
    once, twice = tmp_path / "once", tmp_path / "twice"
    codes, said = in_processes(tmp_path, [*command, "--steps", 8, "--out", once],
                               [*command, "--steps", 3, "--out", twice], [*command, "--steps", 8, "--out", twice])
    assert codes == [[0, 0, 0]] * 2, said
    assert "resuming from step 3" in said[0] and said[1] == "" and same_run(once, twice)
    one, other = (state["pool"] for state in state_of(once)["ranks"])
    assert same(one["potentials"], other["potentials"]) and not same(one["before"], other["before"])


def test_a_run_that_is_done_or_that_is_refused_solves_nothing(train, not_trained, monkeypatch, images):
    train("--steps", 2)

    def coupled(*_, **__):
        raise AssertionError("it is solved")

    monkeypatch.setattr(coupled_batches, "coupled", coupled)
    assert "already at step 2" in train("--steps", 2)
    assert "part 100000 → 9" in not_trained("--steps", 3, "--part", 9)
    assert "couple_error 0.1 → 0.2" in not_trained("--steps", 3, "--couple-error", 0.2)
    assert "method semidiscrete → greedy" in not_trained("--steps", 3, "--method", "greedy")
    noise_image(8, 8, seed=99).save(images / "cat" / "08.png")
    assert "not the same ones" in not_trained("--steps", 3)


def test_other_images_that_look_alike_are_refused(train, not_trained, images, tmp_path):
    train("--steps", 2)
    picture = noise_image(8, 8, seed=8)
    red, green, blue = picture.getpixel((0, 0))
    picture.putpixel((0, 0), (red ^ 1, green, blue))
    picture.save(images / "cat" / "08.png")
    message = not_trained("--steps", 3)
    assert str(checkpoint.newest(tmp_path / "out")) in message and "the data have changed" in message
    assert "--out" in message and "--fresh" in message


def test_a_coupling_that_does_not_fit_is_not_the_fault_of_the_checkpoint(train, not_trained, monkeypatch):
    train("--steps", 1)
    monkeypatch.setattr("dansm.scale.matching.semidiscrete.free_memory", lambda _: 1000)
    message = not_trained("--steps", 2)
    assert "30 samples" in message and "memory" in message and "checkpoint" not in message


def test_a_run_that_needs_more_memory_than_it_may_take_names_the_least_and_resumes_with_it(train, not_trained):
    train("--steps", 1)
    message = not_trained("--steps", 2, "--memory", 2e-6)
    (least,) = re.findall("memory is 2e-06 GB .* expected (.*) or more", message)
    assert "resuming from step 1" in train("--steps", 2, "--memory", least)


def test_a_checkpoint_with_wrong_parts_is_refused_by_name(train, not_trained, tmp_path):
    train("--steps", 1)
    saved = checkpoint.newest(tmp_path / "out")
    for name, wrong in (("before", 3), ("potentials", torch.zeros(3)), ("made_for", {"device": "cpu"})):
        state = checkpoint.load(saved)
        whole = state["ranks"][0]["pool"]
        state["ranks"][0]["pool"] = whole | {name: wrong}
        checkpoint.write(saved, state)
        assert str(saved) in not_trained("--steps", 2), name
        state["ranks"][0]["pool"] = whole
        checkpoint.write(saved, state)


def test_a_run_that_began_before_there_were_these_settings_is_resumed(train, tmp_path):
    train("--steps", 2, "--method", "greedy")
    state = state_of(tmp_path / "out")
    for name in ("part", "couple_error"):
        del state["recipe"][name]
    checkpoint.write(checkpoint.newest(tmp_path / "out"), state)
    assert "resuming" in train("--steps", 3, "--method", "greedy", "--part", 100_000)


def test_ctrl_c_within_the_solve_keeps_what_it_found_and_the_same_command_resumes(run, train, images, tmp_path,
                                                                                  monkeypatch):
    train("--steps", 2, out="once")
    (kept,) = (tmp_path / "potentials").glob("*.pt")
    kept.unlink()
    step, steps = Solver.step, count(1)

    def stopped(solver):
        step(solver)
        if next(steps) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Solver, "step", stopped)
        code, _, err = run("train", images, *METHOD, "--steps", 2, "--out", tmp_path / "twice")
    assert code == 130 and err.count("\n") == 1 and str(kept) in err and "the same command resumes" in err
    assert not checkpoint.newest(tmp_path / "twice")
    train("--steps", 2, out="twice")
    assert same_run(tmp_path / "once", tmp_path / "twice")


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("option", "value"), [("--part", 0), ("--couple-error", 0), ("--couple-error", -0.1),
                                               ("--couple-error", "nan"), ("--match-scope", "global")])
def test_what_cannot_be_is_refused_before_the_data_is_read(not_trained, tmp_path, option, value):
    message = not_trained(option, value, data=tmp_path / "images" / "bird")
    assert f"{option} is {value}" in message.replace("'", "") and not (tmp_path / "out").exists()


@needs_gloo
@pytest.mark.slow
def test_processes_that_would_share_a_pool_are_refused(images, tmp_path):
    codes, said = in_processes(tmp_path, ["train", images, *METHOD, "--match-scope", "global", "--out", tmp_path / "a"])
    assert codes == [[2], [2]] and all("--match-scope is global: expected rank" in words for words in said)


def test_a_latent_that_is_nan_is_named_with_its_file(not_trained, latents, tmp_path):
    shard = latents / "latents-00001.npy"
    array = np.load(shard)
    array[2, 0, 1, 1] = np.nan
    np.save(shard, array)
    message = not_trained("--steps", 2, data=latents)
    assert str(shard) in message and "latent 2" in message
