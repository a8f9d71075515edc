"""The interface of all out-of-distribution detectors, and what they share: checks and blocks of rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.typing import AnyArray, Outputs

Settings = ParamSpec("Settings")

BLOCK = 1024
"""Rows that are scored at once, by each device."""


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
        and the ``Head`` of the model. Arguments that a detector does not need may be left out.
      score: ``score(state, outputs) -> (batch,)`` scores, HIGHER = more out-of-distribution. Called with arrays, it
        works through blocks of rows of one size: memory is bounded, and one compilation serves every test set. Rows
        that are sharded over a mesh are scored on the device that holds them, in blocks, with a copy of the state on
        each device; the scores are sharded in the same way. Under ``jit`` it is one plain function of all rows.

    Both take ``Outputs``; a detector that reads only logits also takes bare logits ``(batch, classes)``.
    """

    fit: Callable[..., Any]
    score: Callable[[Any, Outputs | jax.Array], jax.Array]


def cached_by_settings(factory: Callable[Settings, Detector]) -> Callable[Settings, Detector]:
    """Makes a factory return the same object for equal settings, with or without defaults: hence one compilation."""
    signature, cached = inspect.signature(factory), functools.cache(factory)

    @functools.wraps(factory)
    def once(*args: Settings.args, **kwargs: Settings.kwargs) -> Detector:
        settings = signature.bind(*args, **kwargs)
        settings.apply_defaults()
        try:
            hash((settings.args, *settings.kwargs.values()))
        except TypeError:  # of an array or a list: the factory says whether it takes one
            return factory(*args, **kwargs)
        return cached(*settings.args, **settings.kwargs)

    return once


@_arguments.checked
def make_detector(
    fit: Callable[..., Any] | None,
    score: Callable[[Any, Outputs], jax.Array],
    fitted_on: Callable[[Any], tuple[int | None, int | None]] = lambda state: (None, None),
    *,
    needs_features: bool = True,
) -> Detector:
    """Makes a detector from two plain functions, and adds the checks that all detectors share.

    Args:
      fit: ``(outputs, labels, head) -> state`` (a pytree), called outside ``jit`` with checked arguments; None if
        there is nothing to fit.
      score: ``(state, outputs) -> (batch,)``, traceable, each row independently.
      fitted_on: ``state -> (classes, dim)`` of the training outputs, with None for a number that scored outputs may
        change.
      needs_features: False for a detector that reads only logits: it then takes bare logits ``(batch, classes)`` too,
        and its functions see them as ``Outputs`` with no columns of features.

    Returns:
      The detector. Its two functions see outputs in float32 or finer. They raise ValueError for logits that are not
      ``(batch, classes >= 2)``, for bare logits where the detector needs features, for features, labels or a head that
      do not fit the logits or the state, for labels outside ``0, ..., classes - 1``, for rows that are not finite, and
      for scores that would be NaN. Under ``jit``, where values are unknown, a row that is not finite scores NaN.

    Example:
      >>> detector = scoring.make_detector(
      ...     fit=lambda outputs, labels, head: outputs.features.mean(0),
      ...     score=lambda mean, outputs: jnp.linalg.norm(outputs.features - mean[None], axis=-1),
      ... )
      >>> print(detector.score(detector.fit(train), test))
      [3.27 7.57]
    """

    def score_and_finite(state, outputs):
        outputs = jax.tree.map(in_float32, outputs)
        scores = score(state, outputs)
        # The quickest sign, in the one program that reads the rows; of some finite rows, too, the sum is infinite.
        return scores, jnp.isfinite(outputs.logits.sum(-1) + outputs.features.sum(-1)) & ~jnp.isnan(scores)

    compiled = jax.jit(score_and_finite)

    @functools.wraps(score)
    def checked_score(state, outputs):
        outputs = as_outputs(outputs, needs_features)
        shapes = zip(("logits", "features"), fitted_shapes(fitted_on, state), strict=True)
        for name, wanted in shapes:
            got = getattr(outputs, name).shape
            if wanted is not None and got[1] != wanted:
                raise ValueError(f"outputs.{name} must be ({got[0]}, {wanted}), as the state was fitted on, got {got}.")
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, outputs))):
            finite = jnp.isfinite(outputs.logits).all(-1) & jnp.isfinite(outputs.features).all(-1)
            return jnp.where(finite, score_and_finite(state, outputs)[0], jnp.nan)
        scores, finite = in_blocks(compiled, state, outputs)
        if not np.asarray(finite).all():
            check_finite("outputs.logits", outputs.logits)
            check_finite("outputs.features", outputs.features)
            nan = np.isnan(scores)
            if nan.any():
                raise ValueError(
                    f"state and outputs must be finite and their scores within float32, {nan.sum()} of {nan.size} "
                    f"scores are NaN, the first of row {nan.argmax()}."
                )
        return scores

    def checked_fit(outputs=None, labels=None, head=None):
        if outputs is not None:
            outputs = as_outputs(outputs, needs_features)
            if not outputs.logits.shape[0]:
                raise ValueError("outputs must hold at least one row to fit on, got none.")
            for name, values in zip(outputs._fields, outputs, strict=True):
                check_finite(f"outputs.{name}", values)
            outputs = jax.tree.map(lambda a: jnp.asarray(in_float32(a)), outputs)
            if labels is not None:
                labels = checked_labels(labels, *outputs.logits.shape)
            sharding = sharding_of_rows(outputs)
            if sharding is not None:
                outputs, labels = jax.device_put((outputs, labels), sharding)
            if head is not None:
                head = _checked_head(head, outputs)
        return () if fit is None else fit(outputs, labels, head)

    setattr(checked_fit, "reads_rows", fit is not None)  # noqa: B010, for type checkers
    return Detector(checked_fit, checked_score)


