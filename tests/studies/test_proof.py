"""dansm proof: its plan, its tables that add up over calls, and what they are made from."""

import csv
import json
import shlex
import shutil

import pytest
from support import TINY, files_of, make_images

import dansm
from dansm.scale.base import machine
from dansm.scale.base.files import write_csv
from dansm.scale.base.locks import owning
from dansm.scale.base.machine import hardware
from dansm.scale.data.loader import load_images
from dansm.scale.evaluate.real_features import digest_of_images
from dansm.scale.model.recipe import load
from dansm.scale.studies import prior, proof, proof_runs
from dansm.scale.studies.proof_runs import RUNS, Run, base_of
from dansm.scale.train import evaluation, stop

SMALL = dict(width=8, multipliers=(1,), blocks=1, attention_at=(), batch=8, warmup=0, ema_decay=(0.9,),
             evaluate_count=20, evaluate_steps=(2, 3), match_size=16)
THREE = [Run("random", dict(SMALL, method="random"), 64, 2, "random"), Run("greedy-10000", SMALL, 64, 1, "pool"),
         Run("assigned-256", dict(SMALL, method="optimal", match_size=8), 32, 1, "assigned")]
ROW = dict(run="random", seed=0, images=32, seconds=1.0, steps=2, distance=3.0, real=1.0, features="features:seen",
           data="some", gpu="none")


# ------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_every_run_is_the_command_that_stands_in_commands_txt(run):
    """Read back as dansm train reads it, the command is the run's recipe, to the last setting."""
    for seed in range(run.seeds):
        words = shlex.split(proof_runs.command_of(run, seed))
        assert words[:3] == ["dansm", "train", "proof"]
        given = {option[2:].replace("-", "_"): value for option, value in zip(words[3::2], words[4::2], strict=True)}
        recipe = load("proof", given)
        assert recipe == proof_runs.recipe_of(run, seed, "cifar10")
        assert recipe.steps * recipe.batch == run.images and max(recipe.evaluate_at) == recipe.steps


def test_runs_differ_from_random_pairs_in_their_pairs_alone():
    """But for flow, batch and the learning rate that goes with it, which their own random pairs share."""
    pairs = {"method", "match_size", "cost", "grid", "pool_dtype", "part"}
    for run in RUNS.values():
        base = RUNS[base_of(run)]
        differing = {key for key in run.settings | base.settings if run.settings.get(key) != base.settings.get(key)}
        assert differing <= pairs, run.name
        assert base.images >= run.images


def test_a_run_is_timed_over_whole_lives_of_its_pool_and_not_evaluated():
    timed = {name: proof_runs.timed(proof_runs.recipe_of(run, 0, "x")) for name, run in RUNS.items()}
    for name, recipe in timed.items():
        assert recipe.evaluate_at == () and recipe.steps == 12 * recipe.log_steps
        assert 10 * recipe.log_steps >= proof_runs.RATE_STEPS
        lives = 10 * recipe.log_steps * recipe.batch / recipe.match_size
        assert not ("greedy" in name or "optimal" in name) or lives > 10 or 0 <= lives - round(lives) < 0.03
    assert 10 * timed["greedy-1000000"].log_steps * 256 >= 1_000_000 and timed["random"].steps == 600


# ------------------------------------------------------------------------------- runs


def shortened(patch, folder):
    """Three short runs in the place of the plan; returns the command on some images."""
    pytest.importorskip("torch_fidelity")
    for run in list(RUNS):
        patch.delitem(RUNS, run)
    for run in THREE:
        patch.setitem(RUNS, run.name, run)
    patch.setitem(dansm.NETWORKS, "small", TINY)
    patch.setattr(proof_runs, "FEW", (32, 64))
    patch.setattr(proof_runs, "RATE_STEPS", 24)
    patch.setattr(evaluation, "CACHE", folder / "cache")
    images = folder / "images"
    if not images.exists():
        make_images(images, count=40, width=8, height=8)
    return ["proof", "--data", images, "--features", "features:seen", "--device", "cpu", "--work", folder / "work",
            "--out", folder / "out"]


