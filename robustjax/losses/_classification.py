"""Per-example losses, without reduction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax._precision import in_float32, log_softmax


@_arguments.checked
def cross_entropy(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes the cross-entropy of each example, in nats.

    .. math:: -f_y(x) + \ln \sum_k e^{f_k(x)}

    Values and gradients keep a small relative error where the model is certain, up to leads of about 80 in float32; in
    the plain form, 1 - p_y rounds to 0 from a lead of 17 on. All losses raise half precision to float32.

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Example:
      >>> print(losses.cross_entropy(logits, labels))
      [0.19 1.44]
    """
    check_logits_and_labels(logits, labels)
    logits = in_float32(logits)
    own = jnp.take_along_axis(logits, labels[:, None], -1)
    top, fixed = jax.lax.stop_gradient((logits.max(-1, keepdims=True), own))
    is_top, is_own = fixed == top, jnp.arange(logits.shape[-1])[None] == labels[:, None]
    # ln(1 + sum of e^(f_k - f_y) over the other classes) where f_y is the largest: 1 - p_y would lose that sum.
    against = logits - top - jnp.where(is_top, own - fixed, 0)  # own - fixed is 0, and has the gradient of f_y
    others = jnp.exp(jnp.where(is_own, -jnp.inf, against)).sum(-1, keepdims=True)
    below = jnp.where(is_top, 0, own - top)
    losses = jnp.log1p(jnp.where(is_top, others, others - 1 + jnp.exp(below))) - below
    return jnp.where(labels < 0, jnp.nan, losses[:, 0])  # -1 would be the last class


@_arguments.checked
def soft_cross_entropy(logits: Float[Array, "..."], label_probabilities: Float[Array, "..."]) -> Float[Array, " batch"]:
    r"""Computes the cross-entropy of each example to a distribution over classes, in nats.

    .. math:: -\sum_k q_k \ln \mathrm{softmax}_k f(x)

    Args:
      logits: ``(batch, classes)``, floating.
      label_probabilities: ``(batch, classes)``, rows :math:`q` that are at least 0 and sum to 1, of the dtype of the
        logits.

    Returns:
      ``(batch,)`` losses, at least the entropy of :math:`q`.

    Raises:
      ValueError: shapes do not fit, or rows of ``label_probabilities`` do not sum to 1.

    Example:
      >>> smoothed = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4  # label smoothing
      >>> print(losses.soft_cross_entropy(logits, smoothed))
      [0.41 1.49]
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, classes), got shape {logits.shape}.")
    if label_probabilities.shape != logits.shape:
        raise ValueError(
            f"label_probabilities must be {logits.shape} to match the logits, got shape {label_probabilities.shape}."
        )
    _validate.probabilities(label_probabilities=label_probabilities)
    return -(in_float32(label_probabilities) * log_softmax(in_float32(logits))).sum(-1)


@_arguments.checked
def normalized_cross_entropy(
    logits: Float[Array, "..."], labels: Array, *, tau: float | Float[Array, ""] = 0.04
) -> Float[Array, " batch"]:
    r"""Computes the cross-entropy of each example with its logits scaled to norm ``1 / tau``.

    .. math:: \ell\Bigl(\frac{f(x)}{\tau \lVert f(x) \rVert_2},\, y\Bigr)

    Only the direction of the logits is trained, so confidence cannot grow with their norm. The loss is bounded below by
    :math:`\ln\bigl(1 + (K - 1) e^{-\sqrt{K / (K - 1)} / \tau}\bigr)`. The authors add 1e-7 to the norm. Here the
    quotient is exact at every scale; logits that are all zero are divided by 1, which keeps the gradient finite.

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.
      tau: temperature, positive, 0.04 in the paper for CIFAR-10; may be traced.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit, or ``tau`` is not positive.

    Example:
      >>> print(losses.normalized_cross_entropy(logits, labels, tau=0.5))
      [0.44 1.36]
      >>> print(losses.normalized_cross_entropy(10 * logits, labels, tau=0.5))  # only the direction counts
      [0.44 1.36]

    Reference:
      Wei et al. 2022, Mitigating Neural Network Overconfidence with Logit Normalization, arXiv 2205.09310.
    """
    _validate.positive(tau=tau)
    check_logits_and_labels(logits, labels)
    # Scaled to a largest entry of 1 first, so that squares neither overflow nor vanish; the direction stays the same.
    logits = in_float32(logits)
    scale = jax.lax.stop_gradient(jnp.abs(logits).max(-1, keepdims=True))
    scaled = logits / jnp.where(scale == 0, 1, scale)
    norm = jnp.sqrt(jnp.where(scale == 0, 1, jnp.square(scaled).sum(-1, keepdims=True)))
    return cross_entropy(scaled / (tau * norm), labels)


def of_label(values: Array, labels: Array) -> Array:
    """The value of each row at its label, ``(batch,)``; NaN for a label outside ``0, ..., classes - 1``."""
    found = jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]  # NaN beyond the last class
    return jnp.where(labels < 0, jnp.nan, found)  # -1 would be the last class


def check_logits_and_labels(logits: Array, labels: Array, name: str = "labels") -> None:
    """Raises ValueError unless logits are ``(batch, classes)`` and labels ``(batch,)`` integers."""
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, classes), got shape {logits.shape}.")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"{name} must be ({logits.shape[0]},) to match the logits, got shape {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {labels.dtype}.")
