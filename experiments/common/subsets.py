"""Choices of images, and blocks of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robustjax.typing import AnyArray


def evenly(size: int, most: int) -> np.ndarray:
    """At most ``most`` of ``size`` positions, evenly spaced because many data sets are sorted by class."""
    return np.linspace(0, size - 1, min(size, most)).astype(int)


def in_blocks(function: Callable[..., AnyArray], size: int, *arrays: AnyArray) -> np.ndarray:
    """``function(*arrays)`` on blocks of ``size`` rows, the last filled up."""
    count = len(arrays[0])
    blocks = [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
    return np.concatenate([np.asarray(function(*(a[rows] for a in arrays))) for rows in blocks])[:count]
