"""The page to play with: what the file holds, and in a headless browser that it matches as dansm.py does.

The browser is Debian's (`apt-get install chromium chromium-driver`) or another Chrome with its chromedriver on the
PATH; without one these tests skip. Nothing is downloaded.
"""

import io
import json
import re
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import optimize, stats

import dansm
from dansm.tiny import toy
from dansm.tiny.shapes import SHAPES

PAGE = Path(__file__).parents[2] / "tiny" / "play.html"
SOURCE = PAGE.read_text()
pytestmark = pytest.mark.slow  # needs a browser
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,960")


# The file


def test_the_file_loads_nothing():
    loads = (r"https?:|<script[^>]|<link|@import|\bimport\b|\burl\(|src=|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|"
             r"EventSource")
    assert not re.findall(loads, SOURCE)


def test_the_files_it_names_are_there():
    """As code: a link would show a source as text."""
    assert "href" not in SOURCE
    names = re.findall(r"<code>([\w/]+\.\w+)</code>", SOURCE)
    assert {"dansm.py", "tiny/lesson.ipynb"} <= set(names)
    assert all((PAGE.parents[1] / name).exists() for name in names)


# The browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chrome = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    driver = shutil.which("chromedriver")
    if not (chrome and driver):
        pytest.skip(f"no {'chromedriver' if chrome else 'chromium or google-chrome'} on the PATH: "
                    "apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(20)
    yield browser
    browser.quit()


@pytest.fixture
def console(browser):
    """Some page, for what needs its functions alone."""
    if browser.current_url != PAGE.as_uri():
        browser.get(PAGE.as_uri())
    return browser


@pytest.fixture
def page(browser):
    """The page as it opens, 1280 × 960, light; whatever the test does, the console stays empty."""
    look(browser)
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(PAGE.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def look(page, width=1280, height=960, pixels=1, scheme="light", motion="no-preference"):
    """As on a screen of this size, with these wishes of the reader."""
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": width, "height": height, "deviceScaleFactor": pixels, "mobile": False})
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                         {"features": [{"name": name, "value": value} for name, value in wishes.items()]})


def run(page, script, *given):
    """What a piece of the page's language returns; tensors go in as lists of numbers."""
    given = [one.tolist() if isinstance(one, torch.Tensor) else one for one in given]
    return page.execute_script(f"const d = window.dansm; {script}", *given)


def drawn(page):
    """Wait till the page has drawn what it is asked for."""
    page.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")


def state(page):
    drawn(page)
    return run(page, """const {x, z, shuffled, pools, batch, served, life, pool} = d.run();
        return {x, z, shuffled, pools, batch, served, life: life.now, settings: d.settings,
                pool: {number: pool.number, left: pool.left, noise: pool.noise}}""")


def click(page, name):
    page.find_element("id", name).click()


def says(page, name):
    drawn(page)
    return page.find_element("id", name).text


def fill(page, name, text):
    """Type into a field, and leave it."""
    field = page.find_element("id", name)
    field.send_keys("\ue009a\ue000", text or "\ue017", "\ue004")  # control-A, the text or delete, tab
    drawn(page)


def choose(page, name, value):
    page.find_element("css selector", f"#{name} option[value={value}]").click()


def couple(page, method):
    page.find_element("css selector", f"label:has(#method-{method})").click()


def float64(points):
    return torch.tensor(points, dtype=torch.float64).reshape(-1, 2)


# Matching


@pytest.mark.parametrize("samples, noises, ties", [(1, 1, False), (1, 300, True), (7, 7, True), (64, 64, False),
                                                   (64, 200, True), (100, 401, False)])
def test_greedy_picks_what_dansm_picks(console, samples, noises, ties):
    cost = torch.rand(samples, noises, dtype=torch.float64)
    if ties:
        cost = (4 * cost).floor()
    assert run(console, "return d.greedy(arguments[0])", cost) == dansm.greedy(cost).tolist()


@pytest.mark.parametrize("cost", dansm.COSTS)
def test_costs_are_those_of_dansm(console, cost):
    x, z = torch.randn(20, 2, dtype=torch.float64), torch.randn(33, 2, dtype=torch.float64)
    found = torch.tensor(run(console, "return d.costMatrix(...arguments)", x, z, cost), dtype=torch.float64)
    torch.testing.assert_close(found, dansm.cost_matrix(x, z, cost), rtol=0, atol=1e-14)


@pytest.mark.parametrize("cost", ["[[1], [2]]", "[[1, NaN]]", "[[Infinity, Infinity]]", "[[Infinity, 1], [0, 1]]"])
def test_greedy_refuses_what_dansm_refuses(console, cost):
    result = run(console, f"try {{ return d.greedy({cost}) }} catch (error) {{ return error.message }}")
    try:
        expected = dansm.greedy(torch.tensor(json.loads(cost), dtype=torch.float64)).tolist()
    except dansm.BadInput as error:
        expected = str(error)
    assert result == expected


@pytest.mark.parametrize("samples, noises, ties", [(0, 0, False), (1, 1, False), (6, 6, False), (6, 8, True),
                                                   (64, 64, True), (100, 130, False), (256, 256, False)])
def test_an_assignment_costs_as_little_as_scipys(console, samples, noises, ties):
    cost = torch.randn(samples, noises, dtype=torch.float64)
    if ties:
        cost = (3 * cost).floor()
    found = torch.tensor(run(console, "return d.assign(arguments[0])", cost), dtype=torch.int64)
    assert len(found) == len(found.unique()) == samples
    rows, columns = optimize.linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(samples), found].sum().item() == pytest.approx(cost.numpy()[rows, columns].sum())


