"""Checkpoints of a run; the only file that knows Orbax.

A folder holds one folder per step, named by the step. Each is written under another name and moved when it is
complete, so a process that is killed leaves only whole checkpoints. ``SHA256SUMS`` covers every file, so that later
damage is seen before Orbax reads it (``sha256sum -c SHA256SUMS`` checks by hand). Object stores move a folder file by
file: there a checkpoint is written in place, and counts as unfinished until ``SHA256SUMS``, its last file, exists.
Orbax itself writes only to local paths and ``gs://``, and reads names as patterns; for other stores, such as ``s3://``,
and for folders with ``*?[`` in their names, a temporary folder is copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from robustjax import _arguments, _paths
from robustjax.training._step import TrainState
from robustjax.typing import ModelState

_METADATA = "metadata.json"
_SUMS = "SHA256SUMS"
_UNFINISHED = "unfinished"
_NONE, _ALL_DAMAGED = -1, -2  # in place of the step of a whole checkpoint
_GLOB = {*"*?["}
_START_ANEW = "delete the folder or pass overwrite=True to start anew"
_READ_ANOTHER = "name the folder of another run, one of this model"


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      state: placed as the template is.
      metadata: as given to :func:`save`.
    """

    state: TrainState
    metadata: dict[str, Any]


def as_folder(path: str | os.PathLike[str]) -> epath.Path:
    """The folder as a path of :mod:`etils.epath`; local paths are made absolute, as Orbax needs."""
    found = _paths.path_of(folder=path)
    return found if _is_remote(found) else epath.Path(os.path.abspath(found))


def check_shared(folder: epath.Path) -> None:
    """Raises ValueError if Orbax cannot write to the folder from several processes."""
    if jax.process_count() > 1 and _is_staged(folder):
        raise ValueError(
            f"folder={str(folder)!r} must lie on a file system that the {jax.process_count()} processes share or on "
            "gs://, and have none of *?[ in its name."
        )


def save(folder: epath.Path, state: TrainState, metadata: dict[str, Any], *, keep: int) -> None:
    """Writes the checkpoint of ``state.step`` and deletes all but the ``keep`` newest; all processes call it.

    Args:
      folder: from :func:`as_folder`, on a file system that all processes share.
      state: train state.
      metadata: anything that JSON can hold.
      keep: number of checkpoints to keep.

    Raises:
      OSError: the checkpoint could not be written; earlier checkpoints stay.
    """
    from orbax.checkpoint import v1 as ocp

    step, parts, first = int(state.step), _parts(state), jax.process_index() == 0
    content = json.dumps({**metadata, "arrays": _describe(parts)}, indent=1)
    final = folder / f"{step:08d}"
    written = final if _is_remote(folder) else folder / _UNFINISHED
    try:
        if first:
            _delete(_unfinished(folder))
            if written == final:
                _delete(_from(folder, step))
        with _near(written) as near:
            with _quiet():
                ocp.save_checkpointables(str(near), parts)
            if first:
                (near / _METADATA).write_text(content)
                (near / _SUMS).write_text(_sums(near))
                if near != written:
                    _copy(near, written)
        if first:
            if written != final:
                _delete(_from(folder, step))
                written.rename(final)
            _delete(_found(folder)[:-keep])
    except Exception as error:  # any kind: Orbax and TensorStore raise different errors when a disk is full
        if first:
            with contextlib.suppress(Exception):  # frees space
                _delete(_unfinished(folder))
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({_first_line(error)}); earlier ones "
            "are kept: free some space, if the disk is full, and start the same run again to resume from them."
        ) from error
    if jax.process_count() > 1:  # no process reads the folder, or ends, before the first one has moved it
        multihost_utils.sync_global_devices(f"checkpoint {final}")


def restore(folder: epath.Path, template: TrainState, log: Callable[[str], None]) -> Restored | None:
    """Reads the newest whole checkpoint; all processes read the one that the first process finds.

    Args:
      folder: as for :func:`save`.
      template: a train state with the wanted shapes, dtypes and placement.
      log: called with a line for every damaged checkpoint that is skipped.

    Returns:
      The checkpoint, or None if the folder has none.

    Raises:
      ValueError: all checkpoints are damaged, or the newest whole one belongs to another model or optimizer.
    """
    step = _newest_whole(folder, log) if jax.process_index() == 0 else _NONE
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    found = _checkpoint_of(folder, step, _START_ANEW)
    if found is None:
        return None
    parts, metadata = _load(found, _parts(template), _START_ANEW)
    key = jax.random.wrap_key_data(parts["training"].pop("key"), impl=jax.random.key_impl(template.key))
    return Restored(TrainState(key=key, model=parts["model"], **parts["training"]), metadata)


