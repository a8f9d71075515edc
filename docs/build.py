"""Writes the docstrings as pages: ``python docs/build.py [FOLDER]``; ``results/docs`` by default, extra ``docs``."""

import pathlib
import sys
import warnings

import pdoc

import robustjax

if __name__ == "__main__":
    rooms = [room for room in vars(robustjax).values() if hasattr(room, "__path__")]
    packages = [robustjax.certification.conformal, robustjax.certification.halfspaces]
    for room in [*rooms, *packages]:  # pdoc shows what stands in __all__; rooms re-export
        room.__all__ = [public for public in vars(room) if not public.startswith("_")]
        assert room.__all__, room
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # jaxtyping's shapes are no Python names
    pdoc.render.configure(docformat="google", math=True)
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "results/docs")
    pdoc.pdoc("robustjax", output_directory=folder)
    sys.stdout.write(f"{folder / 'robustjax.html'}\n")