def test_an_assignment_is_the_best_of_all_pairings(console):
    """Try every permutation."""
    cost = torch.rand(5, 7, dtype=torch.float64)
    found = run(console, "return d.assign(arguments[0])", cost)
    best = min(permutations(range(7), 5), key=lambda picks: cost[range(5), picks].sum())
    assert tuple(found) == best


class GivenPool(dansm.NoisePool):
    """A pool whose noises are given, pool after pool, and not drawn."""

    def __init__(self, match_size, cost, given):
        super().__init__(match_size, (2,), cost=cost, dtype=torch.float64)
        self.given = given.split(match_size)

    def _drawn(self, number):
        return self.given[number - 1]


SERVE = """
    const [batches, given, matchSize, cost] = arguments;
    let drawn = 0;
    const pool = new d.NoisePool(matchSize, cost, n => given.slice(drawn, drawn += n));
    return batches.map(batch => [pool.serve(batch), pool.number, pool.left]);
"""


@pytest.mark.parametrize("batch_size, match_size, cost, ties", [
    (1, 2, "squared", False), (1, 10, "inner", True), (1, 50, "squared", True),
    (7, 2, "inner", True), (7, 10, "squared", False), (7, 50, "inner", False),
    (64, 2, "squared", True), (64, 10, "inner", False), (64, 50, "squared", True)])
def test_the_pool_serves_what_dansm_serves(console, batch_size, match_size, cost, ties):
    """Through several pools; batches of 7 and 64 end in the middle of them, and batches of 64 take more than one."""
    count = max(3 * match_size + 5, 2 * batch_size)
    x, given = torch.randn(count, 2, dtype=torch.float64), torch.randn(count + 2 * match_size, 2, dtype=torch.float64)
    given = given[: len(given) // match_size * match_size]
    if ties:
        x, given = x.round(), given.round()
    served = run(console, SERVE, [batch.tolist() for batch in x.split(batch_size)], given, match_size, cost)
    pool = GivenPool(match_size, cost, given)
    expected = [[pool(batch).tolist(), pool.number, len(pool.noise)] for batch in x.split(batch_size)]
    assert served == expected and pool.number > 3


@pytest.mark.parametrize("match_size", [0, 1])
def test_a_match_size_of_0_or_1_is_a_random_noise(console, match_size):
    x, given = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    served = run(console, SERVE, [batch.tolist() for batch in x.split(4)], given, match_size, "squared")
    assert [noise for batch, _, _ in served for noise in batch] == given.tolist()
    assert [rest for _, *rest in served] == [[0, 0]] * 3  # no pool is ever drawn, as in dansm.py


SETTLE = """
    const coupling = new d.Semidiscrete(arguments[0]);
    const begun = coupling.shares;
    for (let steps = 0; steps < 200 && !coupling.settled; steps++) coupling.settle();
    return {begun, settled: coupling.settled, shares: coupling.shares, potentials: coupling.potentials,
            taken: arguments[1].map(z => coupling.take(z))};
"""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 40, 256])
def test_cells_settle_to_equal_shares_of_the_noises(console, count, shape):
    """What each sample gets of a million noises, which choose as in dansm.py."""
    x, z = toy.points(shape, count, "test", 0).double(), torch.randn(1_000_000, 2, dtype=torch.float64)
    found = run(console, SETTLE, x, z[:1000])
    values = z @ x.T - torch.tensor(found["potentials"], dtype=torch.float64)
    taken = values.argmax(1)
    assert found["settled"] and taken[:1000].tolist() == found["taken"]
    counts, expected = taken.bincount(minlength=count), len(z) / count
    assert (counts - expected).abs().max() < 0.005 * expected + 5 * expected**0.5
    nearest = torch.cdist(z[:100_000], x).argmin(1).bincount(minlength=count) / 100_000
    assert nearest == pytest.approx(torch.tensor(found["begun"], dtype=torch.float64), abs=0.008)
    assert sum(found["shares"]) == pytest.approx(1, abs=1e-4)


