"""The pages of docs/build.py: what stands on them, in which order, and signatures as a person writes them."""

import inspect
import sys
from typing import Literal

import pytest

from docs import build
from robustjax import attacks, certification, scoring, typing


def test_public_modules_have_pages_and_private_ones_have_none():
    names = [module.__name__ for module in build.modules()]
    assert {"robustjax.scoring", "robustjax.typing", "robustjax.certification.conformal"} <= {*names}
    assert not [name for name in names if "._" in name]


def test_a_page_shows_what_its_module_defines_or_exports():
    assert {"energy", "Detector", "Outputs"} <= {*build.public_names(scoring)}
    assert {"Outputs", "LogitsFn"} <= {*build.public_names(typing)}
    imported = {"annotations", "jax", "np", "Any", "AnyArray", "Callable"}
    assert not imported & {*build.public_names(certification.mixing), *build.public_names(scoring)}


def test_a_page_begins_with_the_functions_that_its_docstring_names():
    order = build.page_order(certification)
    assert order[:2] == ["certify", "predict"]
    classes = [inspect.isclass(getattr(certification, name)) and name[0].isupper() for name in order]
    first = classes.index(True)
    assert first > 10
    assert not any(inspect.isroutine(getattr(certification, name)) for name in order[first:])


def test_a_class_under_a_lower_case_name_is_a_function_of_its_settings():
    pgd = build.as_function("pgd", attacks.pgd)
    assert pgd(epsilon=0.1, steps=3) == attacks.pgd(epsilon=0.1, steps=3)
    assert pgd.__name__ == "pgd"
    signature = str(inspect.signature(pgd))
    assert signature.startswith("(*, epsilon: 'float', norm: ")
    assert "steps: 'int' = 40" in signature
    assert signature.endswith(")")
    sections = [line for line in pgd.__doc__.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Args:", "Returns:", "Example:", "Reference:"]
    assert "  A function ``(key, logits_fn, x, labels)``. " in pgd.__doc__


def test_without_pdoc_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    with pytest.raises(SystemExit, match=r"needs pdoc: pip install 'robustjax\[docs\]'"):
        build.build(tmp_path)


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        ("Float[AnyArray, ' batch'] | None", "Float[Array, 'batch'] | None"),
        ("Float[AnyArray, 'batch classes']", "Float[Array, 'batch classes']"),
        ("Callable[..., Outputs]", "Callable[..., robustjax.typing.Outputs]"),
        ("_private.Norm", "Literal['l1', 'l2']"),
        ("Literal['Outputs']", "Literal['Outputs']"),
        ("unknown.Name", "unknown.Name"),
    ],
)
def test_annotations_are_shown_as_they_are_written(annotation, written):
    names = {"Outputs": typing.Outputs, "_private": type("module", (), {"Norm": Literal["l1", "l2"]})}
    text = build.as_written(annotation, names, {id(typing.Outputs): "robustjax.typing.Outputs"})
    assert text == written
    assert repr(text) == written
