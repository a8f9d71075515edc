"""The site: every public name has an entry, and none other; signatures and types as a person writes them."""

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import pytest

from docs import reference
from robustjax import attacks, certification, losses, scoring, training, typing

PLACES = reference.public_types()


@pytest.fixture
def plain(monkeypatch):
    """Docstrings as they are, without Sphinx."""
    monkeypatch.setattr(reference, "docstring", lambda text, annotations=None: text)


def entries(text: str) -> list[str]:
    return re.findall(r"^\.\. py:(?:function|class|data):: (\w+)", text, re.MULTILINE)


def test_public_modules_have_pages_and_private_ones_have_none():
    names = [module.__name__ for module in reference.modules()]
    assert {"robustjax.scoring", "robustjax.typing", "robustjax.certification.conformal"} <= {*names}
    assert not [name for name in names if "._" in name]


def test_a_page_shows_what_its_module_defines_or_exports():
    assert {"energy", "Detector", "Outputs"} <= {*reference.public_names(scoring)}
    assert {"Outputs", "LogitsFn"} <= {*reference.public_names(typing)}
    imported = {"annotations", "jax", "np", "Any", "AnyArray", "Callable"}
    assert not imported & {*reference.public_names(certification.mixing), *reference.public_names(scoring)}


def test_every_public_name_has_one_entry_and_a_row_in_the_overview(plain):
    for module in reference.modules():
        names = [name for name in reference.page_order(module) if not inspect.ismodule(getattr(module, name))]
        text = reference.page(module, PLACES)
        assert entries(text) == names
        assert sorted(re.findall(r"\* - :py:obj:`(\w+)`\n     - \S", text)) == sorted(names)


def test_a_page_begins_with_the_functions_that_its_docstring_names(plain):
    order = entries(reference.page(certification, PLACES))
    assert order[:2] == ["certify", "predict"]
    classes = [inspect.isclass(getattr(certification, name)) and name[0].isupper() for name in order]
    first = classes.index(True)
    assert first > 10
    assert not any(inspect.isroutine(getattr(certification, name)) for name in order[first:])


def test_names_of_one_file_stand_together_under_what_they_have_in_common(plain):
    text = reference.page(certification, PLACES)
    families = re.findall(r"^\.\. rst-class:: family\n\n(.*)$", text, re.MULTILINE)
    assert families[0].startswith("Randomized smoothing: ")
    assert families[-2:] == ["Others", "Modules of their own"]
    smoothing = text.split(".. rst-class:: family")[1]
    assert "certify" in smoothing
    assert "laplace" not in smoothing
    assert ".. rst-class:: family" not in reference.page(losses.smoothing, PLACES).split("gaussian_augmentation")[0]


def test_signatures_have_defaults_as_written_and_settings_by_name_only():
    assert reference.signature(certification.certify) == (
        "(key, logits_fn, x, measure, *, num_selection=100, num_estimation=100_000, alpha=0.001, batch_size=None, "
        "input_range=(0.0, 1.0))"
    )
    assert "learning_rate=1e-2" in reference.signature(attacks.carlini_wagner)
    assert reference.signature(attacks.pgd).startswith('(*, epsilon, norm="linf", steps=40, step_size=None, ')
    assert reference.signature(certification.Certificate) == "(label, radius, probability, abstained)"

    def function(key, epsilon=8 / 255, *, rows, **settings):
        return key, epsilon, rows, settings

    assert reference.signature(function) == "(key, epsilon=8 / 255, *, rows, **settings)"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("float | None", r"*float \| None*"),
        ("Float[AnyArray, ' batch'] | None", r"*float array (batch,) \| None*"),
        ("Int[AnyArray, 'batch classes']", "*int array (batch, classes)*"),
        ("Float[AnyArray, '*shape']", r"*float array (\*shape,)*"),
        ("Key[Array, '']", "*PRNG key*"),
        ("Float[Array, '']", "*float*"),
        ("Callable[..., Outputs]", "*function*"),
        ("Callable[[AnyArray, Any], float]", "*function (array, anything) -> float*"),
        ("tuple[int, ...]", "*tuple[int, ...]*"),
        ("Outputs | None", r":py:obj:`~robustjax.typing.Outputs` \| None"),
        ("_private.Norm", r'*"l1" \| "l2"*'),
        ("_private.Bounds | None", ""),
        ("_private._State", ""),
        ("Any", ""),
        (inspect.Parameter.empty, ""),
    ],
)
def test_types_are_in_words_and_link_to_what_is_public(annotation, words):
    private = {"Norm": Literal["l1", "l2"], "Bounds": tuple[typing.Any, typing.Any], "_State": type("_State", (), {})}
    names = {"Outputs": typing.Outputs, "Callable": Callable, "Any": typing.Any, "_private": type("m", (), private)}
    assert (
        reference.type_in_words(annotation, names, PLACES | {id(typing.Outputs): "robustjax.typing.Outputs"}) == words
    )


