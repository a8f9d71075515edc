"""Detectors that weigh the logits by the features, or the features by the last layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.scoring._detector import Detector, cached_by_settings, check_scale, make_detector, require
from robustjax.scoring._neighbours import nearest

TINY = 1e-12
"""Smallest length to divide by."""


def _lengths(vectors):
    return jnp.maximum(jnp.linalg.norm(vectors, axis=-1), TINY)


@cached_by_settings
def gradnorm() -> Detector:
    r"""Scores by the gradient that the last layer would get from a uniform target, without computing one.

    .. math:: s = -\|\nabla_W\, \mathrm{CE}(\mathrm{uniform}, p)\|_1 = -\|z\|_1 \sum_k |1/K - p_k|

    Returns:
      The detector; there is nothing to fit.

    Example:
      >>> print(scoring.gradnorm().score((), test))
      [-12.63  -0.  ]

    Reference:
      Huang, Geng and Li, "On the importance of gradients for detecting distributional shifts in the wild",
      arXiv:2110.00218.
    """

    def score(state, outputs):
        probabilities = jax.nn.softmax(outputs.logits)
        from_uniform = jnp.abs(probabilities - 1 / outputs.logits.shape[1]).sum(-1)
        return -jnp.abs(outputs.features).sum(-1) * from_uniform

    return make_detector(None, score)


@cached_by_settings
def she() -> Detector:
    r"""Scores by the inner product with the stored pattern of the predicted class (simplified Hopfield energy).

    .. math:: s = -\langle z, m_{\hat y} \rangle, \qquad
              m_c = \text{mean feature of training rows of class } c \text{ that are predicted as } c

    Returns:
      The detector; its state is the patterns, ``(classes, dim)``. ``fit`` needs labels, and raises ValueError for a
      class without a row that is classified correctly.

    Example:
      >>> detector = scoring.she()
      >>> state = detector.fit(train, labels)
      >>> print(detector.score(state, test))
      [-28.49 -17.96]

    Reference:
      Zhang et al., "Out-of-distribution detection based on in-distribution data patterns memorization with modern
      Hopfield energy", ICLR 2023.
    """

    def fit(outputs, labels, head):
        require("she", outputs=outputs, labels=labels)
        check_scale("she", outputs.features)
        patterns, count = _patterns(outputs, labels)
        missing = np.flatnonzero(np.asarray(count) == 0)
        if missing.size:
            raise ValueError(f"she needs a correctly classified row of every class, class {missing[0]} has none.")
        return patterns

    def score(state, outputs):
        return -(outputs.features * state[outputs.logits.argmax(-1)]).sum(-1)

    return make_detector(fit, score, _shape)


def _shape(state):
    rows, columns = state.shape
    return rows, columns


@jax.jit
def _patterns(outputs, labels):
    classes = outputs.logits.shape[1]
    correct = (outputs.logits.argmax(-1) == labels).astype(outputs.features.dtype)
    count = jax.ops.segment_sum(correct, labels, classes)
    total = jax.ops.segment_sum(outputs.features * correct[:, None], labels, classes)
    return total / jnp.maximum(count, 1)[:, None], count


@_arguments.checked
@cached_by_settings
def nnguide(*, k: int = 10) -> Detector:
    r"""Scores by the energy, guided by the energies of the training rows that are nearest in angle.

    .. math:: s = -\Big[\frac{1}{k} \sum_{i \in \mathrm{top}\,k} E_i \cos(z, z_i)\Big]\, E(x), \qquad
              E = \ln \sum_j e^{l_j}

    where the top k are the k largest products in the sum. The score needs logits that are large for known inputs: if
    the log-sum-exp is negative on in-distribution rows, the product changes its meaning.

    Args:
      k: number of training rows that guide, at most all of them.

    Returns:
      The detector; its state is the training rows, ``(rows, dim)``: pass ``fit`` only a part of a large training set.

    Raises:
      ValueError: for a k that is not a positive integer.

    Example:
      >>> detector = scoring.nnguide(k=3)
      >>> state = detector.fit(train)
      >>> print(detector.score(state, test))
      [-33.01  -5.83]

    Reference:
      Park, Jung and Teoh, "Nearest neighbor guidance for out-of-distribution detection", arXiv:2309.14888.
    """
    _validate.at_least(1, k=k)

    def fit(outputs, labels, head):
        require("nnguide", outputs=outputs)
        check_scale("nnguide", outputs.features)
        rows = outputs.features.shape[0]
        if k > rows:
            raise ValueError(f"k must be at most the {rows} training rows, got {k}.")
        return _guides(outputs)

    def score(state, outputs):
        directions = outputs.features / _lengths(outputs.features)[:, None]
        guides = state[nearest(state, directions, k)].mean(1)
        guidance = (directions * guides).sum(-1)
        return -guidance * jax.nn.logsumexp(outputs.logits, axis=-1)

    return make_detector(fit, score, lambda state: (None, _shape(state)[1]))


@jax.jit
def _guides(outputs):
    scale = jax.nn.logsumexp(outputs.logits, axis=-1) / _lengths(outputs.features)
    return outputs.features * scale[:, None]


class Boundaries(NamedTuple):
    """State of ``fdbd``.

    Attributes:
      distances: ``(classes, classes)``, between the weight vectors of two classes; 1 on the diagonal.
      mean: ``(dim,)``, the mean training feature.
    """

    distances: Float[Array, "classes classes"]
    mean: Float[Array, " dim"]


@cached_by_settings
def fdbd() -> Detector:
    r"""Scores by the mean distance to the decision boundaries, relative to the distance from the mean training feature.

    .. math:: s = -\frac{1}{(K - 1)\, \|z - \mu\|} \sum_{c \ne \hat y} \frac{l_{\hat y} - l_c}{\|w_{\hat y} - w_c\|}

    Returns:
      The detector; ``fit`` needs the head. Distances between weights are clipped to at least 1e-12, the
      distance from the mean to at least 1e-8.

    Example:
      >>> detector = scoring.fdbd()
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-0.86 -0.  ]

    Reference:
      Liu and Qin, "Fast decision boundary based out-of-distribution detector", arXiv:2312.11536.
    """

    def fit(outputs, labels, head):
        require("fdbd", outputs=outputs, head=head)
        check_scale("fdbd", outputs.features, least=2.0**-20)
        return _boundaries(head.kernel, outputs.features)

    def score(state, outputs):
        logits = outputs.logits
        gaps = logits.max(-1, keepdims=True) - logits
        to_boundaries = (gaps / state.distances[logits.argmax(-1)]).sum(-1) / (logits.shape[1] - 1)
        return -to_boundaries / jnp.maximum(jnp.linalg.norm(outputs.features - state.mean[None], axis=-1), 1e-8)

    return make_detector(fit, score, lambda state: (state.distances.shape[0], state.mean.shape[0]))


@jax.jit
def _boundaries(kernel, features):
    weights = kernel.T
    # One class at a time: the Gram matrix would lose the distance of near weights, all differences at once the memory.
    distances = jax.lax.map(lambda weight: _lengths(weights - weight[None]), weights)
    same = jnp.eye(weights.shape[0], dtype=bool)
    return Boundaries(jnp.where(same, 1, distances), features.mean(0))


class Collapse(NamedTuple):
    """State of ``nci``.

    Attributes:
      weights: ``(classes, dim)``, the weights of the last layer.
      mean: ``(dim,)``, the mean training feature.
    """

    weights: Float[Array, "classes dim"]
    mean: Float[Array, " dim"]


@_arguments.checked
@cached_by_settings
def nci(*, alpha: float = 1e-4) -> Detector:
    r"""Scores by how near the feature lies to the weight of its class, and to the origin (neural collapse).

    .. math:: s = -\frac{\langle w_{\hat y}, z - \mu \rangle}{\|z - \mu\|} - \alpha \|z\|_1

    Args:
      alpha: weight of the norm, 0 or more.

    Returns:
      The detector; ``fit`` needs the head. The distance from the mean is clipped to at least 1e-12.

    Raises:
      ValueError: for a negative or infinite alpha.

    Example:
      >>> detector = scoring.nci()
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-0.85  0.16]

    Reference:
      Liu and Qin, "Detecting out-of-distribution through the lens of neural collapse", arXiv:2311.01479.
    """
    if not 0 <= _validate.number(alpha) < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha!r}.")

    def fit(outputs, labels, head):
        require("nci", outputs=outputs, head=head)
        check_scale("nci", outputs.features)
        return Collapse(head.kernel.T, outputs.features.mean(0))

    def score(state, outputs):
        centred = outputs.features - state.mean[None]
        projected = (centred * state.weights[outputs.logits.argmax(-1)]).sum(-1)
        return -projected / _lengths(centred) - alpha * jnp.abs(outputs.features).sum(-1)

    return make_detector(fit, score, lambda state: _shape(state.weights))
