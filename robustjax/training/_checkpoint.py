"""Checkpoints of a run; the only file that knows Orbax.

A folder holds one folder per step, named by it. Each is written under another name and moved when it is complete, so
that a process killed at any moment leaves only whole ones; ``SHA256SUMS`` inside covers every file, so that later
damage is seen before Orbax reads it (``sha256sum -c SHA256SUMS`` checks by hand).
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from robustjax.training._step import TrainState
from robustjax.typing import ModelState

_METADATA = "metadata.json"
_SUMS = "SHA256SUMS"
_UNFINISHED = "unfinished"
_START_ANEW = "delete the folder or pass overwrite=True to start anew"
_READ_ANOTHER = "name the folder of another run, one of this model"


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      state: with the placement of the template.
      metadata: what :func:`save` was given.
    """

    state: TrainState
    metadata: dict[str, Any]


def save(folder: pathlib.Path, state: TrainState, metadata: dict[str, Any], *, keep: int) -> None:
    """Writes the checkpoint of ``state.step`` and deletes all but the ``keep`` newest.

    Args:
      folder: on a file system that all processes share.
      state: train state.
      metadata: anything that JSON can hold.
      keep: number of checkpoints left.
    """
    from orbax.checkpoint import v1 as ocp

    step, parts, unfinished = int(state.step), _parts(state), folder / _UNFINISHED
    if jax.process_index() == 0:
        _delete(folder.glob(f"{_UNFINISHED}*"))
    ocp.save_checkpointables(str(unfinished), parts)
    if jax.process_index() == 0:
        (unfinished / _METADATA).write_text(json.dumps({**metadata, "arrays": _describe(parts)}, indent=1))
        (unfinished / _SUMS).write_text(_sums(unfinished))
        damaged = [path for path in _found(folder) if int(path.name) >= step]  # or they would have been restored
        _delete(damaged)
        unfinished.rename(folder / f"{step:08d}")
        _delete(_found(folder)[:-keep])


def restore(folder: pathlib.Path, template: TrainState, log: Callable[[str], None]) -> Restored | None:
    """Reads the newest whole checkpoint.

    Args:
      folder: as for :func:`save`.
      template: a train state with the shapes, dtypes and placement wanted.
      log: told of every damaged checkpoint that was passed over.

    Returns:
      The checkpoint, or None where the folder has none.

    Raises:
      ValueError: all checkpoints are damaged, or the newest whole one is of another model or optimizer.
    """
    found = _newest_whole(folder, log, _START_ANEW)
    if found is None:
        return None
    parts, metadata = _load(found, _parts(template), _START_ANEW)
    key = jax.random.wrap_key_data(parts["training"].pop("key"), impl=jax.random.key_impl(template.key))
    return Restored(TrainState(key=key, model=parts["model"], **parts["training"]), metadata)


def restore_model(
    folder: str | pathlib.Path, template: ModelState, *, log: Callable[[str], None] | None = None
) -> ModelState:
    """Reads parameters and batch statistics alone from the newest whole checkpoint of a run.

    Args:
      folder: the checkpoint folder that :func:`robustjax.training.fit` was given.
      template: a state of the same model; gives shapes, dtypes and placement.
      log: told of every damaged checkpoint that was passed over; None for standard error.

    Returns:
      The trained model state.

    Raises:
      FileNotFoundError: the folder has no checkpoint.
      ValueError: all checkpoints are damaged, or they are of another model.
    """
    found = _newest_whole(pathlib.Path(folder), log or to_stderr, _READ_ANOTHER)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name the folder that fit was given.")
    return _load(found, {"model": template}, _READ_ANOTHER)[0]["model"]


def to_stderr(message: str) -> None:
    """Writes a line to standard error."""
    sys.stderr.write(f"{message}\n")


def clear(folder: pathlib.Path) -> None:
    """Deletes all checkpoints of the folder, and nothing else."""
    if jax.process_index() == 0:
        _delete([*_found(folder), *folder.glob(f"{_UNFINISHED}*")])


def _parts(state: TrainState) -> dict[str, Any]:
    training = {"step": state.step, "key": jax.random.key_data(state.key), "opt_state": state.opt_state}
    return {"model": state.model, "training": training}


def _delete(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        shutil.rmtree(path)


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((p for p in folder.glob("*") if p.name.isdecimal() and p.is_dir()), key=lambda p: int(p.name))


def _newest_whole(folder: pathlib.Path, log: Callable[[str], None], advice: str) -> pathlib.Path | None:
    found = _found(folder)
    for path in reversed(found):
        sums = path / _SUMS
        if sums.is_file() and sums.read_bytes() == _sums(path).encode():
            return path
        log(f"The checkpoint {path} is damaged; falling back to the one before.")
    if found:
        raise ValueError(f"folder={str(folder)!r} has no readable checkpoint; {advice}.")
    return None


def _sums(path: pathlib.Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != path / _SUMS)
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return "".join(f"{digest}  {file.relative_to(path)}\n" for digest, file in zip(digests, files, strict=True))


def _describe(parts: dict[str, Any]) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(parts)
    return {jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}


def _load(path: pathlib.Path, template: dict[str, Any], advice: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    metadata = json.loads((path / _METADATA).read_text())
    there, wanted = metadata.pop("arrays"), _describe(template)
    there = {name: array for name, array in there.items() if any(name.startswith(f"['{part}']") for part in template)}
    for name in sorted({*there, *wanted}):
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"the checkpoint {path} is of another model or optimizer: at {name} it has "
                f"{there.get(name, 'nothing')}, wanted is {wanted.get(name, 'nothing')}; {advice}."
            )
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return ocp.load_checkpointables(str(path), jax.tree.map(place, template)), metadata
