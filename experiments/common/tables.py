"""Tables and reports: one notation for mean and spread, on the console and in ``report.md``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from rich import table as rich_table
from rich.console import Console
from rich.markup import escape

from experiments.common import files, runtimes


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      title: one line above it.
      headers: of the columns; the first column names the rows.
      rows: cells; one between ``**`` is printed bold.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def mean_and_sd(values: Any, form: str = ".3f") -> str:
    """Mean and sample standard deviation as ``0.912 (0.004)``; of one value, that value; ``-`` where one is NaN."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    if not values.size or np.isnan(values).any():
        return "-"
    mean = f"{values.mean():{form}}"
    return f"{mean} ({sd(values):{form}})" if values.size > 1 else mean


def sd(values: np.ndarray) -> float:
    """Sample standard deviation of two or more values: exactly 0 where all are equal, NaN where some are infinite."""
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
    """Prints a table; columns that do not fit side by side follow below, each part with the names of the rows."""
    width = lambda column: max(len(str(cells[column]).replace("**", "")) for cells in (table.headers, *table.rows))
    widths = [width(column) + 2 for column in range(len(table.headers))]
    first = 1
    while first < len(widths) or first == 1:
        last = first + 1
        while last < len(widths) and widths[0] + sum(widths[first : last + 1]) <= console.width:
            last += 1
        title = escape(table.title if first == 1 else f"{table.title}, continued")
        printed = rich_table.Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in (0, *range(first, min(last, len(widths)))):
            justify = "right" if column else "left"
            printed.add_column(escape(table.headers[column]), justify=justify, no_wrap=bool(column))
        for cells in table.rows:
            texts = [str(cells[column]) for column in (0, *range(first, min(last, len(widths))))]
            printed.add_row(*(f"[bold]{escape(t.strip('*'))}[/]" if t.startswith("**") else escape(t) for t in texts))
        console.print(printed)
        first = last


def report(
    folder: epath.Path,
    config: Any,
    console: Console,
    stopwatch: runtimes.Stopwatch,
    *,
    title: str,
    parts: Sequence[Table | str],
    details: Sequence[Table | str] = (),
    figures: Mapping[str, Any] | None = None,
    figure_format: str = "png",
) -> None:
    """Prints tables and sentences; writes them with the figures and the settings of ``config`` to ``report.md``.

    Args:
      folder: of the run.
      config: dataclass whose fields are the settings.
      console: where it is printed.
      stopwatch: of the call.
      title: of the report.
      parts: printed and written, in this order.
      details: written only.
      figures: Matplotlib figures by name, written to ``figures/NAME.FORMAT``.
      figure_format: ``png`` or ``pdf``.
    """
    text = [f"# {title}"]
    for part in parts:
        show(console, part) if isinstance(part, Table) else console.print(part, highlight=False, markup=False)
    for part in (*parts, *details):
        text += ["", part] if isinstance(part, str) else ["", f"## {part.title}", "", *markdown(part)]
    for name, figure in (figures or {}).items():
        file = f"figures/{name}.{figure_format}"
        files.write_whole(folder / file, files.figure_bytes(figure, figure_format))
        text += ["", f"![{name}]({file})" if figure_format == "png" else f"[{name}]({file})"]
    settings = [(name, str(value)) for name, value in dataclasses.asdict(config).items()]
    text += ["", stopwatch.told(), "", *markdown(Table("", ["setting", "value"], settings))]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    console.print(f"Run folder: {folder}", soft_wrap=True, highlight=False, markup=False)
