"""The paper's foundations: their numbers against direct computation, and each command on tiny networks."""

import csv
import json
import math
import xml.etree.ElementTree as ET
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from models import awake, state_to_save
from PIL import Image
from support import CPU, make_images

import dansm
from dansm.scale.base.noise import path_noise
from dansm.scale.base.statistics import inter_path_distance, straightness
from dansm.scale.commands import loss, tsne
from dansm.scale.commands.compare import compare_images
from dansm.scale.commands.loss import loss_by_time
from dansm.scale.commands.paths import measure_paths
from dansm.scale.data.loader import batches, load_images
from dansm.scale.data.pixels import to_uint8
from dansm.scale.model import checkpoint
from dansm.scale.model.load import Model, load_models
from dansm.scale.model.sampling import sample_images
from dansm.scale.studies import figures, pairs, style

NETWORK = dict(channels=3, size=8, width=8, multipliers=(1,), blocks=1, attention_at=(), dropout=0.0)
FAST = ("--device", "cpu", "--batch", 16)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", 40, 8, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """Folders of untrained runs by their names; a and b are equal."""
    folders = {}
    for name, flow, changes in (("a", "rectified", {}), ("b", "rectified", {}), ("dm", "diffusion", {"width": 12}),
                                ("small", "rectified", {"size": 4}), ("latent", "rectified", {"channels": 4})):
        torch.manual_seed(0)
        recipe = {"flow": flow, "data": str(images)}
        latents = {} if name == "latent" else None
        folders[name] = tmp_path_factory.mktemp("runs") / name
        folders[name].mkdir()
        state = state_to_save(awake(dansm.UNet(**NETWORK | changes)), recipe=recipe, data=str(images), latents=latents)
        checkpoint.save(folders[name], state)
    return folders


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tsne, "SHUFFLES", 20)
    monkeypatch.setattr(loss, "TIMES", [0.1, 0.5, 0.9])


@pytest.fixture
def result(run, tmp_path):
    """Runs a command that must succeed: its JSON, and what it printed. Its figures and tables must be whole."""

    def result(command, *arguments, out=tmp_path / "out"):
        code, said, err = run(command, *arguments, "--out", out, *FAST)
        assert (code, err) == (0, "")
        names = sorted(path.name for path in out.iterdir())
        assert names == sorted(f"{command}.{kind}" for kind in ("json", "png", "svg", *["csv"] * (command == "paths")))
        assert all(str(out / name) in said for name in names)
        picture = Image.open(out / f"{command}.png")
        assert picture.width >= 300 and len(np.unique(np.asarray(picture.convert("L")))) > 10
        assert ET.parse(out / f"{command}.svg").getroot().tag.endswith("svg")
        return json.loads((out / f"{command}.json").read_text()), said

    return result


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        figure = Figure((2, 2), layout="constrained")
        figure.subplots().plot([1, 2], [3, 4], "o-")
        assert style.save(figure, folder / "line") == ["line.png", "line.svg"]
        assert "url(#clip0)" in (folder / "line.svg").read_text()
    for name in ("line.png", "line.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ------------------------------------------------------------------------------- compare and grid


def test_compare_images_is_what_its_docstring_says():
    a, b = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    b[1] = a[1] + 0.01
    between = [[(x - y).square().sum().sqrt().item() for y in b] for x in a]
    same, unequal = [between[i][i] for i in range(5)], [between[i][j] for i in range(5) for j in range(5) if i != j]
    found = compare_images(a, b)
    assert found["same"] == pytest.approx({"mean": np.mean(same), "std": np.std(same, ddof=1)}, rel=1e-5)
    assert found["unequal"] == pytest.approx({"mean": np.mean(unequal), "std": np.std(unequal, ddof=1)}, rel=1e-5)
    assert found["ratio"] == pytest.approx(np.mean(same) / np.mean(unequal), rel=1e-5)
    assert found["nearest"] == pytest.approx(np.mean([np.argmin(row) == i for i, row in enumerate(between)]))


def test_two_of_three_compared_models_are_one(result, runs):
    found, _ = result("compare", runs["a"], runs["b"], runs["dm"], "--count", 20, "--steps", 2)
    assert [pair["models"] for pair in found["pairs"]] == [["a", "b"], ["a", "dm"], ["b", "dm"]]
    equal, *others = found["pairs"]
    assert (equal["same"], equal["ratio"], equal["nearest"]) == ({"mean": 0, "std": 0}, 0, 1)
    assert all(pair["ratio"] > 0.1 and pair["same"]["mean"] > 0 for pair in others)
    assert [model["flow"] for model in found["models"]] == ["rectified", "rectified", "diffusion"]
    assert found["models"][0]["trained_steps"] == 7


def test_own_pairs_start_from_the_noise_that_dansm_sample_takes(runs):
    (model,) = load_models([runs["a"]], [3])
    model = model.on(CPU)
    x, z, bend = pairs.own_pairs(model, range(5, 12), 3, seed=4, batch=3, device="cpu")
    assert torch.equal(z, path_noise(range(5, 12), (3, 8, 8), 4))
    drawn = torch.cat(list(sample_images(model.net, model.flow, range(5, 12), model.shape, 3, seed=4)))
    assert torch.equal(to_uint8(x), drawn)
    path = torch.stack(list(model.flow.path(model.net, z, 3)))
    assert bend == pytest.approx(straightness(path), rel=1e-4)


def test_latents_are_compared_without_pictures(result, refused, runs):
    result("compare", runs["latent"], runs["latent"], "--count", 4, "--steps", 2)
    assert "4 channels" in refused("grid", runs["latent"])


def test_grid_has_a_cell_for_each_model_and_count_of_steps(result, runs, monkeypatch):
    cells = []
    draw = figures.draw_grid
    monkeypatch.setattr(figures, "draw_grid", lambda images, *rest: cells.append(images) or draw(images, *rest))
    found, _ = result("grid", runs["a"], runs["dm"], "--steps", "2,5,3", "--side", 2, "--name", "RFM", "--name",
                      "DM, a label much too long for its column")
    assert found["steps"] == [2, 5, 3] and found["models"][0]["label"] == "RFM"
    assert [tuple(cell.shape) for cell in cells[0]] == [(4, 3, 8, 8)] * 6


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory, images):
    """A run of a network with twelve classes."""
    folder = tmp_path_factory.mktemp("runs") / "of_classes"
    folder.mkdir()
    net = awake(dansm.UNet(**NETWORK, classes=12))
    checkpoint.save(folder, state_to_save(net, data=str(images), classes=[f"c{number}" for number in range(12)]))
    return folder


def test_own_pairs_of_a_model_with_classes_have_them_in_turn_whatever_the_batch(of_classes):
    for model in load_models([of_classes], [3], guidance="1,2"):
        model = model.on(CPU)
        x, z, _ = pairs.own_pairs(model, range(5, 12), 3, seed=4, batch=3, device="cpu")
        labels = torch.tensor([5, 6, 7, 8, 9, 10, 11])
        drawn = torch.cat(list(sample_images(model.net, model.flow, range(5, 12), model.shape, 3, seed=4,
                                             labels=labels, guidance=model.guidance)))
        assert torch.equal(z, path_noise(range(5, 12), (3, 8, 8), 4))
        assert (to_uint8(x).int() - drawn.int()).abs().max() <= 1
        others, *_ = pairs.own_pairs(model, range(5, 12), 3, seed=4, batch=3, device="cpu", labels=labels - 1)
        assert not torch.equal(x, others)


def test_a_grid_of_classes_has_a_row_for_each_of_ten_and_a_column_for_each_guidance(result, of_classes, runs,
                                                                                   monkeypatch):
    cells = []
    draw = figures.draw_grid
    monkeypatch.setattr(figures, "draw_grid", lambda images, *rest: cells.append(images) or draw(images, *rest))
    named, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: named.append(
        [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]) or save(figure, path))
    found, said = result("grid", of_classes, "--steps", "2", "--side", 2, "--guidance", "1,3")
    assert named == [[[f"c{number}" for number in range(10)], []]]
    assert "c0, c1, c2, c3, c4, c5, c6, c7, c8, c9\n" in said
    assert [model["guidance"] for model in found["models"]] == [1, 3]
    plain, guided = cells[0]
    assert plain.shape == guided.shape == (20, 3, 8, 8) and not torch.equal(plain, guided)
    model = load_models([of_classes], [2])[0].on(CPU)
    x, *_ = pairs.own_pairs(model, [1] * 3, 2, seed=0, batch=64, device="cpu", labels=torch.tensor([0, 4, 9]))
    torch.testing.assert_close(plain[[1, 9, 19]], x, atol=1e-4, rtol=0)
    result("grid", runs["a"], of_classes, "--steps", "2,3", "--side", 1)
    assert [len(cell) for cell in cells[1]] == [1, 10, 1, 10]
    assert [len(names) for names in named[1]] == [0, 10, 0, 10]


def test_guidances_are_compared_as_models_are(result, refused, of_classes, runs):
    found, _ = result("compare", of_classes, "--guidance", "1,0,1.5", "--count", 12, "--steps", 2, "--name", "x")
    assert [pair["models"] for pair in found["pairs"]] == [
        ["x", "x, guidance 0"], ["x", "x, guidance 1.5"], ["x, guidance 0", "x, guidance 1.5"]]
    assert all(pair["same"]["mean"] > 0 for pair in found["pairs"])
    assert "alone" in refused("compare", of_classes)
    assert "trained without labels" in refused("compare", of_classes, runs["a"], "--guidance", "2")


def test_images_are_tiled_with_white_lines_between():
    axes = Figure().subplots()
    figures.show_images(axes, torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 2, 2), columns=2)
    assert axes.images[0].get_array()[..., 0].tolist() == [
        [0, 0, 255, 85, 85], [0, 0, 255, 85, 85], [255] * 5, [170, 170, 255, 255, 255], [170, 170, 255, 255, 255]]


# ------------------------------------------------------------------------------- tsne


def brute_crossings(panel):
    a, b = np.array(panel["samples"]), np.array(panel["noises"])
    ends = [(a[i], b[i]) for i in range(len(a))]

    def turn(a, b, c):
        return np.sign(np.linalg.det([b - a, c - a]))

    return sum(turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b)
               for (a, b), (c, d) in combinations(ends, 2))


def test_tsne_of_a_model(result, runs):
    found, said = result("tsne", runs["a"], "--pairs", 6, "--perplexity", 4, "--steps", 2, "--draws", 2)
    random, own = found["panels"]
    assert (random["name"], own["name"]) == ("random pairs", "own pairs of a")
    assert random["samples"] == own["samples"] and sorted(random["noises"]) == sorted(own["noises"])
    assert random["noises"] != own["noises"]
    for panel in found["panels"]:
        assert panel["crossings"] == brute_crossings(panel)
        assert 0 <= panel["by_chance"]["mean"] <= 15
        assert f"{panel['name']}: {panel['crossings']} of 15" in said


def test_crossings_of_random_segments():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 2))
    count = brute_crossings({"samples": a, "noises": b})
    assert tsne.count_crossings(a, b) == tsne.count_crossings(b, a) == count and 50 < count < 500


def test_tsne_of_a_model_and_data(result, runs, images):
    found, _ = result("tsne", runs["a"], "--data", images, "--pairs", 6, "--perplexity", 4, "--steps", 2, "--draws", 1)
    random, own = found["panels"]
    assert own["name"] == "own pairs of a" and random["samples"] != own["samples"]


def test_crossings_of_tsne_over_draws_are_those_of_one_draw_each(result, images, tmp_path):
    """The third of three draws is the first of two seeds later, and the picture is near the medians."""
    options = "--data", images, "--pairs", 6, "--perplexity", 4, "--match-size", 12
    three = result("tsne", *options, "--draws", 3, out=tmp_path / "three")[0]["panels"]
    assert three[1]["name"] == "matched, match size 12" and three[0]["samples"] == three[1]["samples"]
    alone = [result("tsne", *options, "--draws", 1, "--seed", seed, out=tmp_path / str(seed))[0]["panels"]
             for seed in range(3)]
    counts = np.array([[panel["crossings"] for panel in panels] for panels in alone])
    middle = abs(counts - np.median(counts, 0)).sum(1).argmin()
    for panel, *others in zip(three, *alone, strict=True):
        counts = [other["crossings"] for other in others]
        assert panel["samples"] == others[middle]["samples"] and panel["crossings"] == counts[middle]
        assert panel["over_draws"] == pytest.approx({"mean": np.mean(counts), "std": np.std(counts, ddof=1)})


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
    """The paper's theory, which holds for pools of every size, over whole pools."""
    images, found = cifar_like(300), {}
    for match_size in (0, 30, 300):
        rows = [measure_paths(*pairs.data_pairs(images, match_size, 200, 300, seed=seed, device="cpu"))
                for seed in range(3)]
        found[match_size] = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for key in ("inter_path_mean", "inter_path_minimum"):
        assert (found[0][key] < found[30][key]).all() and (found[30][key] < found[300][key]).all()
    assert (found[0]["path_length"] > found[30]["path_length"]).all()
    assert found[0]["own_noise_nearest"].mean() < found[300]["own_noise_nearest"].mean()  # of 200, a handful


