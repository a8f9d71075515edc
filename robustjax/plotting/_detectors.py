"""Figures of detectors' scores: histograms and receiver operating characteristics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from robustjax import _arguments, _validate, metrics
from robustjax.plotting import _canvas
from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@_arguments.checked
def score_histograms(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    *,
    most: int | None = 8,
    num_bins: int = 30,
    columns: int = 3,
    title: str | None = None,
    panel_size: tuple[float, float] = (3.2, 2.1),
) -> Figure:
    """Draws how the scores of each detector are distributed, one panel for each.

    All sets of a panel share bins, which span the central 99 % of the scores; the other scores are in the outermost
    bins. Each histogram has area 1, so that sets of different sizes can be compared. The first set is drawn as bars,
    every other set as a line through the centres of its bins.

    Args:
      scores: for each detector, ``(n,)`` scores of each set; the first set is the in-distribution one.
      most: number of detectors to show: the detectors with the largest AUROC of the first set against all others
        together, in the given order; the figure says how many are left out. None shows all of them.
      num_bins: number of bins of each histogram.
      columns: number of panels in a row.
      title: title above the panels, or None.
      panel_size: size of a panel, in inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no detector, a set without scores, scores with NaN, or ``most`` < 1.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> sets = {"digits": rng.normal(size=100), "letters": rng.normal(2, size=100)}
      >>> figure = plotting.score_histograms({"energy": sets, "knn": sets})
      >>> [axes.get_title() for axes in figure.axes]
      ['energy', 'knn']
    """
    _validate.at_least(1, num_bins=num_bins, columns=columns)
    checked = _detectors(scores, most)
    areas = {name: _separation(list(sets.values())) for name, sets in checked.items()}
    kept = set(sorted(areas, key=areas.__getitem__, reverse=True)[:most])
    columns = min(columns, len(kept))
    rows = math.ceil(len(kept) / columns)
    figure = _canvas.canvas((columns * panel_size[0], rows * panel_size[1]), title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    entries = {}  # of the legend, with one entry for each set of any panel
    names = list(dict.fromkeys(name for detector in kept for name in checked[detector]))
    for axes, detector in zip(panels, (name for name in checked if name in kept), strict=False):
        sets = checked[detector]
        finite = np.concatenate([values[np.isfinite(values)] for values in sets.values()])
        low, high = np.quantile(finite, (0.005, 0.995)) if finite.size else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
        for name, values in sets.items():
            i, values = names.index(name), np.clip(values, edges[0], edges[-1])
            if i == 0:
                axes.hist(values, edges, density=True, label=name, color=_canvas.COLOURS[0], alpha=0.35)
            else:
                height = np.histogram(values, edges, density=True)[0]
                style = _canvas.line_style(i) | {"linewidth": 1.1, "markevery": (2 * i % 10, 10)}
                axes.plot((edges[1:] + edges[:-1]) / 2, height, label=name, **style)
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.set_title(_canvas.wrapped(detector, panel_size[0] - 0.2, "medium"), fontsize="medium")
        axes.set(yticks=[], ylim=(0, None))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(labelsize="small")
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(kept) :]:
        axes.set_axis_off()
    missing = len(scores) - len(kept)
    note = f"the best {len(kept)} of {len(scores)} detectors by AUROC; {missing} left out" if missing else None
    _canvas.legend(figure, list(entries.values()), list(entries), title=note)
    return figure


@_arguments.checked
def roc_curves(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    most: int | None = 8,
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 4.4),
) -> Figure:
    """Draws the receiver operating characteristic of each detector, out-of-distribution positive, best first.

    Args:
      scores: for each legend entry ``(in-distribution, out-of-distribution)`` scores, higher = more
        out-of-distribution.
      most: number of detectors to show, with the largest AUROC; the figure says how many are left out. None shows all
        of them.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``, whose legend reports the AUROC of each detector.

    Raises:
      ValueError: for no detector, a set without scores, scores with NaN, or ``most`` < 1.

    Example:
      >>> figure = plotting.roc_curves({"energy": ([0.1, 0.2, 0.3], [0.3, 0.4]), "knn": ([0.1, 0.2], [0.8, 0.9])})
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['knn, 1.000', 'energy, 0.917']
    """
    checked = _detectors({name: dict(enumerate(pair)) for name, pair in scores.items()}, most)
    areas = {name: _separation(list(pair.values())) for name, pair in checked.items()}
    kept = sorted(areas, key=areas.__getitem__, reverse=True)[:most]
    figure, axes = _canvas.plain_axes(figure_size, title)
    for i, name in enumerate(kept):
        inside, outside = (np.sort(values) for values in checked[name].values())
        thresholds = np.unique(np.concatenate([inside, outside]))
        # Ties rise together: the segment between two distinct thresholds is straight.
        rates = [1 - np.append(np.searchsorted(v, thresholds, "left") / v.size, 1.0) for v in (inside, outside)]
        axes.plot(*rates, label=f"{name}, {areas[name]:.3f}", **_canvas.dense_style(i))
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="false positive rate (in-distribution)",
        ylabel="true positive rate (out-of-distribution)",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    missing = len(scores) - len(kept)
    note = f" of the best {len(kept)} of {len(scores)} detectors; {missing} left out" if missing else ""
    _canvas.legend(figure, *axes.get_legend_handles_labels(), title=f"AUROC{note}")
    return figure


def _detectors(scores: Mapping[str, Mapping], most: int | None) -> dict[str, dict]:
    if not scores or not all(scores.values()):
        raise ValueError("scores must have at least one detector, and each detector at least one set, got none.")
    if most is not None:
        _validate.at_least(1, most=most)
    return {
        detector: {name: _scores(f"scores[{detector!r}][{name!r}]", values) for name, values in sets.items()}
        for detector, sets in scores.items()
    }


def _separation(sets: list[np.ndarray]) -> float:
    """AUROC of the first set against all other sets; chance if there is no other set."""
    return metrics.auroc(sets[0], np.concatenate(sets[1:])) if len(sets) > 1 else 0.5


def _scores(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise ValueError(f"{name} must be a vector of at least one score without NaN, got shape {values.shape}.")
    return values
