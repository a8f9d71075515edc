"""What experiments share: the run folder, files written whole or not at all, and the command line."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import inspect
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import _runtime
from robustjax import training


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all, whenever the process dies."""
    path, content = epath.Path(path), content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if _runtime.is_remote(path):  # object stores show an object when all of it has come
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
    """What a folder holds under names such as ``*.npz``, in order; nothing, where there is no folder.

    Unlike a glob it leaves the name of the folder alone, which may hold a bracket.
    """
    return sorted(p for p in folder.iterdir() if fnmatch.fnmatch(p.name, pattern)) if folder.is_dir() else []


def write_rows(path: epath.PathLike, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file with these columns, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def write_arrays(path: epath.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes an npz file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_arrays(path: epath.PathLike, *, leave_out: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Reads an npz file; ValueError that says what to do for one that is damaged."""
    try:
        with io.BytesIO(epath.Path(path).read_bytes()) as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays if name not in leave_out}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to make it again.") from error


def png_of(figure) -> bytes:
    """A figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def open_run(folder: epath.Path, config: Any, *, same: tuple[str, ...], overwrite: bool) -> None:
    """Makes the run folder, or takes up the run that is in it; of many processes the first does, and the others wait.

    Args:
      folder: of the run.
      config: frozen dataclass, written as ``config.json``.
      same: fields that may differ between the run there and the one that takes it up.
      overwrite: whether a run that is there is deleted first.

    Raises:
      ValueError: the folder belongs to a run with another config, or holds something else.
    """
    if jax.process_index() == 0:
        _open_run(folder, config, same, overwrite)
    _runtime.barrier("run folder")


def _open_run(folder: epath.Path, config: Any, same: tuple[str, ...], overwrite: bool) -> None:
    path = folder / "config.json"
    ours = {"run": folder.parent.name, **json.loads(json.dumps(dataclasses.asdict(config)))}
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder {folder} is a file; use another name.")
        if folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith(".unfinished")):
            raise ValueError(f"folder {folder} holds files but no config.json, so it is no run; use another name.")
        write_whole(path, json.dumps(ours, indent=1) + "\n")
        return
    try:
        theirs = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); delete the folder to start anew.") from error
    if not isinstance(theirs, dict) or theirs.get("run") != ours["run"]:
        raise ValueError(f"folder {folder} is no run of this experiment; use another name.")
    checkpoint = getattr(config, "checkpoint", None)
    if checkpoint is not None and folder.resolve() in ((p := epath.Path(checkpoint).resolve()), *p.parents):
        raise ValueError(f"checkpoint must be another run than the one in {folder}, got {checkpoint}.")
    if overwrite:  # only what is known to be a run of ours
        folder.rmtree()
        return _open_run(folder, config, same, overwrite=False)
    names = [name for name in {**theirs, **ours} if name not in same and theirs.get(name) != ours.get(name)]
    if names:
        text = ", ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now" for name in names)
        raise ValueError(
            f"folder {folder} belongs to a run with another config ({text}); "
            "choose another --name, or pass --overwrite to start anew."
        )


def settings_of(checkpoint: str, *, flag: str = "checkpoint", **wanted: Any) -> dict[str, Any]:
    """The config of another run, which ``flag`` named.

    Raises:
      ValueError: there is none, or a setting is not the one that is wanted.
    """
    path = epath.Path(checkpoint) / "config.json"
    try:
        theirs = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} must be the folder of a run, but {path} cannot be read ({error}).") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"{flag} must be the folder of a run, but {path} holds no settings.")
    for name, value in wanted.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{flag} {checkpoint} has {name} {theirs.get(name)}, got {value}; pass --{name} {theirs.get(name)}."
            )
    return theirs


def progress_bar(console: Console) -> Progress:
    """A bar with a free text, shown where ``console`` is a terminal."""
    return Progress(
        TextColumn("{task.fields[task_name]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def arguments(config: type, run: Callable[..., Any]) -> Any:
    """A command line as a dataclass: the fields of ``config`` and, where ``run`` takes a runtime, those of it."""
    import tyro

    parts = {"config": config} | (
        {"runtime": _runtime.Runtime} if "runtime" in inspect.signature(run).parameters else {}
    )
    fields = [(name, tyro.conf.OmitArgPrefixes[part]) for name, part in parts.items()]
    return dataclasses.make_dataclass("Arguments", fields)


def command_line(config: type, run: Callable[..., Any], description: str | None) -> None:
    """Parses the command line and calls ``run``; errors that speak to the user end without a trace."""
    import tyro

    spec = sys.modules["__main__"].__spec__
    runtime = _runtime.HERE
    try:
        prog = f"python -m {spec.name}" if spec else None
        parts = vars(tyro.cli(arguments(config, run), description=description, prog=prog))
        runtime = parts.get("runtime", runtime)
        with _runtime.started(runtime):
            run(**parts)
        return
    except training.Preempted as error:
        sys.stderr.write(f"{error}\n")
        if runtime.coordinator is not None:
            sys.stderr.flush()
            time.sleep(2 if jax.process_index() == 0 else 0)  # without the first, JAX ends the others with an error
            os._exit(0)
        return
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "interrupted; the same command continues from here."
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = (
            f"error: another process ended or cannot be reached ({str(error).splitlines()[0]}); "
            "start all of them again to continue from what is written."
        )
    if runtime.coordinator is not None:
        # At its end each process waits for the others, which may be waiting for this one.
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        os._exit(1)
    sys.exit(message)
