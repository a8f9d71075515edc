"""Reliability diagrams: how often a model is right at each confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from robustjax import _arguments
from robustjax.plotting import _canvas
from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@_arguments.checked
def reliability_diagram(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    title: str | None = None,
    figure_size: tuple[float, float] = (5.0, 4.4),
) -> Figure:
    """Draws accuracy against confidence, beside the diagonal of a calibrated model; below, where the rows lie.

    Args:
      curves: for each legend entry ``(confidence, accuracy, share)`` of each bin, as from ``metrics.reliability``.
      title: title above the axes, or None.
      figure_size: size of the axes and their labels, in inches; title and legend add to the height.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for no curve, or numbers that differ in length, are none, or lie outside [0, 1].

    Example:
      >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
      >>> figure = plotting.reliability_diagram({"cnn": metrics.reliability(probabilities, [0, 0, 1, 0])})
      >>> print(figure.axes[0].lines[1].get_ydata())
      [0.5 1. ]
    """
    if not curves:
        raise ValueError("curves must have at least one entry, got none.")
    figure = _canvas.canvas(figure_size, title)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], ":", color="black", linewidth=1.0, label="calibrated")
    for i, (name, points) in enumerate(curves.items()):
        confidence, accuracy, share = (np.asarray(part, np.float64) for part in points)
        if not confidence.size or not confidence.shape == accuracy.shape == share.shape:
            raise ValueError(
                f"curves[{name!r}] must have as many confidences as accuracies and shares, at least one, got shapes "
                f"{confidence.shape}, {accuracy.shape} and {share.shape}."
            )
        if not all(((part >= 0) & (part <= 1)).all() for part in (confidence, accuracy, share)):
            raise ValueError(f"curves[{name!r}] must have numbers in [0, 1].")
        style = _canvas.line_style(i)
        above.plot(confidence, accuracy, label=name, **style)
        below.vlines(confidence, 0, share, color=style["color"], linewidth=3.0)
    for axes in (above, below):
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    above.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    below.set(xlabel="confidence", ylabel="share", ylim=(0, None))
    _canvas.legend(figure, *above.get_legend_handles_labels())
    return figure
