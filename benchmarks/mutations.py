"""How many single changes of the library its tests notice: changes are drawn, made one at a time, and tested.

A change swaps an operator, moves a constant, negates a condition, or drops a `stop_gradient`. It is made in a copy of
the tree, and the mirrored tests run until one fails; if none does, the other tests of the room run too. What no test
notices is printed as file, line, before and after: some such changes alter no answer, which only a reader can tell.
Annotations, decorators, error messages and default values are left as they are.

    python -m benchmarks.mutations --changes 4
    python -m benchmarks.mutations --modules metrics/_certified.py attacks/_ball.py --csv mutations.csv
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks._command import command

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("attacks", "certification", "losses", "metrics", "scoring")
SYMBOLS = {
    "Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">=", "Eq": "==", "NotEq": "!=",
    "Add": "+", "Sub": "-", "Mult": "*", "Div": "/", "And": "and", "Or": "or",
}  # fmt: skip
OPPOSITE = {"Lt": "LtE", "Gt": "GtE", "Eq": "NotEq", "Add": "Sub", "Mult": "Div", "And": "Or"}
OPPOSITE |= {after: before for before, after in OPPOSITE.items()}
TWINS = {"minimum": "maximum", "min": "max", "argmin": "argmax", "floor": "ceil", "any": "all", "sum": "mean"}
TWINS |= {after: before for before, after in TWINS.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is changed."""

    modules: tuple[str, ...] = ()
    """Files below robustjax, such as metrics/_certified.py; by default all of the rooms that bound or rank."""
    changes: int = 4
    """Changes drawn in each file."""
    seed: int = 0
    """Of the draw."""
    processes: int = 2
    """Changes that are tested at the same time."""
    room: bool = True
    """Whether the other tests of the room run where the mirrored tests notice nothing."""
    timeout: float = 600.0
    """Seconds after which a change counts as noticed: its tests do not end."""
    csv: str | None = None
    """File for all changes; those that it has already are not tested again."""

    def __post_init__(self):
        for name in ("changes", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for module in self.modules:
            if not (ROOT / "robustjax" / module).is_file():
                raise ValueError(
                    f"modules must be files below robustjax, such as metrics/_certified.py, got {module!r}."
                )


class Change(NamedTuple):
    """A piece of a file, and what replaces it."""

    module: str
    line: int
    start: int
    end: int
    before: str
    after: str


def changes_in(module: str) -> Iterator[Change]:
    """Each single change of a file below robustjax."""
    source = (ROOT / "robustjax" / module).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def change(start: int, end: int, after: str) -> Change:
        return Change(module, source[:start].count(b"\n") + 1, start, end, source[start:end].decode(), after)

    def between(left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[Change]:
        name, start, end = type(operator).__name__, span(left)[1], span(right)[0]
        if name in OPPOSITE and source[start:end].count(before := SYMBOLS[name].encode()) == 1:
            yield change(at := start + source[start:end].index(before), at + len(before), SYMBOLS[OPPOSITE[name]])

    def visit(node: ast.AST) -> Iterator[Change]:
        match node:
            case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.arguments():
                return
            case ast.FunctionDef() | ast.ClassDef():
                for child in node.body:
                    yield from visit(child)
                return
            case ast.AnnAssign():
                if node.value is not None and not isinstance(node.value, ast.Constant):
                    yield from visit(node.value)
                return
            case ast.Compare():
                for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                    yield from between(left, right, operator)
            case ast.BinOp():
                yield from between(node.left, node.right, node.op)
            case ast.BoolOp():
                yield from between(node.values[0], node.values[1], node.op)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
                return  # the last axis, which in most places is axis 1 too
            case ast.UnaryOp(op=ast.USub() | ast.Not()):
                start = span(node)[0]
                yield change(start, start + len(b"-" if isinstance(node.op, ast.USub) else b"not "), "")
            case ast.Constant(value=bool()):
                yield change(*span(node), str(not node.value))
            case ast.Constant(value=int() | float()):
                after = node.value + 1 if isinstance(node.value, int) else node.value * 1.1 or 0.1
                yield change(*span(node), repr(after))
            case ast.Call(func=ast.Attribute(attr="stop_gradient")):
                yield change(*span(node.func), "")
            case ast.Attribute(attr=name) if name in TWINS:
                yield change(span(node)[1] - len(name), span(node)[1], TWINS[name])
            case ast.If() | ast.IfExp() if not any(isinstance(child, ast.Raise) for child in ast.walk(node)):
                start, end = span(node.test)
                yield change(start, end, f"not ({source[start:end].decode()})")
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def tests_of(module: str) -> tuple[list[str], list[str]]:
    """The mirrored tests of a module, and the other tests of its room."""
    path = pathlib.Path(module)
    room = pathlib.Path("tests") / path.parts[0]
    names = [path.stem.strip("_"), *reversed(path.parts[1:-1])]
    found = {test.stem: str(test.relative_to(ROOT)) for test in sorted((ROOT / room).rglob("*_test.py"))}
    mirror = next((found[f"{name}_test"] for name in names if f"{name}_test" in found), None)
    mirrors = [mirror] if mirror else [name for name in found.values() if pathlib.Path(name).parent.name in names]
    return mirrors, [name for name in found.values() if name not in mirrors]


def noticed_by(change: Change, tree: pathlib.Path, *, room: bool, timeout: float) -> str:
    """Which tests notice a change in a copy of the tree: "mirror", "room", or "" if none does."""
    path = tree / "robustjax" / change.module
    source = path.read_bytes()
    path.write_bytes(source[: change.start] + change.after.encode() + source[change.end :])
    settings = {"cwd": tree, "env": {**os.environ, "PYTHONPATH": str(tree)}, "capture_output": True}
    try:
        mirror, others = tests_of(change.module)
        for place, tests in (("mirror", mirror), ("room", others if room or not mirror else [])):
            command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", *tests]
            try:
                if tests and subprocess.run(command, timeout=timeout, **settings).returncode:
                    return place
            except subprocess.TimeoutExpired:
                return place
    finally:
        path.write_bytes(source)
    return ""


def run(config: Config) -> list[dict[str, object]]:
    """Draws the changes, tests each, and prints what was noticed."""
    console = Console()
    package = ROOT / "robustjax"
    modules = config.modules or sorted(
        str(path.relative_to(package)) for room in ROOMS for path in (package / room).rglob("*.py")
    )
    drawn = []
    for module in modules:
        found = list(changes_in(module))
        drawn += random.Random(f"{config.seed} {module}").sample(found, min(config.changes, len(found)))
    fields = [*Change._fields, "noticed", "seconds"]
    path = pathlib.Path(config.csv or os.devnull).expanduser()
    known = csv.DictReader(path.read_text().splitlines()) if path.is_file() else []
    rows = {tuple(row[name] for name in Change._fields): row for row in known}
    with (
        path.open("a", newline="") as file,
        ThreadPoolExecutor(config.processes) as pool,
        tempfile.TemporaryDirectory() as scratch,
    ):
        trees: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for i in range(config.processes):
            trees.put(tree := pathlib.Path(scratch) / str(i))
            for name in ("robustjax", "experiments", "benchmarks", "tests"):
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", tree)
            (ROOT / ".cache").mkdir(exist_ok=True)
            (tree / ".cache").symlink_to(ROOT / ".cache")
        writer = csv.DictWriter(file, fields)
        if not rows:
            writer.writeheader()

        def test(change: Change) -> dict[str, object]:
            if (key := tuple(map(str, change))) in rows:
                return rows[key]
            begun, tree = time.monotonic(), trees.get()
            noticed = noticed_by(change, tree, room=config.room, timeout=config.timeout)
            trees.put(tree)
            row = {**change._asdict(), "noticed": noticed, "seconds": round(time.monotonic() - begun, 1)}
            writer.writerow(row)
            file.flush()
            return row

        results = []
        for row in pool.map(test, drawn):
            results.append(row)
            if not row["noticed"]:
                console.print(f"{row['module']}:{row['line']}: {row['before']!r} -> {row['after']!r}", markup=False)
    for place in ("mirror", "room", ""):
        console.print(f"{place or 'no test'}: {sum(row['noticed'] == place for row in results)} of {len(results)}")
    return results


if __name__ == "__main__":
    command(Config, run, __doc__)
