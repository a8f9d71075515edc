"""Paths that users give, and folders that are made there."""

from __future__ import annotations

import os
import re
from typing import Any

from etils import epath


def path_of(**given: Any) -> epath.Path:
    """The path that an argument holds, given by its name; ``~`` is the home folder.

    Raises:
      ValueError: it is no path, or a URL that :mod:`etils.epath` does not know.
    """
    [(name, value)] = given.items()
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    wanted = f"{name} must be a path, or a URL such as gs://bucket/runs, got {text!r:.200}"
    if not isinstance(text, str):
        raise ValueError(f"{wanted}.")
    if text.startswith("file:/"):
        raise ValueError(f"{wanted}; pass {re.sub('^file:/+', '/', text)!r}.")
    if re.match(r"[a-z0-9]+:/(?!/)", text):
        raise ValueError(f"{wanted}, which lost a slash; pass it as text or as etils.epath.Path.")
    try:
        return epath.Path(text).expanduser()
    except KeyError as error:  # an unknown scheme
        raise ValueError(f"{wanted}.") from error


def make_folder(folder: epath.Path) -> None:
    """Makes a folder and its parents, unless they are there; ValueError that names what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        wrong = [part for part in (*reversed(folder.parents), folder) if os.path.lexists(part) and not part.is_dir()]
        if not wrong:
            raise
        what = f"a link to {os.readlink(wrong[0])}, which is missing" if os.path.islink(wrong[0]) else "a file"
        raise ValueError(f"{wrong[0]} must be a folder, but it is {what}; delete it, or use another folder.") from error
