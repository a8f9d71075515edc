"""Classification by distances to prototypes: pure functions of arrays, for models, objectives and certificates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robustjax import _arguments
from robustjax.typing import AnyArray

_SMALLEST = 1e-30
"""Beside a weight, as good as 0."""
_FAR = -40.0
"""Logarithm below which a detection is small beside any difference of two sums of weights."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrototypeNetwork:
    """The arrays that a prototype network answers from; a pytree.

    Attributes:
      components: ``(components, dim)`` t, flat images.
      scale: s, positive, one or ``(components,)``; in units of the distance, or of its square where ``squared``.
      positive: ``(classes, reasonings, components)`` P, how much the detection of a component speaks for the class.
      negative: ``(classes, reasonings, components)`` N, how much its absence does. P and N are at least 0, and sum to
        1 for each reasoning. N is 0 in a network of radial basis functions (RBF).
      squared: whether detections fall with the squared distance.
    """

    components: Array
    scale: Array
    positive: Array
    negative: Array
    squared: bool = dataclasses.field(default=False, metadata={"static": True})


@_arguments.checked
def network(params: Mapping[str, Any]) -> PrototypeNetwork:
    """Makes the network of the parameters of :func:`robustjax.models.prototypes.classifier`.

    Args:
      params: ``components``; ``log_scale``, or ``log_squared_scale`` for squared distances; ``reasoning``, the logits
        of P, or of P and N one behind the other.

    Returns:
      The network.

    Example:
      >>> prototypes.network(models.functional(module).state.params).components.shape
      (2, 4)
    """
    squared, components = "log_squared_scale" in params, params["components"]
    weights = jax.nn.softmax(params["reasoning"])
    count = components.shape[0]
    positive, negative = weights[..., :count], weights[..., count:]
    if not negative.shape[-1]:
        negative = jnp.zeros_like(positive)
    scale = jnp.exp(params["log_squared_scale" if squared else "log_scale"])
    return PrototypeNetwork(components, scale, positive, negative, squared)


@_arguments.checked
def log_detections(network: PrototypeNetwork, x: Float[AnyArray, "batch ..."]) -> Float[Array, "batch components"]:
    r"""Computes the logarithm of how strongly each component is detected.

    .. math:: \ln D_k = -\frac{\lVert x - t_k \rVert_2}{s_k}, \text{ or } -\frac{\lVert x - t_k \rVert_2^2}{s_k}

    Args:
      network: see :class:`PrototypeNetwork`.
      x: ``(batch, ...)``, as many numbers each as a component has.

    Returns:
      ``(batch, components)``, at most 0; the gradient at a component itself is 0.

    Example:
      >>> print(prototypes.log_detections(net, x))  # distances of 0.2 and 1.8, in units of the scale
      [[-0.46 -4.14]]
    """
    distances = _distances(network, x)
    return -(jnp.square(distances) if network.squared else distances) / _per_component(network)


@_arguments.checked
def log_probabilities(
    network: PrototypeNetwork, log_detections: Float[Array, "batch components"]
) -> Float[Array, "batch classes"]:
    r"""Computes the logarithm of how probable each class is by itself, without a choice between classes.

    .. math:: p_c = \max_r \sum_k P_{crk} D_k + N_{crk} (1 - D_k)

    Each is in [0, 1]; they do not sum to 1. Where detections underflow, the logarithms do not.

    Args:
      network: see :class:`PrototypeNetwork`.
      log_detections: ``(batch, components)``, at most 0.

    Returns:
      ``(batch, classes)``, at most 0 but for rounding.

    Example:
      >>> print(prototypes.log_probabilities(net, prototypes.log_detections(net, x)))
      [[-0.48 -3.63]]

    Reference:
      Saralajew et al. 2024, A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations,
      arXiv 2412.15499.
    """
    present = _log_sum(log_detections[:, None, None], network.positive[None])
    absent = jnp.einsum("bk,crk->bcr", -jnp.expm1(log_detections), network.negative, precision="highest")
    none = absent <= 0
    absent = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, absent)))
    return jnp.logaddexp(present, absent).max(-1)


