"""Combinators that shape the features, recompute the logits and leave the scoring to another detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import _arguments, _validate
from robustjax.scoring._detector import Detector, Head, cached_by_settings, check_detectors, make_detector, require
from robustjax.typing import Outputs


class Shaped(NamedTuple):
    """State of a combinator.

    Attributes:
      learned: the fitted numbers that shape the features, by method.
      head: the head that computes logits from the shaped features.
      base: the state of the detector that scores them.
    """

    learned: Any
    head: Head
    base: Any


def _shaped_detector(
    name: str, detector: Detector, shape: Callable, learn: Callable = lambda features, head: ((), head)
) -> Detector:
    """``detector`` on ``shape(learned, features)`` and its logits, where ``learned, head = learn(features, head)``."""
    check_detectors(name, detector)

    @jax.jit
    def shaped(learned, head, features):
        features = shape(learned, features)
        logits = jnp.matmul(features, head.kernel, precision=jax.lax.Precision.HIGHEST)
        return Outputs(logits if head.bias is None else logits + head.bias[None], features)

    def fit(outputs, labels, head):
        require(name, outputs=outputs, head=head)
        learned, head = learn(outputs.features, head)
        # Most detectors by logits have nothing to fit, and need no program that shapes the training rows.
        rows = shaped(learned, head, outputs.features) if getattr(detector.fit, "reads_rows", True) else None
        base = detector.fit(rows, labels, head)
        return Shaped(learned, head, base)

    def score(state, outputs):
        return detector.score(state.base, shaped(state.learned, state.head, outputs.features))

    return make_detector(fit, score, lambda state: state.head.kernel.shape[::-1])


def _check_percentiles(**values: float) -> None:
    for name, value in values.items():
        if not 0 < _validate.number(value) < 100:
            raise ValueError(f"{name} must lie strictly between 0 and 100, got {value!r}.")


def _percentile(values, percentile: float, axis: int | None = None) -> jax.Array:
    """On the host: a partition there is ten times faster than XLA's sort on a CPU."""
    return jnp.asarray(np.percentile(np.asarray(values), percentile, axis=axis).astype(np.float32))


@_arguments.checked
@cached_by_settings
def react(detector: Detector, *, percentile: float = 90.0) -> Detector:
    r"""Clips every feature from above at one percentile of all training features (ReAct).

    .. math:: z' = \min(z, c), \qquad c = \text{percentile of all entries of the training features}

    Args:
      detector: what scores the shaped features and the logits of the head for them; any detector.
      percentile: in (0, 100).

    Returns:
      The detector; ``fit`` needs the head, and raises ValueError if c is not positive, because nothing would be left.

    Raises:
      ValueError: for a percentile outside (0, 100).

    Example:
      >>> detector = scoring.react(scoring.energy(), percentile=90.0)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-4.71 -2.1 ]

    Reference:
      Sun, Guo and Li, "ReAct: out-of-distribution detection with rectified activations", arXiv:2111.12797.
    """
    _check_percentiles(percentile=percentile)

    def learn(features, head):
        limit = _percentile(features, percentile)
        if not float(limit) > 0:
            raise ValueError(
                f"percentile must reach positive features, but {percentile} per cent of the training features are at "
                f"most {float(limit):g}."
            )
        return limit, head

    return _shaped_detector("react", detector, lambda limit, features: jnp.minimum(features, limit), learn)