def test_pairs_of_data_are_the_same_samples_for_every_pool_and_whole_pools_are_handed_out():
    images = cifar_like(60)
    random, _ = pairs.data_pairs(images, 0, 20, 60, seed=3, device="cpu")
    matched, _ = pairs.data_pairs(images, 30, 20, 60, seed=3, device="cpu")
    other, _ = pairs.data_pairs(images, 30, 20, 60, seed=4, device="cpu")
    assert torch.equal(random, matched) and not torch.equal(matched, other)
    assert len(matched.flatten(1).unique(dim=0)) == 20 and matched.min() >= -1 and matched.max() <= 1
    x, z = pairs.data_pairs(images, 60, 60, 60, seed=3, device="cpu")
    pool = dansm.NoisePool(60, x.shape[1:], seed=3)
    assert torch.equal(pool(x), z)


@pytest.mark.parametrize("match_size", [0, 10, 20])
def test_pairs_by_class_are_of_whole_pools_of_each_class(match_size):
    """Classes of 30, 20 and 10 images: the least takes two epochs to empty two pools of 10."""
    images = torch.arange(60, dtype=torch.uint8).repeat_interleave(4).reshape(60, 1, 2, 2)
    classes = np.repeat([0, 1, 2], [30, 20, 10])
    x, z, labels = pairs.data_pairs(images, match_size, 15, 20, seed=3, device="cpu", labels=classes, groups=3)
    assert x.shape == z.shape == (15, 1, 2, 2) and labels.bincount(minlength=3).min() > 0
    numbers = to_uint8(x)[:, 0, 0, 0].long()
    assert torch.equal(labels, torch.from_numpy(classes)[numbers])
    random, *_ = pairs.data_pairs(images, 0, 15, 20, seed=3, device="cpu", labels=classes, groups=3)
    assert torch.equal(x, random)
    if match_size:
        drawn = batches(images, 60, seed=3, flip=False, labels=classes)
        pool = dansm.NoisePool(match_size, x.shape[1:], seed=3, groups=3)
        served = [[], [], []]
        for samples, of_samples in islice(drawn, 3):
            for sample, noise, label in zip(samples, pool(samples, of_samples), of_samples, strict=True):
                served[label].append((sample, noise))
        for sample, noise, label in zip(x, z, labels, strict=True):
            assert any(torch.equal(sample, a) and torch.equal(noise, b) for a, b in served[label][:20])


