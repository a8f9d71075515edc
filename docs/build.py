"""Writes the docstrings as pages: ``python docs/build.py [FOLDER]``; ``results/docs`` by default, extra ``docs``."""

import ast
import inspect
import pathlib
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import robustjax


class Text(str):
    """What stands in a signature as it is, without quotation marks."""

    __repr__ = str.__str__


def modules(module: types.ModuleType = robustjax) -> Iterator[types.ModuleType]:
    """The public modules, each before those inside it."""
    yield module
    for name in public_names(module):  # not in vars: a command is there once something has imported it
        value = getattr(module, name)
        if inspect.ismodule(value) and value.__name__ == f"{module.__name__}.{name}":
            yield from modules(value)


def public_names(module: types.ModuleType) -> list[str]:
    """What a module defines, or imports by ``as`` under its own name."""
    names = []
    top = ast.parse(inspect.getsource(module)).body
    late = [node for part in top if isinstance(part, ast.If) for node in part.body]  # rooms imported when they are used
    for node in top + late:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def is_constructor(name: str, value: Any) -> bool:
    """Whether a class is public as a function: ``pgd = PGD``."""
    return inspect.isclass(value) and name[0].islower()


def page_order(module: types.ModuleType) -> list[str]:
    """Functions first, then classes, then the rest; of each kind, what the module's docstring names comes first."""
    named = re.findall(r"``(\w+)", module.__doc__ or "")

    def rank(name):
        value = getattr(module, name)
        kind = 0 if inspect.isroutine(value) or is_constructor(name, value) else 1 if inspect.isclass(value) else 2
        return kind, named.index(name) if name in named else len(named)

    return sorted(public_names(module), key=rank)


def as_function(name: str, constructor: type) -> Callable[..., Any]:
    """The function that a class is to those who only call it: the settings are its arguments."""

    def function(*args, **kwargs):
        return constructor(*args, **kwargs)

    signature = inspect.signature(constructor).replace(return_annotation=inspect.Signature.empty)
    call = vars(constructor).get("__call__")
    text = re.sub(r"^Attributes:$", "Args:", inspect.getdoc(constructor) or "", flags=re.MULTILINE)
    if call is not None and "\nReturns:\n" not in text:
        arguments = ", ".join([*inspect.signature(call).parameters][1:])
        text, *rest = re.split(r"^(?=Example:$|Reference:$)", text, maxsplit=1, flags=re.MULTILINE)
        what = (inspect.getdoc(call) or "").partition("\n")[0]
        text = "\n\n".join([text.rstrip(), f"Returns:\n  A function ``({arguments})``. {what}", *rest])
    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = constructor.__module__, text
    function.__signature__, function.__wrapped__ = signature, constructor  # the second is whose source is shown
    return function


def as_written(annotation: Any, names: Mapping[str, Any], places: Mapping[int, str]) -> Any:
    """An annotation as a person writes it, with the public place of what has one and the value of private names."""
    if not isinstance(annotation, str):
        return annotation

    def name_in_full(match):
        try:
            value = eval(match[0], dict(names))  # noqa: S307
        except (AttributeError, NameError, SyntaxError):
            return match[0]
        return places.get(id(value)) or (inspect.formatannotation(value) if match[0].startswith("_") else match[0])

    text = re.sub(r"\bAnyArray\b", "Array", annotation)  # on a device or on the host: no reader needs to be told
    quoted = re.split(r"('[^']*'|\"[^\"]*\")", text)  # jaxtyping's shapes, and literals
    quoted[::2] = [re.sub(r"[A-Za-z_][\w.]*", name_in_full, part) for part in quoted[::2]]
    quoted[1::2] = [part[0] + part[1:].lstrip() for part in quoted[1::2]]
    return Text("".join(quoted))


def build(folder: pathlib.Path) -> None:
    """Writes the pages of all public modules."""
    try:
        import pdoc
    except ImportError:
        sys.exit("docs/build.py needs pdoc: pip install 'robustjax[docs]'.")

    places = {}
    for module in modules():
        module.__all__ = page_order(module)
        for name in module.__all__:
            value = getattr(module, name)
            if is_constructor(name, value):
                setattr(module, name, staticmethod(as_function(name, value)))  # pdoc unwraps functions, but not these
            else:
                places[id(value)] = f"{module.__name__}.{name}"
    written = lambda annotation, names, *_: as_written(annotation, names, places)
    pdoc.doc.safe_eval_type = pdoc.doc_types.safe_eval_type = written
    pdoc.doc.Function.decorators = pdoc.doc.Class.decorators = ()  # all of them are private matters
    warnings.filterwarnings("ignore", "'robustjax' may refer")
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("robustjax", r"!robustjax\.(.*\.)?_", output_directory=folder)


if __name__ == "__main__":
    chosen = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "results/docs")
    build(chosen)
    sys.stdout.write(f"{chosen / 'robustjax.html'}\n")