@_arguments.checked
def restore_model(
    folder: str | os.PathLike[str], template: ModelState, *, log: Callable[[str], None] | None = None
) -> ModelState:
    """Reads only parameters and batch statistics from the newest whole checkpoint of a run.

    With several processes, call it in all of them: each reads its own copy, and Orbax keeps count across processes.

    Args:
      folder: the checkpoint folder that :func:`robustjax.training.fit` was given, a path or URL.
      template: a state of the same model, with the wanted shapes, dtypes and placement.
      log: called in the first process with a line for every skipped, damaged checkpoint; None for standard error.

    Returns:
      The trained model state.

    Raises:
      FileNotFoundError: the folder has no checkpoint.
      ValueError: all checkpoints are damaged, or they belong to another model.
    """
    path, log = as_folder(folder), log or to_stderr
    step = _newest_whole(path, log if jax.process_index() == 0 else lambda message: None)
    found = _checkpoint_of(path, step, _READ_ANOTHER)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or pass the folder that was given to fit.")
    return _load(found, {"model": template}, _READ_ANOTHER)[0]["model"]


def to_stderr(message: str) -> None:
    """Writes a line to standard error."""
    sys.stderr.write(f"{message}\n")


def clear(folder: epath.Path) -> None:
    """Deletes only the checkpoints of the folder."""
    _delete([*_found(folder), *_unfinished(folder)])


def _parts(state: TrainState) -> dict[str, Any]:
    training = {"step": state.step, "key": jax.random.key_data(state.key), "opt_state": state.opt_state}
    return {"model": state.model, "training": training}


def _is_remote(folder: epath.Path) -> bool:
    return "://" in str(folder)


def _is_staged(folder: epath.Path) -> bool:
    return _is_remote(folder) and not str(folder).startswith("gs://") or not _GLOB.isdisjoint(str(folder))


@contextlib.contextmanager
def _near(path: epath.Path) -> Iterator[epath.Path]:
    """The path itself or, if Orbax cannot use it, a path in a temporary folder instead."""
    if not _is_staged(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield epath.Path(folder) / path.name


def _copy(source: epath.Path, target: epath.Path) -> None:
    for file in sorted(_files(source), key=lambda file: file == source / _SUMS):  # the sums last
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())


def _delete(paths: Iterable[epath.Path]) -> None:
    for path in paths:
        (path / _SUMS).unlink(missing_ok=True)  # from now on no checkpoint, even if the rest is not deleted
        path.rmtree()


def _children(folder: epath.Path) -> list[epath.Path]:
    return [path for path in folder.iterdir() if path != folder] if folder.is_dir() else []


def _found(folder: epath.Path) -> list[epath.Path]:
    is_one = lambda path: (path / _SUMS).exists() if _is_remote(folder) else path.is_dir()
    return sorted((p for p in _children(folder) if p.name.isdecimal() and is_one(p)), key=lambda p: int(p.name))


def _from(folder: epath.Path, step: int) -> list[epath.Path]:
    """Checkpoints of this step and later: they are damaged, otherwise they would have been restored."""
    return [path for path in _found(folder) if int(path.name) >= step]


def _unfinished(folder: epath.Path) -> list[epath.Path]:
    left_behind = lambda path: path.name.partition(".")[0].isdecimal() and not (path / _SUMS).exists()
    return [
        path for path in _children(folder)
        if path.name.startswith(_UNFINISHED) or (_is_remote(folder) and left_behind(path))
    ]  # fmt: skip


def _newest_whole(folder: epath.Path, log: Callable[[str], None]) -> int:
    """The step of the newest whole checkpoint, ``_NONE`` or ``_ALL_DAMAGED``."""
    found = _found(folder)
    for path in reversed(found):
        sums = path / _SUMS
        if sums.exists() and sums.read_bytes() == _sums(path).encode():
            return int(path.name)
        log(f"The checkpoint {path} is damaged; falling back to the previous one.")
    return _ALL_DAMAGED if found else _NONE


def _checkpoint_of(folder: epath.Path, step: int, advice: str) -> epath.Path | None:
    if step == _ALL_DAMAGED:
        raise ValueError(f"folder={str(folder)!r} has no readable checkpoint; {advice}.")
    return None if step == _NONE else folder / f"{step:08d}"


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for child in _children(path):
        if child.is_dir():
            yield from _files(child)
        else:
            yield child


def _sums(path: epath.Path) -> str:
    lines = []
    for file in sorted(_files(path)):
        if file != path / _SUMS:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            lines.append(f"{digest.hexdigest()}  {file.relative_to(path)}\n")
    return "".join(lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's log of an error that it also raises."""
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _describe(parts: dict[str, Any]) -> dict[str, str]:
    leaves = jax.tree.leaves_with_path(parts)
    return {jax.tree_util.keystr(path): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in leaves}


def _load(path: epath.Path, template: dict[str, Any], advice: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    metadata = json.loads((path / _METADATA).read_text())
    there, wanted = metadata.pop("arrays"), _describe(template)
    there = {name: array for name, array in there.items() if any(name.startswith(f"['{part}']") for part in template)}
    for name in sorted({*there, *wanted}):
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"the checkpoint {path} belongs to another model or optimizer: at {name} it has "
                f"{there.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}; {advice}."
            )
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    context = ocp.Context()
    if jax.process_count() > 1:  # each process reads its part and waits for no other
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    with _near(path) as near, context:
        if near != path:
            _copy(path, near)
        return ocp.load_checkpointables(str(near), jax.tree.map(place, template)), metadata
