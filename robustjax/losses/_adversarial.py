"""Losses that attacks maximise and adversarial training minimises, one number for each example."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax import _arguments
from robustjax._precision import in_float32, log_softmax
from robustjax.losses._classification import check_logits_and_labels, cross_entropy, of_label


@_arguments.checked
def margin(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes by how much the largest wrong logit exceeds the right one: positive where the answer is wrong.

    .. math:: \max_{k \ne y} f_k(x) - f_y(x)

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.

    Returns:
      ``(batch,)`` margins.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Example:
      >>> print(losses.margin(logits, labels))  # right by 2, wrong by 1
      [-2.  1.]

    Reference:
      Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644.
    """
    check_logits_and_labels(logits, labels)
    _at_least_classes(2, "margin", logits)
    right, wrong = _right_and_best_wrong(in_float32(logits), labels)
    return wrong - right


@_arguments.checked
def difference_of_logits_ratio(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes the margin relative to the spread of the three largest logits (DLR).

    .. math:: -\frac{f_y - \max_{k \ne y} f_k}{f_{(1)} - f_{(3)} + 10^{-12}}

    The loss is invariant to the scale and offset of the logits, so it does not saturate as cross-entropy does. It is
    meant to drive an attack, not to compare models: where the true class ranks third, it is constant at 1 and has zero
    gradient.

    Args:
      logits: ``(batch, classes)``, floating, at least 3 classes.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit, or there are fewer than 3 classes.

    Example:
      >>> print(losses.difference_of_logits_ratio(logits, labels))
      [-0.67  0.5 ]
      >>> print(losses.difference_of_logits_ratio(10 * logits, labels))
      [-0.67  0.5 ]

    Reference:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks, arXiv 2003.01690.
    """
    check_logits_and_labels(logits, labels)
    _at_least_classes(3, "difference_of_logits_ratio", logits)
    logits = in_float32(logits)
    right, wrong = _right_and_best_wrong(logits, labels)
    largest = jax.lax.top_k(logits, 3)[0]
    return (wrong - right) / (largest[:, 0] - largest[:, 2] + 1e-12)


@_arguments.checked
def targeted_difference_of_logits_ratio(
    logits: Float[Array, "..."], labels: Array, targets: Array
) -> Float[Array, " batch"]:
    r"""Computes the targeted DLR loss, which is high where the target is far above the true class.

    .. math:: -\frac{f_y - f_t}{f_{(1)} - (f_{(3)} + f_{(4)}) / 2 + 10^{-12}}

    Args:
      logits: ``(batch, classes)``, floating, at least 4 classes.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.
      targets: ``(batch,)``, integer, the classes that the attack aims at, likewise.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit, or there are fewer than 4 classes.

    Example:
      >>> print(losses.targeted_difference_of_logits_ratio(logits, labels, jnp.array([1, 1])))
      [-0.57  0.4 ]

    Reference:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks, arXiv 2003.01690.
    """
    check_logits_and_labels(logits, labels)
    check_logits_and_labels(logits, targets, "targets")
    _at_least_classes(4, "targeted_difference_of_logits_ratio", logits)
    logits = in_float32(logits)
    largest = jax.lax.top_k(logits, 4)[0]
    return (of_label(logits, targets) - of_label(logits, labels)) / (
        largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + 1e-12
    )


@_arguments.checked
def kl_divergence(logits: Float[Array, "..."], reference_logits: Float[Array, "..."]) -> Float[Array, " batch"]:
    r"""Computes the divergence of a prediction from a reference prediction.

    .. math:: \sum_k p_k (\ln p_k - \ln q_k), \qquad p = \mathrm{softmax}(g(x)),\ q = \mathrm{softmax}(f(x))

    Args:
      logits: ``(batch, classes)``, floating, of q.
      reference_logits: ``(batch, classes)``, floating, of p.

    Returns:
      ``(batch,)`` divergences; gradients flow through both.

    Raises:
      ValueError: the shapes differ.

    Example:
      >>> print(losses.kl_divergence(jnp.zeros((2, 4)), logits))  # from a uniform prediction
      [0.79 0.44]
      >>> print(np.log(4) - losses.entropy(logits))
      [0.79 0.44]

    Reference:
      Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573 (TRADES):
      p is the prediction for the clean input, q the prediction for the adversarial input.
    """
    if logits.ndim != 2 or logits.shape != reference_logits.shape:
        raise ValueError(
            f"logits and reference_logits must be (batch, classes), got {logits.shape} and {reference_logits.shape}."
        )
    log_p, log_q = log_softmax(in_float32(reference_logits)), log_softmax(in_float32(logits))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


@_arguments.checked
def boosted_cross_entropy(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes cross-entropy with a second term, which pushes down the largest wrong probability.

    .. math:: -\ln p_y - \ln\bigl(1 - \max_{k \ne y} p_k\bigr), \qquad p = \mathrm{softmax}(f(x))

    The authors' code adds 1e-4 inside the second logarithm, which removes the gradient where a wrong answer has a
    probability above 0.9999. Here the term is exact and finite, and has a gradient for logits of any size.

    Args:
      logits: ``(batch, classes)``, floating, at least 2 classes.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``; a label outside gives NaN.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: shapes or dtypes do not fit, or there are fewer than 2 classes.

    Example:
      >>> print(losses.boosted_cross_entropy(logits, labels))
      [0.3  2.47]
      >>> print(losses.cross_entropy(logits, labels))
      [0.19 1.44]

    Reference:
      Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR (MART).
    """
    check_logits_and_labels(logits, labels)
    _at_least_classes(2, "boosted_cross_entropy", logits)
    logits = in_float32(logits)
    best_wrong = _without(logits, labels).argmax(-1)
    return cross_entropy(logits, labels) + jax.nn.softplus(-log_odds_against(logits, best_wrong))


@_arguments.checked
def entropy(logits: Float[Array, "..."]) -> Float[Array, " batch"]:
    r"""Computes the entropy of a prediction, in nats.

    .. math:: -\sum_k p_k \ln p_k, \qquad p = \mathrm{softmax}(f(x))

    Args:
      logits: ``(batch, classes)``, floating.

    Returns:
      ``(batch,)`` entropies, from 0 to the logarithm of the number of classes.

    Raises:
      ValueError: the shape does not fit.

    Example:
      >>> print(losses.entropy(logits))
      [0.6  0.95]
      >>> print(losses.entropy(jnp.zeros((1, 4))), np.log(4))
      [1.39] 1.3862943611198906
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (batch, classes), got shape {logits.shape}.")
    log_p = log_softmax(in_float32(logits))
    return -(jnp.exp(log_p) * log_p).sum(-1)


def log_odds_against(logits: Float[Array, "batch classes"], classes: Array) -> Float[Array, " batch"]:
    """``ln((1 - p) / p)`` of one class of each row: by ``softplus``, logarithms of p and of 1 - p that keep digits."""
    below = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    return jax.nn.logsumexp(_without(below, classes), axis=-1) - of_label(below, classes)


def _without(values, classes):
    return jnp.where(jax.nn.one_hot(classes, values.shape[-1], dtype=bool), -jnp.inf, values)


def _right_and_best_wrong(logits, labels):
    return of_label(logits, labels), _without(logits, labels).max(-1)


def _at_least_classes(least: int, name: str, logits: Array) -> None:
    if logits.shape[-1] < least:
        instead = ": use cross_entropy or margin" if least > 2 else ""
        raise ValueError(f"{name} needs logits of at least {least} classes, got {logits.shape[-1]}{instead}.")
