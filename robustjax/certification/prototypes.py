"""Certificates of prototype networks: a formula, without noise and without sampling."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _prototypes, _validate
from robustjax.typing import AnyArray


class PrototypeCertificate(NamedTuple):
    """Certificates by the formula, one entry per input.

    Attributes:
      label: ``(batch,)``, the classes that the radii refer to, int32.
      radius: ``(batch,)``, l2, in units of x, finite and signed: if positive, the model answers ``label`` everywhere
        within the radius; if negative, it answers another class, and never ``label`` within minus the radius.
    """

    label: Int[Array, " batch"]
    radius: Float[Array, " batch"]


@_arguments.checked
def radius(
    network: _prototypes.PrototypeNetwork,
    x: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"] | None = None,
    *,
    cancel: bool = True,
    batch_size: int = 256,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> PrototypeCertificate:
    r"""Certifies the answers of a prototype network in l2, by the triangle inequality.

    A perturbation of length e changes no distance by more than e, and so multiplies each detection by a factor in
    :math:`[1/t, t]`, :math:`t = e^{e / s}`, with s the least of the scales. For a reasoning y of the label and j of
    another class let

    .. math:: A = \sum_k (P_{yk} + N_{jk}) D_k, \quad B = \sum_k (N_{yk} + P_{jk}) D_k, \quad
              b = \sum_k N_{yk} - \sum_k N_{jk}

    so that :math:`p_y - p_j = b + A - B`. After the perturbation this is at least :math:`b + A / t - B t`, which is
    positive up to the root of a quadratic equation:

    .. math:: t < z = \frac{b + \sqrt{b^2 + 4 A B}}{2 B}, \qquad
              R_{yj} = s \ln z = s \Bigl[\tfrac12 \ln \frac A B + \operatorname{arsinh} \frac{b}{2 \sqrt{A B}}\Bigr]

    and :math:`R = \max_y \min_j R_{yj}`. Exchanging y and j changes the sign of :math:`R_{yj}`, so a negative radius is
    a certificate too. Radial basis functions have N = 0, and :math:`R_{yj} = \frac s 2 \ln (p_y / p_j)`.

    Terms that A and B share cancel in :math:`p_y - p_j`, for every perturbation. Without these terms, that is, with
    :math:`A = \sum_k \max(c_k, 0) D_k` and :math:`B = \sum_k \max(-c_k, 0) D_k` for
    :math:`c_k = P_{yk} - N_{yk} - P_{jk} + N_{jk}`, the same formula gives a radius that is at least as large.

    Squared distances, the largest :math:`d^2`, change by at most :math:`2 d e + e^2`, so that
    :math:`R = \sqrt{d^2 + s \ln z} - d`, and its mirror image where z is below 1.

    Args:
      network: such as ``models.prototypes.network(state.params)``.
      x: ``(batch, ...)``, floating point, in ``input_range``.
      labels: ``(batch,)`` integers, such as the true classes; None for the network's own answers.
      cancel: False for the published formula.
      batch_size: inputs at a time, which bounds memory.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      The certificates. No radius exceeds the diagonal of the box of all inputs in ``input_range``.

    Raises:
      ValueError: for shapes that do not fit, labels that are no classes, arrays that are not finite, scales or weights
        that are not positive, or weights that do not sum to 1.

    Guarantee:
      Deterministic, for every perturbation of l2 norm below the radius, also those that leave the range, in exact
      arithmetic. In float32 distances err by some 1e-7 of the squared norm of x divided by the distance; the
      radius may be too large by one such error at x and one at the perturbed input. With N > 0, probabilities err by
      1e-7: where all detections are smaller, rounding decides the answer.

    Differs from:
      The published formula, which keeps the shared terms, and bounds the change of squared distances with 3 e^2
      instead of e^2.

    Example:
      >>> components = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])  # a black and a white image
      >>> module = models.prototypes.classifier(
      ...     jax.random.key(0), components, jnp.array([0, 1]), num_classes=2, reasoning="rbf"
      ... )
      >>> network = models.prototypes.network(models.functional(module).state.params)
      >>> certificate = certification.prototypes.radius(network, jnp.full((1, 2, 2, 1), 0.1))
      >>> print(certificate.label, certificate.radius)
      [0] [0.8]

    Reference:
      Saralajew et al. 2024, A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations,
      arXiv 2412.15499.
    """
    _validate.at_least(1, batch_size=batch_size)
    _check_network(network)
    dim, classes = network.components.shape[1], network.positive.shape[0]
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        raise ValueError(f"x must be a floating-point array (batch, ...), got {getattr(x, 'dtype', type(x).__name__)}.")
    if math.prod(x.shape[1:]) != dim:
        raise ValueError(f"x must have {dim} numbers in each row, as components have, got shape {x.shape}.")
    _check(x=x)
    if not isinstance(x, jax.core.Tracer):
        _validate.in_range(np.asarray(x), input_range)
    low, high = input_range or (-math.inf, math.inf)
    largest = np.float32((high - low) * math.sqrt(dim))
    if labels is not None:
        _validate.labels(labels, x.shape[0], classes)
        labels = jnp.asarray(labels).astype(jnp.int32)
    return _radius(network, jnp.asarray(x), labels, largest, cancel=cancel, batch_size=batch_size)


@jax.jit(static_argnames=("cancel", "batch_size"))
def _radius(network, x, labels, largest, *, cancel, batch_size):
    def of_one(example):
        x, label = jax.tree.map(lambda a: a[None], example)
        if label is None:
            logs = _prototypes.log_detections(network, x)
            label = _prototypes.log_probabilities(network, logs).argmax(-1).astype(jnp.int32)
        radius = _prototypes.radius(network, x, label, cancel=cancel)
        return PrototypeCertificate(label[0], jnp.clip(radius[0], -largest, largest))

    return jax.lax.map(of_one, (x.astype(jnp.float32), labels), batch_size=batch_size)


def _check_network(network):
    components, positive, negative = network.components, network.positive, network.negative
    count = len(components)
    if components.ndim != 2 or positive.ndim != 3 or positive.shape != negative.shape or positive.shape[2] != count:
        raise ValueError(
            "network must have components (components, dim) and positive and negative weights (classes, reasonings, "
            f"components), got {components.shape}, {positive.shape} and {negative.shape}."
        )
    if network.scale.shape not in ((), (count,)):
        raise ValueError(f"network must have one scale, or one for each of {count}, got {network.scale.shape}.")
    _check(**{f"{field} of the network": getattr(network, field) for field in ("components", "scale")})
    if any(isinstance(a, jax.core.Tracer) for a in (positive, negative, network.scale)):
        return
    positive, negative, scale = (np.asarray(a, np.float64) for a in (positive, negative, network.scale))
    if not scale.min() > 0:
        raise ValueError(f"scale of the network must be positive, got {scale.min()}.")
    sums, weights = (positive + negative).sum(-1), np.stack([positive, negative])
    if not (weights.min() >= 0 and np.abs(sums - 1).max() < 1e-4):
        raise ValueError(
            "weights of the network must be at least 0 and sum to 1 for each reasoning, got weights from "
            f"{weights.min():g} to {weights.max():g} and sums from {sums.min():g} to {sums.max():g}."
        )


def _check(**arrays):
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