def test_settled_potentials_are_those_of_dansm(console):
    x = toy.points("checkerboard", 40, "test", 0)
    coupling = dansm.Semidiscrete(x, seed=0)
    coupling.solve(error=0.03)
    found = torch.tensor(run(console, SETTLE, x.double(), [])["potentials"])
    apart = found - coupling.potentials
    assert (apart - apart.mean()).abs().max() < 0.05 < 0.2 < coupling.potentials.std()


# Measuring, and drawing lots


@pytest.mark.parametrize("count", [2, 3, 256])
def test_crossings_and_lengths_are_those_of_the_toy(console, count):
    x, z = torch.randn(2, count, 2, dtype=torch.float64)
    crossings, length = run(console, "return [d.crossings(...arguments).length, d.pathLength(...arguments)]", x, z)
    assert crossings == round(toy.crossing_share(x, z) * count * (count - 1) / 2)
    assert length == pytest.approx(dansm.path_length(x, z))
    if count > 3:
        assert crossings > count


def test_a_crossing_is_marked_where_two_lines_cross(console):
    x, z = [[1, 1], [3, 0.5]], [[-1, -1], [-1, 0.5]]
    found = run(console, "return crossings(...arguments).map(pair => crossingPoint(...arguments, pair))", x, z)
    assert found == [[0.5, 0.5]]


def test_meetings_are_near_and_part(console):
    x, z, t = torch.randn(80, 2, dtype=torch.float64), torch.randn(80, 2, dtype=torch.float64), 0.4
    place, along = t * x + (1 - t) * z, torch.nn.functional.normalize(x - z)
    expected = ((torch.cdist(place, place) < 0.1) & (along @ along.T < 0.5)).triu(1).nonzero()[:, [0, 1]].tolist()
    found = run(console, "return d.meetings(...arguments)", x, z, t)
    assert sorted(found) == sorted(expected) and len(found) > 3


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_tiny_shapes(console, shape):
    """As many points in every field of a board, as far as chance goes: the χ² of two samples of one distribution is 1
    for each field."""
    found = float64(run(console, "return d.samples(arguments[0], 20000, d.generator(5, 'test'))", shape))
    a, b = (torch.histogramdd(points.double(), [24, 24], range=[-2.4, 2.4, -2.4, 2.4]).hist
            for points in (found, toy.points(shape, 20_000, "test", 0)))
    filled = a + b > 10
    assert ((a - b).square() / (a + b))[filled].mean() < 1.4 and filled.sum() > 50


def test_noises_are_normal_and_follow_their_seed(console):
    first, again, other, data = (float64(run(console, "return d.noises(10000, d.generator(...arguments))", *which))
                                 for which in ((3, "noise"), (3, "noise"), (4, "noise"), (3, "data")))
    assert first.equal(again)
    assert stats.kstest(first.flatten().numpy(), "norm").pvalue > 0.01
    for one in (other, data):
        assert torch.corrcoef(torch.cat([first, one], 1).T).fill_diagonal_(0).abs().max() < 0.04


# The page


def test_the_page_asks_for_nothing_else(page):
    for name in ("play", "one-batch", "carry", "redraw"):
        click(page, name)
    for button in page.find_elements("css selector", ".tries button"):
        button.click()
    drawn(page)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [PAGE.as_uri()]


