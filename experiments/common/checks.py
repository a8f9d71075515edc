"""Checks of a config's fields, for its ``__post_init__``: an error names the field, its value and what is wanted.

None passes; of a tuple, every element is checked.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from robustjax import _validate


def at_least(minimum: int, config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not an integer of at least ``minimum``."""
    _each(lambda **values: _validate.at_least(minimum, **values), config, names)


def _of_fields(check: Callable[..., None]) -> Callable[..., None]:
    return lambda config, *names: _each(check, config, names)


positive, not_negative, probability = map(
    _of_fields, (_validate.positive, _validate.not_negative, _validate.probability)
)
"""Raise ValueError for a field that is no such number, as ``(config, *names)``."""


def distinct(config: Any, *names: str) -> None:
    """Raises ValueError for a tuple with an element twice, or with commas where spaces are wanted."""
    for name in names:
        values = getattr(config, name)
        if with_comma := next((value for value in values if "," in str(value)), None):
            raise ValueError(f"{name} must be separated by spaces, not commas, got {with_comma!r}.")
        texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        if len(set(texts)) < len(texts):
            raise ValueError(f"{name} must be given once each, got {' '.join(texts)}.")


def known(field: str, name: str, names: Iterable[str]) -> None:
    """Raises ValueError for a name that is none of ``names``."""
    if name not in (names := tuple(names)):
        close = difflib.get_close_matches(name, names)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(names)}."
        raise ValueError(f"{field} must be known names, got {name!r}. {hint}")


def seed(config: Any, name: str = "seed") -> None:
    """Raises ValueError for a seed that is no integer of 32 bits."""
    value = getattr(config, name)
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} must lie in [0, 2**32), got {value}.")


@contextlib.contextmanager
def renamed(argument: str, field: str) -> Iterator[None]:
    """An error about the argument of a function is about the field that holds its value."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{argument} "):
            raise
        raise ValueError(field + str(error).removeprefix(argument)) from error


def _each(check: Callable[..., None], config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        for element in value if isinstance(value, tuple) else (value,):
            if element is not None:
                check(**{name: element})
