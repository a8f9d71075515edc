"""Arrays in, matplotlib figures out; nothing is shown and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves must hold at least one run.")
    figure = Figure(figsize=figure_size, layout="constrained")
    axes = figure.add_subplot()
    farthest = 0.0
    for i, (name, (radius, correct)) in enumerate(curves.items()):
        radius, correct = np.asarray(radius, np.float64), np.asarray(correct, bool)
        if radius.ndim != 1 or radius.shape != correct.shape or not radius.size:
            raise ValueError(
                f"curves[{name!r}] must be two vectors of one length, got {radius.shape}, {correct.shape}."
            )
        reached = np.sort(radius[correct])
        height = np.arange(reached.size, -1, -1) / radius.size
        edges = np.concatenate([[0.0], reached])
        colour, dash = _COLOURS[i % len(_COLOURS)], ("-", "--", ":", "-.")[i // len(_COLOURS) % 4]
        # The value at an edge is the one before the fall: an image certified at exactly r counts at r.
        axes.step(edges, height, where="post", color=colour, linestyle=dash, linewidth=1.6, label=name)
        farthest = max(farthest, edges[-1])
    axes.set(
        xlabel=f"{norm} radius (in [0, 1] pixels)",
        ylabel="certified accuracy",
        xlim=(0, 1.03 * farthest or 1),
        ylim=(0, 1.02),
    )
    if title:
        axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
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
