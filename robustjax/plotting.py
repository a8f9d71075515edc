"""Arrays in, matplotlib figures out; nothing is shown and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by all common kinds of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")


def certified_accuracy_curve(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    norm: str = "l2",
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 3.4),
) -> Figure:
    """Draws certified accuracy against the radius, one step curve for each run.

    The curve of n certificates is a step function that falls by 1/n at each certified radius, and it is drawn as such.

    Args:
      curves: for each legend entry ``(radius, correct)``, both ``(n,)``: certified radii, and whether the certified
        class is the true one (False where abstained).
      norm: of the radii, for the axis label.
      title: above the axes, or None.
      figure_size: inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, or radii and marks of different or no length.
    """
    figure, axes = _axes(curves, figure_size, title)
    farthest = 0.0
    for i, (name, (radius, correct)) in enumerate(curves.items()):
        radius, correct = _pair(f"curves[{name!r}]", radius, correct)
        reached = np.sort(radius[correct != 0])
        height = np.arange(reached.size, -1, -1) / radius.size
        edges = np.concatenate([[0.0], reached])
        colour, dash = _COLOURS[i % len(_COLOURS)], _dash(i)
        # The value at an edge is the one before the fall: an image certified at exactly r counts at r.
        axes.step(edges, height, where="post", color=colour, linestyle=dash, linewidth=1.6, label=name)
        farthest = max(farthest, edges[-1])
    axes.set(
        xlabel=f"{norm} radius (in [0, 1] pixels)",
        ylabel="certified accuracy",
        xlim=(0, 1.03 * farthest or 1),
        ylim=(0, 1.02),
    )
    axes.legend(frameon=False, fontsize="small")
    return figure


def robust_accuracy_curve(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    clean: float | None = None,
    norm: str = "linf",
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 3.4),
) -> Figure:
    """Draws robust accuracy against the radius of the ball, one curve for each attack.

    Args:
      curves: for each legend entry ``(epsilon, accuracy)``, both ``(n,)``; sorted by epsilon before they are joined.
      clean: accuracy without an attack, at which every curve begins; None for curves that begin at their first radius.
      norm: of the radii, for the axis label.
      title: above the axes, or None.
      figure_size: inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, vectors of different or no length, or accuracies outside [0, 1].
    """
    figure, axes = _axes(curves, figure_size, title)
    for i, (name, (epsilon, accuracy)) in enumerate(curves.items()):
        epsilon, accuracy = _pair(f"curves[{name!r}]", epsilon, accuracy)
        if not ((accuracy >= 0) & (accuracy <= 1)).all():
            raise ValueError(f"curves[{name!r}] must have accuracies in [0, 1], got {accuracy}.")
        order = np.argsort(epsilon)
        points = epsilon[order], accuracy[order]
        if clean is not None:
            points = np.append(0.0, points[0]), np.append(clean, points[1])
        axes.plot(*points, marker=".", color=_COLOURS[i % len(_COLOURS)], linestyle=_dash(i), linewidth=1.4, label=name)
    axes.set(xlabel=f"{norm} epsilon (in [0, 1] pixels)", ylabel="robust accuracy", ylim=(-0.02, 1.02))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize="small")
    return figure


def loss_over_steps(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    label: str = "mean cross-entropy",
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 3.4),
) -> Figure:
    """Draws what an attack reaches against the number of its steps: a curve that still rises wants more of them.

    Args:
      curves: for each legend entry ``(steps, loss)``, both ``(n,)``; steps at least 1, on a logarithmic axis.
      label: of the value axis.
      title: above the axes, or None.
      figure_size: inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, vectors of different or no length, or steps below 1.
    """
    figure, axes = _axes(curves, figure_size, title)
    ticks = set()
    for i, (name, (steps, loss)) in enumerate(curves.items()):
        steps, loss = _pair(f"curves[{name!r}]", steps, loss)
        if not (steps >= 1).all():
            raise ValueError(f"curves[{name!r}] must have steps of at least 1, got {steps}.")
        axes.plot(steps, loss, marker=".", color=_COLOURS[i % len(_COLOURS)], linestyle=_dash(i), label=name)
        ticks |= set(steps.tolist())
    axes.set(xlabel="steps", ylabel=label, xscale="log", ylim=(0, None))
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def spread_curve(
    curves: Mapping[str, tuple[ArrayLike, Any]],
    references: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    labels: tuple[str, str],
    title: str | None = None,
) -> Figure:
    """Draws the mean over runs against a quantity, and from the least to the largest run as a band.

    Args:
      curves: for each legend entry ``(x, values)``, ``(n,)`` and ``(n, runs)``; x positive, on a logarithmic axis.
      references: lines to compare with, ``(x, y)``, both ``(n,)``, dotted in the colours of the curves.
      labels: of the two axes.
      title: above the axes, or None.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, or x and values of different or no length.
    """
    figure, axes = _axes(curves, (6.0, 3.4), title)
    for i, (name, (x, values)) in enumerate(curves.items()):
        pair = _pair(f"curves[{name!r}]", x, np.mean(values, 1))
        (line,) = axes.plot(*pair, marker=".", color=_COLOURS[i % len(_COLOURS)], label=name)
        axes.fill_between(x, np.min(values, 1), np.max(values, 1), color=line.get_color(), alpha=0.2, linewidth=0)
    for i, (name, (x, y)) in enumerate(references.items()):
        axes.plot(*_pair(f"references[{name!r}]", x, y), color=_COLOURS[i % len(_COLOURS)], linestyle=":", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def image_grid(
    images: ArrayLike, *, titles: Sequence[str] | None = None, columns: int = 8, image_inches: float = 1.0
) -> Figure:
    """Draws images in rows, as they are: no interpolation, values clipped to [0, 1].

    Args:
      images: ``(n, height, width, channels)``, floating, 1 or 3 channels, in [0, 1] (noisy copies may leave it).
      titles: ``(n,)`` short texts above the images, or None.
      columns: images in a row.
      image_inches: width of an image.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for images of another rank, channels or kind, titles of another length, or columns < 1.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (n >= 1, height, width, 1 or 3), got {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be floating, in [0, 1], got {images.dtype}.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must have one text for each of the {len(images)} images, got {len(titles)}.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = image_inches * images.shape[1] / images.shape[2] + (0.22 if titles is not None else 0.04)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(columns * image_inches, rows * height), layout=layout)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if i < len(images):
            axes.imshow(np.clip(images[i], 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if titles is not None:
                axes.set_title(titles[i], fontsize=7, pad=2)
    return figure


def score_histograms(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    *,
    num_bins: int = 50,
    columns: int = 3,
    panel_size: tuple[float, float] = (3.2, 2.1),
) -> Figure:
    """Draws how the scores of each detector are distributed, one panel for each.

    All sets of a panel share bins, which span the central 99 % of the scores; the rest is in the outermost bins. Each
    histogram has area 1, so that sets of different sizes can be compared.

    Args:
      scores: for each detector, ``(n,)`` scores of each set; the first set is the in-distribution one.
      num_bins: of each histogram.
      columns: panels in a row.
      panel_size: inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no detector, a set without scores, or scores with NaN.
    """
    from matplotlib.figure import Figure

    if not scores:
        raise ValueError("scores must hold at least one detector.")
    columns = min(columns, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(columns * panel_size[0], rows * panel_size[1] + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (detector, sets) in zip(panels, scores.items(), strict=False):
        sets = {name: _scores(f"scores[{detector!r}][{name!r}]", values) for name, values in sets.items()}
        finite = np.concatenate([values[np.isfinite(values)] for values in sets.values()])
        low, high = np.quantile(finite, (0.005, 0.995)) if finite.size else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
        for i, (name, values) in enumerate(sets.items()):
            colour = _COLOURS[i % len(_COLOURS)]
            settings = {"color": colour, "alpha": 0.35} if i == 0 else {"color": colour, "histtype": "step"}
            axes.hist(np.clip(values, edges[0], edges[-1]), edges, density=True, label=name, **settings)
        axes.set_title(detector, fontsize="medium")
        axes.set_yticks([])
        axes.tick_params(labelsize="small")
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), frameon=False, fontsize="small")
    return figure


def roc_curves(
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str | None = None,
    figure_size: tuple[float, float] = (4.6, 4.2),
) -> Figure:
    """Draws the receiver operating characteristic of each detector, out-of-distribution positive.

    Args:
      scores: for each legend entry ``(in-distribution, out-of-distribution)`` scores, higher = more
        out-of-distribution.
      title: above the axes, or None.
      figure_size: inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no detector, a set without scores, or scores with NaN.
    """
    from matplotlib.figure import Figure

    if not scores:
        raise ValueError("scores must hold at least one detector.")
    many = len(scores) > 8  # then the legend stands beside the axes
    size = (figure_size[0] + 2.2, max(figure_size[1], 0.19 * len(scores))) if many else figure_size
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, pair) in enumerate(scores.items()):
        inside, outside = (np.sort(_scores(f"scores[{name!r}][{j}]", values)) for j, values in enumerate(pair))
        thresholds = np.unique(np.concatenate([inside, outside]))
        # Ties rise together: the segment between two distinct thresholds is straight.
        rates = [1 - np.append(np.searchsorted(v, thresholds, "left") / v.size, 1.0) for v in (inside, outside)]
        axes.plot(*rates, color=_COLOURS[i % len(_COLOURS)], linestyle=_dash(i), linewidth=1.4, label=name)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="false positive rate (in-distribution)",
        ylabel="true positive rate (out-of-distribution)",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
        aspect="equal",
    )
    if title:
        axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if many:
        figure.legend(frameon=False, fontsize="x-small", loc="outside right center")
    else:
        axes.legend(frameon=False, fontsize="x-small", loc="lower right")
    return figure