@pytest.fixture
def three(monkeypatch, tmp_path):
    return shortened(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a call that measured all runs."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        command = shortened(patch, folder)
        with pytest.raises(SystemExit) as ended:
            dansm.main([str(word) for word in command])
    assert ended.value.code == 0
    return folder


def table(folder, name="distances.csv"):
    with open(folder / "out" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_all_runs_are_measured(done):
    rows = table(done)
    keys = {(row["run"], row["seed"], row["images"], row["steps"]) for row in rows}
    wanted = {("random", seed, images) for seed in "01" for images in ("32", "64")}
    wanted |= {("greedy-10000", "0", "32"), ("greedy-10000", "0", "64"), ("assigned-256", "0", "32")}
    assert keys == {(*key, steps) for key in wanted for steps in "23"} and len(rows) == len(keys)
    log = [json.loads(line) for line in (done / "work" / "random-1" / "metrics.jsonl").read_text().splitlines()]
    line, = (line for line in log if "frechet_distance/2" in line and line["images"] == 64)
    row, = (row for row in rows if [*row.values()][:3] == ["random", "1", "64"] and row["steps"] == "3")
    assert float(row["distance"]) == line["frechet_distance/3"]
    assert len({float(row["distance"]) for row in rows if row["steps"] == "2"}) == len(rows) / 2
    assert all((done / "out" / name).exists() for name in ("summary.csv", "images.png", "images.svg"))
    commands = (done / "out" / "commands.txt").read_text().splitlines()
    assert len(commands) == 4 and all("--data" in line and "features:seen" in line for line in commands)


def test_a_second_call_measures_nothing_and_writes_the_same_files(done, run, three, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, said, _ = run(*three[:2], done / "images", *three[3:])
    assert code == 0 and "0 runs of 4 to go" in said and not (tmp_path / "work").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_calls_that_end_early_add_up(done, run, three, tmp_path, monkeypatch):
    """Each call makes one step of each run: the next resumes them, and the table is that of one call."""
    monkeypatch.setattr(stop.Decide, "__call__", lambda self: (True, False))
    to_go = []
    for _ in range(9):
        code, said, err = run(*three[:2], done / "images", *three[3:], "--only", ",".join(RUNS))
        assert (code, err) == (0, "")
        to_go.append(next(line for line in said.splitlines() if "to go" in line))
    assert to_go == ["4 runs of 4 to go"] * 4 + ["3 runs of 4 to go"] * 4 + ["0 runs of 4 to go"]
    cut, whole = ([{name: row[name] for name in row if name != "seconds"} for row in table(folder)]
                  for folder in (tmp_path, done))
    assert cut == whole


@pytest.mark.parametrize("stopped", ["train_all", "measure_rates"])
def test_what_is_stopped_begins_nothing_more(run, three, tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(proof, "PRIOR", 20)
    begun = []
    for name in ("train_all", "measure_rates"):
        monkeypatch.setattr(proof, name, lambda *_, name=name: begun.append(name) or name == stopped)
    assert run(*three, "--only", "random,rates,prior")[0] == 0 and not (tmp_path / "out" / "prior.csv").exists()
    assert begun == ["train_all", "measure_rates"][: begun.index(stopped) + 1]


@pytest.mark.slow
def test_calls_side_by_side_share_the_runs(run, three, tmp_path, monkeypatch):
    """Another call trains the first seed of random pairs, and has ended another run when its turn comes."""
    fit, data = proof.fit, f"40 images, {digest_of_images(load_images(str(three[2])))[:8]}"

    def beside(call, recipe, folder):
        if recipe.method == "greedy":
            proof.add([dict(ROW, run="assigned-256", data=data)], tmp_path / "out")
        return fit(call, recipe, folder)

    monkeypatch.setattr(proof, "fit", beside)
    work = tmp_path / "work" / "random-0"
    work.mkdir(parents=True)
    with owning(work):
        code, said, err = run(*three)
    assert (code, err) == (0, "") and "random, seed 0, is left to another call" in said
    assert {(row["run"], row["seed"]) for row in table(tmp_path)} == {
        ("greedy-10000", "0"), ("assigned-256", "0"), ("random", "1")}
    assert not (tmp_path / "work" / "assigned-256-0" / "metrics.jsonl").exists() and "1 run to go" in said


@pytest.mark.slow
def test_rates_are_measured_only_when_asked_for_and_of_runs_without_one(run, three, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    known = dict(run="random", images_per_second=9.0, least=8.0, most=9.0, matching=0.1, distance=1.0,
                 distance_random=1.0)
    write_csv(out / "speed.csv", [{**known, "gpu": "CPU"}, {**known, "gpu": "another"}])
    code, said, err = run(*three, "--only", "rates")
    assert (code, err) == (0, "") and "random: how fast" not in said and "assigned-256: how fast" in said
    assert f"written: {out / 'speed.csv'}" in said
    rows = {(row["run"], row["gpu"]): row for row in table(tmp_path, "speed.csv")}
    assert list(rows) == [("random", "CPU"), ("random", "another"), ("greedy-10000", "CPU"), ("assigned-256", "CPU")]
    new = {name: float(value) for name, value in rows["assigned-256", "CPU"].items() if name not in ("run", "gpu")}
    assert 0 < new["least"] <= new["images_per_second"] <= new["most"] and 0 < new["matching"] < 1
    assert new["distance"] < new["distance_random"] and float(rows["random", "CPU"]["images_per_second"]) == 9
    assert list((tmp_path / "work").iterdir()) == [] and not (out / "distances.csv").exists()
    assert "how fast" not in run(*three, "--only", "rates")[1]


@pytest.mark.slow
def test_other_images_are_refused_and_rows_keep_their_card(done, run, three, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rows = [row for row in table(done) if row["run"] == "random"]
    write_csv(tmp_path / "out" / "distances.csv", rows)
    before = (tmp_path / "out" / "distances.csv").read_bytes()
    others = make_images(tmp_path / "others", count=48, width=8, height=8)
    code, _, err = run("proof", "--data", others, *three[3:])
    assert code == 2 and err.count("\n") == 1 and "40 images" in err and "48 images" in err
    assert (tmp_path / "out" / "distances.csv").read_bytes() == before
    monkeypatch.setattr(machine, "hardware", lambda device: hardware(device) | {"gpu": "another card"})
    assert run(*three)[0] == 0
    assert {row["run"]: row["gpu"] for row in table(tmp_path)} == {
        "random": "CPU", "greedy-10000": "another card", "assigned-256": "another card"}


def test_the_prior_is_tested_once_there_are_images_for_a_whole_pool(run, refused, three, tmp_path, monkeypatch):
    only = (*three, "--only", "prior", "--minutes", 5)
    assert "40 images" in refused(*only) and files_of(tmp_path / "out") == []
    monkeypatch.setattr(proof, "PRIOR", 16)
    monkeypatch.setattr(proof, "WAYS", [prior.Way("drawn", "random", 0)])
    assert run(*only)[0] == 0
    first, = table(tmp_path, "prior.csv")
    assert (first["way"], first["noises"]) == ("drawn", "32")
    assert "written" not in run(*only)[1]  # nothing is measured again
    monkeypatch.setattr(proof, "WAYS", [*proof.WAYS, prior.Way("a larger pool", "greedy", 80)])
    assert run(*only)[0] == 0
    row, larger = table(tmp_path, "prior.csv")
    assert row == first and (larger["way"], larger["noises"]) == ("a larger pool", "80")
    path = tmp_path / "out" / "prior.csv"
    path.write_text(path.read_text().replace("drawn,", "other,").replace("40 images", "41 images"))
    kept = path.read_text()
    code, _, err = run(*only)  # of other images: neither lost nor added to
    assert code == 2 and err.count("\n") == 1 and "41 images" in err and path.read_text() == kept


def test_no_minutes_left_begin_nothing(run, three, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "fit", lambda *_: pytest.fail("it trains"))
    for names in ("random,greedy-10000,assigned-256", "random,greedy-10000,assigned-256,rates", "rates"):
        code, said, err = run(*three, "--minutes", 1e-9, "--only", names)
        assert (code, err) == (0, "") and ("4 runs of 4 to go" in said or names == "rates")


def test_a_table_of_other_images_is_refused_before_anything_is_trained(refused, three, tmp_path):
    (tmp_path / "out").mkdir()
    write_csv(tmp_path / "out" / "distances.csv", [ROW])
    before = (tmp_path / "out" / "distances.csv").read_bytes()
    said = refused(*three, "--only", "random")
    assert "data" in said and "some" in said and "40 images" in said
    assert files_of(tmp_path / "out") == ["distances.csv"] and not (tmp_path / "work").exists()
    assert (tmp_path / "out" / "distances.csv").read_bytes() == before


def test_some_runs_alone_lie_next_to_the_tables_and_unknown_ones_are_refused(run, refused, three, tmp_path):
    at = three.index("--work")
    code, said, _ = run(*three[:at], *three[at + 2 :], "--only", "assigned-256")
    assert code == 0 and "1 run of 1 to go" in said and {row["run"] for row in table(tmp_path)} == {"assigned-256"}
    assert (tmp_path / "out" / "runs" / "assigned-256-0" / "metrics.jsonl").exists()
    assert "random, greedy-10000, assigned-256, prior" in refused(*three, "--only", "assigned")


def test_too_few_images_are_refused_before_anything_is_written(refused, three, tmp_path):
    few = make_images(tmp_path / "few", count=3, width=8, height=8)
    assert " 3 " in refused("proof", "--data", few, *three[3:])
    assert not (tmp_path / "work").exists() and not list((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize(("name", "content"), [
    ("speed.csv", "run,x\nrandom,1\n"), ("speed.csv", "run,images_per_second,matching,gpu\nrandom,zero,1,CPU\n"),
    ("prior.csv", "way\na\n"), ("distances.csv", "run,seed\nrandom,0\n"),
    ("distances.csv", ",".join(ROW) + "\noff,0,32,1,2,3,1,features:seen,some,CPU\n"),
    ("distances.csv", ",".join(ROW) + "\nrandom,0,32,1,2,3,1,inception,some,CPU\n"),
    ("distances.csv", ",".join(ROW) + "\nrandom,0,32,1,2\n")])
def test_a_damaged_table_is_refused_before_anything_is_trained(refused, three, tmp_path, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    refused(*three, "--only", "random")
    assert (tmp_path / "out" / name).read_text() == content and not (tmp_path / "work").exists()


@pytest.mark.parametrize("change", [dict(distance="low"), dict(seed="0.5"), dict(run="")])
def test_what_no_table_can_hold_is_refused(tmp_path, change):
    write_csv(tmp_path / "distances.csv", [ROW, {**ROW, "images": 64, **change}])
    with pytest.raises(dansm.BadInput, match=r"distances\.csv"):
        proof.read(tmp_path)


def test_a_call_that_began_with_other_features_adds_nothing(tmp_path):
    proof.add([ROW], tmp_path)
    for other in (dict(features="b"), dict(data="others")):
        with pytest.raises(dansm.BadInput, match="expected the same"):
            proof.add([{**ROW, "seed": 1, **other}], tmp_path)
    assert len(proof.read(tmp_path)) == 1


def test_a_curve_is_of_one_training(tmp_path):
    def rows(*distances, gpu):
        return [dict(ROW, images=32 * number, distance=distance, gpu=gpu)
                for number, distance in enumerate(distances, 1)]

    other = [dict(ROW, seed=1, distance=9.0, gpu="A")]
    first, longer = rows(3.0, 2.0, gpu="A"), rows(3.0, 2.0, 1.0, gpu="B")
    for new, expected in ((other, other), (first, [*first, *other]), ([], [*first, *other]),
                          (rows(3.1, gpu="B"), [*first, *other]),  # trained again, not so far yet
                          (longer, [*first, longer[2], *other]),
                          (rows(3.1, 2.1, 1.1, gpu="B"), [*rows(3.1, 2.1, 1.1, gpu="B"), *other])):
        proof.add(new, tmp_path)
        assert proof.read(tmp_path) == expected


def test_speed_is_the_mean_over_the_lines_after_two(tmp_path):
    """Images over time: 100 a second, then 50, over equally many images, are 66.7 a second."""
    lines = [dict(step=n, loss=1.0, images_per_second=rate, matching=rate / 1e4, distance=2.0, distance_random=3.0)
             for n, rate in enumerate((1.0, 5.0, 100.0, 50.0), 1)]
    lines.insert(3, {"step": 3, "frechet_distance/3": 5.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert proof.speed_of(RUNS["random"], tmp_path, "none") == dict(
        run="random", images_per_second=66.7, least=50.0, most=100.0, matching=0.0075, distance=2.0,
        distance_random=3.0, gpu="none")
