"""Classification by distances to prototypes: pure functions of arrays, and the module that trains them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from robustjax import _validate
from robustjax.typing import AnyArray, Outputs

_SMALLEST = 1e-30
"""Beside a weight, as good as 0."""
_FAR = -40.0
"""Logarithm below which a detection is small beside any difference of two sums of weights."""
_FAINT = 0.01
"""Detection of a component at the mean distance, to start with."""
_HEAD_START = 4.0
"""Logit by which each class prefers its own components, to start with."""


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


class PrototypeClassifier(nnx.Module):
    """Image classifier of :class:`PrototypeNetwork`; see :func:`classifier` for its arguments."""

    def __init__(
        self,
        key: Key[Array, ""],
        components: Float[AnyArray, "components height width channels"],
        labels: Int[AnyArray, " components"] | None,
        *,
        num_classes: int,
        reasoning: Literal["rbf", "cbc"],
        num_reasonings: int,
        scale_per_component: bool,
        squared: bool,
    ):
        _validate.key(key)
        _validate.at_least(1, num_classes=num_classes, num_reasonings=num_reasonings)
        if reasoning not in ("rbf", "cbc"):
            raise ValueError(f"reasoning must be rbf or cbc, got {reasoning!r}.")
        count = len(components)
        if components.ndim != 4 or count < 2 or not np.isfinite(components).all():
            raise ValueError(
                f"components must be (at least 2, height, width, channels) and finite, got {components.shape}."
            )
        if labels is not None and (labels.shape != (count,) or not 0 <= labels.min() <= labels.max() < num_classes):
            raise ValueError(f"labels must be ({count},) classes from 0 to {num_classes - 1}, got {labels}.")
        self.image_shape = components.shape[1:]
        flat = np.asarray(components, np.float32).reshape(count, -1)
        distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)[~np.eye(count, dtype=bool)]
        mean = np.mean(distances ** (2 if squared else 1))
        if not mean > 0:
            raise ValueError("components must differ, got the same image every time.")
        log_scale = np.full((count,) if scale_per_component else (), math.log(mean / -math.log(_FAINT)), np.float32)
        self.components = nnx.Param(jnp.asarray(flat))
        setattr(self, "log_squared_scale" if squared else "log_scale", nnx.Param(jnp.asarray(log_scale)))
        parts = 1 if reasoning == "rbf" else 2
        logits = 0.1 * jax.random.normal(key, (num_classes, num_reasonings, parts, count))
        if labels is not None:
            own = np.asarray(labels)[None] == np.arange(num_classes)[:, None]
            logits = logits.at[:, :, 0].add(_HEAD_START * own[:, None].astype(np.float32))
        self.reasoning = nnx.Param(logits.reshape(num_classes, num_reasonings, parts * count))

    def __call__(self, x: Float[Array, "..."]) -> Outputs:
        """Logarithms of the probabilities of each class, as logits, and detections, as features.

        Args:
          x: ``(batch, height, width, channels)``, floating point, in [0, 1].

        Returns:
          ``logits (batch, num_classes)`` and ``features (batch, components)``.

        Raises:
          ValueError: if ``x`` has another shape.
        """
        if x.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {x.shape}.")
        names = ("components", "log_scale", "log_squared_scale", "reasoning")
        arrays = network({name: getattr(self, name)[...] for name in names if hasattr(self, name)})
        logs = log_detections(arrays, x.astype(jnp.float32))
        return Outputs(log_probabilities(arrays, logs), jnp.exp(logs))


def classifier(
    key: Key[Array, ""],
    components: Float[AnyArray, "components height width channels"],
    labels: Int[AnyArray, " components"] | None = None,
    *,
    num_classes: int = 10,
    reasoning: Literal["rbf", "cbc"] = "cbc",
    num_reasonings: int = 1,
    scale_per_component: bool = False,
    squared: bool = False,
) -> PrototypeClassifier:
    r"""Builds a network that classifies by distances to prototypes in the space of images, all of which are trained.

    Class c is as probable as its best reasoning r says from the detections :math:`D_k = e^{-d_k / s}`:

    .. math:: p_c(x) = \max_r \sum_k P_{crk} D_k + N_{crk} (1 - D_k), \qquad
              \sum_k P_{crk} + N_{crk} = 1

    As logits the module gives :math:`\ln p_c`, as features the detections. Its parameters are ``components``,
    ``reasoning`` and the logarithm of s, which starts where a component at the mean distance is detected by 0.01. With
    labels, each class starts with a preference for its own components.

    Args:
      key: typed PRNG key of the weights to start with.
      components: ``(components, height, width, channels)`` images to start with, such as some of each class.
      labels: ``(components,)`` classes of those images, or None.
      num_classes: number of logits.
      reasoning: ``"rbf"`` for a network of radial basis functions, of N = 0; ``"cbc"`` for the stable
        classification-by-components network, in which the absence of a component may speak for a class.
      num_reasonings: for each class; the best one counts.
      scale_per_component: whether each component has its own s.
      squared: whether detections fall with the squared distance.

    Returns:
      The module, ``x (batch, height, width, channels) -> Outputs``.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> module = prototypes.classifier(jax.random.key(0), components, num_classes=2)
      >>> module(x).features.shape  # the detections of two components
      (1, 2)

    Reference:
      Saralajew et al. 2024, A Robust Prototype-Based Network with Interpretable RBF Classifier Foundations,
      arXiv 2412.15499.
    """
    return PrototypeClassifier(
        key, components, labels, num_classes=num_classes, reasoning=reasoning, num_reasonings=num_reasonings,
        scale_per_component=scale_per_component, squared=squared,
    )  # fmt: skip
