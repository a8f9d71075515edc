"""The module of a prototype network."""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _prototypes, _validate
from robustjax.models._initializers import drawn
from robustjax.typing import AnyArray, Outputs

_FAINT = 0.01
"""Detection of a component at the mean distance, to start with."""
_HEAD_START = 4.0
"""Logit by which each class prefers its own components, to start with."""


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
        logits = drawn(key, 0.1, distribution="normal", shape=(num_classes, num_reasonings, parts, count))
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
        arrays = _prototypes.network({name: getattr(self, name)[...] for name in names if hasattr(self, name)})
        logs = _prototypes.log_detections(arrays, x.astype(jnp.float32))
        return Outputs(_prototypes.log_probabilities(arrays, logs), jnp.exp(logs))


@_arguments.checked
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
