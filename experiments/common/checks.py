"""Checks of a config's fields, for its ``__post_init__``: an error names the field, its value and what is wanted."""

from __future__ import annotations

from typing import Any

from robustjax import _validate


def at_least(minimum: int, config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not an integer of at least ``minimum``; None passes."""
    _validate.at_least(minimum, **_given(config, names))


def positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not positive and finite; None passes."""
    _validate.positive(**_given(config, names))


def not_negative(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not finite and at least 0; None passes."""
    _validate.not_negative(**_given(config, names))


def probability(config: Any, *names: str) -> None:
    """Raises ValueError for a field that does not lie strictly between 0 and 1; None passes."""
    _validate.probability(**_given(config, names))


def seed(config: Any, name: str = "seed") -> None:
    """Raises ValueError for a seed that is no integer of 32 bits."""
    value = getattr(config, name)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in [0, 2**32), got {value}.")


def _given(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(config, name)) is not None}