def require(name: str, **values: Any) -> None:
    """Raises ValueError for an argument of ``fit`` that the detector of that name needs and did not get."""
    for argument, value in values.items():
        if value is None:
            raise ValueError(f"{argument} must be given to fit {name}, got None.")


@jax.jit
def _largest(values):
    return jnp.abs(values).max(initial=0.0)


def check_scale(name: str, features: AnyArray, *, least: float = 2.0**-40, most: float = 2.0**40) -> None:
    """Raises ValueError for features whose products would leave float32; all zeros, and traced features, pass."""
    if isinstance(features, jax.core.Tracer):
        return
    largest = float(_largest(features))
    if largest and not least <= largest <= most:
        raise ValueError(
            f"outputs.features must have a largest magnitude from {least:.0e} to {most:.0e} to fit {name}, got "
            f"{largest:.3g}: multiply features by a power of two, and divide the head's kernel by it."
        )


def check_detectors(name: str, *detectors: Detector) -> None:
    """Raises ValueError if an argument of the named combinator is not a detector."""
    for detector in detectors:
        if not isinstance(detector, Detector):
            raise ValueError(f"{name} needs a Detector such as scoring.energy(), got {detector!r}.")


def check_finite(name: str, values: AnyArray) -> None:
    """Raises ValueError unless all rows are finite; traced rows pass."""
    if not isinstance(values, jax.core.Tracer) and not _validate.holds(_validate.finite, values):
        bad = ~np.isfinite(np.asarray(values)).reshape(values.shape[0], -1).all(-1)
        raise ValueError(
            f"{name} must be finite, {bad.sum()} of {bad.size} rows are not, the first is row {bad.argmax()}."
        )


def fitted_shapes(fitted_on: Callable[[Any], Any], state: Any) -> Any:
    """``fitted_on(state)``; ValueError for a state of another detector, or no state."""
    try:
        return fitted_on(state)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"state must come from fit of this detector, got {type(state).__name__}.") from error


