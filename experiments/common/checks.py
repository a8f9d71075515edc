"""Checks of a config's fields, for its ``__post_init__``: an error names the field, its value and what is wanted.

None passes; of a tuple, every element is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustjax import _validate


def at_least(minimum: int, config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not an integer of at least ``minimum``."""
    _each(lambda **values: _validate.at_least(minimum, **values), config, names)


def positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not positive and finite."""
    _each(_validate.positive, config, names)


def not_negative(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not finite and at least 0."""
    _each(_validate.not_negative, config, names)


def probability(config: Any, *names: str) -> None:
    """Raises ValueError for a field that does not lie strictly between 0 and 1."""
    _each(_validate.probability, config, names)


def distinct(config: Any, *names: str) -> None:
    """Raises ValueError for a tuple with an element twice, or with commas where spaces are wanted."""
    for name in names:
        values = getattr(config, name)
        if with_comma := next((value for value in values if "," in str(value)), None):
            raise ValueError(f"{name} must be separated by spaces, not commas, got {with_comma!r}.")
        texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(texts)) < len(texts):
            raise ValueError(f"{name} must be given once each, got {' '.join(texts)}.")


def seed(config: Any, name: str = "seed") -> None:
    """Raises ValueError for a seed that is no integer of 32 bits."""
    value = getattr(config, name)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in [0, 2**32), got {value}.")


def _each(check: Callable[..., None], config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        for element in value if isinstance(value, tuple) else (value,):
            if element is not None:
                check(**{name: element})
