"""The command line of a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def command(config: type, run: Callable[[Any], Any], description: str | None) -> Any:
    """Parses the command line and calls ``run``; wrong settings end in one line.

    The command line of the experiments would turn on the user's cache of programs, which hides what compiling costs.
    """
    import tyro

    spec = sys.modules["__main__"].__spec__
    prog = f"python -m {spec.name}" if spec else None
    try:
        return run(tyro.cli(config, description=description, prog=prog))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
