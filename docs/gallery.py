"""The pictures of the gallery, made by the commands under them: ``python docs/gallery.py``.

The page docs/gallery.md names for each picture the commands that make it and the file in which they leave it. A command
runs as it stands there, in a folder of its own, and only if its picture is missing; what is in the folder is resumed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

from PIL import Image

DOCS = pathlib.Path(__file__).resolve().parent
LARGEST = 80_000  # bytes of a picture


class Picture(NamedTuple):
    """A picture of the page.

    Attributes:
      path: where the page has it, below ``docs``.
      commands: what makes it.
      source: the file that these leave, below the folder in which they run.
    """

    path: str
    commands: list[str]
    source: str


def pictures(text: str) -> list[Picture]:
    """The pictures of a page; the block of commands below each ends with its file as a comment."""
    found = re.findall(r"!\[[^\]]*\]\((gallery/\w+\.png)\)\s+```sh\n(.*?)\n# (results/\S+)\n```", text, re.DOTALL)
    return [Picture(path, commands.splitlines(), source) for path, commands, source in found]


def make(picture: Picture, folder: pathlib.Path) -> None:
    """Runs the commands of a picture where it is missing, and copies it to the page, with 64 colours.

    Raises:
      ValueError: the copy is larger than a page should load.
    """
    source, target = folder / picture.source, DOCS / picture.path
    environment = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    for command in [] if source.exists() else picture.commands:
        sys.stderr.write(f"{command}\n")
        arguments = [sys.executable, *shlex.split(command)[1:]]
        subprocess.run(arguments, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    target.parent.mkdir(exist_ok=True)
    Image.open(source).convert("RGB").quantize(64).save(target, optimize=True)
    if (size := target.stat().st_size) > LARGEST:
        raise ValueError(f"{target} must have at most {LARGEST:,} bytes, got {size:,}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="results/gallery", help="where the folder results is, or will be")
    place = pathlib.Path(parser.parse_args().folder)
    place.mkdir(parents=True, exist_ok=True)
    for each in pictures((DOCS / "gallery.md").read_text()):
        make(each, place)
