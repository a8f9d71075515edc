"""Results in a few words: what a notebook shows instead of all their arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def of(result: Any, words: Callable[[], str]) -> str:
    """The name of a result and some words about it; all of its fields where they hold no numbers, as under ``jit``."""
    name = type(result).__name__
    try:
        return f"{name}({words()})"
    except Exception:  # a repr must not fail
        return f"{name}({', '.join(f'{field}={value!r}' for field, value in result._asdict().items())})"


def of_radii(certificate: Any) -> str:
    """How many inputs a certificate is for, how many have none, and the mean radius, where abstained it is 0."""

    def words():
        if not len(certificate.radius):
            return inputs(0)
        found = f"{int(np.sum(certificate.abstained))} abstained, mean radius {np.mean(certificate.radius):.3g}"
        return f"{inputs(len(certificate.radius))}: {found}"

    return of(certificate, words)


def inputs(count: int) -> str:
    """``count`` in words."""
    return "1 input" if count == 1 else f"{count} inputs"