def as_outputs(outputs: Outputs | AnyArray, needs_features: bool = False) -> Outputs:
    """``outputs``, and bare logits as Outputs with features (batch, 0).

    Raises ValueError unless logits are (batch, classes >= 2) and features (batch, dim), and for bare logits where
    features are needed.
    """
    if isinstance(outputs, (jax.Array, np.ndarray)):
        outputs = Outputs._make((outputs, outputs[..., :0]))
    if not isinstance(outputs, Outputs):
        raise ValueError(
            f"outputs must be Outputs(logits, features) or logits (batch, classes), got {type(outputs).__name__}."
        )
    shapes = {name: getattr(values, "shape", None) for name, values in zip(outputs._fields, outputs, strict=True)}
    logits, features = shapes["logits"], shapes["features"]
    if logits is None or len(logits) != 2 or logits[1] < 2:
        raise ValueError(f"outputs.logits must be (batch, classes >= 2), got {logits}.")
    if features is None or len(features) != 2 or features[0] != logits[0]:
        raise ValueError(f"outputs.features must be ({logits[0]}, dim), got {features}.")
    if needs_features and not features[1]:
        raise ValueError(
            f"outputs must be Outputs(logits, features), because this detector reads features; got logits {logits}."
        )
    for name, values in zip(outputs._fields, outputs, strict=True):
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(f"outputs.{name} must be floating, got {values.dtype}.")
    return outputs


def checked_labels(labels, rows: int, num_classes: int):
    """``labels`` as int32, or ValueError unless they are ``rows`` integers in ``0, ..., num_classes - 1``."""
    if getattr(labels, "shape", None) != (rows,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = f"{labels.dtype} {labels.shape}" if hasattr(labels, "shape") else type(labels).__name__
        raise ValueError(f"labels must be ({rows},) integers, got {got}.")
    inside = lambda labels: (labels >= 0) & (labels < num_classes)
    if not isinstance(labels, jax.core.Tracer) and not _validate.holds(inside, labels):
        raise ValueError(f"labels must lie in 0, ..., {num_classes - 1}, got {labels.min()} to {labels.max()}.")
    return jnp.asarray(labels, jnp.int32)


def _checked_head(head: Head | tuple, outputs: Outputs) -> Head:
    if not isinstance(head, (tuple, list)) or len(head) != 2 or head[0] is None:
        got = f"{type(head).__name__}{f' of {len(head)}' if isinstance(head, (tuple, list)) else ''}"
        raise ValueError(f"head must be Head(kernel, bias), got {got}.")
    kernel = in_float32(jnp.asarray(head[0]))
    bias = None if head[1] is None else in_float32(jnp.asarray(head[1]))
    dim = outputs.features.shape[1:] if outputs.features.shape[1] else kernel.shape[:1]  # bare logits have no dim
    wanted = (*dim, outputs.logits.shape[1])
    if kernel.shape != wanted:
        raise ValueError(f"head.kernel must be (dim, classes) = {wanted}, got {kernel.shape}.")
    if bias is not None and bias.shape != wanted[1:]:
        raise ValueError(f"head.bias must be ({wanted[1]},), got {bias.shape}.")
    for name, values in (("kernel", kernel), ("bias", bias)):
        if values is None or isinstance(values, jax.core.Tracer):
            continue
        if not _validate.holds(_validate.finite, values):
            raise ValueError(f"head.{name} must be finite, got NaN or infinity.")
    return Head(kernel, bias)


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


def sharding_of_rows(rows):
    """The sharding of rows over several devices; None for one device, and if single rows are sharded."""
    leaves = [leaf for leaf in jax.tree.leaves(rows) if not isinstance(leaf, jax.core.Tracer)]
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
    spread = [sharding for sharding in shardings if sharding is not None and len(sharding.device_set) > 1]
    if not spread or not isinstance(spread[0], NamedSharding) or any(spread[0].spec[1:]):
        return None
    mesh, spec = spread[0].mesh, spread[0].spec
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), PartitionSpec(*spec[:1]))  # all axes Auto


