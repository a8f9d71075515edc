"""Records of measurements: the files that the catalogue is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from robustjax import _paths

from ..common import files

HAS = ("study", "seeds", "seconds", "settings", "different", "claims")


def read(path: epath.PathLike) -> dict[str, Any]:
    """A record; ValueError that names the file if it holds something else."""
    return files.read_json(path, *HAS, advice="delete it, and record again")


def place(folder: str, name: str, seeds: int, different: Mapping[str, Any]) -> epath.Path:
    """Where a record goes.

    Raises:
      ValueError: ``folder`` is a file, or holds a record of that name that has more seeds or other settings.
    """
    parent = _paths.path_of(record=folder)
    path = parent / f"{name}.json"
    if parent.exists() and not parent.is_dir():
        raise ValueError(f"record must be a folder, but {parent} is a file.")
    if path.exists():
        there = read(path)
        if there["seeds"] > seeds:
            raise ValueError(
                f"seeds must be at least {there['seeds']}, as in the record {path}, got {seeds}; delete the record to "
                "replace it by one of fewer seeds."
            )
        if there["different"] != json.loads(json.dumps(different)):
            raise ValueError(f"name must be another one, since {path} is a record of other settings.")
    return path
