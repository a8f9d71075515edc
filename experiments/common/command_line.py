"""The command line of an experiment: a config, a runtime, and errors of one line.

Lists are tuples, with spaces between their elements: ``--detectors energy knn``, ``--epsilons 2/255 8/255``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from robustjax import training

from . import runtimes


def number(text: str) -> float:
    """A number or a fraction, as on the command line; ValueError for other texts."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"must be a number or a fraction, such as 0.1 or 8/255, got {text!r}.") from error


Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda texts: number(texts[0]),
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


def wrapped(text: str, width: int) -> str:
    """A docstring for the terminal; a command longer than a line continues below, after a backslash."""
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        prose = not block.startswith(("python -m ", "robustjax "))
        if prose and all(line[:1].isalpha() for line in block.splitlines()):
            lines += textwrap.wrap(block, width, break_long_words=False, break_on_hyphens=False)
        else:
            for line in block.splitlines():
                parts = textwrap.wrap(
                    line, width - 2, subsequent_indent=8 * " ", break_long_words=False, break_on_hyphens=False
                ) or [""]
                lines += [*(f"{part} \\" for part in parts[:-1]), parts[-1]]
        lines.append("")
    return "\n".join(lines[:-1])


def as_called(text: str) -> str:
    """Commands as they are called here: ``robustjax NAME`` where the experiments are a part of the package."""
    return text.replace("python -m experiments.", "robustjax ") if __name__.startswith("robustjax.") else text


def _parsed(arguments: type, description: str | None) -> dict[str, Any]:
    """The fields of the command line; help ends the process."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__").removeprefix("robustjax.") if spec else None
    prog = as_called(f"python -m {name}") if name else None
    place, shown = "DESCRIPTION", io.StringIO()  # tyro would put each paragraph on one line
    shown.isatty = sys.stdout.isatty
    try:
        with contextlib.redirect_stdout(shown):
            return vars(tyro.cli(arguments, description=place, prog=prog, config=(tyro.conf.FlagCreatePairsOff,)))
    finally:
        width = min(shutil.get_terminal_size().columns, 120)
        sys.stdout.write(shown.getvalue().replace(place, wrapped(as_called(description or ""), width), 1))


def _comma_hint(message: str = "") -> str:
    """Says how lists are written, if the command line has one with commas that the message does not explain."""
    values = [text.partition("=")[2] if text.startswith("--") else text for text in sys.argv[1:]]
    named = [v for v in values if "," in v and "=" not in v and (not message or v in message)]
    return "Lists are separated by spaces, not commas, such as --norms linf l2.\n" if named else ""


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
    runtime = runtimes.HERE
    try:
        try:
            parts = _parsed(arguments, description)
        except SystemExit as error:
            sys.stderr.write(_comma_hint() if error.code else "")
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
        hint = "" if "not commas" in str(error) else _comma_hint(str(error))
        message = f"error: {error}\n{hint}".rstrip()
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