def test_a_class_under_a_lower_case_name_is_a_function_of_its_settings(plain):
    text = reference.of_constructor(attacks.pgd)
    sections = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Args:", "Returns:", "Example:", "Reference:"]
    assert "  A function ``(key, logits_fn, x, labels)``. " in text
    shown = reference.entry(attacks, "autoattack", PLACES)
    assert ".. py:function:: autoattack(*, epsilon" in shown
    assert ".. py:method:: autoattack.evaluate(key, logits_fn, x, labels" in shown
    assert "perturb" not in re.findall(r"py:method:: pgd\.(\w+)", reference.entry(attacks, "pgd", PLACES))


def test_a_value_has_the_string_below_it_and_its_source_where_that_is_short(plain):
    source, text = reference.of_value(certification, "ABSTAIN")
    assert (source, text) == ("-1", "The label of an input for which no class can be certified or predicted.")
    assert ":value: -1\n" in reference.entry(certification, "ABSTAIN", PLACES)
    assert ":value:" not in reference.entry(training, "RECIPES", PLACES)
    with pytest.raises(ValueError, match=r"^name must be assigned in robustjax.certification, got 'absent'\.$"):
        reference.of_value(certification, "absent")


def test_a_page_that_did_not_change_stays_and_one_without_a_module_goes(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "page", lambda module, places: module.__name__)
    reference.write(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {"index.rst", "certification.rst", "losses.smoothing.rst"} <= {*before}
    (tmp_path / "gone.rst").touch()
    reference.write(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_sections_become_fields_with_types():
    pytest.importorskip("sphinx")
    text = "Does.\n\nArgs:\n  x: rows.\n  *more: others.\n\nGuarantee:\n  Always.\n\nReference:\n  A paper."
    lines = reference.docstring(text, {"x": "*array*"}).splitlines()
    assert lines.index(":type x: *array*") + 1 == lines.index(":param x: rows.")
    assert lines[lines.index(".. admonition:: Guarantee") + 1 :][:3] == ["  :class: tip", "", "  Always."]
    assert ".. rubric:: Reference" in lines


def test_links_work_in_the_repository_and_on_the_site():
    pytest.importorskip("sphinx")
    links = importlib.import_module("docs.links")
    page, github = links.DOCS / "howto" / "page.md", links.GITHUB
    text = (
        "[a](../methods.md#losses) [b](../../experiments/claims) [c](../../CHANGELOG.md) [d](https://x.y/z.md) [e](#e)"
    )
    assert links.mended(text, page, page) == (
        f"[a](../methods.md#losses) [b]({github}/tree/main/experiments/claims) [c](../changelog.md) "
        "[d](https://x.y/z.md) [e](#e)"
    )
    assert links.mended("![f](docs/jobs.png)", links.ROOT / "README.md", page) == "![f](../jobs.png)"
    assert links.mended("[g](../../colab/ood.ipynb)", page, page) == "[g](../tutorials/ood.ipynb)"
    reference.write(links.DOCS / "api")
    assert links.mended("[h](../../robustjax/losses/smoothing.py)", page, page) == "[h](../api/losses.smoothing.rst)"
    source = links.source("py", {"module": "robustjax.attacks", "fullname": "pgd"})
    assert re.fullmatch(rf"{github}/blob/main/robustjax/attacks/_pgd\.py#L\d+-L\d+", source)
    assert links.source("py", {"module": "robustjax.certification", "fullname": "ABSTAIN"}) is None


def test_blocks_of_the_quickstart_print_what_stands_below_them(capsys):
    text = (reference.pathlib.Path(reference.__file__).parent / "quickstart.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "quickstart.md", "exec"), names)
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 3
    assert capsys.readouterr().out == "".join(shown)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("sphinx_book_theme")
    inventory = pytest.importorskip("sphinx.util.inventory")
    docs = reference.pathlib.Path(reference.__file__).parent
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        docs,
        tmp_path / "a",
    ]
    subprocess.run(command, check=True)
    site = tmp_path / "a"
    known = inventory.InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind in ("py:function", "py:class", "py:data", "py:module") for name in known.data.get(kind, {})}
    public = {f"{m.__name__}.{name}" for m in reference.modules() for name in reference.public_names(m)}
    assert names == public
    attack = (site / "tutorials" / "attack.html").read_text()
    assert "_images/" in attack
    assert 'href="certify.html"' in attack  # whole links to the repository lead to pages
    assert 'href="../methods.html"' in attack
    assert "<table" in (site / "tutorials" / "own_model.html").read_text()  # a report in Markdown
    assert not (site / "_modules").exists()
    for page in ("index.html", "api/certification.html", "methods.html", "tutorials/attack.html"):
        assert not re.findall(
            r"<(?:script|link|img)[^>]*(?:src|rel=\"stylesheet\" href)=\"https?:", (site / page).read_text()
        )
    assert (site / "_static" / "tex-svg.js").stat().st_size > 1e6
    assert 'href="api/certification.html#robustjax.certification.certify"' in (site / "quickstart.html").read_text()
    assert 'href="api/losses.smoothing.html#robustjax.losses.smoothing.macer"' in (site / "methods.html").read_text()
