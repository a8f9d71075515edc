"""What all figures share: colours, dashes and markers, line breaks, and a legend that covers no curve."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax import _arguments, _validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without yellow, distinguishable with all common kinds of colour vision."""

DASHES = ("-", "--", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)))  # dotted lines are left for references
MARKERS = "os^DvPX<*"
PAD = 0.08  # inches around what is drawn


@_arguments.checked
def line_style(i: int) -> dict[str, Any]:
    """Returns the style of the i-th curve of a figure; 36 curves differ in dash or marker, so also in grey.

    Args:
      i: index of the curve, from 0.

    Returns:
      Keyword arguments for ``Axes.plot``.

    Example:
      >>> {name: plotting.line_style(1)[name] for name in ("color", "linestyle", "marker")}
      {'color': '#D55E00', 'linestyle': '--', 'marker': 's'}
    """
    _validate.at_least(0, i=i)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4.0,
        "linewidth": 1.4,
    }


def dense_style(i: int) -> dict[str, Any]:
    """As ``line_style``, for curves of many points: markers at a few places, and none on the first curve."""
    places = (0.03 + 0.03 * (i % 5), 0.17)
    return line_style(i) | ({"markevery": places} if i else {"marker": "None"})


def canvas(size: tuple[float, float], title: str | None) -> Figure:
    """A figure of the given size in inches, plus the height of its title."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=PAD, h_pad=PAD)
    figure = Figure(figsize=size, layout=layout)
    if title:
        grow(figure, figure.suptitle(wrapped(title, size[0] - 0.2, "medium"), fontsize="medium"))
    return figure


def plain_axes(size: tuple[float, float], title: str | None) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = canvas(size, title)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.locator_params(axis="x", nbins=max(2, int(size[0] / 0.7)))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def grow(figure: Figure, artist: Any) -> None:
    """Adds the height of the artist and some space to the height of the figure."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + artist.get_window_extent().height / figure.dpi + PAD)


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], *, title: str | None = None) -> None:
    """Puts the legend below the axes, in as many columns as fit, and makes room for it."""
    from matplotlib.font_manager import FontProperties

    size = "small" if len(names) <= 12 else "x-small"
    inches = figure.get_size_inches()[0] - 0.3
    beside = 0.55  # for each name: its handle, and the space between columns
    names = [wrapped(name, inches - beside, size) for name in names]
    widths = [beside + max(inches_of(line, size) for line in name.split("\n")) for name in names]
    # Matplotlib fills columns one by one, each as wide as its widest name.
    counts = [math.ceil(len(names) / rows) for rows in range(1, len(names) + 1)]
    fits = (sum(part.max() for part in np.array_split(widths, count)) <= inches for count in counts)
    columns = next((count for count, fit in zip(counts, fits, strict=True) if fit), 1)
    below = figure.legend(
        handles,
        names,
        title=title and wrapped(title, inches, size),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=size,
        title_fontsize=size,
        handlelength=24 / FontProperties(size=size).get_size_in_points(),  # in ems; two periods of the longest dash
        columnspacing=1.0,
    )
    grow(figure, below)


def log_ticks(axes: Axes, places: np.ndarray, width: float) -> None:
    """Makes the horizontal axis of a figure of ``width`` inches logarithmic, with ticks where there is room.

    The largest place always has a tick.
    """
    places = np.unique(places)
    inches = np.log(places / places[0]) * 0.9 * (width - 1.0) / (np.log(places[-1] / places[0]) or 1)
    kept, end = [], math.inf
    for place, centre in zip(places[::-1], inches[::-1], strict=True):
        half = inches_of(f"{place:g}", "medium") / 2
        if centre + half < end:
            kept.append(place)
            end = centre - half - 0.08
    axes.set_xscale("log")
    axes.set_xticks(kept[::-1], [f"{place:g}" for place in kept[::-1]])
    axes.set_xticks([], minor=True)


def inches_of(line: str, size: str | float) -> float:
    """Width of a line of text, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(line, FontProperties(size=size), ismath=False)[0] / 72


def wrapped(text: str, inches: float, size: str | float) -> str:
    """Breaks a text into lines of at most the given width: at spaces; then after , / _ and -; then anywhere."""

    def pieces(part: str, patterns: Sequence[str]) -> list[str]:
        if not patterns or inches_of(part.rstrip(), size) <= inches:
            return [part]
        return [piece for word in re.findall(patterns[0], part) for piece in pieces(word, patterns[1:])]

    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in pieces(paragraph, (r"\S+\s*", r"[^,/_-]*[,/_-]+|[^,/_-]+", ".")):
            if line and inches_of((line + piece).rstrip(), size) > inches:
                lines.append(line.rstrip())
                line = ""
            line += piece
        lines.append(line.rstrip())
    return "\n".join(lines)
