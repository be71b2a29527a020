"""The pages agree with the records, the files and the commands."""

import importlib.metadata
import importlib.util
import re
import tomllib

import pytest
import typer
from support import ROOT

from dansm.scale.commands import main

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/**/*.md")),
         ROOT / "findings" / "README.md", ROOT / "CHANGELOG.md"]
SHOWN = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names options that are gone
PLACES = [str(page.relative_to(ROOT)) for page in SHOWN]
PYTHON = [(page, code) for page in SHOWN for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_docs_leaves_no_difference():
    tables, rooms = script("tables"), script("rooms")
    for page in PAGES:
        assert tables.updated(page.read_text()) == page.read_text(), page
    assert rooms.drawing() == (ROOT / "docs" / "rooms.svg").read_text()


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def commands(command, name="dansm"):
    """Every command by its full name, with its options."""
    yield name, {option for parameter in command.params if not getattr(parameter, "hidden", False)
                 for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("-")}
    if hasattr(command, "list_commands"):
        for child in command.list_commands(None):
            yield from commands(command.get_command(None, child), f"{name} {child}")


@pytest.fixture(scope="module")
def options():
    return dict(commands(typer.main.get_command(main.app)))


def code_of(page):
    """The pieces of code in a page, a line each; Python aside."""
    text = re.sub(r"```(python|bibtex)\n.*?```", "", page.read_text(), flags=re.DOTALL)
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.partition("#")[0].strip() for block in [*blocks, *spans] for line in block.splitlines()]


@pytest.mark.parametrize("page", SHOWN, ids=PLACES)
def test_commands_and_options_exist(page, options):
    every_option = set().union(*options.values()) | {"--nproc-per-node", "--max-restarts"}  # the last are torchrun's
    for code in code_of(page):
        given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        called = re.search(r"(?:^|-m )dansm ((?:bench )?[a-z]+)", code)
        if called:
            assert f"dansm {called[1]}" in options, code
            assert given <= options[f"dansm {called[1]}"] | {"--help", "--nproc-per-node"}, code
        elif not code.startswith(("python ", "PYTHON")):
            assert given <= every_option, code


@pytest.mark.parametrize("page", SHOWN, ids=PLACES)
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for code in code_of(page):
        for target in re.findall(r"^make ([a-z][\w-]*)", code):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), code


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = [*PAGES, *(path for folder in ("scale", "tiny", "examples", "results", "docs")
                     for path in sorted((ROOT / folder).rglob("*.py")))]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_extras_that_are_to_be_installed_exist(source):
    text = source.read_text()
    for command in re.findall(r"pip install ((?:-e )?['\"]?(?:\.|dansm)\[\S*)", text):
        asked = re.match(r"""(?:-e )?(['"])(?:\.|dansm)\[([\w,]+|\{extra\})\]\1""", command)
        assert asked, command  # brackets need quotes in a shell
        assert {*asked[2].split(",")} <= {*PROJECT["optional-dependencies"], "{extra}"}, command


def test_an_extra_that_an_error_names_brings_the_package():
    distributions = importlib.metadata.packages_distributions()
    for module, extra in main.EXTRAS.items():
        brought = {re.match(r"[\w-]+", package)[0] for package in PROJECT["optional-dependencies"][extra]}
        assert brought & {module.replace("_", "-"), *distributions.get(module, ())}, module


def test_every_extra_is_in_the_page_that_lists_them():
    page = (ROOT / "docs" / "training.md").read_text()
    listed = re.findall(r"^\| `pip install '\.\[([\w,]+)\]'`", page, re.MULTILINE)
    assert {name for names in listed for name in names.split(",")} == set(PROJECT["optional-dependencies"])


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == version
    assert main.version() == version


def with_the_line_before(code):
    """The code with what a line had before the pool, as its comment says."""
    return re.sub(r"^( *)(\w+) = pool\([\w, ]+\) +# was: (.+)$", r"\1\3", code, flags=re.MULTILINE)


@pytest.mark.parametrize("change", [str, with_the_line_before])
@pytest.mark.parametrize("page, code", PYTHON)
def test_python_in_pages_runs(page, code, change):
    for package in ("diffusers", "torchcfm"):
        if package in code:
            pytest.importorskip(package)
    exec(compile(change(code), str(page), "exec"), {})


def test_each_folder_of_results_has_a_page_that_the_list_names():
    listed = (ROOT / "results" / "README.md").read_text()
    for folder in (ROOT / "results").iterdir():
        if folder.is_dir():
            assert f"({folder.name}/" in listed
            assert (folder / "README.md").exists()
