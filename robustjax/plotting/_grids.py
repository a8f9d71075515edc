"""Grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from robustjax import _arguments, _validate
from robustjax.plotting import _canvas
from robustjax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAD = 0.035  # inches around an image
POINTS = 7.0  # size of titles and row labels


@_arguments.checked
def image_grid(
    images: ArrayLike,
    *,
    titles: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    columns: int = 8,
    title: str | None = None,
    image_inches: float = 1.0,
) -> Figure:
    """Draws images in rows, as they are: no interpolation, values clipped to [0, 1].

    Args:
      images: ``(n, height, width, channels)``, floating, 1 or 3 channels, in [0, 1] (noisy copies may leave it).
      titles: ``(n,)`` short texts above the images, or None.
      row_labels: a text for each row, rotated and to its left, or None.
      columns: number of images in a row.
      title: title above the grid, such as the attack and its epsilon, or None.
      image_inches: width of an image, in inches.

    Returns:
      A matplotlib ``Figure``.

    Raises:
      ValueError: for images of another rank, dtype or number of channels, titles or row labels of another number, or
        columns < 1.

    Example:
      >>> images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1))
      >>> figure = plotting.image_grid(images, titles=["3", "8", "1", "0"], columns=2, title="PGD, epsilon 8/255")
      >>> [axes.get_title() for axes in figure.axes]
      ['3', '8', '1', '0']
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (n >= 1, height, width, 1 or 3), got {images.shape}.")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be floating, in [0, 1], got {images.dtype}.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must have one text for each of the {len(images)} images, got {len(titles)}.")
    _validate.positive(image_inches=image_inches)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"row_labels must have one text for each of the {rows} rows, got {len(row_labels)}.")
    image_height = (image_inches - 2 * PAD) * images.shape[1] / images.shape[2]
    above = [_canvas.wrapped(text, image_inches - 2 * PAD, POINTS) for text in titles or [""] * len(images)]
    beside = [_canvas.wrapped(text, image_height, POINTS) for text in row_labels or [""] * rows]
    line = 1.25 * POINTS / 72
    lines = [max(text.count("\n") + 1 for text in above[i : i + columns]) for i in range(0, len(images), columns)]
    left = line * max(text.count("\n") + 1 for text in beside) + 0.04 if row_labels is not None else 0.0
    height = rows * (image_height + 2 * PAD) + (sum(lines) * line + 0.04 * rows if titles is not None else 0.0)
    figure = _canvas.canvas((columns * image_inches + left, height), title)
    figure.set_layout_engine("constrained", w_pad=PAD, h_pad=PAD, wspace=0, hspace=0)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if i % columns == 0 and row_labels is not None:
            axes.set_ylabel(beside[i // columns], fontsize=POINTS, labelpad=2)
        if i < len(images):
            axes.imshow(np.clip(images[i], 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if titles is not None:
                axes.set_title(above[i], fontsize=POINTS, pad=2)
    return figure
