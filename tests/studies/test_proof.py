"""The proof: its plan, its table that adds up over calls, what it makes of known curves, and the test of the prior."""

import csv
import json
import math
import shlex

import numpy as np
import pytest
import torch
from dansm.scale.base.files import write_csv
from dansm.scale.base.locks import owning
from dansm.scale.base.machine import hardware
from dansm.scale.data.loader import load_images
from dansm.scale.evaluate.evaluate import digest_of_images
from dansm.scale.model.recipe import load
from dansm.scale.studies import prior, proof, proof_figures
from dansm.scale.train import fit as trainer
from dansm.scale.train import judge
from support import make_images

import dansm

SMALL = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), batch=8, warmup=0, decay=(0.9,),
             evaluate_count=20, evaluate_steps=(2, 3), match_size=16)
THREE = [proof.Run("off", dict(SMALL, method="random"), 64, 2, "off"), proof.Run("greedy-10000", SMALL, 64, 1, "pool"),
         proof.Run("assigned-256", dict(SMALL, method="optimal", match_size=8), 32, 1, "assigned")]


# ------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", proof.RUNS)
def test_every_run_is_the_command_that_stands_beside_it(name):
    """Read back as dansm train reads it, the command is the run's recipe, to the last setting."""
    from dansm.scale.commands.train import parse

    for seed in range(proof.RUNS[name].seeds):
        words = shlex.split(proof.command_of(proof.RUNS[name], seed))
        assert words[:3] == ["dansm", "train", "proof"]
        given = {option[2:].replace("-", "_"): value for option, value in zip(words[3::2], words[4::2], strict=True)}
        recipe = load("proof", {option: parse(option, value) for option, value in given.items()})
        assert recipe == proof.recipe_of(proof.RUNS[name], seed, "cifar10")
        assert recipe.steps * recipe.batch == proof.RUNS[name].images and max(recipe.evaluate_at) == recipe.steps


def test_runs_differ_from_off_in_their_pairs_alone():
    """But for flow, batch and the learning rate that goes with it, in which their own off differs too."""
    pairs = {"method", "match_size", "cost", "pool"}
    for entry in proof.RUNS.values():
        off = proof.RUNS[proof.base_of(entry)]
        differing = {key for key in entry.settings | off.settings if entry.settings.get(key) != off.settings.get(key)}
        assert differing <= pairs, entry.name
        assert off.images >= entry.images


# ------------------------------------------------------------------------------- runs


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Three short runs in the place of the plan; returns what calls the command on some images."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(proof, "RUNS", {entry.name: entry for entry in THREE})
    monkeypatch.setattr(proof, "FEW", (32, 64))
    monkeypatch.setattr(proof, "RATE_STEPS", 24)
    monkeypatch.setattr(judge, "CACHE", tmp_path / "cache")
    images = make_images(tmp_path / "images", count=40, width=8, height=8)
    return ["proof", "--data", images, "--features", "test_evaluate:seen", "--device", "cpu", "--work",
            tmp_path / "work", "--out", tmp_path / "out"]


def table(folder):
    with open(folder / "out" / "distances.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_all_runs_are_measured_and_a_second_call_measures_nothing(run, three, tmp_path):
    code, said, err = run(*three)
    assert (code, err) == (0, "") and "4 runs of 4 to go" in said
    rows = table(tmp_path)
    found = {(row["run"], row["seed"], row["images"], row["steps"]) for row in rows}
    wanted = {("off", seed, images) for seed in "01" for images in ("32", "64")}
    wanted |= {("greedy-10000", "0", "32"), ("greedy-10000", "0", "64"), ("assigned-256", "0", "32")}
    assert found == {(*key, steps) for key in wanted for steps in "23"} and len(rows) == len(found)
    logged = [json.loads(line) for line in (tmp_path / "work" / "off-1" / "metrics.jsonl").read_text().splitlines()]
    by_steps = {line["images"]: line for line in logged if "frechet_distance/2" in line}
    row, = (row for row in rows if (row["run"], row["seed"], row["images"], row["steps"]) == ("off", "1", "64", "3"))
    assert float(row["distance"]) == by_steps[64]["frechet_distance/3"]
    assert len({float(row["distance"]) for row in rows if row["steps"] == "2"}) == len(rows) / 2
    out = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"summary.csv", "commands.txt", "images.png", "images.svg"} <= out
    before = (tmp_path / "out" / "distances.csv").read_bytes()
    code, said, _ = run(*three)
    assert code == 0 and "0 runs of 4 to go" in said and (tmp_path / "out" / "distances.csv").read_bytes() == before


