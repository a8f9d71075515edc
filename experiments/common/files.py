"""Files of a run: each is written whole or not at all, so that a kill at any moment leaves no half of one."""

from __future__ import annotations

import ast
import csv
import fnmatch
import functools
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

import robustjax
from robustjax import _paths

from . import runtimes


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all, whenever the process dies."""
    path, content = _paths.path_of(path=path), content.encode() if isinstance(content, str) else content
    _paths.make_folder(path.parent)
    if runtimes.is_remote(path):  # object stores show an object when all of it has come
        path.write_bytes(content)
        return
    unfinished = path.parent / f".{path.name}.unfinished"
    try:
        unfinished.write_bytes(content)
    except OSError:
        unfinished.unlink(missing_ok=True)  # a full disk needs the room
        raise
    unfinished.replace(path)


def files(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """Paths in a folder with names such as ``*.npz``, sorted; none if there is no folder.

    Unlike a glob, it does not interpret brackets in the name of the folder.
    """
    return sorted(p for p in folder.iterdir() if fnmatch.fnmatch(p.name, pattern)) if folder.is_dir() else []


def write_rows(path: epath.PathLike, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file with these columns, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def read_json(path: epath.PathLike, *wanted: str, advice: str, error: str = "") -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      ValueError: there is none, or it lacks a ``wanted`` value; the message begins with ``error``, names the file and
        ends with what to do, the ``advice``.
    """
    try:
        found = json.loads(epath.Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(f"{error}{path} cannot be read ({problem}); {advice}.") from problem
    if not isinstance(found, dict):
        raise ValueError(f"{error}{path} holds no JSON object; {advice}.")
    if lacks := [name for name in wanted if name not in found]:
        raise ValueError(f"{error}{path} lacks {', '.join(lacks)}; {advice}.")
    return found


def write_arrays(path: epath.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes an npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_arrays(path: epath.PathLike, *wanted: str, leave_out: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Reads an npz file; ValueError that says what to do for one that is damaged, or lacks a ``wanted`` array."""
    try:
        with io.BytesIO(epath.Path(path).read_bytes()) as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in arrays if name not in leave_out}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to make it again.") from error
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{path} must hold {', '.join(wanted)}, got no {missing[0]}; delete it to make it again.")
    return found


@functools.cache
def source_digest() -> str:
    """Digest of the code of robustjax and of the experiments, without comments and docstrings."""
    digest = hashlib.sha256()
    library, experiments = pathlib.Path(robustjax.__path__[0]), pathlib.Path(__file__).parents[1]
    # By their names in an installed package, which has the experiments inside.
    sources = {pathlib.Path("experiments", path.relative_to(experiments)): path for path in experiments.rglob("*.py")}
    sources |= {path.relative_to(library): path for path in library.rglob("*.py")}
    for name, path in sorted(sources.items()):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            body = vars(node).get("body")
            if isinstance(body, list):
                vars(node)["body"] = [part for part in body if not _is_text(part)]
        digest.update(f"{name}\0{ast.dump(tree)}".encode())
    return digest.hexdigest()[:12]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def figure_bytes(figure: Any, format: str = "png") -> bytes:
    """A Matplotlib figure as the content of a ``png`` or ``pdf`` file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=150)
    return buffer.getvalue()
