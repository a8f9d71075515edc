"""The command line of an experiment: a config, a runtime, and errors of one line.

Lists are tuples, with spaces between their elements: ``--detectors energy knn``, ``--epsilons 2/255 8/255``.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.common import runtimes
from robustjax import training


def _number(text: str) -> float:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"must be a number or a fraction, such as 0.1 or 8/255, got {text!r}.") from error


Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda texts: _number(texts[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]
"""A field that takes 0.03 as well as 8/255."""


def progress_bar(console: Console) -> Progress:
    """A bar with a free text, shown where ``console`` is a terminal."""
    return Progress(
        TextColumn("{task.fields[task_name]}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def arguments(config: type, run: Callable[..., Any]) -> Any:
    """A command line as a dataclass: the fields of ``config`` and, where ``run`` takes a runtime, its fields."""
    parts = {"config": config} | (
        {"runtime": runtimes.Runtime} if "runtime" in inspect.signature(run).parameters else {}
    )
    fields = [(name, tyro.conf.OmitArgPrefixes[part]) for name, part in parts.items()]
    return dataclasses.make_dataclass("Arguments", fields)


def command_line(config: type, run: Callable[..., Any], description: str | None) -> None:
    """Parses the command line and calls ``run``; errors of the user end without a trace."""
    call(arguments(config, run), run, description)


def call(arguments: type, run: Callable[..., Any], description: str | None) -> None:
    """Parses the fields of a dataclass and calls ``run`` with them, as :func:`command_line` does."""
    spec = sys.modules["__main__"].__spec__
    runtime = runtimes.HERE
    try:
        prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
        try:
            parts = vars(
                tyro.cli(arguments, description=description, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
            )
        except SystemExit as error:
            if error.code and any("," in text and "=" not in text for text in sys.argv[1:]):
                sys.stderr.write("Lists are separated by spaces, not commas, such as --norms linf l2.\n")
            raise
        runtime = parts.get("runtime", runtime)
        with runtimes.started(runtime):
            run(**parts)
        return
    except training.Preempted as error:
        sys.stderr.write(f"{error}\n")
        if runtime.coordinator is not None:
            sys.stderr.flush()
            time.sleep(2 if jax.process_index() == 0 else 0)  # without the first, JAX ends the others with an error
            os._exit(0)
        return
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "interrupted; the same command continues from here."
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        message = (
            f"error: another process ended or cannot be reached ({str(error).splitlines()[0]}); "
            "start all of them again to continue from what is written."
        )
    if runtime.coordinator is not None:
        # At its end each process waits for the others, which may be waiting for this one.
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        os._exit(1)
    sys.exit(message)