def test_calls_that_end_early_add_up(run, three, tmp_path, monkeypatch):
    """Each call makes one step of each run: they go on in the next, and the table is that of one call."""
    assert run(*three)[0] == 0
    whole = (tmp_path / "out" / "distances.csv").read_text()
    three = [*three[:-3], tmp_path / "again", "--out", tmp_path / "cut", "--only", ",".join(proof.RUNS)]
    monkeypatch.setattr(trainer.Decide, "__call__", lambda self: (True, False))
    begun = []
    for _ in range(9):
        code, said, err = run(*three)
        assert (code, err) == (0, "")
        begun.append(next(line for line in said.splitlines() if "to go" in line))
    assert begun == ["4 runs of 4 to go"] * 4 + ["3 runs of 4 to go"] * 4 + ["0 runs of 4 to go"]
    cut, once = ([{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(text.splitlines())]
                 for text in ((tmp_path / "cut" / "distances.csv").read_text(), whole))
    assert cut == once


def test_what_is_stopped_begins_nothing_more(run, three, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "PRIOR", 20)
    begun = []
    for stopped in ("train_all", "measure_rates"):
        for name in ("train_all", "measure_rates"):
            monkeypatch.setattr(proof, name, lambda *_, name=name, stopped=stopped, **__: begun.append(name) or (
                name == stopped))  # True: as Ctrl-C leaves it
        assert run(*three)[0] == 0 and not (tmp_path / "out" / "prior.csv").exists()
    assert begun == ["train_all", "train_all", "measure_rates"]


def test_calls_side_by_side_share_the_runs(run, three, tmp_path, monkeypatch):
    """Another call trains the first seed of off, ends a run meanwhile, and has ended another when its turn comes."""
    train, which = proof.one_run, f"40 images, {digest_of_images(load_images(str(three[2])))[:8]}"

    def beside(entry, seed, *rest):
        new, stopped = train(entry, seed, *rest)
        if entry.name == "greedy-10000":  # the other call has done this one, before it is added
            done = [{**row, "run": "assigned-256", "data": which} for row in new if row["images"] == 32]
            proof.add(done, tmp_path / "out")
        return new, stopped

    monkeypatch.setattr(proof, "one_run", beside)
    work = tmp_path / "work" / "off-0"
    work.mkdir(parents=True)
    with owning(work):
        code, said, err = run(*three)
    assert (code, err) == (0, "") and "off, seed 0, is another call's" in said
    assert {(row["run"], row["seed"]) for row in table(tmp_path)} == {
        ("greedy-10000", "0"), ("assigned-256", "0"), ("off", "1")}
    assert not (tmp_path / "work" / "assigned-256-0" / "metrics.jsonl").exists() and "1 run to go" in said


def test_rates_are_of_every_run_that_has_none_of_this_device(run, three, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    known = dict(run="off", images_per_second=9.0, least=8.0, most=9.0, matching=0.1, distance=1.0,
                 distance_unmatched=1.0)
    write_csv([{**known, "gpu": "CPU"}, {**known, "gpu": "another"}], out / "speed.csv")
    code, said, err = run(*three, "--only", "rates")
    assert (code, err) == (0, "") and "off: how fast" not in said and "assigned-256: how fast it trains" in said
    found = {(row["run"], row["gpu"]): row for row in proof.read_speeds(out / "speed.csv")}
    assert list(found) == [("off", "CPU"), ("off", "another"), ("greedy-10000", "CPU"), ("assigned-256", "CPU")]
    assert found["off", "CPU"]["images_per_second"] == 9
    fresh = found["assigned-256", "CPU"]
    assert 0 < float(fresh["least"]) <= fresh["images_per_second"] <= float(fresh["most"]) and 0 < fresh["matching"] < 1
    assert float(fresh["distance"]) < float(fresh["distance_unmatched"])
    assert list((tmp_path / "work").iterdir()) == [] and not (out / "distances.csv").exists()
    assert "how fast" not in run(*three, "--only", "rates")[1]


def test_a_run_is_timed_over_its_whole_pool_and_not_evaluated():
    timed = {name: proof.timed_recipe(entry, "x") for name, entry in proof.RUNS.items()}
    assert all(recipe.evaluate_at == () and recipe.steps == 12 * recipe.log_steps for recipe in timed.values())
    for name, recipe in timed.items():
        assert 10 * recipe.log_steps >= proof.RATE_STEPS
        lives = 10 * recipe.log_steps * recipe.batch / recipe.match_size
        assert not ("greedy" in name or "optimal" in name) or lives > 10 or 0 <= lives - round(lives) < 0.03
    assert 10 * timed["greedy-1000000"].log_steps * 256 >= 1_000_000 and timed["off"].steps == 600


def test_what_trains_beside_on_the_same_device_costs_the_rate(run, three, tmp_path, monkeypatch):
    train = proof.fit

    def beside(images, recipe, *rest):
        if recipe.method == "greedy":
            with proof.visit(torch.device("cpu"), tmp_path / "out") as alone:  # comes and goes
                assert not alone()
        return train(images, recipe, *rest)

    monkeypatch.setattr(proof, "fit", beside)
    code, said, err = run(*three, "--only", "rates")
    assert (code, err) == (0, "") and said.count("has no rate") == 1 and "greedy-10000 has no rate" in said
    assert {row["run"] for row in proof.read_speeds(tmp_path / "out" / "speed.csv")} == {"off", "assigned-256"}


def test_beside_another_call_nothing_is_timed(run, three, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "fit", lambda *_: pytest.fail("it was trained"))
    (tmp_path / "out").mkdir()
    with proof.visit(torch.device("cpu"), tmp_path / "out"):
        code, said, err = run(*three, "--only", "rates")
    assert (code, err) == (0, "") and "off has no rate, nor has what follows" in said


def test_a_run_that_is_proven_is_noticed_by_one_that_is_timed(run, three, tmp_path, monkeypatch):
    train = proof.one_run

    def beside(*given):
        with proof.visit(torch.device("cpu"), tmp_path / "out") as alone:
            assert not alone()
        return train(*given)

    monkeypatch.setattr(proof, "one_run", beside)
    assert run(*three, "--only", "off")[0] == 0
    with proof.visit(torch.device("cpu"), tmp_path / "out") as first:
        assert first()
        with proof.visit(torch.device("cpu"), tmp_path / "out") as second:
            assert not first() and not second()


def test_a_call_that_began_with_other_features_adds_nothing(tmp_path):
    row = dict(run="off", seed=0, images=32, seconds=1.0, steps=2, distance=3.0, real=1.0, features="a", data="some",
               gpu="none")
    proof.add([row], tmp_path)
    for other in (dict(features="b"), dict(data="others")):
        with pytest.raises(dansm.BadInput, match="expected the same"):
            proof.add([{**row, "seed": 1, **other}], tmp_path)
    assert len(proof.read_rows(tmp_path / "distances.csv")) == 1


def test_a_curve_is_of_one_training():
    def rows(*distances, gpu):
        return [dict(run="off", seed=0, images=32 * number, steps=2, distance=distance, gpu=gpu)
                for number, distance in enumerate(distances, 1)]

    other = [dict(run="off", seed=1, images=32, steps=2, distance=9.0, gpu="A")]
    first = rows(3.0, 2.0, gpu="A")
    assert proof.taken_in([*first, *other], []) == [*first, *other]
    longer = rows(3.0, 2.0, 1.0, gpu="B")
    assert proof.taken_in([*first, *other], longer) == [*first, longer[2], *other]
    assert proof.taken_in([*first, *other], rows(3.1, gpu="B")) == [*first, *other]  # begun anew, not so far yet
    assert proof.taken_in([*first, *other], rows(3.1, 2.1, gpu="B")) == [*rows(3.1, 2.1, gpu="B"), *other]


def test_the_prior_alone_is_tested_whatever_the_minutes(run, three, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "PRIOR", 40)
    monkeypatch.setattr(proof, "WAYS", [prior.Way("drawn", "random", 0)])
    assert run(*three, "--only", "prior", "--minutes", 5)[0] == 0
    assert (tmp_path / "out" / "prior.csv").read_text().count("\n") == 2


def test_other_images_are_refused_and_rows_keep_their_card(run, three, tmp_path, monkeypatch):
    assert run(*three, "--only", "off")[0] == 0
    before = (tmp_path / "out" / "distances.csv").read_bytes()
    others = make_images(tmp_path / "others", count=48, width=8, height=8)
    code, _, err = run(*("proof", "--data", others, *three[3:]))
    assert code == 2 and err.count("\n") == 1 and "40 images" in err and "48 images" in err
    assert (tmp_path / "out" / "distances.csv").read_bytes() == before
    known = hardware
    monkeypatch.setattr(dansm, "hardware", lambda device: known(device) | {"gpu": "another card"})
    assert run(*three)[0] == 0
    assert {row["run"]: row["gpu"] for row in table(tmp_path)} == {
        "off": "CPU", "greedy-10000": "another card", "assigned-256": "another card"}
    assert all("--data" in line and "test_evaluate:seen" in line for line in
               (tmp_path / "out" / "commands.txt").read_text().splitlines())


def test_the_prior_is_tested_once_there_are_images_for_a_whole_pool(run, three, tmp_path, monkeypatch):
    assert "40" in run(*three)[1].partition("the prior is not tested")[2]
    monkeypatch.setattr(proof, "PRIOR", 16)
    monkeypatch.setattr(proof, "WAYS", [prior.Way("drawn", "random", 0)])
    assert run(*three, "--only", "prior")[0] == 0
    before = proof.read_table(tmp_path / "out" / "prior.csv")
    assert [(row["way"], row["noises"]) for row in before] == [("drawn", "32")]
    assert run(*three, "--only", "prior")[1].count("written") == 1  # the figures alone: nothing is measured again
    monkeypatch.setattr(proof, "WAYS", [*proof.WAYS, prior.Way("a larger pool", "greedy", 80)])
    assert run(*three, "--only", "prior")[0] == 0
    row, larger = proof.read_table(tmp_path / "out" / "prior.csv")
    assert row == before[0] and (larger["way"], larger["noises"]) == ("a larger pool", "80")
    table = tmp_path / "out" / "prior.csv"
    table.write_text(table.read_text().replace("drawn,", "called otherwise,").replace("40 images", "41 images"))
    kept = table.read_text()
    code, _, err = run(*three, "--only", "prior")  # of other images: neither lost nor added to
    assert code == 2 and err.count("\n") == 1 and "41 images" in err and table.read_text() == kept
    table.write_text(kept.replace("41 images", "40 images"))
    assert run(*three, "--only", "prior")[0] == 0
    assert [row["way"] for row in proof.read_table(table)] == ["drawn", "a larger pool", "called otherwise"]


def test_no_minutes_left_begin_nothing(run, three, tmp_path):
    code, said, err = run(*three, "--minutes", 1e-9)
    assert (code, err) == (0, "") and "4 runs of 4 to go" in said and not (tmp_path / "work").exists()


def test_some_runs_alone_and_unknown_ones(run, three, tmp_path):
    code, said, _ = run(*three, "--only", "assigned-256")
    assert code == 0 and "1 run of 1 to go" in said and {row["run"] for row in table(tmp_path)} == {"assigned-256"}
    code, _, err = run(*three, "--only", "assigned")
    assert code == 2 and err.count("\n") == 1 and "off, greedy-10000, assigned-256, prior" in err


@pytest.mark.parametrize("name", ["speed.csv", "prior.csv", "distances.csv"])
@pytest.mark.parametrize("content", ["run,x\noff,1\n", "", "run,seed,images_per_second,gpu\noff,zero,1,CPU\n"])
def test_a_damaged_table_is_refused_before_anything_is_trained(run, three, tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    code, _, err = run(*three, "--only", "off")
    assert code == 2 and err.count("\n") == 1 and f"{name} cannot be read" in err
    assert (tmp_path / "out" / name).read_text() == content and not (tmp_path / "work").exists()


ROW = dict(run="off", seed=0, images=32, seconds=1.0, steps=2, distance=3.0, real=1.0, features="test_evaluate:seen",
           data="some", gpu="none")


@pytest.mark.parametrize(("change", "says"), [
    (dict(distance="nan"), "line 3 has distance nan"), (dict(distance="inf"), "line 3 has distance inf"),
    (dict(distance="-4"), "line 3 has distance -4"), (dict(distance="0"), "line 3 has distance 0"),
    (dict(images="-4"), "line 3 has images -4"), (dict(seed="-1"), "line 3 has seed -1"),
    (dict(run=""), "holds a run ''"), (dict(images=32, steps=2), "it has two rows of off, 0, 32, 2"),
    (dict(features="other"), "is of features other, this call of test_evaluate:seen")])
def test_a_number_that_nothing_measured_can_be_is_refused(run, three, tmp_path, change, says):
    (tmp_path / "out").mkdir()
    write_csv([ROW, {**ROW, "images": 64, **change}], tmp_path / "out" / "distances.csv")
    before = (tmp_path / "out" / "distances.csv").read_text()
    code, said, err = run(*three, "--only", "off")
    assert code == 2 and err.count("\n") == 1 and says in err and "reading images" not in said
    assert (tmp_path / "out" / "distances.csv").read_text() == before and not (tmp_path / "work").exists()


@pytest.mark.parametrize("cut", ["off,0,64,1.0,2\n", 'off,0,64,1.0,2,3.0,1.0,a,"some\n',
                                 "off,0,64,1.0,2,3,1,a,b,c,d\n"])
def test_a_line_that_is_cut_off_is_refused(tmp_path, cut):
    write_csv([ROW], tmp_path / "distances.csv")
    with open(tmp_path / "distances.csv", "a") as file:
        file.write(cut + 'off,0,96,1.0,2,3.0,1.0,a,"some",none\n')
    with pytest.raises(dansm.BadInput, match=r"distances.csv cannot be read \("):
        proof.read_rows(tmp_path / "distances.csv")


def test_the_runs_lie_beside_the_tables(run, three, tmp_path):
    at = three.index("--work")
    assert run(*three[:at], *three[at + 2 :], "--only", "assigned-256")[0] == 0
    assert (tmp_path / "out" / "runs" / "assigned-256-0" / "metrics.jsonl").exists()


def test_too_few_images_are_refused_before_anything_is_written(run, three, tmp_path):
    few = make_images(tmp_path / "few", count=3, width=8, height=8)
    code, _, err = run(*("proof", "--data", few, *three[3:]))
    assert code == 2 and err.count("\n") == 1 and "3 real images" in err
    assert not (tmp_path / "work").exists() and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", ["run,seed\nother,0\n", "nothing\n1\n",
                                     ",".join(proof.FIELDS) + "\nother,0,1,1,1,1,1,test_evaluate:seen,some,CPU\n",
                                     ",".join(proof.FIELDS) + "\noff,0,1,1,1,1,1,inception,some,CPU\n"])
def test_a_table_of_others_is_refused_and_left(run, three, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "distances.csv").write_text(content)
    code, _, err = run(*three)
    assert code == 2 and err.count("\n") == 1 and "distances.csv" in err
    assert (tmp_path / "out" / "distances.csv").read_text() == content and not (tmp_path / "work").exists()


# ------------------------------------------------------------------------------- what it says


def rows_by(distance, name, seeds=1, images=(256_000, 512_000, 1_024_000, 2_048_000)):
    return [dict(run=name, seed=seed, images=each, seconds=each / 1000, steps=3, distance=distance(each, seed),
                 real=1.0, features="inception", data="some", gpu="none") for seed in range(seeds) for each in images]


def test_what_is_saved_is_read_off_curves_that_are_known():
    """Off falls with the root of the images; what is as good after n images as off after 1.6 n has saved 37.5 %."""
    rows = rows_by(lambda n, _: n**-0.5, "off") + rows_by(lambda n, _: (1.6 * n) ** -0.5, "greedy-10000")
    found = {row["images"]: row for row in proof.summarize(rows)}
    for images in (256_000, 512_000, 1_024_000):
        assert found[images]["images_off"] == pytest.approx(1.6 * images, rel=1e-6)
        assert found[images]["saved"] == pytest.approx(1 - 1 / 1.6, abs=1e-3)
        assert found[images]["of_off"] == pytest.approx(1.6**-0.5, abs=1e-4)
    assert found[2_048_000]["saved"] is None  # off does not come so far
    assert [row["ratio"] for row in found.values()] == pytest.approx([1, 1.6, 1.6, 1.6], abs=1e-3)
    assert [row["at_least"] for row in found.values()] == [True, False, False, False]  # was nearer from the first on
    assert found[512_000]["images_ours"] == pytest.approx(320_000, rel=1e-5)
    worse = rows_by(lambda n, _: n**-0.5, "off") + rows_by(lambda n, _: (n / 2) ** -0.5, "greedy-10000")
    assert [row["saved"] for row in proof.summarize(worse)] == [None, -1.0, -1.0, -1.0]
    assert [row["ratio"] for row in proof.summarize(worse)] == [0.5, 0.5, 0.5, None]


def test_speed_is_the_mean_over_the_lines_after_two(tmp_path):
    """Images over time: 100 a second, then 50, over equally many images, are 66.7 a second."""
    lines = [dict(step=n, loss=1.0, images_per_second=rate, matching=rate / 1e4, distance=2.0, distance_unmatched=3.0)
             for n, rate in enumerate((1.0, 5.0, 100.0, 50.0), 1)]
    lines.insert(3, {"step": 3, "frechet_distance/3": 5.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert proof.speed_of(proof.RUNS["off"], tmp_path / "metrics.jsonl", "none") == dict(
        run="off", images_per_second=66.7, least=50.0, most=100.0, matching=0.0075, distance=2.0,
        distance_unmatched=3.0, gpu="none")


def test_seeds_give_means_and_spreads():
    factor = (1.0, 1.1, 1.2)
    rows = rows_by(lambda n, seed: factor[seed] * n**-0.5, "off", 3) + rows_by(
        lambda n, seed: factor[seed] * (1.6 * n) ** -0.5, "greedy-10000", 3)
    row = next(row for row in proof.summarize(rows) if row["images"] == 512_000)
    assert row["seeds"] == 3
    assert row["off"] == pytest.approx(1.1 * 512_000**-0.5, abs=1e-3)
    assert row["saved"] == pytest.approx(0.375, abs=1e-3)
    assert row["least_saved"] == pytest.approx(1 - (1.2 / 1.0) ** 2 / 1.6, abs=1e-3)
    assert row["most_saved"] == pytest.approx(1 - (1.0 / 1.2) ** 2 / 1.6, abs=1e-3)
    assert row["ratio"] == pytest.approx(1.6, abs=1e-3) and not row["at_least"]  # as one pair alone is
    assert row["least_ratio"] == pytest.approx(1.6 / 1.2**2, abs=1e-3) and row["most_ratio"] == 2.0


def test_seeds_that_are_under_way_count_as_far_as_both_have_come():
    """One whole seed of each, and a second begun: behind its end, what the first says stands, alone. Nor does a seed
    count that only one of the two has."""
    some = (256_000, 512_000)
    whole = rows_by(lambda n, _: n**-0.5, "off") + rows_by(lambda n, _: (1.6 * n) ** -0.5, "greedy-10000")
    begun = [{**row, "seed": 1, "distance": 3 * row["distance"]} for row in whole if row["images"] in some]
    alone = [{**row, "seed": 2, "distance": 9.0} for row in whole if row["run"] == "off"]
    found, of_one = proof.summarize(whole + begun + alone), proof.summarize(whole)
    assert [row["seeds"] for row in found] == [2, 2, 1, 1] and found[2:] == of_one[2:]
    mean = [2 * row["distance"] for row in of_one[:2]]
    assert [row["distance"] for row in found[:2]] == pytest.approx(mean, abs=2e-3)
    assert [row["of_off"] for row in found[:2]] == [row["of_off"] for row in of_one[:2]]
    assert found[1]["images_ours"] == of_one[1]["images_ours"] and found[1]["spread"] > 0


def test_a_range_is_that_of_all_pairs_of_seeds_or_none():
    """At 1,024,000 images the second seed is nearer than off ever comes: there is no range then, nor half of one."""
    factor = (1.0, 0.5)
    rows = rows_by(lambda n, _: n**-0.5, "off", 2) + rows_by(
        lambda n, seed: factor[seed] * (1.2 * n) ** -0.5, "greedy-10000", 2)
    found = {row["images"]: row for row in proof.summarize(rows)}
    assert found[256_000]["least_saved"] == pytest.approx(1 - 1 / 1.2, abs=1e-3)
    assert found[256_000]["most_saved"] == pytest.approx(1 - 1 / 4.8, abs=1e-3)
    assert found[256_000]["least_saved"] < found[256_000]["saved"] < found[256_000]["most_saved"]
    assert found[1_024_000]["least_saved"] is None is found[1_024_000]["most_saved"]


def test_a_curve_that_never_comes_so_near_has_no_images():
    falling = [(100, 4.0), (200, 2.0), (400, 1.0)]
    assert proof.images_to(2.0, falling) == pytest.approx(200)
    assert proof.images_to(math.sqrt(8), falling) == pytest.approx(100 * math.sqrt(2))
    assert proof.images_to(0.5, falling) is None and proof.images_to(5.0, falling) is None
    assert proof.images_to(1.5, []) is None


def test_a_line_is_of_the_seeds_that_came_farthest_and_its_band_of_all():
    some = (256_000, 512_000)
    rows = rows_by(lambda n, _: 8e6 / n, "off") + [
        {**row, "seed": 1} for row in rows_by(lambda n, _: 4e6 / n, "off", images=some)]
    axes, = proof_figures.curves(rows, proof_figures.LOOKS, "images").axes
    line, = axes.lines
    assert list(line.get_ydata()) == [8e6 / images for images in (256_000, 512_000, 1_024_000, 2_048_000)]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {round(x * 1e6) for x, _ in corners} == set(some)  # where there is one alone, there is no band
    assert {round(y, 6) for _, y in corners} == {round(each / images, 6) for each in (8e6, 4e6) for images in some}


def test_the_lower_panels_show_the_share_of_images_and_leave_hollow_what_is_at_most():
    """Half of random pairs' distance all along is half of the images; before the first mark nobody has looked."""
    rows = rows_by(lambda n, _: 8e6 / n, "off") + rows_by(lambda n, _: 4e6 / n, proof.MATCHED)
    above, below = proof_figures.curves(rows, proof_figures.LOOKS, "images").axes
    assert len(above.lines) == 2
    equal, line, hollow, *_ = [line for line in below.lines if len(line.get_xdata())]
    assert list(equal.get_ydata()) == [1, 1] and list(line.get_ydata())[1:] == pytest.approx([0.5, 0.5, 0.5])
    assert list(line.get_xdata()) == [0.256, 0.512, 1.024, 2.048] and np.isnan(line.get_ydata()[0])
    assert (list(hollow.get_xdata()), list(hollow.get_ydata()), hollow.get_markerfacecolor()) == ([0.256], [1], "white")


def test_what_is_not_reached_by_each_seed_ends_at_the_top_edge():
    rows = rows_by(lambda n, _: 4e6 / n, "off", 2) + rows_by(lambda n, seed: (2e6, 5e6)[seed] / n, proof.MATCHED, 2)
    row = next(row for row in proof.summarize(rows) if row["images"] == 2_048_000)
    assert row["ratio"] > 1 and row["least_ratio"] is None  # the mean is there before, the second seed never
    below = proof_figures.curves(rows, proof_figures.LOOKS, "images").axes[1]
    *_, rising, edge = [line for line in below.lines if len(line.get_xdata())]
    assert list(rising.get_xdata()) == [2.048, 2.048] and list(edge.get_xdata()) == [2.048]
    assert rising.get_ydata()[1] == edge.get_ydata()[0] == below.get_ylim()[1] > 1


def test_the_ratio_of_each_run_is_to_random_pairs_of_its_own_batch():
    known = {"off": 9.0, "batch8-off": 4.0, "batch8-assigned": 3.0}
    rows = [row for name in known for row in rows_by(lambda *_, name=name: known[name], name, images=(512_000,))]
    assert proof_figures.ratios(rows, "batch8-assigned", None) == {3: [0.75]}
    assert proof_figures.ratios(rows, "off", 512_000) == {3: [1.0]}
    seeds = rows_by(lambda _, seed: (2.0, 4.0)[seed], "off", 2) + rows_by(lambda _, seed: 2.0, "greedy-10000", 3)
    assert proof_figures.ratios(seeds, "greedy-10000", 512_000) == {3: [1.0, 0.5]}  # each by its own seed's


def test_minutes_are_those_of_the_images_at_the_runs_rate_on_one_card():
    rows = rows_by(lambda n, _: 1.0, "off", 2, images=(256_000,)) + rows_by(lambda n, _: 1.0, "nearest-16", 1)
    speeds = [dict(run=name, gpu=gpu, images_per_second=rate) for name, gpu, rate in (
        ("off", "another", 1.0), ("off", "A", 12800.0), ("greedy-1000", "A", 5.0))]
    found, card = proof_figures.at_their_rate(rows, speeds)
    assert card == "A" and [(row["run"], row["seed"], row["seconds"]) for row in found] == [
        ("off", 0, 20.0), ("off", 1, 20.0)]
    assert proof_figures.at_their_rate(rows, []) == ([], "")


# ------------------------------------------------------------------------------- the prior

TESTS = ("size_p", "mean_p", "variance_p", "covariance_p")


@pytest.mark.parametrize("shape", [(3000, 20), (400, 300)])
def test_normal_noise_passes_about_as_often_as_it_should(shape):
    """Of 40 draws, each test finds p below 0.1 in four; fourteen would be a chance of one in 10⁵."""
    torch.manual_seed(1)
    found = [prior.tests_of([torch.randn(shape)]) for _ in range(40)]
    for test in TESTS:
        assert sum(each[test] < 0.1 for each in found) < 14, test
        assert sum(each[test] > 0.5 for each in found) > 8, test


@pytest.mark.parametrize(("change", "test"), [
    (lambda z: 1.03 * z, "size_p"), (lambda z: z + 0.05, "mean_p"),
    (lambda z: z * torch.linspace(0.9, 1.1, z.shape[1]), "variance_p"),
    (lambda z: z + 0.15 * z.roll(1, 1), "covariance_p")])
def test_noise_that_is_not_normal_is_found(change, test):
    z = torch.randn(3000, 40, generator=torch.Generator().manual_seed(2))
    assert prior.tests_of(change(z).split(700))[test] < 1e-4 < prior.tests_of([z])[test]


def test_whole_pools_keep_the_prior_and_the_nearest_of_k_does_not():
    images = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 0.4 + 0.6
    ways = [prior.Way("pool", "greedy", 500), prior.Way("first", "greedy", 500, (0.0, 0.25)),
            prior.Way("nearest", "nearest", 16)]
    told = []
    pool, first, nearest = prior.prior(images, ways, advance=told.append)
    assert sum(told) == 3 * 2000
    assert pool["noises"] == nearest["noises"] == 2000 and first["noises"] == 500
    assert min(pool[test] for test in TESTS) > 1e-3
    assert max(first["mean_p"], nearest["mean_p"], nearest["size_p"]) < 1e-6


def test_a_pool_larger_than_the_images_is_emptied_by_epochs_of_them():
    """Image by image: each comes once an epoch, in another order, and the pool hands out all that it drew."""
    images = torch.randn(300, 1, 2, 2, generator=torch.Generator().manual_seed(4))
    way, told = prior.Way("pool", "greedy", 700), []
    used = torch.cat(list(prior.paired(images, way, 3, told.append)))
    assert len(used) == sum(told) == prior.count_of_noises(images, way) == 700
    drawn = dansm.NoisePool(700, (1, 2, 2), seed=3)(torch.zeros(700, 1, 2, 2)).flatten(1)
    assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, drawn.tolist()))
    late = torch.cat(list(prior.within(used.split(90), 600, 700, 700)))
    assert torch.equal(late, used[600:])
    assert used[:100].norm(dim=1).mean() < late.norm(dim=1).mean()  # short noises go first


def test_the_proof_of_nothing_draws_nothing(tmp_path):
    assert proof_figures.draw([], [], tmp_path) == [] and not list(tmp_path.iterdir())