@pytest.mark.parametrize("cost, shape", [("squared", "two-moons"), ("inner", "checkerboard")])
def test_what_is_shown_is_the_matching_of_dansm(page, cost, shape):
    choose(page, "shape", shape), choose(page, "cost", cost)
    fill(page, "batch-size", "64")
    shown = state(page)
    x, z, noise = (float64(points) for points in (shown["x"], shown["z"], shown["pool"]["noise"]))
    assert len(x) == 64 and len(noise) == 100 and shown["pool"]["left"] == 36
    assert z.equal(noise[dansm.greedy(dansm.cost_matrix(x, noise, cost))])
    shuffled = float64(shown["shuffled"])
    assert sorted(shown["shuffled"]) == sorted(shown["z"]) and not shuffled.equal(z)
    for name, noises in (("greedy", z), ("shuffled", shuffled)):
        count = round(toy.crossing_share(x, noises) * 64 * 63 / 2)
        assert says(page, f"crossings-{name}") == f"{100 * count / 2016:.1f} %"
    assert says(page, "line-pairs") == "2,016" and says(page, "length-greedy") == f"{dansm.path_length(x, z):.2f}"


def test_the_pool_runs_empty_in_the_middle_of_a_batch(page):
    assert says(page, "pool-says") == "no. 1: 60 of 100 left"
    assert "ran empty" not in says(page, "news")
    click(page, "one-batch"), click(page, "one-batch")
    shown = state(page)
    assert (shown["batch"], shown["served"], shown["pools"]) == (3, 120, [1] * 20 + [2] * 20)
    assert "Pool 1 ran empty after sample 20 of this batch, and pool 2 was drawn." in says(page, "news")
    assert says(page, "pool-says") == "no. 2: 80 of 100 left"
    assert says(page, "batch-says") == "no. 3: 40 of 40 served"
    assert run(page, "return document.getElementById('batch-bar').innerText").split("\n") == ["pool 1", "pool 2"]


def test_an_empty_pool_is_seen_empty_and_the_next_sample_draws_another(page):
    fill(page, "match-size", "40")
    assert says(page, "pool-says") == "no. 1: 0 of 40 left"
    assert run(page, "return document.querySelector('#pool-bar span').offsetWidth") == 0
    assert "the next sample draws a new one" in says(page, "news")
    click(page, "one-sample")
    shown = state(page)
    assert (shown["batch"], len(shown["z"]), shown["pool"]["number"], shown["pool"]["left"]) == (2, 1, 2, 39)

def test_redrawn_noises_are_matched_to_the_same_samples(page):
    before = state(page)
    click(page, "redraw")
    after = state(page)
    assert after["x"] == before["x"] and after["settings"]["seed"] == 1
    assert not {tuple(z) for z in before["z"]} & {tuple(z) for z in after["z"]}
    assert page.find_element("id", "seed").get_property("value") == "1"
    fill(page, "seed", "0")
    assert state(page) == before


def test_other_settings_keep_the_place_in_the_stream(page):
    click(page, "one-batch"), click(page, "one-sample")
    before = state(page)
    fill(page, "match-size", "500")
    after = state(page)
    assert (after["served"], after["batch"], after["x"]) == (81, 3, before["x"])
    assert after["pool"]["left"] == 419
    fill(page, "batch-size", "16")  # of other batches it shows the first
    assert (state(page)["served"], state(page)["batch"]) == (16, 1)


METHODS = ("random", "greedy", "optimal", "semidiscrete")


def test_all_couplings_have_the_same_samples_and_noises(page):
    fill(page, "match-size", "40")  # the batch is a whole pool
    click(page, "one-batch")
    shown = {}
    for method in METHODS:
        couple(page, method)
        shown[method] = state(page)
        assert shown[method]["settings"]["method"] == method and shown[method]["served"] == 80
    for method in ("greedy", "optimal"):
        assert shown[method]["x"] == shown["random"]["x"]
        assert sorted(shown[method]["z"]) == sorted(shown["random"]["z"]) and shown[method]["z"] != shown["random"]["z"]
    assert shown["semidiscrete"]["z"] == shown["random"]["z"]
    x, z = (float64(shown["optimal"][end]) for end in "xz")
    rows, columns = optimize.linear_sum_assignment(dansm.cost_matrix(x, z).numpy())
    assert list(columns) == list(rows)  # as they are


