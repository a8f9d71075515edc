"""Choices of images."""

from __future__ import annotations

import numpy as np


def evenly(size: int, most: int) -> np.ndarray:
    """At most so many positions, evenly spaced, since many sets are sorted by class."""
    return np.linspace(0, size - 1, min(size, most)).astype(int)
