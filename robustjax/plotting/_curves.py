"""Curves of one quantity against another: accuracies over radii, losses over steps, means over runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax import _arguments, _validate
from robustjax.plotting import _canvas
from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@_arguments.checked
def certified_accuracy_curve(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    norm: str = "l2",
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 3.4),
) -> Figure:
    """Draws certified accuracy against the radius, one step curve for each run.

    The curve of n certificates is a step function that falls by 1/n at each certified radius, and is drawn as steps.

    Args:
      curves: for each legend entry ``(radius, correct)``, both ``(n,)``: certified radii, and whether the certified
        class is the true one (False where abstained).
      norm: norm of the radii, for the axis label.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, or radii and marks of different lengths or of length 0.

    Example:
      >>> radius, correct = [0.2, 0.5, 0.9], [True, True, False]
      >>> figure = plotting.certified_accuracy_curve({"sigma 0.25": (radius, correct)})
      >>> print(figure.axes[0].lines[0].get_ydata())
      [0.67 0.33 0.  ]
    """
    figure, axes = _axes(curves, figure_size, title)
    farthest = 0.0
    for i, (name, (radius, correct)) in enumerate(curves.items()):
        radius, correct = _pair(f"curves[{name!r}]", radius, correct)
        if not (np.isfinite(radius).all() and np.isfinite(correct).all()):
            raise ValueError(f"curves[{name!r}] must have finite radii and marks, got NaN or infinity.")
        reached = np.sort(radius[correct != 0])
        height = np.arange(reached.size, -1, -1) / radius.size
        edges = np.concatenate([[0.0], reached])
        # The value at an edge is the one before the fall: an image certified at exactly r counts at r.
        axes.step(edges, height, where="post", label=name, **_canvas.dense_style(i))
        farthest = max(farthest, edges[-1])
    axes.set(
        xlabel=f"{norm} radius (in [0, 1] pixels)",
        ylabel="certified accuracy",
        xlim=(0, 1.03 * farthest or 1),
        ylim=(0, 1.02),
    )
    _canvas.legend(figure, *axes.get_legend_handles_labels())
    return figure


@_arguments.checked
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
      curves: for each legend entry ``(epsilon, accuracy)``, both ``(n,)``; in any order of epsilon.
      clean: accuracy without an attack, at which every curve begins; None for curves that begin at their first radius.
      norm: norm of the radii, for the axis label.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, vectors of different lengths or of length 0, or accuracies outside [0, 1].

    Example:
      >>> figure = plotting.robust_accuracy_curve({"PGD": ([0.1, 0.2], [0.8, 0.4])}, clean=0.95)
      >>> figure.axes[0].get_xlabel(), list(figure.axes[0].lines[0].get_ydata())
      ('linf epsilon (in [0, 1] pixels)', [np.float64(0.95), np.float64(0.8), np.float64(0.4)])
    """
    if clean is not None and not 0 <= _validate.number(clean) <= 1:
        raise ValueError(f"clean must lie in [0, 1], got {clean!r}.")
    figure, axes = _axes(curves, figure_size, title)
    for i, (name, (epsilon, accuracy)) in enumerate(curves.items()):
        epsilon, accuracy = _pair(f"curves[{name!r}]", epsilon, accuracy)
        if not ((accuracy >= 0) & (accuracy <= 1)).all():
            got = f"{accuracy.min():g} to {accuracy.max():g}"
            raise ValueError(f"curves[{name!r}] must have accuracies in [0, 1], got {got}.")
        order = np.argsort(epsilon)
        points = epsilon[order], accuracy[order]
        if clean is not None:
            points = np.append(0.0, points[0]), np.append(clean, points[1])
        axes.plot(*points, label=name, **_canvas.line_style(i))
    axes.set(xlabel=f"{norm} epsilon (in [0, 1] pixels)", ylabel="robust accuracy", ylim=(-0.02, 1.02))
    axes.set_xlim(left=0)
    _canvas.legend(figure, *axes.get_legend_handles_labels())
    return figure


