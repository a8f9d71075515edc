"""Writes the docstrings as pages: ``python docs/build.py [FOLDER]``; ``results/docs`` by default, extra ``docs``."""

import pathlib
import sys
import types
import warnings

import pdoc

import robustjax


def is_face(module: object) -> bool:
    """Whether this is a public module that only shows what private ones define."""
    names = vars(module) if isinstance(module, types.ModuleType) else {}
    shown = [value for name, value in names.items() if not name.startswith("_")]
    return bool(shown) and not any(getattr(value, "__module__", None) == module.__name__ for value in shown)


if __name__ == "__main__":
    rooms = [room for room in vars(robustjax).values() if hasattr(room, "__path__")]
    faces = [module for room in rooms for module in vars(room).values() if is_face(module)]
    for room in [*rooms, *faces]:  # pdoc shows what stands in __all__; rooms and their faces re-export
        room.__all__ = [public for public in vars(room) if not public.startswith("_")]
        assert room.__all__, room
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # jaxtyping's shapes are no Python names
    pdoc.render.configure(docformat="google", math=True)
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "results/docs")
    pdoc.pdoc("robustjax", output_directory=folder)
    sys.stdout.write(f"{folder / 'robustjax.html'}\n")
