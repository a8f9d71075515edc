"""Checks of values that are known in Python; a traced value cannot be read, and passes."""

from __future__ import annotations

import inspect
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import _callables

_PACKAGE = os.path.dirname(__file__) + os.sep
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: Any) -> str:
    """``value`` for a message, in one line of bounded length: type and shape of an array, the start of a long list."""
    if isinstance(value, (jax.Array, np.ndarray)) and (value.ndim or isinstance(value, jax.core.Tracer)):
        return f"{value.dtype} of shape {value.shape}"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _SHORT.repr(value.item())
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def warn(sentence: str) -> None:
    """Warns the line outside of this package from which it was called."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith((_PACKAGE, "<string>")):  # a dataclass's __init__
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)


def number(value: Any) -> float:
    """``value`` as a float; NaN, which lies in no range, if it is not a number."""
    try:
        return math.nan if isinstance(value, (str, bool, np.bool_)) else float(value)
    except (TypeError, ValueError):
        return math.nan


def holds(condition: Callable[[Any], Any], values: Any) -> bool:
    """Whether a condition holds for all numbers of an array: seen by NumPy on a CPU, where it compiles nothing."""
    if isinstance(values, jax.Array) and all(device.platform == "cpu" for device in values.devices()):
        values = np.asarray(values) if values.is_fully_addressable else values
    return bool(condition(values).all())


def finite(values: Any) -> Any:
    """Which numbers are finite, of a NumPy or a JAX array."""
    return abs(values) < math.inf


def _is_integer(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:  # arrays of one integer pass too
        return False


def positive(**values: Any) -> None:
    """Raises ValueError for a value that is not a positive finite number."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 < number(value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {short(value)}.")


def not_negative(**values: Any) -> None:
    """Raises ValueError for a value that is not a finite number of at least 0."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 <= number(value) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {short(value)}.")


def finite_number(**values: Any) -> None:
    """Raises ValueError for a value that is not a finite number."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not math.isfinite(number(value)):
            raise ValueError(f"{name} must be finite, got {short(value)}.")


def probability(**values: Any) -> None:
    """Raises ValueError for a value outside the open interval (0, 1)."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not 0 < number(value) < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {short(value)}.")


def at_least(minimum: int, *, below: int | None = None, **values: Any) -> None:
    """Raises ValueError for a value that is not an integer of at least ``minimum``, and ``below`` a limit."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not _is_integer(value) or operator.index(value) < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {short(value)}.")
        if below is not None and operator.index(value) >= below:
            raise ValueError(f"{name} must be below {below}, got {short(value)}.")


def image_shape(shape: Any) -> tuple[int, int, int]:
    """``shape`` as three integers; raises ValueError unless it is a height, a width and a number of channels."""
    if len(shape) != 3 or not all(_is_integer(size) and size > 0 for size in shape):
        raise ValueError(f"image_shape must be (height, width, channels), each at least 1, got {short(shape)}.")
    return tuple(map(int, shape))  # type: ignore[return-value]


def images(**values: Any) -> None:
    """Raises ValueError unless ``value`` has the shape (batch, height, width, channels)."""
    for name, value in values.items():
        if getattr(value, "ndim", None) != 4:
            got = getattr(value, "shape", type(value).__name__)
            raise ValueError(f"{name} must have shape (batch, height, width, channels), got {got}.")


def channels_last(**values: Any) -> None:
    """Warns of images whose channels seem to come first, in a method for which the axes differ."""
    for name, value in values.items():
        shape = getattr(value, "shape", ())
        if len(shape) == 4 and shape[1] in (1, 3) and shape[3] > 4:
            warn(
                f"{name} should have shape (batch, height, width, channels), got {shape}, which looks like (batch, "
                f"channels, height, width): {name}.transpose(0, 2, 3, 1) puts channels last."
            )


def levels(value: Any) -> str:
    """What a whole number from 1 to 255 looks like; no words for other numbers."""
    level = number(value)
    return f"{level:g} looks like {level:g}/255" if level in range(1, 256) else ""