def test_pairs_by_class_have_the_shares_of_the_data_and_every_age_of_a_pool():
    images, classes = torch.zeros(400, 1, 1, 1, dtype=torch.uint8), np.repeat([0, 1, 4], [300, 60, 40])
    drawn = [pairs.data_pairs(images, 50, 50, 50, seed=seed, device="cpu", labels=classes, groups=5)
             for seed in range(20)]
    labels = torch.cat([labels for *_, labels in drawn])
    assert (labels.bincount() / 1000).tolist() == pytest.approx([0.75, 0.15, 0, 0, 0.1], abs=0.05)
    z = torch.cat([z for _, z, _ in drawn]).flatten()
    assert [z.mean().item(), z.std().item()] == pytest.approx([0, 1], abs=0.1)  # a pool's first noises are small


def test_pairs_of_labelled_data_matched_together_are_those_without_labels():
    images, classes = cifar_like(60), np.arange(60) % 3
    x, z, labels = pairs.data_pairs(images, 30, 20, 60, seed=3, device="cpu", labels=classes)
    expected = pairs.data_pairs(images, 30, 20, 60, seed=3, device="cpu")
    assert torch.equal(x, expected[0]) and torch.equal(z, expected[1])
    of_images = {image.numpy().tobytes(): label for image, label in zip(images, classes, strict=True)}
    assert [of_images[image.numpy().tobytes()] for image in to_uint8(x)] == labels.tolist()


