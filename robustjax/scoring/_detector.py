"""The pair that every out-of-distribution detector is, and what all pairs share: checks and blocks of rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from robustjax.typing import AnyArray, Outputs

Settings = ParamSpec("Settings")

BLOCK = 1024
"""Rows that are scored at once."""


class Head(NamedTuple):
    """The last linear layer of a classifier, ``logits = features @ kernel + bias``.

    Attributes:
      kernel: ``(dim, classes)``.
      bias: ``(classes,)``, or None.
    """

    kernel: Float[AnyArray, "dim classes"]
    bias: Float[AnyArray, " classes"] | None = None


class Detector(NamedTuple):
    """A detector of out-of-distribution inputs: two functions, as Optax's ``init`` and ``update``.

    Attributes:
      fit: ``fit(outputs, labels=None, head=None) -> state``, from outputs and labels of in-distribution training rows
        and the ``Head`` of the model. What a detector does not need may be left out.
      score: ``score(state, outputs) -> (batch,)`` scores, HIGHER = more out-of-distribution. Called with arrays it
        works through blocks of rows of one size, so that memory is bounded and one compilation serves every test set;
        under ``jit``, and for rows that are sharded, it is one plain function of all rows.
    """

    fit: Callable[..., Any]
    score: Callable[[Any, Outputs], jax.Array]


def cached_by_settings(factory: Callable[Settings, Detector]) -> Callable[Settings, Detector]:
    """Makes a factory give the same object for equal settings, defaults left out or written, hence one compilation."""
    signature, cached = inspect.signature(factory), functools.cache(factory)

    @functools.wraps(factory)
    def once(*args: Settings.args, **kwargs: Settings.kwargs) -> Detector:
        settings = signature.bind(*args, **kwargs)
        settings.apply_defaults()
        return cached(*settings.args, **settings.kwargs)

    return once


def make_detector(fit: Callable[..., Any] | None, score: Callable[[Any, Outputs], jax.Array]) -> Detector:
    """Makes a detector of two plain functions, behind the checks that all detectors share.

    Args:
      fit: ``(outputs, labels, head) -> state`` (a pytree), called outside ``jit`` with checked arguments; None where
        there is nothing to fit.
      score: ``(state, outputs) -> (batch,)``, traceable, each row by itself.

    Returns:
      The detector. Its functions raise ValueError for logits that are not ``(batch, classes >= 2)``, for features,
      labels or a head that do not fit them, for labels outside ``0, ..., classes - 1``, for training rows that are not
      finite and for scored rows with NaN.
    """

    @jax.jit
    def score_and_suspect(state, outputs):
        # The quickest sign of a NaN, in the one program that reads the rows; infinities of both signs give it, too.
        return score(state, outputs), jnp.isnan(outputs.logits.sum(-1) + outputs.features.sum(-1))

    @functools.wraps(score)
    def checked_score(state, outputs):
        check_outputs(outputs)
        leaves = jax.tree.leaves((state, outputs))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            # By itself a NaN may not reach the score: on a CPU, XLA's max passes over it.
            nan = jnp.isnan(outputs.logits).any(-1) | jnp.isnan(outputs.features).any(-1)
            return jnp.where(nan, jnp.nan, score(state, outputs))
        scores, suspect = in_blocks(score_and_suspect, state, outputs)
        if suspect.any():
            for name, values in zip(outputs._fields, outputs, strict=True):
                nan = jnp.isnan(values).any(-1)
                if nan.any():
                    raise ValueError(f"outputs.{name} must hold no NaN, got one in row {int(nan.argmax())}.")
        return scores

    def checked_fit(outputs=None, labels=None, head=None):
        if outputs is not None:
            check_outputs(outputs)
            if not outputs.logits.shape[0]:
                raise ValueError("outputs must hold at least one row to fit on, got none.")
            for name, values in zip(outputs._fields, outputs, strict=True):
                if not isinstance(values, jax.core.Tracer) and not bool(jnp.isfinite(values).all()):
                    row = int((~jnp.isfinite(values)).any(-1).argmax())
                    raise ValueError(f"outputs.{name} must be finite to fit on, row {row} is not.")
            if labels is not None:
                labels = checked_labels(labels, *outputs.logits.shape)
            if head is not None:
                head = _checked_head(head, outputs)
        return () if fit is None else fit(outputs, labels, head)

    return Detector(checked_fit, checked_score)


def require(name: str, **values: Any) -> None:
    """Raises ValueError for an argument of ``fit`` that the detector of that name needs and did not get."""
    for argument, value in values.items():
        if value is None:
            raise ValueError(f"{argument} must be given to fit {name}, got None.")


def check_detectors(name: str, *detectors: Detector) -> None:
    """Raises ValueError for what the combinator of that name took for a detector and is none."""
    for detector in detectors:
        if not isinstance(detector, Detector):
            raise ValueError(f"{name} takes a Detector such as scoring.energy(), got {detector!r}.")


def check_outputs(outputs: Outputs) -> None:
    """Raises ValueError unless ``outputs`` are logits (batch, classes >= 2) and features (batch, dim)."""
    shapes = {name: getattr(values, "shape", None) for name, values in zip(outputs._fields, outputs, strict=True)}
    logits, features = shapes["logits"], shapes["features"]
    if logits is None or len(logits) != 2 or logits[1] < 2:
        raise ValueError(f"outputs.logits must be (batch, classes >= 2), got {logits}.")
    if features is None or len(features) != 2 or features[0] != logits[0]:
        raise ValueError(f"outputs.features must be ({logits[0]}, dim), got {features}.")
    for name, values in zip(outputs._fields, outputs, strict=True):
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(f"outputs.{name} must be floating, got {values.dtype}.")


def checked_labels(labels, rows: int, num_classes: int):
    """``labels`` as int32, or ValueError unless they are ``rows`` integers in ``0, ..., num_classes - 1``."""
    if getattr(labels, "shape", None) != (rows,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = f"{labels.dtype} {labels.shape}" if hasattr(labels, "shape") else type(labels).__name__
        raise ValueError(f"labels must be ({rows},) integers, got {got}.")
    if (
        not isinstance(labels, jax.core.Tracer)
        and rows
        and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    ):
        raise ValueError(f"labels must lie in 0, ..., {num_classes - 1}, got {labels.min()} to {labels.max()}.")
    return jnp.asarray(labels, jnp.int32)


def _checked_head(head: Head | tuple, outputs: Outputs) -> Head:
    kernel, bias = head
    wanted = (outputs.features.shape[1], outputs.logits.shape[1])
    if kernel.shape != wanted:
        raise ValueError(f"head.kernel must be (dim, classes) = {wanted}, got {kernel.shape}.")
    if bias is not None and bias.shape != wanted[1:]:
        raise ValueError(f"head.bias must be ({wanted[1]},), got {bias.shape}.")
    for name, values in (("kernel", kernel), ("bias", bias)):
        if values is not None and not isinstance(values, jax.core.Tracer) and not bool(jnp.isfinite(values).all()):
            raise ValueError(f"head.{name} must be finite, it is not.")
    return Head(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))


@functools.partial(jax.jit, static_argnames="size")
def _slice(array, start, *, size):
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _rows(tree, start, size):
    # A slice of a NumPy array is a view; an argument of a compiled program would be copied whole for every block.
    return jax.tree.map(
        lambda a: _slice(a, start, size=size) if isinstance(a, jax.Array) else a[start : start + size], tree
    )


def _free_on_cpu(tree):
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return jax.default_backend() == "cpu" and not any(array.committed for array in arrays)


def _spread(tree):
    return any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def in_blocks(function: Callable[[Any, Any], Any], state: Any, rows: Any, size: int = BLOCK) -> Any:
    """``function(state, rows)`` by ``size`` rows at a time, or of all at once where arrays are traced or rows sharded.

    ``function`` is compiled and treats each row by itself; ``rows`` and its result are trees of arrays whose first axis
    is the batch. The last block is filled up with rows that are there twice. Where the state lies on several devices,
    each block goes to all of them.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, rows))) or _spread(rows):
        return function(state, rows)
    # Rows that are bound to one device could not meet a state on several. On a CPU, slices of an array are copies, made
    # in half of the time that energy takes, and slices of what NumPy makes of it are views.
    if _spread(state) or _free_on_cpu(rows):
        rows = jax.tree.map(np.asarray, rows)
    total = jax.tree.leaves(rows)[0].shape[0]
    if total < size:
        filled = jax.tree.map(lambda a: np.pad(np.asarray(a), ((0, size - total), *((0, 0),) * (a.ndim - 1))), rows)
        return jax.tree.map(lambda a: a[:total], function(state, filled))
    parts = [function(state, _rows(rows, start, size)) for start in range(0, total - size + 1, size)]
    left = total % size
    if left:
        parts.append(jax.tree.map(lambda a: a[-left:], function(state, _rows(rows, total - size, size))))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
