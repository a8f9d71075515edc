"""The pages of the API reference, made of the docstrings: reStructuredText, one page for each public module."""

from __future__ import annotations

import ast
import collections
import dataclasses
import inspect
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
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


def public_types() -> dict[int, str]:
    """The public places of classes and of names for types, by the identity of the value."""
    return {
        id(value): f"{module.__name__}.{name}"
        for module in modules()
        for name, value in ((name, getattr(module, name)) for name in public_names(module) if name[0].isupper())
        if inspect.isclass(value) or typing.get_origin(value)
    }


# Signatures and types


def signature(value: Any) -> str:
    """The arguments of a function, or the settings of a class, with defaults as they stand in the source."""
    written = _defaults(value)
    signature = inspect.signature(value)
    parameters = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else written.get(p.name, p.default))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _defaults(value):
    found = {}
    for part in reversed(value.__mro__) if inspect.isclass(value) else [inspect.unwrap(value)]:
        try:
            text = textwrap.dedent(inspect.getsource(part))
            node = ast.parse(text).body[0]
        except (OSError, TypeError, SyntaxError):  # object, tuple and the like; a lambda within a line
            continue
        if isinstance(node, ast.ClassDef):
            pairs = [(field.target.id, field.value) for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            late = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
            pairs = zip([a.arg for a in [*arguments, *node.args.kwonlyargs]], late + node.args.kw_defaults)
        else:
            continue
        found |= {name: Text(ast.get_source_segment(text, default)) for name, default in pairs if default}
    return {name: default for name, default in found.items() if not default.startswith("dataclasses.field")}


def type_in_words(annotation: Any, names: Mapping[str, Any], places: Mapping[int, str]) -> str:
    """An annotation as a person would say it, with links to public types; empty for what no reader could look up."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__forward_arg__", None)
    if annotation in (inspect.Parameter.empty, Any, "Any"):
        return ""
    node = ast.parse(text or inspect.formatannotation(annotation), mode="eval").body
    words = _words(node, {**names, "robustjax": robustjax}, places)
    return words if ":py:obj:" in words or not words else f"*{words}*"


_ARRAYS = {
    "Float": "float array",
    "Int": "int array",
    "Bool": "bool array",
    "UInt32": "uint32 array",
    "Key": "PRNG key",
}


def _words(node, names, places):
    say = lambda node: _words(node, names, places)
    match node:
        case ast.BinOp(left=left, right=right):
            sides = dict.fromkeys([say(left), say(right)])
            return " \\| ".join(sides) if all(sides) else ""
        case ast.Subscript(value=head, slice=inside):
            parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            name = ast.unparse(head).rpartition(".")[2]
            if name in _ARRAYS:
                return _array(_ARRAYS[name], parts[1].value)
            if name == "Literal":
                return " \\| ".join(_escaped(f'"{part.value}"') for part in parts)
            if name == "Callable":
                if not isinstance(parts[0], ast.List):
                    return "function"
                takes = ", ".join(say(part) or "anything" for part in parts[0].elts)
                return f"function ({takes}) -> {say(parts[1]) or 'anything'}"
            return f"{name}[{', '.join(say(part) or 'Any' for part in parts)}]"
        case ast.Name() | ast.Attribute():
            return _name(ast.unparse(node), names, places)
    return "..." if ast.unparse(node) == "..." else _escaped(ast.unparse(node))


def _name(text, names, places):
    last = text.rpartition(".")[2]
    if last in ("Array", "AnyArray"):  # on a device or on the host: no reader needs to be told
        return "array"
    try:
        value = eval(text, dict(names))  # noqa: S307, our own annotations
    except (AttributeError, NameError):
        return _escaped(last)
    if id(value) in places:
        return f":py:obj:`~{places[id(value)]}`"
    if value is Any or isinstance(value, type):
        return "" if value is Any or last.startswith("_") else _escaped(last)
    if last == "Callable":
        return "function"
    if typing.get_origin(value):  # a private name for a type
        words = _words(ast.parse(inspect.formatannotation(value), mode="eval").body, names, places)
        return "" if "Any" in words else words
    return _escaped(last)


def _array(kind, shape):
    sizes = shape.split()
    if not sizes:
        return kind.removesuffix(" array")
    if sizes == ["..."]:
        return f"{kind}s" if kind == "PRNG key" else kind
    return _escaped(f"{kind} ({', '.join(sizes)}{',' * (len(sizes) == 1)})")


def _escaped(text):
    return re.sub(r"([*_`|\\])", r"\\\1", text)


# Docstrings

_SECTIONS = ["Reference", "Differs from", "Whose checkpoints fit"]


def docstring(text: str, annotations: Mapping[str, str] | None = None) -> str:
    """A docstring as reStructuredText; the arguments that it lists are given their types."""
    from sphinx.ext.napoleon import Config, GoogleDocstring

    settings = Config(napoleon_custom_sections=_SECTIONS, napoleon_use_rtype=False, napoleon_use_ivar=True)
    text = re.sub(r"^Guarantee:$", ".. admonition:: Guarantee\n  :class: tip\n", text, flags=re.MULTILINE)
    lines = []
    for line in str(GoogleDocstring(text, settings)).splitlines():
        listed = re.match(r"( *):(param|ivar) (\w+):", line)
        if listed and (words := (annotations or {}).get(listed[3])):
            lines.append(f"{listed[1]}:{'type' if listed[2] == 'param' else 'vartype'} {listed[3]}: {words}")
        lines.append(line)
    return "\n".join(lines)


def of_constructor(constructor: type) -> str:
    """The docstring of the function that a class is to those who only call it: the settings are its arguments."""
    text = re.sub(r"^Attributes:$", "Args:", inspect.getdoc(constructor) or "", flags=re.MULTILINE)
    call = vars(constructor).get("__call__")
    if call is None or "\nReturns:\n" in text:
        return text
    arguments = ", ".join([*inspect.signature(call).parameters][1:])
    text, *rest = re.split(r"^(?=Raises:$|Guarantee:$|Example:$|Reference:$)", text, maxsplit=1, flags=re.MULTILINE)
    what = (inspect.getdoc(call) or "").partition("\n")[0]
    return "\n\n".join([text.rstrip(), f"Returns:\n  A function ``({arguments})``. {what}", *rest])


def of_value(module: types.ModuleType, name: str) -> tuple[str, str]:
    """The source of a value, and the string that stands below it."""
    text = inspect.getsource(module)
    body = ast.parse(text).body
    for node, below in zip(body, [*body[1:], None]):
        if isinstance(node, ast.ImportFrom) and any(alias.asname == name for alias in node.names):
            return of_value(sys.modules[node.module], name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(getattr(target, "id", None) == name for target in targets):
            source = ast.get_source_segment(text, node.value)
            return source, inspect.cleandoc(below.value.value) if isinstance(below, ast.Expr) else ""
    raise ValueError(f"name must be assigned in {module.__name__}, got {name!r}.")


# Pages

_FAMILY = ".. rst-class:: family\n\n"


def entry(module: types.ModuleType, name: str, places: Mapping[int, str]) -> str:
    """The entry of a public name: its signature and its docstring."""
    value = getattr(module, name)
    if inspect.isroutine(value) or is_constructor(name, value):
        text = of_constructor(value) if inspect.isclass(value) else inspect.getdoc(value)
        head, text = name + signature(value), docstring(text, _types(value, places))
        methods = _members(value, places, f"{name}.") if inspect.isclass(value) else ()
        return "\n\n".join([_directive("function", head, text), *methods])
    if inspect.isclass(value):
        takes = signature(value) if issubclass(value, tuple) or dataclasses.is_dataclass(value) else ""
        text = docstring(inspect.getdoc(value), _types(value, places))
        return _directive("class", name + takes, "\n\n".join([text, *_members(value, places)]))
    source, text = of_value(module, name)
    shown = f":value: {source}\n\n" if len(source) < 60 and "\n" not in source else ""
    return _directive("data", name, shown + text)


def _types(value, places):
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # an exception
        return {}
    names = vars(sys.modules[inspect.unwrap(value).__module__])
    return {p.name: type_in_words(p.annotation, names, places) for p in parameters}


def _members(value, places, constructor=""):
    """Entries of methods; of a constructor, of those that its docstring names or that have arguments of their own."""
    for name, member in vars(value).items():
        text = inspect.getdoc(member) or ""
        told = "\nArgs:\n" in text or f":meth:`{name}`" in value.__doc__ if constructor else text
        if not told or name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property):
            yield _directive("property", constructor + name, docstring(text))
        elif inspect.isroutine(member):
            takes = re.sub(r"^\(self(, )?", "(", signature(member))
            yield _directive("method", constructor + name + takes, docstring(text, _types(member, places)))


def _directive(kind, head, text):
    options = text if text.startswith(":value:") else f"\n{text}"
    return f".. py:{kind}:: {head}\n{textwrap.indent(options, '   ')}\n"


def page(module: types.ModuleType, places: Mapping[int, str]) -> str:
    """The page of a module: what it is for, a table of its names, and the entries."""
    title = module.__name__.removeprefix("robustjax.")
    inner = [name for name in public_names(module) if inspect.ismodule(getattr(module, name))]
    names = [name for name in page_order(module) if name not in inner]
    about, _, examples = inspect.getdoc(module).partition("\n\nThe examples")
    parts = [f"{title}\n{'=' * len(title)}", f".. py:module:: {module.__name__}", about]
    for family, members in _families(module, names):
        parts += [_FAMILY + family] if family else []
        parts += [_table([(f":py:obj:`{name}`", _summary(module, name)) for name in members])]
    if inner:
        rows = [(f":doc:`{title}.{name}`", inspect.getdoc(getattr(module, name))) for name in inner]
        parts += [f"{_FAMILY}Modules of their own", _table(rows), _toctree(f"{title}.{name}" for name in inner)]
    if examples:
        parts += [".. dropdown:: What the examples begin with\n\n" + textwrap.indent(f"The examples{examples}", "   ")]
    return "\n\n".join([*parts, *(entry(module, name, places) for name in names)]) + "\n"


def _families(module, names):
    """The names by the file that defines them, under its first sentence where it has several functions."""
    files = collections.defaultdict(list)
    for name in names:
        value = getattr(module, name)
        home = sys.modules.get(getattr(value, "__module__", ""), module)
        files[home if home.__name__.startswith("robustjax.") else module].append(name)
    several = [home for home, inside in files.items() if sum(name[0].islower() for name in inside) > 1]
    if len(several) < 2:
        yield "", names
        return
    for home in several:
        yield inspect.getdoc(home).partition("\n\n")[0].replace("\n", " ").rstrip("."), files.pop(home)
    if rest := [name for name in names if any(name in inside for inside in files.values())]:
        yield "Others", rest


def _summary(module, name):
    value = getattr(module, name)
    described = inspect.isroutine(value) or inspect.isclass(value)
    return inspect.getdoc(value) if described else of_value(module, name)[1]


def _table(rows):
    lines = [f"   * - {name}\n     - {(text or '').partition(chr(10))[0]}\n" for name, text in rows]
    return ".. list-table::\n   :class: overview\n   :widths: 30 70\n\n" + "".join(lines)


def _toctree(pages):
    return ".. toctree::\n   :hidden:\n\n" + "".join(f"   {name}\n" for name in pages)


def write(folder: pathlib.Path) -> None:
    """Writes the page of each public module, and the page that lists the rooms; pages that did not change stay."""
    places = public_types()
    rooms = sorted(public_names(robustjax))
    table = _table([(f":doc:`{name}`", inspect.getdoc(getattr(robustjax, name))) for name in rooms])
    about = textwrap.dedent(robustjax.__doc__).partition("\n\n")[2]
    pages = {"index": "\n\n".join(["API reference\n=============", table, _toctree(rooms), about])}
    pages |= {m.__name__.removeprefix("robustjax."): page(m, places) for m in modules() if m is not robustjax}
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
