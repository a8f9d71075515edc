"""What the documents name exists: links, commands and names of the library; and their code runs."""

import ast
import importlib
import importlib.util
import operator
import pathlib
import re
import shlex
import sys
import types

import numpy as np
import pytest
import tyro

import robustjax
from docs import gallery, reference
from experiments.claims import _frame
from experiments.common import command_line

ROOT = pathlib.Path(__file__).parents[1]
CATALOGUE = ROOT / "docs" / "methods.md"
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = [  # but for CONTRIBUTING, whose commands are those of its example
    *(page for page in DOCUMENTS if page.name != "CONTRIBUTING.md"),
    *sorted((ROOT / "experiments").glob("*[!_]*/__init__.py")),
    ROOT / "experiments" / "smoothing" / "sequential.py",
    *sorted((ROOT / "experiments").glob("[!_]*.py")),
    *sorted((ROOT / "experiments" / "claims").glob("[!_]*.py")),
]


def commands_in(text: str) -> list[str]:
    """Every ``python -m experiments.NAME ...``, up to the end of its line or of its quotation."""
    return re.findall(r"python -m experiments\.[^`\n]*", text.replace("\\\n", " "))


def parse(command: str):
    name, *arguments = shlex.split(command, comments=True)[2:]
    module = importlib.import_module(name)
    arguments = [argument for argument in arguments if argument != "--help"]
    if name == "experiments.claims":
        return tyro.cli(importlib.import_module("experiments.claims.__main__").Arguments, args=arguments)
    if name.startswith("experiments.claims."):
        return tyro.cli(_frame.arguments(module.STUDY), args=arguments).config
    return tyro.cli(command_line.arguments(module.Config, module.run), args=arguments).config


# Each once, under the name of the last page that has it.
COMMANDS = {command: page.name for page in PAGES for command in commands_in(page.read_text())}


@pytest.mark.parametrize(("command", "page"), COMMANDS.items())
def test_each_command_parses(command, page):
    assert parse(command), page


def test_commands_are_found_and_wrong_ones_fail(capsys):
    assert len(commands_in((ROOT / "README.md").read_text())) >= 4
    assert len(commands_in(CATALOGUE.read_text())) >= 5
    assert commands_in("run `python -m experiments.a --b 1`, then\n  python -m experiments.c \\\n --d 2\nnow") == [
        "python -m experiments.a --b 1", "python -m experiments.c   --d 2",
    ]  # fmt: skip
    assert parse("python -m experiments.smoothing --sigma 0.75 --help  # slow").sigma == 0.75
    for wrong in ("smoothing --sigm 0.5", "smoothing --sigma high", "smoothing.sequential RUN --radii high"):
        with pytest.raises(SystemExit):
            parse(f"python -m experiments.{wrong}")
    assert capsys.readouterr().err


def test_blocks_of_the_readme_run_in_order():
    text = (ROOT / "README.md").read_text()
    for setting, less in (("num_estimation=10_000", "num_estimation=500"), ("steps=40, restarts=5", "steps=4")):
        assert setting in text
        text = text.replace(setting, less)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) == 4
    assert names["cert"].label.shape == names["scores_in"].shape == names["test"].label.shape
    assert abs(names["x_adv"] - names["test"].image).max() <= 8 / 255


LONG = {"new_attack", "new_objective", "resume", "run_folder", "tpu_and_hosts"}  # they train or attack
RUN = [
    page
    for page in [ROOT / "docs" / "own_data.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
    if "```python" in page.read_text()
]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in LONG)) for page in RUN]
)
def test_blocks_of_a_page_print_what_stands_below_them(page, tmp_path, monkeypatch, capsys):
    """In an empty folder, as a module beside the studies, so that a study may stand on a page."""
    module = types.ModuleType("experiments.claims.page")
    module.__package__, module.__spec__ = "experiments.claims", importlib.util.spec_from_loader(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    printed = ""
    for kind, block in re.findall(r"```(python|text)\n(.*?)```", page.read_text(), re.DOTALL):
        if kind == "python":
            exec(compile(block, page.name, "exec"), module.__dict__)
            printed += capsys.readouterr().out
        else:
            assert block in (printed, printed[-len(block) :] if page.stem == "run_folder" else "")  # after its tables
            printed = ""
    assert not printed


def test_pictures_of_the_gallery_are_small_and_lie_where_their_commands_leave_them():
    found = gallery.pictures((ROOT / "docs" / "gallery.md").read_text())
    assert len({picture.path for picture in found}) == 8
    for path, commands, source in found:
        assert 1000 < (ROOT / "docs" / path).stat().st_size <= gallery.LARGEST
        name, *flags = shlex.split(commands[-1])[2:]
        if name.startswith("experiments.claims."):
            assert source.startswith(
                f"results/claims/{name.split('.')[-1]}/{flags[flags.index('--name') + 1]}/figures/"
            )
        elif "--compare" not in flags and "--checkpoint" not in flags:
            assert source.startswith(f"{parse(commands[-1]).folder()}/figures/")


def anchors_of(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def names_in(text: str) -> set[str]:
    """The dotted names in code that begin with a room: ``losses.smoothing.macer``."""
    code = " ".join(re.findall(r"```python\n.*?```|`[^`\n]+`", text, re.DOTALL))
    rooms = "|".join(reference.public_names(robustjax))
    return set(re.findall(rf"(?<![\w./-])(?:{rooms})(?!\.(?:csv|json)\b)(?:\.[A-Za-z]\w*)+", code))


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if "docs" in page.parts], ids=lambda page: page.name)
def test_names_of_the_library_on_a_page_exist(page):
    for name in names_in(page.read_text()):
        assert operator.attrgetter(name)(robustjax), name


def test_names_are_found_and_wrong_ones_fail():
    text = "data.no, `metrics.auroc(a, b)`, `x.data.no` and\n```python\nf = losses.smoothing.macer(sigma=1)\n```"
    assert names_in(text) == {"metrics.auroc", "losses.smoothing.macer"}
    with pytest.raises(AttributeError, match="aurocs"):
        operator.attrgetter("metrics.aurocs")(robustjax)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("certify", lambda accuracies: (np.diff(accuracies) <= 0).all() and 0.7 < accuracies[0] < 1),
        ("score", lambda found: found.auroc > 0.99),
        ("attack", lambda warnings: warnings == ()),
        ("calibrate", lambda error: 0 < error < 0.1),
        ("conformal", lambda sizes: 1 <= sizes.mean() < 1.5),
    ],
)
def test_the_block_of_a_concept_gives_what_the_page_tells(name, is_right):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/concepts/{name}.md").read_text(), re.DOTALL)
    *statements, last = ast.parse(block).body
    names = {}
    exec(compile(ast.Module(statements, []), name, "exec"), names)
    assert is_right(eval(ast.unparse(last), names))