def test_pools_of_several_sizes_are_all_whole(images):
    """40 images: two pools of 12 are 24, and with one of 9 it takes 36; with one of 14 it would take 84."""
    for sizes, count, served in (([12], 13, 24), ([12, 9], 2, 36), ([], 7, 7), (None, 10, 40)):
        assert pairs.load_data(str(images), [], sizes, count=count)[2] == served
    with pytest.raises(dansm.BadInput, match=r"40 samples.* 84.*--match-size"):
        pairs.load_data(str(images), [], [12, 14], count=6)


def test_paths_of_data_and_a_model(result, runs, images, tmp_path):
    found, said = result("paths", runs["a"], "--match-size", "10,40", "--count", 20, "--steps", 2, "--seeds", 2)
    assert [row["pairs"] for row in found["summary"]] == ["random", "matched, 10", "matched, 40", "own, a"]
    assert all(f"{row['pairs']}: length {row['path_length']['mean']:.2f}" in said for row in found["summary"])
    rows = list(csv.DictReader((tmp_path / "out" / "paths.csv").read_text().splitlines()))
    assert len(rows) == len(found["rows"]) == 8
    assert float(rows[-1]["straightness"]) > 0 and rows[0]["straightness"] == ""
    mean = found["summary"][-1]["inter_path_minimum"]["mean"]
    of_model = [row["inter_path_minimum"] for row in found["rows"] if row["pairs"] == "own, a"]
    assert mean == pytest.approx(np.mean(of_model))
    length = {(row["pairs"], row["seed"]): row["path_length"] for row in found["rows"]}
    growth = [length["matched, 40", seed] / length["random", seed] - 1 for seed in (0, 1)]
    assert found["summary"][2]["over_random"]["path_length"]["mean"] == pytest.approx(np.mean(growth))
    x, z = pairs.data_pairs(load_images(str(images)), 10, 20, 40, seed=1, device="cpu")
    measured = next(row for row in found["rows"] if row["pairs"] == "matched, 10" and row["seed"] == 1)
    assert measured["path_length"] == pytest.approx(dansm.path_length(x, z), rel=1e-6)
    assert measured["inter_path_mean"] == pytest.approx(inter_path_distance(x, z).mean, rel=1e-6)


