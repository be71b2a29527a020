"""The foundations: their numbers against direct computation, and each command run for real on tiny networks."""

import csv
import json
import math
import xml.etree.ElementTree as ET
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import inter_path_distance
from dansm.scale.data.loader import load_images
from dansm.scale.data.pixels import to_uint8
from dansm.scale.model import checkpoint
from dansm.scale.model.sampling import sample_images
from dansm.scale.studies import figures, foundations, paths
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from support import noise_image

import dansm
from dansm import BadInput

NETWORK = dict(channels=3, size=8, width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.0)
FAST = ("--device", "cpu", "--batch", 16)


@pytest.fixture(autouse=True)
def away_from_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(foundations, "SHUFFLES", 20)




@pytest.fixture
def refused(run, tmp_path):
    """Runs a command that must fail: exit code 2, one line, which is returned, and no file."""

    def refused(*arguments):
        code, out, err = run(*arguments, "--out", tmp_path / "refused", *FAST)
        assert code == 2, err
        assert err.startswith("dansm: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "written" not in out and not (tmp_path / "refused").exists()
        return err

    return refused


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        noise_image(8, 8, seed=i).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def save_model(tmp_path, images):
    """Writes an untrained run, whose last layers are not zero, and returns its folder."""

    def save(name, flow="rectified", seed=0, **changes):
        torch.manual_seed(seed)
        net = dansm.UNet(**NETWORK | changes)
        for weight in net.parameters():
            torch.nn.init.normal_(weight, 0, 0.1)
        (tmp_path / name).mkdir()
        recipe = {"flow": flow, "times": "uniform", "data": str(images), "size": 0}
        checkpoint.save(tmp_path / name, {"network": net.settings, "recipe": recipe, "ranks": [{}], "training": {
            "step": 7, "averages": [{"decay": 0.9, "weights": net.state_dict()}]}})
        return tmp_path / name

    return save


def written(out, said, *names):
    """The JSON; and that each file was announced and is what its name says."""
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert all(str(out / name) in said for name in names)
    for name in names:
        if name.endswith("png"):
            picture = Image.open(out / name)
            assert picture.width >= 300 and len(np.unique(np.asarray(picture.convert("L")))) > 10
        if name.endswith("svg"):
            assert ET.parse(out / name).getroot().tag.endswith("svg")
    return json.loads(next(out.glob("*.json")).read_text())


# ------------------------------------------------------------------------------- foundation 1


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        figure = Figure((2, 2))
        figure.subplots().plot([1, 2], [3, 4], "o-")
        assert figures.save(figure, tmp_path / folder / "line") == ["line.png", "line.svg"]
    for name in ("line.png", "line.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_compare_images_is_what_its_docstring_says():
    a, b = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    b[1] = a[1] + 0.01
    between = [[(x - y).square().sum().sqrt().item() for y in b] for x in a]
    same, unequal = [between[i][i] for i in range(5)], [between[i][j] for i in range(5) for j in range(5) if i != j]
    found = foundations.compare_images(a, b)
    assert found["same"] == pytest.approx({"mean": np.mean(same), "std": np.std(same, ddof=1)}, rel=1e-5)
    assert found["unequal"] == pytest.approx({"mean": np.mean(unequal), "std": np.std(unequal, ddof=1)}, rel=1e-5)
    assert found["ratio"] == pytest.approx(np.mean(same) / np.mean(unequal), rel=1e-5)
    assert found["nearest"] == pytest.approx(np.mean([np.argmin(row) == i for i, row in enumerate(between)]))


def test_compare_images_refuses_what_it_cannot_compare():
    for a, b in ((torch.zeros(1, 2), torch.zeros(1, 2)), (torch.zeros(3, 2), torch.zeros(2, 2))):
        with pytest.raises(BadInput, match="at least two each, equal shapes"):
            foundations.compare_images(a, b)


def test_compare_of_three_models_where_two_are_one(run, save_model, tmp_path):
    a, b, c = save_model("a"), save_model("b"), save_model("c", "diffusion", seed=1)
    code, said, err = run("compare", a, b, c, "--count", 20, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    found = written(tmp_path / "out", said, "compare.json", "compare.png", "compare.svg")
    assert [pair["models"] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    equal, *others = found["pairs"]
    assert (equal["same"], equal["ratio"], equal["nearest"]) == ({"mean": 0, "std": 0}, 0, 1)
    assert all(pair["ratio"] > 0.1 and pair["same"]["mean"] > 0 for pair in others)
    assert [model["flow"] for model in found["models"]] == ["rectified", "rectified", "diffusion"]
    assert found["models"][0]["trained_steps"] == 7


def test_compare_takes_the_noise_that_dansm_sample_takes(save_model):
    (model,) = foundations.load_models([save_model("a")], torch.device("cpu"), steps=[3])
    pairs = foundations.own_pairs(model, range(5, 12), 3, seed=4, batch=3, device="cpu")
    assert torch.equal(pairs.z, path_noise(range(5, 12), (3, 8, 8), 4))
    drawn = torch.cat(list(sample_images(model.net, model.flow, range(5, 12), model.shape, 3, seed=4)))
    assert torch.equal(to_uint8(pairs.x), drawn)
    path = torch.stack(list(model.flow.path(model.net, pairs.z, 3)))
    assert pairs.straightness == pytest.approx(dansm.straightness(path), rel=1e-4)


def test_latents_are_compared_without_pictures(run, refused, save_model, tmp_path):
    models = [save_model(name, seed=seed, channels=4) for seed, name in enumerate("ab")]
    code, said, _ = run("compare", *models, "--count", 4, "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert code == 0 and "no pictures" in said
    written(tmp_path / "out", said, "compare.json", "compare.png", "compare.svg")
    assert re_all("4 channels", "no pictures", "expected", refused("grid", *models))


def re_all(*words):
    *wanted, said = words
    missing = [word for word in wanted if word not in said]
    assert not missing, said
    return True


def test_labels_are_the_names_of_folders_and_all_different(tmp_path):
    one, two = tmp_path / "a" / "checkpoint-00000001.pt", tmp_path / "a" / "checkpoint-00000002.pt"
    assert foundations.label_by_path([tmp_path / "a", tmp_path / "b.safetensors", tmp_path / "c" / one.name]) == [
        "a", "b", "c"]
    assert foundations.label_by_path([one, two]) == ["a checkpoint-00000001", "a checkpoint-00000002"]
    assert foundations.label_by_path([tmp_path / "a", tmp_path / "a"]) == ["a", "a (2)"]


def test_grid_writes_a_cell_for_each_model_and_count_of_steps(run, save_model, tmp_path, monkeypatch):
    cells = []
    draw = figures.draw_grid
    monkeypatch.setattr(figures, "draw_grid", lambda images, *rest: cells.append(images) or draw(images, *rest))
    models = save_model("a"), save_model("b", "diffusion")
    code, said, err = run("grid", *models, "--steps", "2,5,3", "--side", 2, "--label", "RFM", "--label",
                          "DM, a label much too long for its column", "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    found = written(tmp_path / "out", said, "grid.json", "grid.png", "grid.svg")
    assert found["steps"] == [2, 5, 3] and found["models"][0]["label"] == "RFM"
    assert [[tuple(cell.shape) for cell in row] for row in cells[0]] == [[(4, 3, 8, 8)] * 2] * 3


# ------------------------------------------------------------------------------- foundation 2


def meet(a, b, c, d):
    """Whether the closed segments a–b and c–d have a common point, by solving for it in fractions."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = [[Fraction(float(v)) for v in point] for point in (a, b, c, d)]
    ux, uy, vx, vy, wx, wy = bx - ax, by - ay, dx - cx, dy - cy, cx - ax, cy - ay
    turn = ux * vy - uy * vx
    if turn:
        s, t = (wx * vy - wy * vx) / turn, (wx * uy - wy * ux) / turn
        return 0 <= s <= 1 and 0 <= t <= 1
    if ux * wy - uy * wx or vx * wy - vy * wx or ((ux, uy) == (vx, vy) == (0, 0) and (wx or wy)):
        return False
    return max(min(ax, bx), min(cx, dx)) <= min(max(ax, bx), max(cx, dx)) and (
        max(min(ay, by), min(cy, dy)) <= min(max(ay, by), max(cy, dy)))


def brute_crossings(a, b):
    return sum(meet(a[i], b[i], a[j], b[j]) for i, j in combinations(range(len(a)), 2))


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=2, max_size=7))
def test_crossings_that_touch_or_lie_on_one_line_are_counted_exactly(segments):
    ends = np.array(segments, float)
    assert foundations.count_crossings(ends[:, :2], ends[:, 2:]) == brute_crossings(ends[:, :2], ends[:, 2:])


def test_crossings_of_many_random_segments():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 2))
    count = brute_crossings(a, b)
    assert foundations.count_crossings(a, b) == count and 50 < count < 500
    assert foundations.count_crossings(b, a) == count


def test_crossings_where_float64_is_not_sure():
    """Ends that lie on another segment but for the last bit: after rounding, some would touch that do not."""
    near = np.nextafter(0.1, 1) - 0.1
    a = np.array([[0.0, 0.0], [0.1, 0.1 + near], [0.1, 0.1], [0.3, 0.3 - near]])
    b = np.array([[0.9, 0.9], [0.0, 1.0], [1.0, 0.0], [0.7, 0.2]])
    assert foundations.count_crossings(a, b) == brute_crossings(a, b)


def test_tsne_of_a_model(run, save_model, tmp_path):
    code, said, err = run("tsne", save_model("a"), "--pairs", 6, "--perplexity", 4, "--steps", 2, "--out",
                          tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    found = written(tmp_path / "out", said, "tsne.json", "tsne.png", "tsne.svg")
    random, own = found["panels"]
    assert (random["name"], own["name"]) == ("random pairs", "own pairs of a")
    assert random["samples"] == own["samples"] and sorted(random["noises"]) == sorted(own["noises"])
    assert random["noises"] != own["noises"]
    for panel in found["panels"]:
        assert panel["crossings"] == brute_crossings(panel["samples"], panel["noises"])
        assert 0 <= panel["by_chance"]["mean"] <= 15
        assert f"{panel['name']}: {panel['crossings']} of 15 pairs of lines cross" in said


def test_pools_of_several_sizes_are_all_whole(refused, run, images, tmp_path):
    """40 images: two pools of 12 are 24, and with one of 9 it takes 36; with one of 14 it would take 84."""
    assert foundations.whole_pools(range(40), [12], 13) == 24 and foundations.whole_pools(range(40), [12, 9], 2) == 36
    options = "paths", "--data", images, "--count", 6, "--seeds", 1, "--out", tmp_path / "out"
    assert run(*options, "--match-size", "12,9", *FAST)[0] == 0
    (tmp_path / "out" / "paths.json").unlink()
    assert "take 84, and there are 40" in refused(*options, "--match-size", "12,14", *FAST)
    assert not (tmp_path / "out" / "paths.json").exists()


@pytest.mark.parametrize("with_model", [False, True])
def test_tsne_of_data(run, save_model, images, tmp_path, with_model):
    model = [save_model("a")] if with_model else []
    code, said, err = run("tsne", *model, "--data", images, "--pairs", 6, "--perplexity", 4, "--match-size", 12,
                          "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    random, below = written(tmp_path / "out", said, "tsne.json", "tsne.png", "tsne.svg")["panels"]
    assert below["name"] == ("own pairs of a" if with_model else "matched, match size 12")
    assert (random["samples"] == below["samples"]) != with_model


def test_crossings_of_tsne_over_draws_are_those_of_one_draw_each(run, images, tmp_path):
    """The third of three draws is the first of two seeds later, and the picture is the median one."""
    options = "--data", images, "--pairs", 6, "--perplexity", 4, "--match-size", 12, *FAST
    code, said, err = run("tsne", *options, "--draws", 3, "--out", tmp_path / "three")
    assert (code, err) == (0, "") and "in 3 draws" in said
    three = json.loads((tmp_path / "three" / "tsne.json").read_text())["panels"]
    alone = []
    for seed in range(3):
        assert run("tsne", *options, "--draws", 1, "--seed", seed, "--out", tmp_path / str(seed))[0] == 0
        alone.append(json.loads((tmp_path / str(seed) / "tsne.json").read_text())["panels"])
    middle = sorted(range(3), key=lambda seed: alone[seed][1]["crossings"])[1]
    for panel, *others in zip(three, *alone, strict=True):
        counts = [other["crossings"] for other in others]
        assert panel["samples"] == others[middle]["samples"] and panel["crossings"] == counts[middle]
        assert panel["over_draws"]["mean"] == pytest.approx(np.mean(counts))
        assert panel["over_draws"]["std"] == pytest.approx(np.std(counts, ddof=1))


# ------------------------------------------------------------------------------- paths


def cifar_like(count, size=8, seed=0):
    """Smooth colour pictures, uint8: spectra fall with frequency as those of photographs do, and brightness varies."""
    numbers = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    fall = 1 / np.maximum(frequency, 1 / size)
    grey = np.fft.ifft2(np.fft.fft2(numbers.normal(size=(count, 1, size, size))) * fall).real
    tint = np.fft.ifft2(np.fft.fft2(numbers.normal(size=(count, 3, size, size))) * fall).real
    mixed = grey + 0.3 * tint + 2 * numbers.normal(size=(count, 1, 1, 1))
    return torch.from_numpy(np.clip(127.5 + 50 * mixed / mixed.std(), 0, 255).astype(np.uint8))


def test_matched_paths_keep_farther_apart_than_random_ones():
    """The paper's theory, which holds for all three pools of noises, over whole pools."""
    images, found = cifar_like(300), {}
    for match_size in (0, 30, 300):
        rows = [paths.measure_paths(*foundations.data_pairs(images, match_size, 200, 300, seed=seed,
                                                                  device="cpu")) for seed in range(3)]
        found[match_size] = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for key in ("inter_path_mean", "inter_path_minimum"):
        assert (found[0][key] < found[30][key]).all() and (found[30][key] < found[300][key]).all()
    assert (found[0]["path_length"] > found[30]["path_length"]).all()
    assert found[0]["own_noise_nearest"].mean() < found[300]["own_noise_nearest"].mean()  # of 200, a handful


def test_pairs_of_data_are_the_same_samples_for_every_pool_and_whole_pools_are_handed_out():
    images = cifar_like(60)
    random, _ = foundations.data_pairs(images, 0, 20, 60, seed=3, device="cpu")
    matched, _ = foundations.data_pairs(images, 30, 20, 60, seed=3, device="cpu")
    other, _ = foundations.data_pairs(images, 30, 20, 60, seed=4, device="cpu")
    assert torch.equal(random, matched) and not torch.equal(matched, other)
    assert len(matched.flatten(1).unique(dim=0)) == 20 and matched.min() >= -1 and matched.max() <= 1
    x, z = foundations.data_pairs(images, 60, 60, 60, seed=3, device="cpu")
    pool = dansm.NoisePool(60, x.shape[1:], seed=3)
    assert torch.equal(pool(x), z) and pool.left == 0


def test_paths_of_data_and_a_model(run, images, save_model, tmp_path):
    model = save_model("a")
    code, said, err = run("paths", model, "--match-size", "10,40", "--count", 20, "--steps", 2, "--seeds", 2, "--out",
                          tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    found = written(tmp_path / "out", said, "paths.json", "paths.csv", "paths.png", "paths.svg")
    assert [row["pairs"] for row in found["summary"]] == ["random", "matched, 10", "matched, 40", "own, a"]
    table = said[said.index("Straight paths") : said.index("written")]
    assert "…" not in table and "matched, 40 against random: length -" in table
    rows = list(csv.DictReader((tmp_path / "out" / "paths.csv").read_text().splitlines()))
    assert len(rows) == len(found["rows"]) == 8
    of_model = [row for row in found["rows"] if row["pairs"] == "own, a"]
    mean = found["summary"][-1]["inter_path_minimum"]["mean"]
    assert mean == pytest.approx(np.mean([row["inter_path_minimum"] for row in of_model]))
    length = {(row["pairs"], row["seed"]): row["path_length"] for row in found["rows"]}
    growth = [length["matched, 40", seed] / length["random", seed] - 1 for seed in (0, 1)]
    assert found["summary"][2]["over_random"]["path_length"]["mean"] == pytest.approx(np.mean(growth))
    x, z = foundations.data_pairs(load_images(str(images)), 10, 20, 40, seed=1, device="cpu")
    measured = next(row for row in found["rows"] if row["pairs"] == "matched, 10" and row["seed"] == 1)
    assert measured["path_length"] == pytest.approx(dansm.path_length(x, z), rel=1e-6)
    assert measured["inter_path_mean"] == pytest.approx(inter_path_distance(x, z).mean, rel=1e-6)
    assert float(rows[-1]["straightness"]) > 0 and rows[0]["straightness"] == ""


def test_paths_without_a_model_take_the_pools_that_the_data_fills(run, images, tmp_path):
    code, _, _ = run("paths", "--data", images, "--count", 10, "--seeds", 1, "--out", tmp_path / "out", *FAST)
    found = json.loads((tmp_path / "out" / "paths.json").read_text())
    assert code == 0 and found["match_sizes"] == [40] and found["models"] == []


# ------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("flow", [dansm.RectifiedFlow(), dansm.Diffusion()])
def test_loss_by_time_against_direct_computation(flow):
    def net(x, t):
        return 0.5 * x + t.reshape(-1, 1, 1, 1) / 999

    model = foundations.Model("a", net, flow, (1, 2, 2), {})
    x, z = torch.randn(50, 1, 2, 2), torch.randn(50, 1, 2, 2)
    found = paths.loss_by_time(model, x, z, [0.1, 0.8], batch=1)
    for i, t in enumerate((0.1, 0.8)):
        if isinstance(flow, dansm.Diffusion):
            level = int((1 - t) * 1000)
            signal = flow.alpha_bar[level].item()
            errors = net(math.sqrt(signal) * x + math.sqrt(1 - signal) * z, torch.full((50,), float(level))) - z
        else:
            t = t * (1 - 1e-3) + 1e-3
            errors = net(t * x + (1 - t) * z, torch.full((50,), 999 * t)) - (x - z)
        each = errors.square().flatten(1).mean(1)
        assert found["mean"][i] == pytest.approx(each.mean().item(), rel=1e-4)
        assert found["error"][i] == pytest.approx(each.std().item() / math.sqrt(50), rel=1e-3)
    grouped = paths.loss_by_time(model, x, z, [0.1, 0.8], batch=9)
    assert grouped["mean"] == pytest.approx(found["mean"], rel=1e-5)


@pytest.mark.parametrize("flow", dansm.FLOWS)
def test_loss_of_a_model(run, save_model, tmp_path, flow):
    code, said, err = run("loss", save_model("a", flow), "--count", 20, "--match-size", "10,40", "--steps", 2, "--out",
                          tmp_path / "out", *FAST)
    assert (code, err) == (0, "")
    found = written(tmp_path / "out", said, "loss.json", "loss.png", "loss.svg")
    assert list(found["curves"]) == ["random", "matched, 10", "matched, 40", "own"] and len(found["times"]) == 20
    values = [value for curve in found["curves"].values() for part in curve.values() for value in part]
    assert len(values) == 4 * 2 * 20 and min(values) > 0


# ------------------------------------------------------------------------------- bad input


def test_models_of_different_shapes_are_refused_naming_both(refused, save_model):
    a, b = save_model("a"), save_model("b", size=4)
    for command in ("compare", "grid", "paths"):
        assert re_all(f"{b} makes samples of 3×4×4", f"{a} of 3×8×8", "expected", refused(command, a, b))


def test_one_step_of_a_diffusion_is_refused(refused, save_model, images):
    a, b = save_model("a"), save_model("b", "diffusion")
    for command in (("compare", a, b), ("grid", a, b), ("paths", b), ("tsne", b), ("loss", b)):
        steps = "3,1" if command[0] == "grid" else "1"
        assert "--steps is 1: expected 2 to 1,000 for a diffusion" in refused(*command, "--steps", steps)


def test_other_bad_input_is_named(refused, save_model, images, tmp_path):
    a, b = save_model("a"), save_model("b", size=4)
    cases = [
        (("compare", a), f"{a} alone: expected two or more"),
        (("compare", a, tmp_path / "missing"), "missing does not exist"),
        (("compare", a, a, "--label", "x"), "--label is given 1 time for 2 models"),
        (("tsne", a, "--pairs", 6, "--perplexity", 12), "--perplexity is 12 for 6 pairs, 12 points: expected"),
        (("tsne", a, "--pairs", 1), "Invalid value for '--pairs'"),
        (("tsne",), "--data is not given"),
        (("tsne", "--data", images, "--match-size", 50), "--match-size is 50, and there are 40 samples"),
        (("paths",), "--data is not given"),
        (("paths", "--data", tmp_path / "nothing"), "nothing does not exist"),
        (("paths", "--data", images, "--count", 41), "--count is 41, and"),
        (("paths", "--data", images, "--count", 9, "--match-size", "10,50"), "--match-size is 50, and"),
        (("paths", "--data", images, "--match-size", "ten"), "--match-size is 'ten': expected whole numbers"),
        (("paths", "--data", images, "--match-size", "1"), "--match-size is '1': expected whole numbers of at least 2"),
        (("paths", b, "--count", 9), "holds samples of 3×8×8"),
        (("grid", a, "--steps", "3,"), "--steps is '3,'"),
        (("loss", a, "--count", 41), "--count is 41, and"),
        (("loss", tmp_path / "missing.pt"), "missing.pt does not exist"),
    ]
    for command, words in cases:
        assert words in refused(*command), command


def test_size_makes_the_data_of_the_models_size(run, save_model, images, tmp_path):
    code, _, err = run("paths", save_model("b", size=4), "--size", 4, "--count", 9, "--match-size", 10, "--seeds", 1,
                       "--steps", 2, "--out", tmp_path / "out", *FAST)
    assert (code, err) == (0, "")


def test_ctrl_c_is_one_line_and_leaves_no_half_file(run, save_model, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(foundations, "own_pairs", stop)
    code, _, err = run("compare", save_model("a"), save_model("b"), "--out", tmp_path / "out", *FAST)
    assert (code, err) == (130, "dansm: stopped\n") and list((tmp_path / "out").iterdir()) == []


def test_data_that_a_run_left_files_out_of_is_read_as_it_was(images, save_model):
    (images / "broken.png").write_text("no image")
    model, = foundations.load_models([save_model("a")], torch.device("cpu"), steps=[2])
    model.about["data"] = str(images)
    with pytest.raises(dansm.BadInput, match=r"broken\.png cannot be read"):
        foundations.load_data(None, [model], count=2)
    model.about["recipe"]["skip_unreadable"] = True
    assert len(foundations.load_data(None, [model], count=2)) == 40
