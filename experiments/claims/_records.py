"""Records of measurements: the files that the catalogue is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

HAS = ("study", "seeds", "seconds", "settings", "different", "claims")


def read(path: epath.PathLike) -> dict[str, Any]:
    """A record; ValueError that names the file if it holds something else."""
    try:
        record = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and record again.") from error
    lacks = [name for name in HAS if name not in record] if isinstance(record, dict) else HAS
    if lacks:
        raise ValueError(f"{path} is no record, it lacks {', '.join(lacks)}; delete it, and record again.")
    return record


def place(folder: str, name: str, seeds: int, different: Mapping[str, Any]) -> epath.Path:
    """Where a record goes.

    Raises:
      ValueError: ``folder`` is a file, or holds a record of that name that has more seeds or other settings.
    """
    parent, path = epath.Path(folder), epath.Path(folder) / f"{name}.json"
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
