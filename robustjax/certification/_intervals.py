"""Certificates of the network itself by interval bound propagation, without noise and without sampling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robustjax import _arguments, _summary, _validate
from robustjax._intervals import ball, margin_bounds
from robustjax.typing import AnyArray, LogitsFn


class Certificate(NamedTuple):
    """Certificates by interval bound propagation for the ball around each input.

    Attributes:
      label: ``(batch,)``, the classes to be verified, int32.
      margin: ``(batch,)``, a lower bound of the least :math:`f_y - f_j` in the ball, less the room for rounding errors;
        ``-inf`` if there is no bound.
      verified: ``(batch,)``, whether ``margin`` is positive: the model answers ``label`` everywhere in the ball.
    """

    label: Int[Array, " batch"]
    margin: Float[Array, " batch"]
    verified: Bool[Array, " batch"]

    def __repr__(self) -> str:
        words = lambda: f"{_summary.inputs(len(self.verified))}: {int(np.sum(self.verified))} verified"
        return _summary.of(self, words)


@_arguments.checked
def certify(
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"] | None = None,
    *,
    epsilon: float,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> Certificate:
    r"""Certifies the network itself in the linf ball around each input, by interval bound propagation.

    .. math:: \min_{j \ne y} \ \min_{\lVert x' - x \rVert_\infty \le \epsilon,\ l \le x' \le h} f_y(x') - f_j(x')

    with [l, h] the ``input_range``, is bounded from below: intervals go through the network up to the last activations,
    and the map from there to a difference of logits is bounded as a whole ("elision" of the last layer). The bounds are
    tight for networks trained for them (:func:`robustjax.losses.interval_training`), and loose for other networks,
    above all for deep ones. See :func:`bounds` for the operations that a network may contain. Randomness and batch
    statistics are not supported: the model sees one input at a time. Works under ``jit`` and compiles once for all
    epsilons.

    Args:
      logits_fn: maps ``(1, ...)`` to ``(1, classes)``; normalisation belongs inside.
      x: ``(batch, ...)``, float32 or float64, in ``input_range``.
      labels: ``(batch,)``, classes to verify; None for the model's own answers.
      epsilon: radius of the ball in the linf norm, in units of x, at least 0.
      batch_size: inputs at a time, which bounds memory; None for all.
      input_range: the smallest and the largest number that an input may hold, also after a change; None for any.

    Returns:
      The certificates, device arrays.

    Raises:
      ValueError: for an argument that is not as above, and for a network with a JAX primitive whose bounds are not
        known; the message names the primitive, its layer, and the line of the model.

    Guarantee:
      Deterministic, for every point of the ball. A step that may leave its domain anywhere in the ball, or overflow to
      inf - inf, leaves its input unverified for good: what clip, max, min or where make of an undefined value is no
      bound. Rounding is allowed for: every step widens its interval by 1e-5 in float32 (84 units in the last place) of
      the result, or of the sum of absolute terms where terms may cancel, as in sums and products of matrices. The
      rounding error of float32 is about 6e-8 for each term, mostly in both directions; 1e-5 covers the sums of networks
      of usual width, but this is not proved for every network. It does not cover a model that runs in lower precision
      than float32, as matrix products on TPUs and GPUs do by default (``jax.default_matmul_precision`` changes this).

    Example:
      >>> certificate = intervals.certify(logits_fn, x, epsilon=0.2)  # the means 0.5 and 0.9 may fall by 0.2
      >>> print(certificate.label, certificate.verified)
      [1 1] [False  True]

    Reference:
      Gowal et al. 2018, On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models,
      arXiv 1810.12715.
    """
    logits_fn = _validate.as_pytree(logits_fn=logits_fn)
    _validate.not_negative(epsilon=epsilon)
    if batch_size is not None:
        _validate.at_least(1, batch_size=batch_size)
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype not in (jnp.float32, jnp.float64) or x.ndim < 2:
        got = f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(f"x must be a float32 or float64 array (batch, ...), got {got}.")
    with jax.ensure_compile_time_eval():
        if not isinstance(x, jax.core.Tracer):
            _validate.in_range(np.asarray(x), input_range)
            if not np.isfinite(x).all():
                raise ValueError("x must be finite, got NaN or infinity in it.")
    if input_range is not None:
        _validate.in_units(input_range[1] - input_range[0], epsilon=epsilon)
    ends = tuple(np.asarray(end, x.dtype) for end in input_range or (-np.inf, np.inf))
    logits = _logits.eval_shape(logits_fn, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != 1 or logits.shape[1] < 2:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"logits_fn must return (1, classes >= 2) for a batch of one, got {got}.")
    if labels is not None:
        _validate.labels(labels, x.shape[0], logits.shape[1])
        labels = jnp.asarray(labels).astype(jnp.int32)
    if not x.shape[0]:  # none of the results for one black image: models need not take an empty batch
        black = jnp.zeros((1, *x.shape[1:]), x.dtype)
        return jax.tree.map(lambda a: a[:0], _certify(logits_fn, black, None, epsilon, ends, batch_size=None))
    return _certify(logits_fn, jnp.asarray(x), labels, epsilon, ends, batch_size=batch_size)


_logits = jax.jit(lambda logits_fn, x: logits_fn(x))  # never compiled: new weights do not trace the model again


@jax.jit(static_argnames="batch_size")
def _certify(logits_fn, x, labels, epsilon, ends, *, batch_size):
    low, high = ends

    def of_examples(x, labels):
        if labels is None:
            labels = logits_fn(x).argmax(-1).astype(jnp.int32)
        lower, upper = ball(x, jnp.nextafter(jnp.asarray(epsilon, x.dtype), jnp.inf), low, high)
        bounds = margin_bounds(logits_fn, jnp.nextafter(lower, low), jnp.nextafter(upper, high), labels, outward=True)
        margin = jnp.where(jnp.arange(bounds.shape[-1])[None] == labels[:, None], jnp.inf, bounds).min(-1)
        return Certificate(labels, margin, margin > 0)

    if batch_size is None or batch_size >= x.shape[0]:
        return of_examples(x, labels)
    one = lambda example: jax.tree.map(lambda a: a[0], of_examples(*jax.tree.map(lambda a: a[None], example)))
    return jax.lax.map(one, (x, labels), batch_size=batch_size)