def test_paths_without_a_model_of_data_made_smaller(result, images):
    found, _ = result("paths", "--data", images, "--size", 4, "--count", 10, "--seeds", 1)
    assert (found["match_sizes"], found["models"], found["shape"]) == ([40], [], [3, 4, 4])


def test_data_that_a_run_left_files_out_of_is_read_as_it_was(tmp_path, runs):
    images = make_images(tmp_path / "images", 4, 8, 8)
    (images / "broken.png").write_text("no image")
    (model,) = load_models([runs["a"]], [2])
    model.about["data"] = str(images)
    with pytest.raises(dansm.BadInput, match=r"broken\.png"):
        pairs.load_data(None, [model], [], count=2)
    model.about["recipe"]["skip_unreadable"] = True
    assert len(pairs.load_data(None, [model], [], count=2)[0]) == 4


# ------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("flow", [dansm.RectifiedFlow(), dansm.Diffusion()])
def test_loss_by_time_against_direct_computation(flow):
    def net(x, t):
        return 0.5 * x + t.reshape(-1, 1, 1, 1) / 999

    model = Model(None, "a", net, flow, {})
    x, z = torch.randn(50, 1, 2, 2), torch.randn(50, 1, 2, 2)
    found = loss_by_time(model, x, z, [0.1, 0.8], batch=1)
    for i, t in enumerate((0.1, 0.8)):
        if isinstance(flow, dansm.Diffusion):
            level = int((1 - t) * 1000)
            signal = flow.alpha_bar[level].item()
            errors = net(math.sqrt(signal) * x + math.sqrt(1 - signal) * z, torch.full((50,), float(level))) - z
        else:
            t = t * (1 - 1e-3) + 1e-3
            errors = net(t * x + (1 - t) * z, torch.full((50,), 999 * t)) - (x - z)
        losses = errors.square().flatten(1).mean(1)
        assert found["mean"][i] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert found["error"][i] == pytest.approx(losses.std().item() / math.sqrt(50), rel=1e-3)
    grouped = loss_by_time(model, x, z, [0.1, 0.8], batch=9)
    assert grouped["mean"] == pytest.approx(found["mean"], rel=1e-5)


