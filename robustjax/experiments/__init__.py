"""The experiments as a part of the package: ``from robustjax.experiments import evaluate``.

An installed package has them in this folder. In a checkout they are the folder ``experiments`` at the top, which is
added to where this package looks for its modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
from types import ModuleType

_NEEDED = ("markdown_it", "platformdirs", "tyro")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ModuleNotFoundError(
        f'robustjax.experiments needs {", ".join(_missing)}: pip install "robustjax[experiments]"', name=_missing[0]
    )

if not pathlib.Path(__path__[0], "common").is_dir():
    __path__.append(str(pathlib.Path(__file__).parents[2] / "experiments"))


def __getattr__(name: str) -> ModuleType:
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