@_arguments.checked
@cached_by_settings
def dice(detector: Detector, *, percentile: float = 90.0) -> Detector:
    r"""Cuts the weights of the last layer that contribute little on training rows (DICE).

    .. math:: W'_{jc} = W_{jc}\, [\bar z_j W_{jc} > q], \qquad
              q = \text{percentile of all } \bar z_j W_{jc},\ \bar z = \text{mean training feature}

    Args:
      detector: what scores the features and the logits of the sparse head for them, with that head; any detector.
      percentile: in (0, 100); 90 keeps a tenth of the weights.

    Returns:
      The detector; ``fit`` needs the head.

    Raises:
      ValueError: for a percentile outside (0, 100).

    Example:
      >>> detector = scoring.dice(scoring.energy(), percentile=80.0)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-5.04 -2.1 ]

    Reference:
      Sun and Li, "DICE: leveraging sparsification for out-of-distribution detection", arXiv:2111.09805.
    """
    _check_percentiles(percentile=percentile)

    def learn(features, head):
        kernel = np.asarray(head.kernel)
        contributions = np.asarray(jnp.mean(features, 0))[:, None] * kernel
        kept = contributions > np.asarray(_percentile(contributions, percentile))
        return (), Head(jnp.asarray(np.where(kept, kernel, 0)), head.bias)

    return _shaped_detector("dice", detector, lambda learned, features: features, learn)


def _num_kept(dim: int, percentile: float) -> int:
    kept = dim - round(dim * percentile / 100)
    if kept < 1:
        raise ValueError(f"percentile must leave at least one of {dim} features, got {percentile}.")
    return kept


def _kept(features, percentile: float):
    """Marks the ``kept`` largest features of a row; of equal features, the first."""
    kept = _num_kept(features.shape[1], percentile)
    least = jax.lax.top_k(features, kept)[0].min(1, keepdims=True)  # for the slice [:, -1:] XLA would sort whole rows
    above, level = ~(features <= least), features == least  # a NaN is kept, so that it reaches the score
    return above | (level & (jnp.cumsum(level, axis=1) <= kept - above.sum(1, keepdims=True)))


def _concentration(features, of_largest):
    """``exp`` of the sum of a row over the sum of its largest, at most dim / kept for a positive sum."""
    ratio = features.sum(1, keepdims=True) / jnp.where(of_largest > 0, of_largest, jnp.inf)
    return jnp.exp(jnp.minimum(ratio, 40))  # only percentiles above 97.5 get there; products stay inside float32


@_arguments.checked
@cached_by_settings
def ash(detector: Detector, *, method: Literal["S", "B", "P"] = "S", percentile: float = 90.0) -> Detector:
    r"""Keeps the largest features of each row and prunes the rest to 0 (ASH).

    Of n features, ``k = n - round(n * percentile / 100)`` are kept. With :math:`s_1` the sum before pruning and
    :math:`s_2` after, the kept features become :math:`z\, e^{s_1 / s_2}` (S) or :math:`s_1 / k` (B), or do not change
    (P). The exponent is clipped at 40; rows with :math:`s_2 \le 0`, which after a ReLU means that all features are 0,
    are only pruned.

    Args:
      detector: what scores the shaped features and the logits of the head for them; any detector.
      method: S (scale), B (binarise) or P (prune).
      percentile: in (0, 100), of the features that are pruned.

    Returns:
      The detector; ``fit`` needs the head, and raises ValueError if no feature would be kept.

    Raises:
      ValueError: for an unknown method and a percentile outside (0, 100).

    Example:
      >>> detector = scoring.ash(scoring.energy(), method="P", percentile=50.0)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-5.04 -1.1 ]

    Reference:
      Djurisic et al., "Extremely simple activation shaping for out-of-distribution detection", arXiv:2209.09858.
    """
    _check_percentiles(percentile=percentile)
    if method not in ("S", "B", "P"):
        raise ValueError(f"method must be S, B or P, got {method!r}.")

    def shape(learned, features):
        mask = _kept(features, percentile)
        pruned = jnp.where(mask, features, 0)
        if method == "P":
            return pruned
        if method == "S":
            return pruned * _concentration(features, pruned.sum(1, keepdims=True))
        return jnp.where(mask, features.sum(1, keepdims=True) / _num_kept(features.shape[1], percentile), 0)

    return _shaped_detector("ash", detector, shape)