@pytest.mark.parametrize("name", ["a", "dm"])
def test_loss_of_a_model(result, runs, name):
    found, _ = result("loss", runs[name], "--count", 20, "--match-size", "10,40", "--steps", 2)
    assert list(found["curves"]) == ["random", "matched, 10", "matched, 40", "own"] and found["times"] == loss.TIMES
    assert all(min(curve["mean"] + curve["error"]) > 0 and len(curve["mean"]) == 3
               for curve in found["curves"].values())


def test_loss_by_time_of_a_network_with_classes():
    def net(x, t, labels):
        return x * labels.reshape(-1, 1, 1, 1)

    x, z = torch.randn(30, 1, 2, 2), torch.randn(30, 1, 2, 2)
    labels = torch.arange(30) % 3
    found = loss_by_time(Model(None, "a", net, dansm.RectifiedFlow(), {}), x, z, [0.4], batch=7, labels=labels)
    t = 0.4 * (1 - 1e-3) + 1e-3
    errors = net(t * x + (1 - t) * z, None, labels) - (x - z)
    assert found["mean"][0] == pytest.approx(errors.square().mean().item(), rel=1e-5)


@pytest.fixture
def by_class(tmp_path):
    """Makes a run of a network with three classes, of which its data has two, with other numbers."""
    for name, count in (("b", 30), ("c", 10)):
        make_images(tmp_path / "by_class" / name, count, 8, 8)

    def by_class(match_labels, **recipe):
        recipe |= {"labels": "folders", "match_labels": match_labels}
        folder = tmp_path / f"match-{match_labels}"
        folder.mkdir()
        net = awake(dansm.UNet(**NETWORK, classes=3))
        checkpoint.save(folder, state_to_save(net, data=str(tmp_path / "by_class"), classes=list("abc"), recipe=recipe))
        return folder

    return by_class


def test_models_of_other_classes_are_not_compared_number_by_number(refused, by_class, of_classes):
    assert "have different classes: expected a call for each" in refused("compare", of_classes, by_class("yes"))


@pytest.mark.parametrize("match_labels", ["yes", "no"])
def test_loss_of_a_model_with_classes_is_of_their_labels(result, by_class, tmp_path, match_labels):
    folder = by_class(match_labels)
    found, _ = result("loss", folder, "--count", 20, "--match-size", "10,20", "--steps", 2)
    model = load_models([folder], [2])[0].on(CPU)
    assert model.classes == ["a", "b", "c"]
    images, classes = load_images(str(tmp_path / "by_class")), np.repeat([1, 2], [30, 10])
    for name, match_size in (("random", 0), ("matched, 10", 10), ("matched, 20", 20)):
        x, z, labels = pairs.data_pairs(images, match_size, 20, 20, seed=0, device="cpu", labels=classes,
                                        groups=3 if match_labels == "yes" else None)
        expected = loss_by_time(model, x, z, loss.TIMES, 16, labels)
        assert found["curves"][name]["mean"] == pytest.approx(expected["mean"], rel=1e-4)
        assert loss_by_time(model, x, z, loss.TIMES, 16)["mean"] != pytest.approx(expected["mean"], rel=1e-3)
    x, z, _ = pairs.own_pairs(model, range(20), 2, seed=0, batch=16, device="cpu")
    expected = loss_by_time(model, x, z, loss.TIMES, 16, torch.arange(20) % 3)
    assert found["curves"]["own"]["mean"] == pytest.approx(expected["mean"], rel=1e-4)