def test_the_table_compares_all_couplings(page):
    fill(page, "match-size", "40")
    run_until(page, "!d.settling()")
    lengths, squares, lines = ({method: [] for method in METHODS} for _ in range(3))
    for _ in range(3):
        for method in METHODS:
            couple(page, method)
            run_until(page, "!d.settling()")
            x, z = (float64(state(page)[end]) for end in "xz")
            lengths[method].append((x - z).norm(dim=1).mean())
            squares[method].append((x - z).square().sum(1).mean())
            lines[method].append((x, z))
            assert says(page, f"crossings-{method}") == f"{100 * toy.crossing_share(x, z):.1f} %"
            assert says(page, f"length-{method}") == f"{lengths[method][-1]:.2f}"
            assert says(page, f"length-all-{method}") == f"{torch.stack(lengths[method]).mean():.2f}"
            assert says(page, f"squared-all-{method}") == f"{torch.stack(squares[method]).mean():.2f}"
            ends = [torch.cat(parts) for parts in zip(*lines[method], strict=True)]
            assert says(page, f"crossings-all-{method}") == f"{100 * toy.crossing_share(*ends):.1f} %"
            times = [t / 10 for t in range(10)]
            met = run(page, "const [x, z, times] = arguments; return times.map(t => d.meetings(x, z, t).length)",
                      x, z, times)
            assert float(says(page, f"meetings-{method}")) == pytest.approx(sum(met) / 10, abs=0.051)
            bold = {cell.get_attribute("data-method") for cell in page.find_elements("css selector", "table .chosen")}
            assert bold == {method}
        click(page, "one-batch")
    means = {method: torch.stack(of_batches).mean() for method, of_batches in squares.items()}
    assert means["optimal"] < means["greedy"] < means["random"] and means["semidiscrete"] < means["greedy"]
    assert says(page, "line-count") == "160"


def test_a_semidiscrete_coupling_knows_forty_samples_in_batches_of_any_size(page):
    data = state(page)["x"]
    fill(page, "batch-size", "1")
    couple(page, "semidiscrete")
    for _ in range(30):
        click(page, "one-batch")
    assert run(page, "return d.run().coupling.data") == data and state(page)["served"] == 31
    assert len({tuple(x) for x in [*run(page, "return d.run().past.x"), *state(page)["x"]]}) > 10
    fill(page, "batch-size", "64")
    assert run(page, "return d.run().coupling.data.length") == len(state(page)["x"]) == 64


def test_it_says_that_a_pool_which_is_not_empty_flatters(page):
    assert "60 of 100 left" in says(page, "unfair")
    fill(page, "match-size", "40")
    assert says(page, "unfair") == ""


def test_random_pairs_have_no_pool(page):
    couple(page, "random")
    shown = state(page)
    assert says(page, "pool-says") == "none" and shown["pool"] == {"number": 0, "left": 0, "noise": []}
    assert len(shown["z"]) == 40
    couple(page, "greedy")
    assert says(page, "pool-says") == "no. 1: 60 of 100 left"


def test_the_noises_of_a_batch_are_assigned_together_and_shown_one_by_one(page):
    couple(page, "optimal")
    click(page, "one-sample")
    shown = state(page)
    assert (shown["batch"], len(shown["z"]), len(run(page, "return d.run().assigned"))) == (2, 1, 40)
    click(page, "one-batch")
    assert state(page)["z"] == run(page, "return d.run().assigned")


