"""Functions of any framework, taken apart: arrays, which are arguments of a compiled program, and all the rest.

A function is taken apart as far as it says what it holds: a pytree (an Equinox or a Flax NNX module, ``Partial``), a
``functools.partial``, a bound method, and ``jax.jit`` of these. What a plain function closes over stays in it, and
``jax.vmap(module)`` is a plain function; ``equinox.filter_vmap(module)`` is a module.

- Arrays are arguments, so that new weights of equal shapes are used and do not compile again.
- Numbers of Python, text and functions are part of the program: code branches on them (``train=False``) and makes
  shapes of them. Only the ``float`` and ``int`` that ``jax.tree_util.Partial`` binds are arguments, as JAX says.
- Equal structures with equal static parts share a program. Parts that have no hash are compared by identity.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

_KINDS = (jnp.number, jnp.bool_, jax.dtypes.prng_key)


def separated(function: Callable, name: str) -> Any:
    """``function`` as a ``Partial`` of a hashable program and its arrays; one that is so already is returned."""
    if is_separated(function):
        return function
    arrays: list[Any] = []
    recipe = _taken_apart(function, arrays)
    if not _equal(recipe, _taken_apart(function, [])):  # a static field of a pytree, such as a NumPy array, has no ==
        arrays, recipe = [], _Static(function)
    return jax.tree_util.Partial(_Program(recipe, name, _signature(function)), tuple(arrays))


def is_separated(function: Any) -> bool:
    """Whether a function is a result of :func:`separated`."""
    return isinstance(function, jax.tree_util.Partial) and isinstance(function.func, _Program)


def is_torch(function: Any) -> bool:
    """Whether this is a PyTorch module, also of a subclass; PyTorch is not imported for it."""
    return any(kind.__module__.startswith("torch.") for kind in type(function).__mro__)


class _Program:
    """A function without its arrays, which it takes as one tuple before its own arguments."""

    def __init__(self, recipe: Any, name: str, signature: inspect.Signature | None):
        self._recipe, self._name, self.__signature__ = recipe, name, signature
        self._hash = hash(recipe)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and (self is other or _equal(self._recipe, other._recipe))

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self._name

    def __call__(self, arrays: tuple, *args: Any, **kwargs: Any) -> Any:
        function = _put_together(self._recipe, iter(arrays))
        kept = {id(array) for array in arrays} & _held(function)  # fewer where a pytree makes arrays as it is flattened
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            # Flax, of an NNX module that a plain function closes over, and of Linen variables that are not mutable.
            if type(error).__name__ in ("TraceContextError", "ModifyScopeVariableError"):
                raise self._changed() from error
            raise
        if not kept <= _held(function):
            raise self._changed()
        return result

    def _changed(self):
        # Its new arrays would be lost, and they would be other ones in each block of inputs.
        return ValueError(
            f"{self._name} must not change its own arrays when it is called, got others in it after a call: leave the "
            "training mode, as model.eval() does in Flax NNX and equinox.nn.inference_mode in Equinox, and keep no "
            "counters or caches in the model."
        )


class _Static:
    """Something that is part of a program: equal by type and value, or by identity where it has no hash."""

    def __init__(self, value: Any):
        self.value = value
        try:
            hash(value)
        except TypeError:
            self._key: Any = (type(value), id(value))
        else:  # 0.0 equals -0.0, and 1 equals True: programs of both differ
            self._key = (type(value), repr(value) if isinstance(value, (float, complex)) else value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _equal(recipe: Any, other: Any) -> bool:
    try:
        return hash(recipe) == hash(other) and recipe == other
    except Exception:  # of what a pytree holds as static
        return False


def _taken_apart(value: Any, arrays: list[Any], numbers: bool = False) -> Any:
    """What is left of a value without its arrays, which are appended: None for an array, or (how to make it, parts)."""
    if _is_array(value) or numbers and type(value) in (float, int):
        arrays.append(value)
        return None
    if isinstance(value, functools.partial):
        kind = jax.tree_util.Partial if isinstance(value, jax.tree_util.Partial) else functools.partial
        numbers = numbers or kind is jax.tree_util.Partial
        inner = getattr(value.func, "fun", None)  # where `Partial` keeps a partial that it binds more arguments to
        func = inner if isinstance(inner, functools.partial) else value.func
        make, parts = _MAKE[kind], (func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        make, parts = types.MethodType, (value.__func__, value.__self__)
    elif isinstance(inside := _under_jit(value), (functools.partial, types.MethodType)) or not _is_leaf(inside):
        return _taken_apart(inside, arrays, numbers)
    elif _is_leaf(value):
        return _Static(value)
    else:
        parts, make = jax.tree.flatten(value, is_leaf=lambda part: isinstance(part, functools.partial))
    return make, tuple(_taken_apart(part, arrays, numbers) for part in parts)


def _put_together(recipe: Any, arrays: Iterator[Any]) -> Any:
    if recipe is None:
        return next(arrays)
    if isinstance(recipe, _Static):
        return recipe.value
    make, parts = recipe
    parts = [_put_together(part, arrays) for part in parts]
    return make.unflatten(parts) if isinstance(make, jax.tree_util.PyTreeDef) else make(*parts)


def _held(function: Any) -> set[int]:
    """The identities of the arrays in a function; none of one that can no longer be taken apart."""
    arrays: list[Any] = []
    try:
        _taken_apart(function, arrays)
    except Exception:  # a state of Equinox that a newer one has replaced
        return set()
    return {id(array) for array in arrays}


_SHAPES = ("broadcast_in_dim", "clamp", "convert_element_type", "copy", "max", "min", "reshape", "squeeze", "transpose")


def last_steps(jaxpr: Any) -> set[str]:
    """The names of the primitives that compute the first result of a jaxpr, apart from those that only reshape it."""
    return _last_steps(jaxpr.jaxpr, _variables(jaxpr.jaxpr.outvars[:1]))[0]


def _last_steps(jaxpr, wanted):
    found = set()
    for equation in reversed(jaxpr.eqns):
        if wanted.isdisjoint(equation.outvars):
            continue
        inside = next((equation.params[name] for name in ("jaxpr", "call_jaxpr") if name in equation.params), None)
        if inside is not None:  # a function in the function
            inside = getattr(inside, "jaxpr", inside)
            results = (inner for inner, outer in zip(inside.outvars, equation.outvars) if outer in wanted)
            names, reached = _last_steps(inside, _variables(results))
            found |= names
            wanted |= _variables(outer for inner, outer in zip(inside.invars, equation.invars) if inner in reached)
        elif equation.primitive.name in _SHAPES:
            wanted |= _variables(equation.invars)
        else:
            found.add(equation.primitive.name)
    return found, wanted


def _variables(atoms):
    return {atom for atom in atoms if isinstance(atom, jax.extend.core.Var)}


_MAKE = {
    kind: (lambda function, args, keywords, kind=kind: kind(function, *args, **keywords))
    for kind in (functools.partial, jax.tree_util.Partial)
}


def _under_jit(value: Any) -> Any:
    """The function that ``jax.jit`` has compiled; None of all others."""
    return getattr(value, "__wrapped__", None) if isinstance(value, _JITTED) else None


_JITTED = type(jax.jit(lambda: None))


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value]) or value is None


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers or keys, on a device or on the host, or its shape and dtype."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape") or not _is_leaf(value):
        return False
    try:
        return any(jnp.issubdtype(dtype, kind) for kind in _KINDS)
    except TypeError:  # a dtype of another library
        return False


def _signature(function: Callable) -> inspect.Signature | None:
    """The signature with a place for the arrays. Without default values, which may be arrays that it would keep."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in functions have none
        return None
    empty = inspect.Parameter.empty
    plain = [p.replace(annotation=empty, default=empty if p.default is empty else None) for p in parameters]
    return inspect.Signature([inspect.Parameter("__arrays", inspect.Parameter.POSITIONAL_ONLY), *plain])