def test_loss_takes_labels_from_a_file_and_knows_which_images_were_left_out(result, by_class, tmp_path):
    folder = by_class("yes", skip_unreadable=True)
    expected, _ = result("loss", folder, "--count", 20, "--steps", 2)
    (tmp_path / "by_class" / "b" / "10.png").write_text("no image")
    found, _ = result("loss", folder, "--count", 20, "--steps", 2, out=tmp_path / "left-out")
    assert found["curves"] != expected["curves"]
    folder = tmp_path / "numbered"
    folder.mkdir()
    net = awake(dansm.UNet(**NETWORK, classes=2))
    checkpoint.save(folder, state_to_save(net, classes=["0", "1"]))
    make_images(tmp_path / "flat", 20, 8, 8)
    np.save(tmp_path / "numbers.npy", np.arange(20) % 2)
    found, _ = result("loss", folder, "--data", tmp_path / "flat", "--labels", tmp_path / "numbers.npy", "--count", 9,
                      "--steps", 2, out=tmp_path / "of-numbers")
    assert found["labels"] == str(tmp_path / "numbers.npy")


def test_loss_without_the_labels_of_a_model_is_refused(refused, by_class, runs, of_classes, images, tmp_path):
    cases = [
        ((of_classes,), (str(images), "no labels", "--labels auto")),
        ((of_classes, "--labels", "folders"), ("--labels is folders", str(images))),
        ((by_class("yes"), "--labels", "none"), ("by_class", "no labels", "--labels none")),
        ((of_classes, "--data", tmp_path / "by_class"), ("class b", "the model knows c0")),
        ((runs["a"], "--labels", "folders"), ("--labels is folders", str(runs["a"]), "without labels")),
    ]
    for arguments, words in cases:
        said = refused("loss", *arguments, "--count", 20, "--out", tmp_path / "out", *FAST)
        assert all(word in said for word in words), said
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- bad input


def test_bad_input_is_named_before_anything_is_written(refused, runs, images, tmp_path):
    a, dm, small = (str(runs[name]) for name in ("a", "dm", "small"))
    cases = [
        (("compare", a), ("MODELS", a)),
        (("compare", a, tmp_path / "missing"), ("missing",)),
        (("compare", a, small), (a, "(3, 8, 8)", small, "(3, 4, 4)")),
        (("compare", a, a, "--name", "x"), ("--name", "2 models")),
        (("compare", a, dm, "--steps", 1), ("--steps is 1", "2 to 1,000")),
        (("grid", a, "--steps", "3,"), ("--steps is '3,'",)),
        (("grid", a, dm, "--steps", "3,1"), ("--steps is 1", "2 to 1,000")),
        (("tsne", a, "--pairs", 6, "--perplexity", 12), ("--perplexity is 12", "6 pairs")),
        (("tsne", a, "--pairs", 1), ("--pairs",)),
        (("tsne", "--data", images, "--pairs", 41), ("41", "40 samples")),
        (("tsne", "--data", images, "--match-size", 50), ("--match-size", "50", "40 samples")),
        (("paths",), ("--data",)),
        (("paths", "--data", tmp_path / "nothing"), ("nothing",)),
        (("paths", "--data", images, "--count", 41), ("41", "40 samples")),
        (("paths", "--data", images, "--match-size", "ten"), ("--match-size is 'ten'",)),
        (("paths", "--data", images, "--match-size", "1"), ("--match-size is '1'", "from 2")),
        (("paths", small, "--count", 9), ("(3, 8, 8)", small, "(3, 4, 4)")),
        (("loss", a, "--count", 41), ("41", "40 samples")),
    ]
    for command, words in cases:
        said = refused(*command, "--out", tmp_path / "out", *FAST)
        assert all(word in said for word in words), said
        assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line_and_leaves_no_half_file(run, runs, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dansm.RectifiedFlow, "path", stop)
    code, _, err = run("compare", runs["a"], runs["b"], "--out", tmp_path / "out", *FAST)
    assert (code, err) == (130, "dansm: stopped\n") and list((tmp_path / "out").iterdir()) == []
