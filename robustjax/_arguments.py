"""Arguments of public functions, checked when they are called against the signature's own annotations.

:func:`checked` decorates each public function, and each public dataclass of settings with its methods. It guarantees:

- An argument of another type, rank or kind of number than its annotation says is refused before anything is computed:
  ``ValueError: labels must be an array of integers (batch,), got float32 of shape (4, 2).``
- Settings, which are dataclasses, speak first where they have a check of their own.
- Values are not read. Traced values and ``jax.ShapeDtypeStruct`` pass by their shape and dtype, NumPy's arrays as JAX's
  do, and integers where numbers are wanted.
- The function keeps its signature, documentation and type. Annotations are read at the first call, not at import.

What an annotation does not say (ranges, NaN, sizes that agree) the function checks itself, with ``_validate``.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import itertools
import numbers
import types
import typing
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import _validate

_Function = TypeVar("_Function", bound=collections.abc.Callable[..., Any])
_Kind = tuple[collections.abc.Callable[[Any], bool], str]  # what an annotation admits, and the words for it
_ANYTHING: _Kind = (lambda value: True, "")


def checked(function: _Function) -> _Function:
    """Decorates a function, or a dataclass and its methods, to refuse arguments that annotations do not admit."""
    if inspect.isclass(function):
        function.__init__ = _checked_settings(function.__init__)  # type: ignore[misc]
        for name, method in [*vars(function).items()]:
            if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_")):
                setattr(function, name, checked(method))
        return function

    @functools.wraps(function)
    @typing.no_type_check  # the tests' type checker is for the function inside
    def call(*args, **kwargs):
        _check(function, args, kwargs)
        return call.__wrapped__(*args, **kwargs)

    return call  # type: ignore[return-value]


def _checked_settings(init):
    @functools.wraps(init)
    @typing.no_type_check
    def call(*args, **kwargs):
        try:
            call.__wrapped__(*args, **kwargs)
        except Exception as error:
            said = str(error)
            by_name = isinstance(error, ValueError) and said.split(" ")[0] in _parameters(init)[2] and len(said) <= 300
            if not by_name:  # else it is the class's own check, which says more
                _check(init, args, kwargs)
            raise
        _check(init, args, kwargs)

    return call


def _check(function, args, kwargs):
    positional, more, named, others = _parameters(function)
    for (name, (admits, words)), value in zip(itertools.chain(positional, more), args):
        if not admits(value):
            raise ValueError(f"{name} must be {words}, got {_validate.short(value)}.") from None
    for name, value in kwargs.items():
        admits, words = named.get(name, others)
        if not admits(value):
            raise ValueError(f"{name} must be {words}, got {_validate.short(value)}.") from None


@functools.cache
def _parameters(function):
    """Names and kinds of parameters by position, of further positions, by name, and of further names."""
    namespace = getattr(inspect.unwrap(function), "__globals__", {})
    positional, more, named, others = [], (), {}, _ANYTHING
    for p in inspect.signature(function).parameters.values():
        kind = _kind(_read(p.annotation, namespace))
        if p.kind is p.VAR_POSITIONAL:
            more = itertools.repeat((p.name, kind))
        elif p.kind is p.VAR_KEYWORD:
            others = kind
        else:
            named[p.name] = kind
            positional += [(p.name, kind)] * (p.kind is not p.KEYWORD_ONLY)
    return positional, more, named, others


def _read(annotation, namespace):
    try:
        return eval(annotation, namespace) if isinstance(annotation, str) else annotation  # noqa: S307, our signatures
    except NameError:  # imported for type checkers only
        return Any


@functools.cache
def _kind(hint) -> _Kind:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return _ANYTHING
    if hint == jax.typing.DTypeLike:
        return _is_dtype, "a dtype"
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in (typing.Union, types.UnionType):
        if np.generic in inside:  # typing.ArrayLike
            none = type(None) in inside
            return lambda value: _is_numeric(value) or none and value is None, "real numbers" + " or None" * none
        kinds = [_kind(part) for part in inside]
        words = " or ".join(dict.fromkeys(word for _, word in kinds if word))
        return lambda value: any(admits(value) for admits, _ in kinds), words
    if origin is typing.Literal:
        *others, last = map(str, inside)
        words = f"{', '.join(others)} or {last}" if others else last
        return lambda value: isinstance(value, (str, int)) and value in inside, words
    if hasattr(hint, "dims") and hasattr(hint, "dtypes"):
        return _array_kind(hint)
    if origin in (tuple, collections.abc.Sequence):
        return _sequence_kind(origin, inside)
    if origin is collections.abc.Mapping:
        admits, words = _kind(inside[1])
        every = lambda value: isinstance(value, collections.abc.Mapping) and all(map(admits, value.values()))
        return every, "a mapping" + (f" to {words}" if words else "")
    kind = origin or hint
    if not inspect.isclass(kind):
        return _ANYTHING
    if kind is collections.abc.Callable or getattr(kind, "_is_protocol", False) and "__call__" in vars(kind):
        return callable, "a function"
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    words = _WORDS.get(kind.__name__, f"{article} {kind.__name__}")
    return lambda value: isinstance(value, kind) and not isinstance(value, type), words


_WORDS = {
    "Measure": "a smoothing measure such as gaussian(0.5)",
    "Gaussian": "gaussian(sigma)",
    "Detector": "a Detector such as scoring.energy()",
}


@functools.cache
def _is_array_type(kind):
    # A Flax variable is an array by __jax_array__. Tracers are jax.Array by their abstract values.
    return issubclass(kind, (jax.Array, np.ndarray, np.generic, jax.core.Tracer, jax.ShapeDtypeStruct)) or hasattr(
        kind, "__jax_array__"
    )


def _is_array(value):
    return _is_array_type(type(value))


@functools.cache
def _is_of(dtype, kinds):
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


_REAL = (jnp.floating, np.integer)


def _is_number(value):
    if type(value) in (float, int):
        return True
    if _is_array(value):
        return value.ndim == 0 and _is_of(value.dtype, _REAL)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value):
    if type(value) is int:
        return True
    if _is_array(value):
        return value.ndim == 0 and _is_of(value.dtype, (np.integer,))
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_truth(value):
    return isinstance(value, bool) or _is_array(value) and value.ndim == 0 and _is_of(value.dtype, (np.bool_,))


def _is_dtype(value):
    try:
        return value is not None and jnp.dtype(value) is not None
    except TypeError:
        return False


def _is_numeric(value):
    try:
        dtype = value.dtype if _is_array(value) else np.asarray(value).dtype
    except (TypeError, ValueError):  # rows of several lengths
        return False
    return _is_of(dtype, (*_REAL, np.bool_))


_PLAIN: dict[Any, _Kind] = {
    None: (lambda value: value is None, "None"),
    type(None): (lambda value: value is None, "None"),
    bool: (_is_truth, "True or False"),
    int: (_is_integer, "an integer"),
    float: (_is_number, "a number"),
    str: (lambda value: isinstance(value, str), "text"),
    jax.Array: (_is_array, "an array"),
    np.ndarray: (lambda value: _is_array(value) and _is_numeric(value), "an array"),
    collections.abc.Callable: (callable, "a function"),
}
_DTYPES = {
    "Float": (jnp.floating, "a floating array"),
    "Int": (np.integer, "an array of integers"),
    "UInt32": (np.uint32, "an array of uint32"),
    "Bool": (np.bool_, "an array of bool"),
    "Key": (jax.dtypes.prng_key, "a typed key from jax.random.key"),
    "Shaped": (np.generic, "an array"),
}


def _array_kind(hint) -> _Kind:
    """An array of jaxtyping, by its rank and kind of number; the function itself checks that sizes agree."""
    name = hint.__name__.split("[")[0]
    dtype, words = _DTYPES[name]
    rank, least = len(hint.dims), len(hint.dims) - (hint.index_variadic is not None)
    if not rank:
        words = {"Float": "a number", "Int": "an integer", "Key": f"{words}, of shape ()"}.get(name, words)
    elif least and name != "Key":
        words += f" ({', '.join(hint.dim_str.split())}{',' * (rank == 1)})"

    def admits(value):
        if not _is_array(value) or not (value.ndim == rank or least < rank and value.ndim >= least):
            return False
        return dtype is np.generic or _is_of(value.dtype, (dtype,))

    return admits, words


def _sequence_kind(origin, inside) -> _Kind:
    kinds = [_kind(part) for part in inside if part is not ...]
    length = len(inside) if origin is tuple and ... not in inside else None
    words = f"{length} values" if length else f"a sequence, each {kinds[0][1]}"
    if length and len({word for _, word in kinds}) == 1:
        words += f", each {kinds[0][1]}"

    def admits(value):
        if isinstance(value, (str, bytes)) or not (isinstance(value, collections.abc.Sequence) or _is_array(value)):
            return False
        if getattr(value, "ndim", 1) != 1 or length not in (None, len(value)):
            return False
        return all(admits(part) for part, (admits, _) in zip(value, kinds if length else kinds * len(value)))

    return admits, words
