"""The run folder: a config belongs to it, and another config is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from robustjax import _paths

from . import files, runtimes

ALWAYS_SAME = ("results_dir", "name", "overwrite", "data_dir", "figure_format", "list")
"""Fields that never make it another run."""


def run_folder(results_dir: str, experiment: str, name: str) -> epath.Path:
    """``RESULTS_DIR/EXPERIMENT/NAME``; ValueError for a name that is no folder name."""
    if name in ("", ".", "..") or epath.Path(name).name != name:
        raise ValueError(f"name must be the name of a folder, got {name!r}.")
    return _paths.path_of(results_dir=results_dir) / experiment / name


def open_run(
    folder: epath.Path,
    config: Any,
    *,
    same: tuple[str, ...] = (),
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Makes the run folder, or resumes the run in it; the first of many processes does, and the others wait.

    ``config.json`` holds the config, a dataclass, the version, and other ``notes``. When a run is resumed, version and
    notes may differ, and so may the fields ``same`` and ``ALWAYS_SAME``. ValueError for a folder that belongs to a run
    with another config, or holds something else; ``overwrite`` deletes an existing run first.
    """
    notes = {"version": importlib.metadata.version("robustjax"), **(notes or {})}
    if jax.process_index() == 0:
        _open_run(folder, config, (*ALWAYS_SAME, *same, *notes), overwrite, notes)
    runtimes.barrier("run folder")


def _open_run(
    folder: epath.Path, config: Any, same: tuple[str, ...], overwrite: bool, notes: Mapping[str, Any]
) -> None:
    path = folder / "config.json"
    ours = {"run": folder.parent.name, **notes, **json.loads(json.dumps(dataclasses.asdict(config)))}
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder {folder} is a file; use another name.")
        if folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith(".unfinished")):
            raise ValueError(f"folder {folder} holds files but no config.json, so it is not a run; use another name.")
        files.write_whole(path, json.dumps(ours, indent=1) + "\n")
        return
    theirs = files.read_json(path, advice="delete the folder to start again")
    if theirs.get("run") != ours["run"]:
        raise ValueError(f"folder {folder} is not a run of this experiment; use another name.")
    checkpoint = getattr(config, "checkpoint", None)
    there = None if checkpoint is None else _paths.path_of(checkpoint=checkpoint).resolve()
    if there is not None and folder.resolve() in (there, *there.parents):
        raise ValueError(f"checkpoint must not be the run folder itself, {folder}, got {checkpoint}.")
    if overwrite:  # only now: it is a run of this experiment
        folder.rmtree()
        return _open_run(folder, config, same, False, notes)
    names = [name for name in {**theirs, **ours} if name not in same and theirs.get(name) != ours.get(name)]
    if names:
        text = ", ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now" for name in names)
        raise ValueError(
            f"folder {folder} belongs to a run with another config ({text}); "
            "choose another --name, or pass --overwrite to start again."
        )
    if theirs.get("version", notes["version"]) != notes["version"]:
        runtimes.log(f"{folder} was begun by version {theirs['version']}; what is there is not computed again.")


def settings_of(checkpoint: str, *, flag: str = "checkpoint", **wanted: Any) -> dict[str, Any]:
    """The config of another run, the folder that ``flag`` gives.

    Raises:
      ValueError: it cannot be read, or a setting differs from the one that is wanted.
    """
    path = _paths.path_of(**{flag: checkpoint}) / "config.json"
    theirs = files.read_json(path, error=f"{flag} must be the folder of a run, but ", advice="name another folder")
    for name, value in wanted.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{flag} {checkpoint} has {name} {theirs.get(name)}, not {value}; pass --{name} {theirs.get(name)}."
            )
    return theirs
