"""Detectors that read only the logits: they take bare logits as well as Outputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.scoring._detector import (
    Detector,
    cached_by_settings,
    check_finite,
    checked_labels,
    make_detector,
    require,
)
from robustjax.typing import AnyArray

SPAN = 5.0
"""Temperatures are sought between ``exp(-SPAN)`` and ``exp(SPAN)``."""


class Temperature(NamedTuple):
    """A fitted temperature; the state of ``temperature_scaling``.

    Attributes:
      temperature: scalar. Exactly ``exp(-5)`` or ``exp(5)`` if the likelihood still rises at that end of the search, as
        it does if all answers are right or all are wrong.
      nll_before: mean negative log-likelihood in nats at temperature 1.
      nll_after: the same at ``temperature``.
    """

    temperature: Float[Array, ""]
    nll_before: Float[Array, ""]
    nll_after: Float[Array, ""]


class Templates(NamedTuple):
    """State of ``kl_matching``.

    Attributes:
      log_templates: ``(classes, classes)``, row k is the logarithm of the mean softmax of rows predicted as k.
      seen: ``(classes,)``, whether any row was predicted as k.
    """

    log_templates: Float[Array, "classes classes"]
    seen: Bool[Array, " classes"]


def _log_probabilities(logits):
    """``log softmax`` and ``log(1 - softmax)``, with small relative error next to 0, where the plain forms round to 0.

    With r the logsumexp of all logits but the largest, relative to it, the largest probability is 1 / (1 + e^r).
    """
    below = logits - logits.max(-1, keepdims=True)
    top = jnp.arange(logits.shape[-1])[None] == logits.argmax(-1)[:, None]
    rest = jax.nn.logsumexp(jnp.where(top, -jnp.inf, below), axis=-1, keepdims=True)
    log_p = jnp.where(top, 0, below) - jax.nn.softplus(rest)
    return log_p, jnp.where(top, jax.nn.log_sigmoid(rest), jnp.log1p(-jnp.where(top, 0, jnp.exp(log_p))))


def _logsumexp(logits):
    """As ``jax.nn.logsumexp``, by a product with ones: on CPUs, XLA sums computed numbers at half the speed."""
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    ones = jnp.ones_like(logits, shape=logits.shape[-1:])
    return jnp.log(jnp.matmul(jnp.exp(logits - top), ones, precision=jax.lax.Precision.HIGHEST)) + top[:, 0]


def _negative_entropy(log_p):
    return jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * log_p).sum(-1)


def _log_doubt(logits):
    return _log_probabilities(logits)[1].min(-1)


@cached_by_settings
def msp() -> Detector:
    r"""Scores by the maximum softmax probability, as the logarithm of the probability of all other classes.

    .. math:: s = \ln(1 - \max_k p_k), \qquad p = \mathrm{softmax}(l)

    It ranks as the literal :math:`-\max_k p_k` does in exact arithmetic, and ``expm1(s)`` is that number. In float32
    the literal form is -1 for every row whose largest logit leads by more than 17, so the most confident rows tie;
    this form still ranks them.

    Returns:
      The detector; there is nothing to fit.

    Example:
      >>> logits = jnp.array([[5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
      >>> print(scoring.msp().score((), logits))
      [-4.32 -0.41]

    Reference:
      Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in neural
      networks", arXiv:1610.02136.
    """
    return make_detector(None, lambda state, outputs: _log_doubt(outputs.logits), needs_features=False)


@cached_by_settings
def max_logit() -> Detector:
    r"""Scores by the largest logit, :math:`s = -\max_k l_k`.

    Returns:
      The detector; there is nothing to fit. A constant added to all logits changes the score.

    Example:
      >>> logits = jnp.array([[5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
      >>> print(scoring.max_logit().score((), logits))
      [-5. -1.]

    Reference:
      Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", arXiv:1911.11132.
    """
    return make_detector(None, lambda state, outputs: -outputs.logits.max(-1), needs_features=False)


@_arguments.checked
@cached_by_settings
def energy(*, temperature: float = 1.0) -> Detector:
    r"""Scores by the free energy, :math:`s = -T \ln \sum_k e^{l_k / T}`.

    Args:
      temperature: T, positive. Small T tends to ``max_logit``, large T to the mean logit.

    Returns:
      The detector; there is nothing to fit.

    Raises:
      ValueError: for a temperature that is not positive and finite.

    Example:
      >>> logits = jnp.array([[5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
      >>> print(scoring.energy().score((), logits))
      [-5.01 -2.1 ]

    Reference:
      Liu et al., "Energy-based out-of-distribution detection", arXiv:2010.03759.
    """
    _validate.positive(temperature=temperature)
    return make_detector(
        None, lambda state, outputs: -temperature * _logsumexp(outputs.logits / temperature), needs_features=False
    )


@cached_by_settings
def entropy() -> Detector:
    r"""Scores by the entropy of the softmax in nats, :math:`s = -\sum_k p_k \ln p_k`.

    Returns:
      The detector; there is nothing to fit. Rows whose largest logit leads by more than about 87 score 0, the limit of
      float32.

    Example:
      >>> logits = jnp.array([[5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
      >>> print(scoring.entropy().score((), logits))
      [0.08 1.1 ]

    Reference:
      Hendrycks and Gimpel, arXiv:1610.02136, section 2.
    """
    return make_detector(
        None, lambda state, outputs: -_negative_entropy(_log_probabilities(outputs.logits)[0]), needs_features=False
    )


@_arguments.checked
@cached_by_settings
def generalized_entropy(*, gamma: float = 0.1, top: int | None = None) -> Detector:
    r"""Scores by the generalised entropy (GEN) of the M largest probabilities.

    .. math:: s = \sum_{m=1}^{M} p_{(m)}^\gamma (1 - p_{(m)})^\gamma

    Args:
      gamma: exponent, positive; the smaller, the more the small probabilities weigh.
      top: M, at most the number of classes; None for 100, or all classes where there are fewer.

    Returns:
      The detector; there is nothing to fit.

    Raises:
      ValueError: for a gamma that is not positive and finite, and for a ``top`` that is not in ``1, ..., classes``.

    Example:
      >>> logits = jnp.array([[5.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
      >>> print(scoring.generalized_entropy().score((), logits))
      [1.86 2.58]

    Reference:
      Liu, Lochman and Zach, "GEN: pushing the limits of softmax-based out-of-distribution detection", CVPR 2023.
    """
    _validate.positive(gamma=gamma)
    if top is not None:
        _validate.at_least(1, top=top)

    def score(state, outputs):
        classes = outputs.logits.shape[1]
        if top is not None and top > classes:
            raise ValueError(f"top must be at most the {classes} classes, got {top}.")
        log_p, log_q = _log_probabilities(outputs.logits)
        terms = jnp.exp(gamma * (log_p + log_q))
        # Of probabilities that sum to 1 the larger has the larger p (1 - p): the largest terms are the wanted ones.
        kept = min(100, classes) if top is None else top
        return (terms if kept == classes else jax.lax.top_k(terms, kept)[0]).sum(-1)

    return make_detector(None, score, needs_features=False)


@cached_by_settings
def temperature_scaling() -> Detector:
    r"""Scores by the maximum softmax probability at the temperature that ``fit_temperature`` finds.

    .. math:: s = \ln(1 - \max_k \mathrm{softmax}(l / T)_k)

    Returns:
      The detector; its state is a ``Temperature``. Fit it on held-out rows: on rows that the model was trained on, T
      comes out too small. ``labels`` must be given.

    Example:
      >>> detector = scoring.temperature_scaling()
      >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
      >>> state = detector.fit(logits, jnp.array([0, 0, 1, 0]))  # held-out rows, one of which is wrong
      >>> print(detector.score(state, jnp.array([[4.0, 0.0], [1.0, 0.0]])))
      [-1.39 -0.84]

    Reference:
      Guo et al., "On calibration of modern neural networks", arXiv:1706.04599.
    """

    def fit(outputs, labels, head):
        require("temperature_scaling", outputs=outputs, labels=labels)
        return fit_temperature(outputs.logits, labels)

    score = lambda state, outputs: _log_doubt(outputs.logits / state.temperature)
    return make_detector(fit, score, lambda state: (None, None, state.temperature)[:2], needs_features=False)


@_arguments.checked
def fit_temperature(logits: Float[AnyArray, "batch classes"], labels: Int[AnyArray, " batch"]) -> Temperature:
    r"""Fits the temperature that calibrates logits: the T that maximises the likelihood of held-out labels.

    .. math:: T = \arg\min_T -\frac{1}{n} \sum_i \ln \mathrm{softmax}(l_i / T)_{y_i},
              \qquad \ln T \in [-5, 5]

    The negative log-likelihood is convex in 1/T, so the sign of its slope says on which side of the minimum T is. The
    search is a bisection to the last digit of float32.

    Args:
      logits: ``(batch, classes)``, finite, of rows that the model was not trained on.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``.

    Returns:
      ``Temperature(temperature, nll_before, nll_after)``, scalars.

    Raises:
      ValueError: for shapes or labels that do not fit, no rows, and logits that are not finite.

    Example:
      >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
      >>> fitted = scoring.fit_temperature(logits, jnp.array([0, 0, 1, 0]))  # 98 % sure, and right in three of four
      >>> f"T = {fitted.temperature:.2f}: from {fitted.nll_before:.2f} to {fitted.nll_after:.2f} nats"
      'T = 3.64: from 1.02 to 0.56 nats'

    Reference:
      Guo et al., "On calibration of modern neural networks", arXiv:1706.04599.
    """
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (batch >= 1, classes >= 2), got {logits.shape}.")
    labels = checked_labels(labels, *logits.shape)
    check_finite("logits", logits)
    return _fit_temperature(in_float32(jnp.asarray(logits)), labels)


@jax.jit
def _fit_temperature(logits, labels):
    own = labels[:, None]
    gaps = logits - jnp.take_along_axis(logits, own, axis=1)

    def halve(_, bracket):
        low, high = bracket
        middle = jnp.sqrt(low * high)
        slope_in_inverse = (jax.nn.softmax(gaps / middle) * gaps).sum(-1).mean()
        too_hot = slope_in_inverse <= 0
        return jnp.where(too_hot, low, middle), jnp.where(too_hot, middle, high)

    def nll(temperature):
        return -jnp.take_along_axis(_log_probabilities(logits / temperature)[0], own, axis=1).mean()

    ends = jnp.float32(math.exp(-SPAN)), jnp.float32(math.exp(SPAN))
    low, high = jax.lax.fori_loop(0, 40, halve, ends)  # 27 halvings of ln T reach neighbouring floats
    temperature = jnp.where(high == ends[1], high, low)
    return Temperature(temperature, nll(1.0), nll(temperature))


@cached_by_settings
def kl_matching() -> Detector:
    r"""Scores by the divergence from the nearest class template.

    .. math:: s = \min_k \mathrm{KL}(p \,\|\, d_k), \qquad
              d_k = \text{mean softmax of training rows predicted as } k

    Templates are averaged and kept as logarithms, so that none is ever 0. A class that is never predicted has no
    template and is left out.

    Returns:
      The detector; labels are not used.

    Example:
      >>> detector = scoring.kl_matching()
      >>> state = detector.fit(train.logits)
      >>> print(detector.score(state, test.logits))
      [0.   1.19]

    Reference:
      Hendrycks et al., "Scaling out-of-distribution detection for real-world settings", arXiv:1911.11132.
    """

    def fit(outputs, labels, head):
        require("kl_matching", outputs=outputs)
        return _fit_templates(outputs.logits)

    def score(state, outputs):
        log_p, _ = _log_probabilities(outputs.logits)
        cross = jnp.matmul(jnp.exp(log_p), state.log_templates.T, precision=jax.lax.Precision.HIGHEST)
        divergence = _negative_entropy(log_p)[:, None] - cross
        return jnp.where(state.seen[None], divergence, jnp.inf).min(-1)

    return make_detector(fit, score, lambda state: (state.log_templates.shape[0], None), needs_features=False)


@jax.jit
def _fit_templates(logits):
    classes, predicted = logits.shape[1], logits.argmax(-1)
    log_p, _ = _log_probabilities(logits)
    count = jax.ops.segment_sum(jnp.ones_like(predicted), predicted, classes)
    seen = count > 0
    peak = jnp.where(seen[:, None], jax.ops.segment_max(log_p, predicted, classes), 0)
    total = jax.ops.segment_sum(jnp.exp(log_p - peak[predicted]), predicted, classes)
    log_mean = jnp.log(total) + peak - jnp.log(count.astype(log_p.dtype))[:, None]
    return Templates(jnp.where(seen[:, None], log_mean, 0), seen)
