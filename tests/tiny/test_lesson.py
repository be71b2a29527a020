"""The lesson runs whole, what it claims holds, and its stored output and pictures are those of today's code."""

import base64
import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from PIL import Image
from support import ROOT

NOTEBOOK = ROOT / "tiny" / "lesson.ipynb"
CELLS = nbformat.read(NOTEBOOK, as_version=4).cells
pytestmark = pytest.mark.slow
TITLE = re.compile(r"## (\d+)  (.+)")


def steps_of(cells) -> list[SimpleNamespace]:
    """The lesson's steps; the cells before the first are its introduction."""
    steps = []
    for cell in cells:
        if title := TITLE.match(cell.source):
            steps.append(SimpleNamespace(number=int(title[1]), cells=[]))
        if steps:
            steps[-1].cells.append(cell)
    return steps


STEPS = steps_of(CELLS)
each_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: f"step-{step.number}")


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """What the cells, run from top to bottom, leave behind: names, printed lines, and the folder with its pictures."""
    out = tmp_path_factory.mktemp("lesson") / "new"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setenv("LESSON_OUT", str(out))
        names = {}
        exec("\n".join(cell.source for cell in CELLS if cell.cell_type == "code"), names)
    return SimpleNamespace(**{**names, "said": said.getvalue(), "out": out})


# Its form


def test_the_steps_are_in_order():
    assert [step.number for step in STEPS] == list(range(1, 11))  # ten, as its title, README.md and play.html say


@each_step
def test_a_step_is_a_text_then_code_that_ends_with_a_picture(step):
    text, code = step.cells
    assert (text.cell_type, code.cell_type) == ("markdown", "code")
    last = code.source[code.source.rindex("\npictures.draw_") :]  # a notebook shows the last value of a cell
    assert re.fullmatch(rf'\npictures\.draw_\w+\([^"]*OUT / "{step.number}-[a-z-]+\.png"\)', last)


def test_no_measured_number_is_typed_into_the_text():
    for cell in CELLS:
        if cell.cell_type == "markdown":
            text = re.sub(r"`[^`]*`|W2²|^#.*", "", cell.source, flags=re.MULTILINE)
            assert set(re.findall(r"\d[\d.,]*%?", text.replace(". ", " "))) <= {"0", "1", "0,", "1,"}  # the ends of t


# What it does


@each_step
def test_a_step_leaves_its_picture(step, lesson):
    image = Image.open(picture_of(step, lesson.out))
    assert image.width > 900 and 250 < image.height < 700 and len(image.getcolors()) > 30


def picture_of(step: SimpleNamespace, out: Path) -> Path:
    """The one file in `out` that is this step's."""
    picture, = out.glob(f"{step.number}-*.png")
    return picture


def test_it_says_what_was_measured_and_leaves_nothing_else(lesson):
    assert len(lesson.said.splitlines()) > 20 and "nan" not in lesson.said
    assert len(list(lesson.out.iterdir())) == len(STEPS)


# What it says


def test_2_the_perfect_network_is_the_mean_of_the_lines_through_a_point(lesson):
    """By brute force: of a million random pairs those whose lines pass near the point at that time."""
    draw, t, point = torch.Generator().manual_seed(1), 0.4, torch.tensor([0.3, 0.2])
    x = lesson.x[torch.randint(len(lesson.x), (1_000_000,), generator=draw)]
    z = torch.randn(x.shape, generator=draw)
    near = (t * x + (1 - t) * z - point).norm(dim=1) < 0.05
    assert near.sum() > 1000
    seen = lesson.perfect(point[None], torch.tensor([999 * t]))[0]
    assert (seen - (x - z)[near].mean(0)).abs().max() < 0.12


def test_2_one_step_of_it_ends_at_the_mean_where_no_data_is_and_many_steps_arrive(lesson):
    ends = lesson.flow.sample(lesson.perfect, lesson.z, 1)
    assert (ends - lesson.x.mean(0)).abs().max() < 0.05
    assert (lesson.x - lesson.x.mean(0)).norm(dim=1).min() > 0.2
    w2 = list(lesson.perfect_w2.values())
    assert w2 == sorted(w2, reverse=True) and w2[0] > 1 and w2[-1] < 0.03


def test_3_each_sample_takes_the_nearest_noise_left(lesson):
    for served, sample in enumerate(lesson.few):
        assert (lesson.taken[served:] - sample).norm(dim=1).argmin() == 0
    assert lesson.toy.crossing_share(lesson.few, lesson.taken) < lesson.toy.crossing_share(lesson.few, lesson.shuffled)


def test_4_the_last_lines_of_a_pool_are_long(lesson):
    lengths = (lesson.stream - lesson.matched).norm(dim=1).view(3, 1000)
    assert (lengths[:, -50:].mean(1) > 5 * lengths[:, :500].mean(1)).all()


def test_4_the_pool_keeps_the_prior_and_nearest_of_a_few_bends_it(lesson):
    assert lesson.matched.unique(dim=0).equal(lesson.for_roll.unique(dim=0))
    assert not lesson.matched.equal(lesson.for_roll)
    assert lesson.p["pool"] > 0.05
    assert lesson.p["nearest of 16"] < 1e-6


