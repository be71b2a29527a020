"""The coupling of a training: samples as networks see them, and potentials that no later call has to find again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CPU, ROOT, free_port, limited_files, needs_gloo, same

from dansm import BadInput
from dansm.scale.base.text import Stopped
from dansm.scale.data.latents import Shards, write_shard
from dansm.scale.matching.solver import Solved, Solver
from dansm.scale.model import checkpoint
from dansm.scale.train import coupling
from dansm.scale.train.coupling import Samples, coupled, overall

LABELS = np.arange(40) % 2
NUMBERS = np.array([3, 39, 40, 3, 79, 0, 43])


def pictures(count=40, seed=0):
    return torch.randint(256, (count, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def solve(cache):
    """`coupled` with settings that take no time: eighty samples in four parts."""
    def solve(images=None, **settings):
        settings = dict(flip=True, labels=LABELS, part=20, error=0.3, seed=0, device=CPU, cache=cache) | settings
        return coupled(pictures() if images is None else images, **settings)

    return solve


@pytest.fixture
def steps(monkeypatch):
    """How many steps were taken; the step before which Ctrl-C is pressed."""
    counter, step = {"taken": 0, "last": None}, Solver.step

    def counted(solver):
        if counter["taken"] == counter["last"]:
            raise KeyboardInterrupt
        counter["taken"] += 1
        step(solver)

    monkeypatch.setattr(Solver, "step", counted)
    return counter


def the_file(cache):
    (path,) = cache.glob("*.pt")
    return path


# ------------------------------------------------------------------------------- samples


def latents(folder, moments):
    stored = np.random.default_rng(0).normal(size=(40, 6 if moments else 3, 4, 6)).astype(np.float16)
    write_shard(folder, 0, stored[:25], [])
    write_shard(folder, 1, stored[25:], [])
    return Shards(sorted(folder.glob("*.npy")), {"moments": moments}), torch.from_numpy(stored[:, :3])


@pytest.mark.parametrize("kind", ["uint8", "float32", "memory-mapped", "encoded", "moments"])
def test_samples_are_as_networks_see_them_and_mirrored_ones_come_behind(tmp_path, kind):
    images = pictures()
    if kind == "memory-mapped":
        np.save(tmp_path / "images.npy", images.numpy())
        given = np.load(tmp_path / "images.npy", mmap_mode="c")
    elif kind in ("encoded", "moments"):
        given, images = latents(tmp_path, kind == "moments")
    else:
        given = images = images.to(getattr(torch, kind))
    whole = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    whole = torch.cat([whole, whole.flip(3)])
    samples = Samples(given, mirrored=True)
    assert samples.shape == (80, 3, 4, 6) and Samples(given, mirrored=False).shape == (40, 3, 4, 6)
    for numbers in (NUMBERS, torch.from_numpy(NUMBERS)):
        assert samples[numbers].dtype == torch.float32 and torch.equal(samples[numbers], whole[NUMBERS])


def test_a_mirrored_sample_has_the_label_of_its_image(solve):
    found = solve()
    z, taken = found.draw(60, torch.ones(60, dtype=torch.int64))
    assert set((taken % 40 % 2).tolist()) == {1} and (taken >= 40).any() and (taken < 40).any()
    assert z.shape == (60, 3, 4, 6)


# ------------------------------------------------------------------------------- the file


def test_the_second_call_finds_what_the_first_has_solved(solve, steps, cache, capsys):
    first = solve()
    said = capsys.readouterr().out
    assert "80 samples in 2 groups and 4 parts: shares off by " in said and "noises for each, " in said
    taken = steps["taken"]
    second = solve()
    assert steps["taken"] == taken > 0 and torch.equal(first.potentials, second.potentials)
    line = f"found in {the_file(cache)}\n"
    said = capsys.readouterr().out
    assert said.endswith(line) and said.count("\n") == 1  # and no bar


def test_without_a_folder_it_is_kept_in_the_users_cache(solve, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(coupling, "POTENTIALS", Path("~/potentials"))
    solve(cache=None)
    the_file(tmp_path / "potentials")


def test_a_smaller_error_resumes_from_what_is_there_and_a_larger_one_takes_it(solve, steps, tmp_path):
    at_once = solve(error=0.15, cache=tmp_path / "other")
    taken = steps["taken"]
    solve(error=0.4)
    in_two = solve(error=0.15)
    assert steps["taken"] == 2 * taken and torch.equal(at_once.potentials, in_two.potentials)
    solve(error=0.3)
    assert steps["taken"] == 2 * taken


@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_an_interrupted_call_keeps_what_it_found_and_the_next_resumes(solve, steps, cache, tmp_path, share):
    whole = solve(cache=tmp_path / "other")
    taken = steps["taken"]
    steps["last"] = taken + int(share * taken)
    with pytest.raises(Stopped, match=f"{cache}.*the same command resumes"):
        solve()
    steps["last"] = None
    resumed = solve()
    assert steps["taken"] == 2 * taken and torch.equal(whole.potentials, resumed.potentials)
    assert same(whole.solution()["progress"], resumed.solution()["progress"])


def test_what_was_interrupted_is_usable(solve, steps):
    steps["last"] = 40
    with pytest.raises(Stopped):
        solve(part=None, labels=None, error=0.01)
    found = solve(part=None, labels=None, error=0.01, most=1)
    assert steps["taken"] == 40 and found.draw(5)[1].max() < 80


OTHERS = {"images": dict(images=pictures(seed=1)), "one image": dict(images=pictures()[:39], labels=LABELS[:39]),
          "labels": dict(labels=1 - LABELS), "none": dict(labels=None), "mirrored": dict(flip=False),
          "parts": dict(part=10), "seed": dict(seed=1)}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS.keys())
def test_other_data_labels_or_parts_are_solved_on_their_own(solve, steps, cache, settings):
    solve()
    before, taken = the_file(cache).read_bytes(), steps["taken"]
    path = the_file(cache)
    solve(**settings)
    assert steps["taken"] > taken and len(list(cache.glob("*.pt"))) == 2 and path.read_bytes() == before


def test_the_same_content_is_found_wherever_it_lies_and_with_any_seed_where_nothing_is_split(solve, steps):
    solve(part=None)
    taken = steps["taken"]
    solve(pictures().numpy(), part=1000, seed=5)
    assert steps["taken"] == taken


def of_other_data(path):
    solution = torch.load(path)
    solution["made_for"]["content"] = "f" * 32
    checkpoint.write(path, solution)


def too_short(path):
    solution = torch.load(path)
    checkpoint.write(path, solution | {"potentials": solution["potentials"][:-1]})


def with_a_changed_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["potentials"].numpy().tobytes()) + 5] ^= 8
    path.write_bytes(content)


DAMAGES = {"empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("potentials"),
           "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
           "a list": lambda path: torch.save([1, 2], path),
           "code": lambda path: checkpoint.write(path, {"run": print}),
           "nothing in it": lambda path: checkpoint.write(path, {}), "of other data": of_other_data,
           "too short": too_short, "a changed bit": with_a_changed_bit}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_solved_again_and_replaced(solve, steps, cache, damage, capsys):
    first, taken = solve(), steps["taken"]
    assert "not used" not in capsys.readouterr().out
    damage(the_file(cache))
    second = solve()
    assert steps["taken"] == 2 * taken and torch.equal(first.potentials, second.potentials)
    assert f"not used, and written anew: {the_file(cache)}" in capsys.readouterr().out.replace("\n", " ")
    solve()
    assert steps["taken"] == 2 * taken and "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["b", "steps", "mean"])
def test_a_solver_of_another_version_starts_over_from_what_was_found(solve, steps, cache, part):
    first, taken = solve(), steps["taken"]
    solution = torch.load(the_file(cache))
    for state in solution["progress"].values():
        del state["solver"][part]
    checkpoint.write(the_file(cache), solution)
    assert torch.equal(solve().potentials, first.potentials) and steps["taken"] == taken
    assert all(state["reached"].at_most <= 0.1 for state in solve(error=0.1).progress.values())


def on_a_gpu(path):
    """Write the file again as a GPU would have, whose generators have other states."""
    solution = torch.load(path) | {"device": "cuda"}
    for state in solution["progress"].values():
        state["solver"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.write(path, solution)


def test_what_another_kind_of_device_solved_is_taken_but_not_continued(solve, steps, cache, tmp_path):
    first = solve()
    on_a_gpu(the_file(cache))
    steps["last"] = steps["taken"]  # no step more
    assert torch.equal(solve().potentials, first.potentials)
    steps["last"] = None
    finer = solve(error=0.15)
    assert torch.equal(finer.potentials, solve(error=0.15, cache=tmp_path / "other").potentials)


def test_potentials_that_started_over_do_not_count_as_what_was_there_before(solve, steps, cache):
    first = solve()
    on_a_gpu(the_file(cache))
    steps["last"] = steps["taken"] + 2
    with pytest.raises(Stopped):
        solve(error=0.05)
    steps["last"] = None
    again = solve()
    assert torch.equal(again.potentials[again.labels == 1], first.potentials[first.labels == 1])  # as they were
    assert all(state["reached"].at_most <= 0.3 for state in again.progress.values()) and steps["taken"] > 2


# ------------------------------------------------------------------------------- what it says


def test_an_error_that_is_not_reached_is_told(solve, capsys):
    solve(error=0.01, most=5)
    said = capsys.readouterr().out
    assert "shares of 4 of 4 parts may be off by more than 1 % after 6 noises for each sample; the plan serves" in said


def test_the_bar_shows_the_error_so_far(solve, capsys, monkeypatch):
    monkeypatch.setattr("dansm.scale.base.text.SOON", (0,))
    monkeypatch.setattr("dansm.scale.base.text.SELDOM", 0)
    solve()
    assert "coupling, shares off by " in capsys.readouterr().out


@pytest.mark.parametrize(("images", "labels", "copies", "result"), [
    (pictures(1), None, "", "1 sample in 1 group: nothing to choose"),
    (torch.zeros(5, 1, 2, 2), None, "4 of 5 samples are copies of others", "5 samples in 1 group: nothing to choose"),
    (torch.cat([pictures(5), pictures(3)]), None, "3 of 8 samples are copies", "8 samples in 1 group: shares off by"),
    (torch.cat([pictures(5), pictures(1)]), None, "1 of 6 samples is a copy", "6 samples in 1 group: shares off by"),
    (pictures(6), np.array([0, 0, 2, 0, 0, 0]), "", "6 samples in 2 groups: shares off by")])
def test_equal_samples_and_those_that_are_alone_are_told_and_work(solve, steps, capsys, images, labels, copies, result):
    found = solve(images, labels=labels, flip=False, part=None)
    said = capsys.readouterr().out
    assert copies in said and ("samples is" in said or "samples are" in said) == bool(copies) and result in said
    assert len(found.draw(90)[1].unique()) == len(images)
    assert ("nothing to choose" in result) == (not steps["taken"])


def test_latents_that_are_not_finite_are_named(solve, tmp_path):
    shards, _ = latents(tmp_path, moments=False)
    stored = np.load(shards.files[1], mmap_mode="r+")
    stored[3, 1] = np.nan
    stored.flush()
    with pytest.raises(BadInput, match=f"{shards.files[1]} holds NaN or infinite numbers, in latent 3"):
        solve(shards)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_solved(solve, steps, cache):
    cache.write_text("precious")
    with pytest.raises(BadInput, match=r"--cache is .* is a file"):
        solve()
    assert not steps["taken"] and cache.read_text() == "precious"


def test_a_full_disk_leaves_the_file_that_was_there(solve, cache):
    solve()
    before = the_file(cache).read_bytes()
    with limited_files(1000), pytest.raises(BadInput, match="cannot be written"):
        solve(error=0.2)
    assert the_file(cache).read_bytes() == before
    solve(error=0.2)


def test_the_error_over_all_parts_is_the_root_of_the_mean_square_of_their_samples():
    solved = overall([Solved(0.09, 0.02, 10.0), Solved(0.01, 0.01, 40.0)], [10, 30])
    assert solved == pytest.approx((0.03, (0.005**2 + 0.0075**2) ** 0.5, 32.5))


# ------------------------------------------------------------------------------- several processes

SCRIPT = """if True:
    import sys, torch
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from dansm.scale.base.processes import processes
    from dansm.scale.matching.solver import Solver
    from dansm.scale.train.coupling import coupled
    step, steps = Solver.step, []
    Solver.step = lambda solver: (steps.append(1), step(solver))
    images = torch.randint(256, (60, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with processes(torch.device("cpu")) as device:
        coupling = coupled(images, flip=False, labels=None, part=None, error=0.2, seed=0, device=device,
                           cache=Path("cache"))
        print(len(steps), coupling.potentials.double().sum().item(), coupling.draw(1)[0].sum().item())
"""


@needs_gloo
@pytest.mark.slow
def test_of_two_processes_one_solves_and_each_draws_its_own_noises(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                   "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(ROOT)], cwd=tmp_path, text=True,
                                 env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
    said = [child.communicate(timeout=120)[0] for child in children]
    first, second = ([json.loads(word) for word in text.splitlines()[-1].split()] for text in said)
    assert first[0] > 0 == second[0] and first[1] == second[1] and first[2] != second[2], said