def in_units(reach: float, **values: Any) -> None:
    """Warns of a distance or a size of noise beyond the range of the inputs, such as 12 for 12/255."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and number(value) > reach:
            hint = levels(value) or "a number in 256 levels is divided by 255"
            warn(f"{name}={short(value)} is more than {reach:g}, the range of x: {hint}.")


def labels(labels: Any, batch: int, classes: int) -> None:
    """Raises ValueError unless ``labels`` are integers ``(batch,)`` from 0 to ``classes - 1``."""
    if getattr(labels, "shape", None) != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = f"{labels.dtype} of shape {labels.shape}" if hasattr(labels, "shape") else type(labels).__name__
        raise ValueError(f"labels must be ({batch},) integers, got {got}.")
    if not isinstance(labels, jax.core.Tracer) and batch:
        low, high = np.min(np.asarray(labels)), np.max(np.asarray(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be 0 to {classes - 1}, got values from {low} to {high}.")


def probabilities(**values: Any) -> None:
    """Raises ValueError unless ``value`` is a floating array of rows that are at least 0 and sum to 1."""
    for name, value in values.items():
        if getattr(value, "ndim", None) != 2 or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype} of shape {value.shape}" if hasattr(value, "ndim") else type(value).__name__
            raise ValueError(f"{name} must be floating (batch, classes), got {got}.")
        if isinstance(value, jax.core.Tracer):
            continue
        rows = np.asarray(value, np.float64)
        with np.errstate(invalid="ignore"):  # infinite logits of both signs have no sum
            total = rows.sum(-1)
        # Each entry of a row may be rounded by half a unit, which is more than 1e-3 in bfloat16.
        wrong = ~(np.abs(total - 1) <= max(1e-3, float(jnp.finfo(value.dtype).eps))) | (rows < 0).any(-1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{name} must be >= 0 with rows that sum to 1, got row {row} with sum {total[row]:.6g} and least value "
                f"{rows[row].min(initial=np.inf):.6g}: expected probabilities, got logits?"
            )


def not_probabilities(**values: Any) -> None:
    """Warns of logits on the host whose rows are all at least 0 and sum to 1, named by the function they come from."""
    for name, value in values.items():
        rows = np.asarray(value, np.float32)
        rounding = max(1e-3, float(jnp.finfo(value.dtype).eps))
        if rows.size and (rows >= 0).all() and (np.abs(rows.sum(-1) - 1) <= rounding).all():
            warn(
                f"{name} should return logits, got rows that are at least 0 and sum to 1, which are probabilities: "
                "return what comes before the softmax, where gradients do not vanish, or take the logarithm."
            )


def untargeted(attack: Any) -> None:
    """Raises ValueError for an attack that is targeted, also inside another, where labels are the true classes."""
    if getattr(attack, "targeted", False):
        raise ValueError(f"attack must not be targeted where labels are the true classes, got {attack!r}.")
    parts = getattr(attack, "attacks", ())
    for part in (getattr(attack, "attack", None), *(parts if isinstance(parts, tuple) else ())):
        if part is not None:
            untargeted(part)


def depends_on_batch(name: str = "logits_fn") -> ValueError:
    """The error of a model whose answers to some inputs change with the others."""
    return ValueError(
        f"{name} must answer each input by itself, got other answers for the same inputs in another batch: leave the "
        "training mode, in which batch normalisation computes its statistics anew."
    )


def unlike(x: Any) -> Any:
    """Other images of the same shape, black and white: each number moves by at least a half."""
    return (x <= 0.5).astype(x.dtype)


def same_rows(logits: Any, others: Any) -> Any:
    """Which rows are equal up to 1 % of their largest logit; what is not finite is reported elsewhere."""
    return ~(abs(logits - others) > 0.01 * abs(logits).max(-1, keepdims=True)).any(-1)


def in_range(x: Any, input_range: tuple[float, float] | None) -> None:
    """Raises ValueError for inputs on the host outside the range; None takes all."""
    if input_range is None:
        return
    low, high = (number(value) for value in input_range)
    if not -math.inf <= low < high <= math.inf:
        raise ValueError(f"input_range must be (low, high) with low < high, or None, got {input_range!r}.")
    if x.size and not ((x >= low) & (x <= high)).all():
        raise ValueError(
            f"x must lie in [{low:g}, {high:g}], got values from {x.min():g} to {x.max():g}: radii are in these units; "
            "input_range=None takes inputs of any range."
        )


def floating(ndim: int, **values: Any) -> None:
    """Raises ValueError unless ``value`` is an array of finite floating numbers with ``ndim`` axes."""
    for name, value in values.items():
        if getattr(value, "ndim", None) != ndim or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype} of shape {value.shape}" if hasattr(value, "ndim") else type(value).__name__
            raise ValueError(f"{name} must be a floating array of {ndim} axes, got {got}.")
        if not isinstance(value, jax.core.Tracer) and (lost := np.size(value) - np.isfinite(np.asarray(value)).sum()):
            raise ValueError(f"{name} must be finite, got {lost} that are not.")


def key(key: Any, batch: int | None = None) -> None:
    """Raises ValueError unless ``key`` is one typed PRNG key, or ``batch`` of them where ``batch`` is given."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"an array of {key.dtype}" if isinstance(key, jax.Array) else short(key)
        raise ValueError(f"key must be a typed key from jax.random.key, got {got}.")
    wanted = [()] if batch is None else [(), (batch,)]
    if key.shape not in wanted:
        raise ValueError(f"key must have shape {' or '.join(map(str, wanted))}, got {key.shape}.")


def traced(name: str, inputs: Any, trace: Callable[[], Any]) -> Any:
    """What ``trace`` returns; ValueError that names the function and its inputs for what it raises while traced."""
    try:
        return trace()
    except ValueError:  # of ours, or one that says what the function wants
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise ValueError(
            f"{name} must be a function that JAX can trace, for inputs {inputs.shape}, got {type(error).__name__}: "
            f"{reason}"
        ) from error


def as_pytree(takes: int | None = 1, **functions: Any) -> Any:
    """Returns the function, given by its name, as a pytree whose arrays are arguments of compiled programs.

    A module of any framework, ``Partial``, ``functools.partial`` or a bound method gives up its arrays; a plain
    function is traced once, as under ``jit``. See ``_callables``.
    Raises ValueError if it cannot be called, or not with so many arguments; with None their number is not checked. When
    it is called and changes its own arrays, as a module in training mode does, that raises ValueError too.
    """
    [(name, function)] = functions.items()
    if _callables.is_torch(function):
        raise ValueError(
            f"{name} must be a function of JAX arrays, got the PyTorch module {type(function).__name__}: "
            "robustjax.models.from_torch(module, example) makes one of it."
        )
    if not callable(function):
        raise ValueError(f"{name} must be a function of inputs, got {short(function)}.")
    if takes is not None:
        try:
            inspect.signature(function).bind(*[None] * takes)
        except TypeError:
            count = f"{takes} argument{'s' * (takes > 1)}"
            raise ValueError(f"{name} must be a function of {count}, got {short(function)}.") from None
        except ValueError:  # built-in functions have no signature
            pass
    return _callables.separated(function, name)