@_arguments.checked
def radius(
    network: PrototypeNetwork, x: Float[AnyArray, "batch ..."], labels: Int[Array, " batch"], *, cancel: bool = True
) -> Float[Array, " batch"]:
    """Computes the signed radius of :func:`robustjax.certification.prototypes.radius`, differentiable and unchecked.

    Memory holds ``batch * classes * reasonings**2 * components`` numbers.

    Args:
      network: see :class:`PrototypeNetwork`.
      x: ``(batch, ...)``.
      labels: ``(batch,)`` classes that are to be kept.
      cancel: False for the published formula, which is at most as large.

    Returns:
      ``(batch,)`` l2 radii: positive where the label is answered, else minus that within which it is not.

    Example:
      >>> print(prototypes.radius(net, x, jnp.array([0])))  # the boundary is half-way, 0.8 away
      [0.8]
    """
    distances = _distances(network, x)
    logs = -(jnp.square(distances) if network.squared else distances) / _per_component(network)
    # Weights of the label's reasonings (batch, reasonings, 1, 1, components) and of all (1, 1, classes, ...).
    positive, negative = (a[labels][:, :, None, None] for a in (network.positive, network.negative))
    others_positive, others_negative = (a[None, None] for a in (network.positive, network.negative))
    shrinks, grows = positive + others_negative, negative + others_positive
    if cancel:
        shrinks, grows = jax.nn.relu(shrinks - grows), jax.nn.relu(grows - shrinks)
    shrinks, grows = (_log_sum(logs[:, None, None, None], weights) for weights in (shrinks, grows))
    bias = negative.sum(-1) - others_negative.sum(-1)
    log_factor = (shrinks - grows) / 2 + _arcsinh(bias, (shrinks + grows) / 2)
    other = jnp.arange(network.positive.shape[0])[None] != labels[:, None]
    log_factor = jnp.where(other[:, None, :, None], log_factor, jnp.inf).min((2, 3)).max(1)
    length = log_factor * network.scale.min()
    if not network.squared:
        return length
    farthest = jnp.maximum(distances.max(-1), _SMALLEST)
    return length / (farthest + jnp.sqrt(farthest**2 + jnp.abs(length)))


def _log_sum(logs: Array, weights: Array) -> Array:
    """``ln sum_k w_k e**logs_k``."""
    none = weights <= 0
    lowest = logs.min(-1, keepdims=True) + math.log(_SMALLEST)  # a logarithm also where all weights are 0
    terms = jnp.where(none, lowest, logs + jnp.log(jnp.where(none, 1.0, weights)))
    return jax.nn.logsumexp(terms, axis=-1)


def _arcsinh(bias: Array, log_mean: Array) -> Array:
    """``arcsinh(bias / 2 e**log_mean)``, also where that overflows."""
    near = jnp.arcsinh(bias / 2 * jnp.exp(-jnp.maximum(log_mean, _FAR)))
    far = jnp.sign(bias) * (jnp.log(jnp.where(bias == 0, 1.0, jnp.abs(bias))) - log_mean)
    return jnp.where(log_mean > _FAR, near, far)


def _distances(network: PrototypeNetwork, x: AnyArray) -> Array:
    """Euclidean distances ``(batch, components)``."""
    # From the middle of the components: products of large numbers would round more.
    middle = jax.lax.stop_gradient(network.components.mean(0))[None]
    x, components = jnp.asarray(x).reshape(x.shape[0], -1) - middle, network.components - middle
    squares = lambda a: jnp.square(a).sum(-1)
    products = jnp.matmul(x, components.T, precision="highest")
    square = squares(x)[:, None] - 2 * products + squares(components)[None]
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _per_component(network: PrototypeNetwork) -> Array:
    return jnp.broadcast_to(network.scale, network.components.shape[:1])[None]
