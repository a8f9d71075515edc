"""The part of a feature outside the subspace of the training features, without and with the logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.scoring._detector import Detector, Head, cached_by_settings, check_scale, make_detector, require
from robustjax.scoring._factor import stacked_factor, triangular_factor

_NOTHING = 1e-5
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class ResidualState(NamedTuple):
    """A subspace, by its complement.

    Attributes:
      origin: ``(dim,)``, the feature with the smallest norm at which all logits are zero.
      complement: ``(dim, dim - principal_dim)``, orthonormal columns.
    """

    origin: Float[Array, " dim"]
    complement: Float[Array, "dim rest"]


class VimState(NamedTuple):
    """A subspace, and the scale that makes the distance from it a logit.

    Attributes:
      subspace: state of ``residual``.
      alpha: mean of the largest logit of the training rows over the mean of their residuals.
    """

    subspace: ResidualState
    alpha: Float[Array, ""]


@_arguments.checked
@cached_by_settings
def residual(*, principal_dim: int | None = None) -> Detector:
    r"""Distance of the features from the principal subspace of the training features.

    .. math:: \lVert P^\perp (z - u) \rVert, \qquad u = -(W^\top)^+ b

    :math:`W` and :math:`b` are the kernel and bias of the head, and :math:`P^\perp` projects on the eigenvectors of
    :math:`\frac1N \sum_i (z_i - u)(z_i - u)^\top` that belong to its smallest eigenvalues. ``fit`` needs the head. The
    distance agrees with float64 arithmetic within 3e-7 of the length of z - u: within 1e-3 as long as it exceeds 1/3000
    of that length.

    Args:
      principal_dim: dimension of the principal subspace, in 1, ..., dim - 1; None for the paper's choice: 1000 for
        features of 2048 and more dimensions, 512 for 768 and more, else half of the dimensions.

    Returns:
      The detector; its state is a ``ResidualState``.

    Example:
      >>> detector = scoring.residual(principal_dim=3)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [0.39 7.56]

    Reference:
      Wang, Li, Feng and Zhang, "ViM: out-of-distribution with virtual-logit matching", arXiv:2203.10807.
    """
    _check(principal_dim)

    def fit(outputs, labels, head):
        require("residual", outputs=outputs, head=head)
        check_scale("residual", outputs.features)
        size = _principal_dim(principal_dim, outputs.features)
        return _fit(outputs.features, outputs.features.mean(0), head, size)[0]

    score = lambda state, outputs: _distance(state, outputs.features)
    return make_detector(fit, score, lambda state: (None, state.complement.shape[0]))


@_arguments.checked
@cached_by_settings
def vim(*, principal_dim: int | None = None) -> Detector:
    r"""Virtual-logit matching: the residual as the logit of an additional class, relative to the other logits.

    .. math:: \alpha \lVert P^\perp (z - u) \rVert - \log \sum_k e^{l_k}, \qquad
        \alpha = \frac{\sum_i \max_k l_{ik}}{\sum_i \lVert P^\perp (z_i - u) \rVert}

    with the residual of ``residual``, and sums over the training rows. ``fit`` needs the head; it raises ValueError
    if the largest training logits have no positive mean, or the training features no residual, because
    :math:`\alpha` would have the wrong sign or be infinite.

    Args:
      principal_dim: as in ``residual``.

    Returns:
      The detector; its state is a ``VimState``.

    Example:
      >>> detector = scoring.vim(principal_dim=3)
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-2.95 38.2 ]

    Reference:
      Wang, Li, Feng and Zhang, "ViM: out-of-distribution with virtual-logit matching", arXiv:2203.10807.
    """
    _check(principal_dim)

    def fit(outputs, labels, head):
        require("vim", outputs=outputs, head=head)
        check_scale("vim", outputs.features)
        size = _principal_dim(principal_dim, outputs.features)
        subspace, length = _fit(outputs.features, outputs.features.mean(0), head, size)
        lengths, logits = _distance(subspace, outputs.features), outputs.logits.max(-1)
        distance, logit, length = (np.asarray(a) for a in (jnp.mean(lengths), jnp.mean(logits), length))
        if not logit > 0:
            raise ValueError(f"outputs.logits must have a positive mean of the largest entries, got {logit:.4g}.")
        if not distance > _NOTHING * length:
            raise ValueError(f"principal_dim must leave a residual of the training features, {size} leaves none.")
        return VimState(subspace, jnp.asarray(logit / distance))

    def score(state, outputs):
        energy = jax.nn.logsumexp(outputs.logits, axis=-1)
        return state.alpha * _distance(state.subspace, outputs.features) - energy

    return make_detector(fit, score, lambda state: (None, state.subspace.complement.shape[0]))


def _check(principal_dim):
    if principal_dim is not None:
        _validate.at_least(1, principal_dim=principal_dim)


def _principal_dim(principal_dim, features):
    dim = features.shape[1]
    if principal_dim is None:
        principal_dim = 1000 if dim >= 2048 else 512 if dim >= 768 else dim // 2
    if not 1 <= principal_dim < dim:
        raise ValueError(f"principal_dim must lie in 1, ..., {dim - 1} for {dim} features, got {principal_dim}.")
    return principal_dim


@functools.partial(jax.jit, static_argnames="principal_dim")
def _fit(features, mean, head: Head, principal_dim):
    """The subspace, and the root mean square norm of the features from its origin."""
    bias = jnp.zeros_like(head.kernel[0]) if head.bias is None else head.bias
    origin = -_matmul(jnp.linalg.pinv(head.kernel.T), bias)
    about_mean = triangular_factor(features - mean[None])
    _, values, directions = jnp.linalg.svd(stacked_factor(about_mean, (mean - origin)[None]))
    return ResidualState(origin, directions[principal_dim:].T), jnp.linalg.norm(values)


@jax.jit
def _distance(state, features):
    return jnp.linalg.norm(_matmul(features - state.origin[None], state.complement), axis=-1)
