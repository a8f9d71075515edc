"""Choices of images, and blocks of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from robustjax.typing import AnyArray


def evenly(size: int, most: int) -> np.ndarray:
    """At most ``most`` of ``size`` positions, evenly spaced because many data sets are sorted by class."""
    return np.linspace(0, size - 1, min(size, most)).astype(int)


def in_blocks(function: Callable[..., AnyArray], most: int, *arrays: AnyArray) -> np.ndarray:
    """``function(*arrays)``, at most ``most`` rows at once: blocks of one size, the last filled up."""
    count = len(arrays[0])
    size = min(most, count)
    blocks = [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]
    return np.concatenate([np.asarray(function(*(a[rows] for a in arrays))) for rows in blocks])[:count]