def test_semidiscrete_pairs_settle_on_the_first_samples(page):
    before = state(page)
    run_until(page, "!d.settling()")
    couple(page, "semidiscrete")
    assert run(page, "return d.settling()")  # it can be watched
    run_until(page, "!d.settling()")
    shown = state(page)
    data, potentials, shares, history = (
        torch.tensor(run(page, f"return d.run().coupling.{name}"), dtype=torch.float64)
        for name in ("data", "potentials", "shares", "history"))
    assert data.tolist() == before["x"] and shown["pool"] == {"number": 0, "left": 0, "noise": []}
    assert shown["x"] == data[(float64(shown["z"]) @ data.T - potentials).argmax(1)].tolist()
    assert shares == pytest.approx(1 / 40, rel=0.005) and says(page, "pool-says") == "2.5 % each"
    prices = potentials - data.square().sum(1) / 2
    assert (history[0] == 0).all() and history[-1] == pytest.approx(prices - prices.mean())
    assert "Cells hold 2.5 % of all noises." in says(page, "news")
    click(page, "redraw")
    assert not run(page, "return d.settling()") and state(page)["z"] != shown["z"]
    click(page, "one-batch")
    assert (state(page)["batch"], len(state(page)["x"])) == (2, 40)
    click(page, "settle-again")
    assert run(page, "return d.settling()")
    run_until(page, "!d.settling()")
    again = torch.tensor(run(page, "return d.run().coupling.potentials"), dtype=torch.float64)
    assert again == pytest.approx(potentials) and state(page)["batch"] == 2


@pytest.mark.parametrize("name, setting", [("match-size", "matchSize"), ("batch-size", "batchSize")])
def test_a_slider_and_its_field_move_together(page, name, setting):
    slider, field = (page.find_element("id", name + end) for end in ("-slider", ""))
    before = state(page)["settings"][setting]
    slider.send_keys("\ue014")  # one to the right
    after = state(page)["settings"][setting]
    assert after > before and field.get_property("value") == slider.get_attribute("aria-valuetext") == str(after)
    slider.send_keys("\ue011")  # home
    assert state(page)["settings"][setting] == {"matchSize": 0, "batchSize": 1}[setting]
    slider.send_keys("\ue010")  # end
    assert state(page)["settings"][setting] == {"matchSize": 2000, "batchSize": 256}[setting]
    fill(page, name, "13")
    assert state(page)["settings"][setting] == 13
    assert slider.get_attribute("aria-valuetext") == "13"


@pytest.mark.parametrize("name, wrong", [("match-size", ["many", "-1", "2001", ""]),
                                         ("batch-size", ["0", "2.5", "1e2"]), ("seed", ["<b>"])])
def test_what_cannot_be_used_is_named_at_its_field_and_the_page_works_on(page, name, wrong):
    before, field = state(page), page.find_element("id", name)
    for given in wrong:
        fill(page, name, given)
        assert (given or "empty") in says(page, f"{name}-wrong") and "expected" in says(page, f"{name}-wrong")
        assert field.get_attribute("aria-invalid") == "true"
    assert state(page) == before
    fill(page, name, "7")
    assert says(page, f"{name}-wrong") == "" and field.get_attribute("aria-invalid") == "false"
    assert state(page)["settings"] != before["settings"]


def test_play_serves_samples_until_it_is_paused(page):
    page.find_element("id", "speed").send_keys("\ue010")  # the fastest
    fill(page, "match-size", "30")
    before = state(page)
    click(page, "play")
    assert says(page, "play") == "❚❚ Pause"
    run_until(page, f"d.run().pool.number > {before['pool']['number'] + 1}")
    click(page, "play")
    paused = state(page)
    assert says(page, "play") == "▶ Play" and paused["served"] > before["served"] + 30
    drawn(page)
    assert state(page)["served"] == paused["served"]


def run_until(page, condition):
    """Look at each frame, and give up after the script's twenty seconds."""
    page.execute_async_script(f"""const d = window.dansm, done = arguments[0];
        (function look() {{ ({condition}) ? done() : requestAnimationFrame(look) }})()""")


def test_points_go_from_noise_to_data(page):
    before = picture(page, "pairs").tobytes()
    slider = page.find_element("id", "time")
    slider.send_keys("\ue010")
    assert says(page, "time-says").startswith("1.00") and picture(page, "pairs").tobytes() != before
    slider.send_keys(*["\ue012"] * 50)
    shown = state(page)
    met = run(page, "return d.meetings(...arguments).length", shown["x"], shown["z"], 0.5)
    assert says(page, "time-says") == f"0.50: {met} meet"
    click(page, "carry")
    run_until(page, "d.view.t > 0 && d.view.t < 0.45")
    run(page, "d.clock.carried = 0.99")
    run_until(page, "d.view.t === 1 && !d.clock.carrying")