@_arguments.checked
@cached_by_settings
def scale(detector: Detector, *, percentile: float = 85.0) -> Detector:
    r"""Multiplies the features of each row by how little its largest ones dominate (SCALE).

    .. math:: z' = z\, e^{s_1 / s_2}

    with :math:`s_1` the sum of the row and :math:`s_2` the sum of its ``k = n - round(n * percentile / 100)`` largest
    features. The exponent is clipped at 40; rows with :math:`s_2 \le 0` do not change.

    Args:
      detector: what scores the shaped features and the logits of the head for them; any detector.
      percentile: in (0, 100).

    Returns:
      The detector; ``fit`` needs the head, and raises ValueError if k would be 0.

    Raises:
      ValueError: for a percentile outside (0, 100).

    Example:
      >>> detector = scoring.scale(scoring.max_logit(), percentile=50.0)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-20.86  -3.32]

    Reference:
      Xu et al., "Scaling for training time and post-hoc out-of-distribution detection enhancement", arXiv:2310.00227.
    """
    _check_percentiles(percentile=percentile)

    def shape(learned, features):
        largest = jax.lax.top_k(features, _num_kept(features.shape[1], percentile))[0]
        return features * _concentration(features, largest.sum(1, keepdims=True))

    return _shaped_detector("scale", detector, shape)


@_arguments.checked
@cached_by_settings
def vra(detector: Detector, *, low: float = 60.0, high: float = 95.0) -> Detector:
    r"""Drops low features and clips high ones, by percentiles of each unit (variational rectified activation).

    .. math:: z'_j = \begin{cases} 0 & z_j < \alpha_j \\ z_j & \alpha_j \le z_j \le \beta_j \\
              \beta_j & z_j > \beta_j \end{cases}

    where :math:`\alpha_j, \beta_j` are percentiles of unit j over training rows. OpenOOD instead raises low features to
    a percentile of all units, which is not what the paper and its code do.

    Args:
      detector: what scores the shaped features and the logits of the head for them; any detector.
      low: percentile in (0, 100), below ``high``.
      high: percentile in (0, 100).

    Returns:
      The detector; ``fit`` needs the head.

    Raises:
      ValueError: for percentiles outside (0, 100) or out of order.

    Example:
      >>> detector = scoring.vra(scoring.energy())
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-5.01 -1.1 ]

    Reference:
      Xu et al., "VRA: variational rectified activation for out-of-distribution detection", arXiv:2302.11716.
    """
    _check_percentiles(low=low, high=high)
    if not low < high:
        raise ValueError(f"low must be less than high, got {low!r} and {high!r}.")

    def learn(features, head):
        return (_percentile(features, low, axis=0), _percentile(features, high, axis=0)), head

    def shape(learned, features):
        alpha, beta = learned
        return jnp.where(features < alpha[None], 0, jnp.minimum(features, beta[None]))

    return _shaped_detector("vra", detector, shape, learn)


@_arguments.checked
@cached_by_settings
def feature_normalized(detector: Detector) -> Detector:
    r"""Scales the features of every row to the same length, the mean length of training rows.

    .. math:: z' = \bar r\, z / \|z\|, \qquad \bar r = \text{mean length of the training features}

    Detectors by distance see vectors of one length, and the head sees features of the size that it was trained on.
    ``feature_normalized(mahalanobis())`` is Mahalanobis++. A row of zeros does not change.

    Args:
      detector: what scores the shaped features and the logits of the head for them; any detector.

    Returns:
      The detector; ``fit`` needs the head.

    Example:
      >>> detector = scoring.feature_normalized(scoring.mahalanobis())  # Mahalanobis++
      >>> state = detector.fit(train, labels, head)
      >>> print(detector.score(state, test))
      [ 2.23 84.48]

    Reference:
      Mueller and Hein, "Mahalanobis++: improving OOD detection via feature normalization", arXiv:2505.18032.
    """

    def learn(features, head):
        return jnp.linalg.norm(features, axis=1).mean(), head

    def shape(length, features):
        norms = jnp.linalg.norm(features, axis=1, keepdims=True)
        return features * (length / jnp.where(norms > 0, norms, jnp.inf))

    return _shaped_detector("feature_normalized", detector, shape, learn)