def bar_chart(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    label: str,
    start: float = 0.0,
    panel_width: float = 5.0,
    row_inches: float = 0.3,
) -> Figure:
    """Draws one group of horizontal bars for each entry: the mean over runs, and every run as a point.

    Args:
      values: for each entry and each series, the numbers of the runs, such as the AUROC of each seed.
      label: of the value axis.
      start: where bars begin, such as 0.5, chance, for AUROC.
      panel_width: inches.
      row_inches: height of a bar.

    Returns:
      A matplotlib ``Figure``, the first entry on top.

    Raises:
      ValueError: for no entry, or entries with different series.
    """
    from matplotlib.figure import Figure

    if not values:
        raise ValueError("values must hold at least one entry.")
    series = list(next(iter(values.values())))
    if any(list(entry) != series for entry in values.values()):
        raise ValueError(f"values must have the series {series} in each entry.")
    thickness = 0.8 / len(series)
    height = row_inches * len(values) * max(1.0, 0.6 * len(series)) + 0.8
    figure = Figure(figsize=(panel_width, height), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(values), dtype=np.float64)
    for i, name in enumerate(series):
        runs = [np.atleast_1d(np.asarray(entry[name], np.float64)) for entry in values.values()]
        here = places + (i - (len(series) - 1) / 2) * thickness
        length = [run.mean() - start for run in runs]
        axes.barh(here, length, thickness, left=start, color=_COLOURS[i % len(_COLOURS)], alpha=0.75, label=name)
        for place, run in zip(here, runs, strict=True):
            axes.plot(run, np.full(run.size, place), "o", color="black", markersize=2)
    axes.axvline(start, color="black", linewidth=0.8)
    axes.set(xlabel=label, yticks=places, ylim=(len(values) - 0.5, -0.5))
    axes.set_yticklabels(list(values), fontsize="small")
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(series), 4), frameon=False, fontsize="small")
    return figure


def _axes(curves: Mapping, figure_size: tuple[float, float], title: str | None) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves must hold at least one run.")
    figure = Figure(figsize=figure_size, layout="constrained")
    axes = figure.add_subplot()
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dash(i: int) -> str:
    return ("-", "--", ":", "-.")[i // len(_COLOURS) % 4]


def _pair(name: str, first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"{name} must be two vectors of one length, got {first.shape}, {second.shape}.")
    return first, second


def _scores(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise ValueError(f"{name} must be a vector of at least one score without NaN, got shape {values.shape}.")
    return values
