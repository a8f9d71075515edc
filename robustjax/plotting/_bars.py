"""Bar charts of means over runs, with the single runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from robustjax import _arguments, _validate
from robustjax.plotting import _canvas
from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "oo", "||||")


@_arguments.checked
def bar_chart(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    label: str,
    start: float = 0.0,
    title: str | None = None,
    panel_width: float = 5.0,
    row_inches: float = 0.3,
) -> Figure:
    """Draws one group of horizontal bars for each entry: the mean over runs, and every run as a point.

    Args:
      values: for each entry and each series, one number for each run, such as the AUROC of each seed.
      label: label of the value axis.
      start: value at which the bars begin, such as 0.5 (chance) for AUROC.
      title: title above the axes, or None.
      panel_width: width of the axes, in inches.
      row_inches: height of a bar, in inches.

    Returns:
      A matplotlib ``Figure``, the first entry on top.

    Raises:
      ValueError: for no entry, series or run, or entries with different series.

    Example:
      >>> auroc = {"energy": {"digits": [0.91, 0.93]}, "knn": {"digits": [0.97, 0.95]}}  # two seeds each
      >>> figure = plotting.bar_chart(auroc, label="AUROC", start=0.5)
      >>> [f"{bar.get_x() + bar.get_width():.2f}" for bar in figure.axes[0].patches]
      ['0.92', '0.96']
    """
    _validate.positive(panel_width=panel_width, row_inches=row_inches)
    _validate.finite_number(start=start)
    if not values:
        raise ValueError("values must have at least one entry, got none.")
    series = list(next(iter(values.values())))
    if any(list(entry) != series for entry in values.values()):
        raise ValueError(f"values must have the series {series} of the first entry in every entry.")
    if not series or not all(np.size(runs) for entry in values.values() for runs in entry.values()):
        raise ValueError("values must have at least one series, and each series at least one run, got none.")
    thickness = 0.8 / len(series)
    names = [_canvas.wrapped(name, 0.35 * panel_width, "small") for name in values]
    lines = max(name.count("\n") + 1 for name in names)
    group = max(row_inches * max(1.0, 0.6 * len(series)), 0.16 * lines + 0.06)
    figure, axes = _canvas.plain_axes((panel_width, group * len(values) + 0.6), title)
    places = np.arange(len(values), dtype=np.float64)
    for i, name in enumerate(series):
        runs = [np.atleast_1d(np.asarray(entry[name], np.float64)) for entry in values.values()]
        here = places + (i - (len(series) - 1) / 2) * thickness
        style = {"color": _canvas.COLOURS[i % len(_canvas.COLOURS)], "hatch": HATCHES[i % len(HATCHES)]}
        length = [run.mean() - start for run in runs]
        axes.barh(here, length, thickness, left=start, label=name, edgecolor="white", linewidth=0, **style)
        for place, run in zip(here, runs, strict=True):
            axes.plot(run, np.full(run.size, place), "o", color="black", markersize=2)
    axes.axvline(start, color="black", linewidth=0.8)
    axes.set(xlabel=_canvas.wrapped(label, 0.65 * panel_width, "medium"), ylim=(len(values) - 0.5, -0.5))
    axes.set_yticks(places, names, fontsize="small")
    axes.grid(visible=False, axis="y")
    _canvas.legend(figure, *axes.get_legend_handles_labels())
    return figure