def test_5_larger_pools_have_fewer_crossings_shorter_lines_and_keep_them_apart(lesson):
    measures = ("crossing", "path_length", "inter_path_mean")
    crossing, length, apart = ([found[measure] for found in lesson.measured.values()] for measure in measures)
    sizes = list(lesson.measured)
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (1, 10_000)
    assert crossing == sorted(crossing, reverse=True) and crossing[-1] < crossing[0] / 20
    assert length == sorted(length, reverse=True) and length[-1] < 1.1 * lesson.shortest < length[0] / 3
    assert apart[-1] > 1.4 * apart[0]
    assert length[2] - length[3] > 4 * (length[-2] - length[-1])  # it flattens


def test_6_random_pairs_cost_what_the_perfect_network_does_and_matched_ones_far_less(lesson):
    last = {method: torch.stack(losses[-100:]).mean().item() for method, losses in lesson.losses.items()}
    assert lesson.least < last["random"] < 1.15 * lesson.least
    assert last["greedy"] < lesson.least / 4
    assert lesson.found["greedy"]["straightness"] < lesson.found["random"]["straightness"] / 10


def test_7_matched_is_better_in_few_steps_and_no_different_in_many(lesson):
    random, matched = lesson.w2["random"], lesson.w2["greedy"]
    assert all(matched[steps] < random[steps] / least for steps, least in ((1, 20), (2, 8), (4, 3), (8, 1.5)))
    assert max(random[50], matched[50]) < 1.5 * lesson.floor
    assert abs(random[50] - matched[50]) < lesson.floor / 3
    for steps in (1, 2, 4):  # the random flow ends where the perfect network did
        assert random[steps] == pytest.approx(lesson.perfect_w2[steps], rel=0.15)


def test_8_the_pool_does_not_know_the_batch_and_assignment_does(lesson):
    assert (lesson.one_by_one == lesson.matched).all(1).float().mean() > 0.999
    of_random, *of_larger = lesson.crossing.values()
    assert of_random > 0.2 and of_larger == sorted(of_larger, reverse=True)
    assert lesson.crossing[10] > 3 * lesson.of_pool
    assert lesson.crossing[1000] < lesson.of_pool  # the lesson says so too


def test_9_single_batches_keep_the_prior_and_lines_cross_less_than_with_the_pool(lesson):
    p = {name: torch.tensor(of_batches).median() for name, of_batches in lesson.p_of.items()}
    assert p["pool"] < 1e-3 < 0.1 < p["semidiscrete"]
    assert lesson.crossing_of["semidiscrete"] < lesson.crossing_of["pool"] / 2


def test_9_cells_hold_equal_shares_when_potentials_have_settled(lesson):
    off = {name: (40 * share - 1).abs().max() for name, share in lesson.shares_of.items()}
    assert (lesson.shares_of["zero"] == 0).sum() > 20
    assert off["settled"] < 0.2 < off["on the way"] < min(off["zero"], off["at the start"])


def test_10_images_gain_some_per_cent_where_the_plane_gains_most(lesson):
    plane, digits = lesson.shares["two moons"], lesson.shares["digits"]
    assert all(0.85 < share < 0.98 for size, share in digits.items() if size >= 100)
    assert list(digits.values()) == sorted(digits.values(), reverse=True)
    assert plane[1000] < 0.5
    widths = {name: (of_all / of_all.mean(1, keepdim=True)).std() for name, of_all in lesson.distances.items()}
    assert widths["digits"] < widths["two moons"] / 4


# The notebook


def test_the_notebook_was_run_from_top_to_bottom_without_an_error():
    code = [cell for cell in CELLS if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} == {"stream", "execute_result"}
    assert {output.name for cell in code for output in cell.outputs if output.output_type == "stream"} == {"stdout"}


@each_step
def test_a_step_of_the_notebook_shows_its_picture(step, lesson):
    said, shown = step.cells[1].outputs
    assert said.text.strip()
    stored = in_small(io.BytesIO(base64.b64decode(shown.data["image/png"])))
    apart = {other.number: (in_small(picture_of(other, lesson.out)) - stored).abs().mean() for other in STEPS}
    assert apart.pop(step.number) < 2 < min(apart.values())  # of 255 shades


def in_small(file) -> torch.Tensor:
    """A picture in grey at 96 × 36: a point that lies elsewhere hardly counts, a curve that does, does."""
    image = Image.open(file).convert("L").resize((96, 36))
    return torch.tensor(list(image.tobytes()), dtype=torch.float32)


def test_the_stored_output_is_what_the_cells_print(lesson):
    """To a tenth: other machines round otherwise."""
    told = "".join(output.text for cell in CELLS if cell.cell_type == "code"
                   for output in cell.outputs if output.output_type == "stream")
    number = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
    words = [" ".join(re.sub(number, "#", text).split()) for text in (told, lesson.said)]
    assert words[0] == words[1]
    numbers = ([float(n.replace(",", "")) for n in re.findall(number, text)] for text in (told, lesson.said))
    for stored, now in zip(*numbers, strict=True):
        assert now == pytest.approx(stored, rel=0.1, abs=0.01), "make lesson updates the notebook"


def test_the_notebook_is_light():
    assert NOTEBOOK.stat().st_size < 700_000