def test_every_suggestion_does_what_it_says(page):
    look(page, motion="reduce")  # while the page scrolls up smoothly, a click may meet the button's neighbour
    shown = {}
    for button in page.find_elements("css selector", ".tries button"):
        button.click()
        shown[button.text] = state(page)
        if button.text == "Batches of four":
            shown_crossings, of_pool = (says(page, f"crossings-all-{method}") for method in ("optimal", "greedy"))
    assert [one["settings"]["matchSize"] for one in shown.values()] == [1, 100, 100, 400, 200, 200, 100, 100]
    assert shown["Empty in the middle of a batch"]["pools"] == [1] * 20 + [2] * 20
    assert shown["The last of a pool"]["pool"]["left"] == 0
    assert len(shown["A batch of one"]["z"]) == 1 and shown["A batch of one"]["pool"]["left"] == 170
    assert shown["By the inner product"]["settings"]["cost"] == "inner"
    assert float(shown_crossings.rstrip(" %")) > 3 * float(of_pool.rstrip(" %"))
    assert shown["Data known beforehand"]["settings"]["method"] == "semidiscrete"
    assert not run(page, "return d.settling()")  # at once where motion is unwelcome


# How it looks


def picture(page, name):
    """A canvas as it stands there."""
    drawn(page)
    return Image.open(io.BytesIO(page.find_element("id", name).screenshot_as_png)).convert("RGB")


@pytest.mark.parametrize("scheme, panel", [("light", (246, 247, 249)), ("dark", (28, 32, 38))])
def test_pictures_are_drawn_in_the_colours_of_the_scheme(page, scheme, panel):
    look(page, scheme=scheme)
    for name in ("pairs", "shuffled", "life"):
        colours = picture(page, name).getcolors(2**20)
        assert max(colours)[1] == panel and len(colours) > 30
    noise, data = (143, 168, 196), {"light": (200, 68, 27), "dark": (234, 98, 56)}[scheme]
    counts = {colour: count for count, colour in picture(page, "pairs").getcolors(2**20)}
    assert counts[noise] > 300 and counts[data] > 300
    couple(page, "semidiscrete")
    assert max(picture(page, "pairs").getcolors(2**20))[1] not in (panel, (0, 0, 0))

def test_an_address_may_name_a_suggestion(page):
    page.get("about:blank")
    page.get(PAGE.as_uri() + "#3")
    assert state(page)["batch"] == 3
    page.get("about:blank")
    page.get(PAGE.as_uri() + "#nothing")
    assert state(page)["batch"] == 1


@pytest.mark.parametrize("width", [320, 900])
def test_nothing_sticks_out_at_the_side(page, width):
    look(page, width)
    fill(page, "match-size", "-" + 20 * "9")
    fill(page, "batch-size", "256")
    drawn(page)
    assert run(page, "return document.documentElement.scrollWidth") <= width
    right = run(page, '''const all = [...document.body.querySelectorAll("*")];
        return Math.max(...all.map(one => one.getBoundingClientRect().right))''')
    assert right <= width
    canvas = page.find_element("id", "pairs").size
    assert canvas["width"] == canvas["height"] >= 0.85 * min(width, 490)

def test_every_control_has_a_name_and_is_reached_by_the_keyboard(page):
    other = "input[type=radio]:not(:checked)"  # arrows lead to it
    controls = page.find_elements("css selector", f"button:not([hidden]), input:not({other}), select")
    assert len(controls) > 20
    assert all(control.accessible_name.strip() for control in controls)
    assert all(canvas.accessible_name for canvas in page.find_elements("css selector", "canvas"))
    reached = []
    for _ in range(len(controls)):
        page.switch_to.active_element.send_keys("\ue004")
        reached.append(page.switch_to.active_element)
    assert reached == controls
    page.find_element("id", "play").send_keys(" ")
    assert run(page, "return d.clock.playing")
    page.find_element("id", "method-greedy").send_keys("\ue014")  # right
    assert state(page)["settings"]["method"] == "optimal"


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_motion_is_left_out_where_it_is_unwelcome(page, motion):
    look(page, motion=motion)
    growing = run(page, "document.getElementById('one-sample').click(); return d.view.grown")
    assert growing == {"no-preference": 0, "reduce": 1}[motion]
    times = run(page, """d.clock.carrying = true; d.clock.carried = 0;
        return Array.from({length: 31}, () => { carryOn(0.1); return d.view.t })""")
    assert len(set(times)) == {"no-preference": 31, "reduce": 5}[motion] and times[-1] == 1
