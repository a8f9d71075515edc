"""Tables and reports: one notation for mean and spread, on the console and in ``report.md``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from . import files, runtimes


class Table(NamedTuple):
    """A table of texts."""

    title: str  # one line above it
    headers: Sequence[str]  # of the columns; the first column names the rows
    rows: Sequence[Sequence[str]]  # cells; one between ``**`` is printed bold


class Picture(NamedTuple):
    """A figure between the tables and sentences of a report."""

    name: str  # of its file in ``figures``
    figure: Any  # a Matplotlib figure


def mean_and_sd(values: Any, form: str = ".3f") -> str:
    """Mean and sample standard deviation as ``0.912 (0.004)``; of one value, that value; ``-`` where one is NaN."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    if not values.size or np.isnan(values).any():
        return "-"
    mean = f"{values.mean():{form}}"
    return f"{mean} ({sd(values):{form}})" if values.size > 1 else mean


def sd(values: np.ndarray) -> float:
    """Sample standard deviation of two or more values: exactly 0 where all are equal, NaN where one is infinite."""
    with np.errstate(invalid="ignore"):
        return float(values.std(ddof=1)) if (values != values[0]).any() else 0.0


def over_seeds(count: int) -> str:
    """Says what :func:`mean_and_sd` shows: ``mean (sd) over 3 seeds``, or ``one seed``."""
    return f"mean (sd) over {count} seeds" if count > 1 else "one seed"


def markdown(table: Table) -> list[str]:
    """The lines of a Markdown table, without its title."""
    line = lambda cells: " | ".join(["", *(str(cell).replace("|", r"\|") for cell in cells), ""]).strip()
    return [line(table.headers), f"|{'---|' * len(table.headers)}", *map(line, table.rows)]


def show(console: Console, table: Table) -> None:
    """Prints a table; numbers that do not fit side by side follow below, each part with the names of the rows."""
    columns = [[str(cell) for cell in column] for column in zip(table.headers, *table.rows, strict=True)]
    numeric = [all(re.match(r"[-+*]*[\d.]|-?$", cell) for cell in cells) for _, *cells in columns]
    widths = [max(len(cell.replace("**", "")) for cell in column) + 2 for column in columns]
    widths = [width if number else min(width, 40) for width, number in zip(widths, numeric, strict=True)]
    first, title = 1, table.title
    while first < len(columns):
        last = first + 1
        while last < len(columns) and widths[0] + sum(widths[first : last + 1]) <= console.width:
            last += 1
        shown = (0, *range(first, last))
        printed = rich_table.Table(box=None, padding=(0, 2, 0, 0))
        for i in shown:
            right = bool(i) and numeric[i]
            printed.add_column(escape(columns[i][0]), justify="right" if right else "left", no_wrap=right)
        for cells in zip(*(columns[i][1:] for i in shown), strict=True):
            printed.add_row(*(f"[bold]{escape(c.strip('*'))}[/]" if c.startswith("**") else escape(c) for c in cells))
        console.print(f"\n[italic]{escape(title)}[/]", highlight=False)
        console.print(printed)
        first, title = last, f"{table.title}, continued"


def drawn(folder: epath.Path, picture: Picture, figure_format: str = "png") -> str:
    """Writes a figure to ``figures/NAME.FORMAT``; the Markdown that shows it."""
    file = f"figures/{picture.name}.{figure_format}"
    files.write_whole(folder / file, files.figure_bytes(picture.figure, figure_format))
    return f"![{picture.name}]({file})" if figure_format == "png" else f"[{picture.name}]({file})"


def report(
    folder: epath.Path,
    config: Any,
    console: Console,
    stopwatch: runtimes.Stopwatch,
    *,
    title: str,
    parts: Sequence[Table | str],
    details: Sequence[Table | Picture | str] = (),
    figures: Mapping[str, Any] | None = None,
    figure_format: str = "png",
) -> None:
    """Prints tables and sentences; writes them with the figures and the settings of ``config`` to ``report.md``.

    ``parts`` are printed and written in this order, ``details`` and ``figures`` only written; Matplotlib figures go to
    ``figures/NAME.FORMAT``.
    """
    text = [f"# {title}"]
    for part in parts:
        show(console, part) if isinstance(part, Table) else console.print(part, highlight=False, markup=False)
    for part in (*parts, *details, *(Picture(*each) for each in (figures or {}).items())):
        if isinstance(part, str):
            text += ["", part]
        elif isinstance(part, Table):
            text += ["", f"## {part.title}", "", *markdown(part)]
        else:
            text += ["", drawn(folder, part, figure_format)]
    settings = [(name, str(value)) for name, value in dataclasses.asdict(config).items()]
    text += ["", stopwatch.told(), "", *markdown(Table("", ["setting", "value"], settings))]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
