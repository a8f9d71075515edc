"""The experiments of the package: the command ``robustjax``, and ``from robustjax.experiments import NAME``.

In a checkout they are its folder ``experiments``; in an installed package they lie inside of ``robustjax``, so that no
package of that name stands among everybody's packages. They are found when the first of them is used.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import pathlib
import runpy
import sys
from typing import Any

COMMANDS = {
    "evaluate": "how far a trained model can be trusted: accuracy, certificates, attacks, foreign inputs",
    "smoothing": "train with noise and certify by randomized smoothing",
    "ood": "train and compare out-of-distribution detectors",
    "adversarial": "train and attack",
    "claims": "measure the claims of papers over several seeds",
}
"""Commands, and what they do."""


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    _find()
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"experiments.{name}":
            raise
        raise AttributeError(f"robustjax has no experiment {name!r}; it has {', '.join(COMMANDS)}.") from error


def _find() -> None:
    """Makes ``experiments`` importable: of the checkout, which is found already, or of the installed package."""
    here = pathlib.Path(__file__).parent
    for place in (here / "_installed", here.parent):
        if (place / "experiments" / "common").is_dir() and str(place) not in sys.path:
            sys.path.insert(0, str(place))
            return


def main() -> None:
    """The command line ``robustjax COMMAND ...``."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:12} {about}" for name, about in COMMANDS.items()]
        print("usage: robustjax COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nrobustjax COMMAND --help has more.")  # noqa: T201
        return
    if command == "--version":
        print(importlib.metadata.version("robustjax"))  # noqa: T201
        return
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(COMMANDS)}."
        sys.exit(f"error: there is no command {command!r}; {hint}")
    _find()
    vars(importlib.import_module("experiments.common.command_line"))["PROG"] = f"robustjax {command}"
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module(f"experiments.{command}", run_name="__main__", alter_sys=True)