@functools.partial(jax.jit, static_argnames=("function", "sharding"))
def _on_each_device(state, rows, *, function, sharding):
    """``function(state, rows)`` for the rows of each device, without communication between devices."""
    mesh, everywhere, spec = sharding.mesh, PartitionSpec(), sharding.spec
    return jax.shard_map(function, mesh=mesh, in_specs=(everywhere, spec), out_specs=spec, check_vma=False)(state, rows)


def _take(places, rows):
    return jax.tree.map(lambda a: a[places], rows)


def _join(places, parts):
    return jax.tree.map(lambda *a: jnp.concatenate(a)[places], *parts)


def _in_blocks_on_devices(function, state, rows, size, sharding):
    rows = jax.device_put(rows, sharding)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    is_array = lambda leaf: isinstance(leaf, (jax.Array, np.ndarray))
    state = jax.tree.map(lambda leaf: jax.device_put(leaf, everywhere) if is_array(leaf) else leaf, state)
    on_each_device = functools.partial(_on_each_device, sharding=sharding)
    total = sharding.shard_shape(jax.tree.leaves(rows)[0].shape[:1])[0]
    parts = []
    for start in range(0, total, size):
        places = np.minimum(np.arange(start, start + size), total - 1)  # the last block is padded with its last row
        parts.append(on_each_device(state, on_each_device(places, rows, function=_take), function=function))
    return on_each_device(np.arange(total), parts, function=_join)


def _seen(tree):
    """Results on the host, where they are those of one CPU: slicing and joining them there compiles nothing."""
    leaves = jax.tree.leaves(tree)
    there = all(len(a.devices()) == 1 and next(iter(a.devices())).platform == "cpu" for a in leaves)
    return jax.tree.map(np.asarray, tree) if there else tree


def _joined(parts):
    if isinstance(jax.tree.leaves(parts)[0], np.ndarray):
        return jax.tree.map(lambda *a: jnp.asarray(np.concatenate(a)), *parts)
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def in_blocks(function: Callable[[Any, Any], Any], state: Any, rows: Any, size: int = BLOCK) -> Any:
    """``function(state, rows)`` for ``size`` rows at a time, or for all rows at once if arrays are traced.

    ``function`` is compiled and treats each row independently; ``rows`` and its result are trees of arrays whose first
    axis is the batch. The last block is padded with repeated rows. Rows on several devices are processed in blocks of
    ``size`` rows per device, with a copy of the state on each device. If only the state is on several devices, each
    block goes to all of them.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, rows))):
        return function(state, rows)
    sharding = sharding_of_rows(rows)
    if sharding is not None and jax.tree.leaves(rows)[0].shape[0]:
        return _in_blocks_on_devices(function, state, rows, size, sharding)
    if _spread(rows):  # single rows are sharded: leave it to the compiler
        return function(state, rows)
    # Rows that are bound to one device could not meet a state on several. On a CPU, slices of an array are copies, made
    # in half of the time that energy takes, and slices of what NumPy makes of it are views.
    if _spread(state) or _free_on_cpu(rows):
        rows = jax.tree.map(np.asarray, rows)
    total = jax.tree.leaves(rows)[0].shape[0]
    if total < size:
        filled = jax.tree.map(lambda a: np.pad(np.asarray(a), ((0, size - total), *((0, 0),) * (a.ndim - 1))), rows)
        return _joined([jax.tree.map(lambda a: a[:total], _seen(function(state, filled)))])
    parts = [_seen(function(state, _rows(rows, start, size))) for start in range(0, total - size + 1, size)]
    left = total % size
    if left:
        parts.append(jax.tree.map(lambda a: a[-left:], _seen(function(state, _rows(rows, total - size, size)))))
    return _joined(parts)