@_arguments.checked
def loss_over_steps(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    label: str = "mean cross-entropy",
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 3.4),
) -> Figure:
    """Draws the loss that an attack reaches against its number of steps: a curve that still rises needs more steps.

    Args:
      curves: for each legend entry ``(steps, loss)``, both ``(n,)``; steps at least 1, on a logarithmic axis.
      label: label of the value axis.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, vectors of different lengths or of length 0, or steps below 1.

    Example:
      >>> figure = plotting.loss_over_steps({"PGD": ([1, 10, 100], [0.5, 1.4, 1.5])})
      >>> figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()
      ('log', 'mean cross-entropy')
    """
    figure, axes = _axes(curves, figure_size, title)
    taken = []
    for i, (name, (steps, loss)) in enumerate(curves.items()):
        steps, loss = _pair(f"curves[{name!r}]", steps, loss)
        if not (steps >= 1).all():
            raise ValueError(f"curves[{name!r}] must have steps of at least 1, got {steps.min():g}.")
        axes.plot(steps, loss, label=name, **_canvas.line_style(i))
        taken.append(steps)
    axes.set(xlabel="steps", ylabel=_canvas.wrapped(label, figure_size[1] - 0.8, "medium"))
    _from_zero(axes)
    _canvas.log_ticks(axes, np.concatenate(taken), figure_size[0])
    _canvas.legend(figure, *axes.get_legend_handles_labels())
    return figure


@_arguments.checked
def spread_curve(
    curves: Mapping[str, tuple[ArrayLike, Any]],
    references: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    *,
    labels: tuple[str, str],
    xscale: str = "log",
    title: str | None = None,
    figure_size: tuple[float, float] = (6.0, 3.4),
) -> Figure:
    """Draws the mean over runs against a quantity, with a band from the smallest to the largest run.

    Args:
      curves: for each legend entry ``(x, values)``, ``(n,)`` and ``(n, runs)``.
      references: dotted lines to compare with, ``(x, y)``, both ``(n,)``; the i-th line has the colour and the marker,
        unfilled, of the i-th curve.
      labels: labels of the two axes.
      xscale: ``"log"``, which needs positive x, or ``"linear"``.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``, the value axis from 0 where no value is negative.

    Raises:
      ValueError: for no curve, x and values of different lengths or of length 0, an unknown ``xscale``, or x of 0 or
        less on a logarithmic axis.

    Example:
      >>> errors = [[0.30, 0.34], [0.10, 0.12]]  # two seeds at each number of examples
      >>> figure = plotting.spread_curve({"ours": ([100, 1000], errors)}, labels=("examples", "error"))
      >>> print(figure.axes[0].lines[0].get_ydata())  # the means
      [0.32 0.11]
    """
    if xscale not in ("log", "linear"):
        raise ValueError(f"xscale must be 'log' or 'linear', got {xscale!r}.")
    figure, axes = _axes(curves, figure_size, title)
    places = []
    for i, (name, (x, values)) in enumerate(curves.items()):
        x, mean = _pair(f"curves[{name!r}]", x, np.mean(values, 1))
        if xscale == "log" and not (x > 0).all():
            raise ValueError(f"curves[{name!r}] must have positive x on a logarithmic axis, got {x.min():g}.")
        axes.plot(x, mean, label=name, **_canvas.line_style(i))
        band = np.min(values, 1), np.max(values, 1)
        axes.fill_between(x, *band, color=_canvas.COLOURS[i % len(_canvas.COLOURS)], alpha=0.2, linewidth=0)
        places.append(x)
    for i, (name, (x, y)) in enumerate((references or {}).items()):
        style = _canvas.line_style(i) | {"linestyle": ":", "markerfacecolor": "none"}
        axes.plot(*_pair(f"references[{name!r}]", x, y), label=name, **style)
    xlabel, ylabel = (
        _canvas.wrapped(label, inches - 0.8, "medium") for label, inches in zip(labels, figure_size, strict=True)
    )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _from_zero(axes)
    if xscale == "log":
        _canvas.log_ticks(axes, np.concatenate(places), figure_size[0])
    _canvas.legend(figure, *axes.get_legend_handles_labels())
    return figure


def _axes(curves: Mapping, figure_size: tuple[float, float], title: str | None) -> tuple[Figure, Axes]:
    if not curves:
        raise ValueError("curves must have at least one curve, got none.")
    return _canvas.plain_axes(figure_size, title)


def _from_zero(axes: Axes) -> None:
    """Lets the value axis begin at 0 where no value is negative."""
    if axes.dataLim.y0 >= 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)


def _pair(name: str, first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"{name} must be two vectors of one length, got {first.shape}, {second.shape}.")
    return first, second
