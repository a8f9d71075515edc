"""Radii of classifiers that add up weighted scores of several modalities.

The examples begin with:

>>> from robustjax.certification import multimodal
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate
from robustjax.losses._multimodal import pair_radii
from robustjax.typing import AnyArray


@_arguments.checked
def lipschitz_constants(kernel: Float[AnyArray, "modalities inputs hidden"]) -> np.ndarray:
    """Computes l2 Lipschitz constants of encoders with one layer of ReLU, on the host in float64.

    Args:
      kernel: matrices of the layers, one for each modality, such as ``params["kernel"]`` of
        :func:`robustjax.models.multimodal`.

    Returns:
      ``(modalities,)`` spectral norms, by singular values; float64.

    Raises:
      ValueError: ``kernel`` does not have three axes, or is not finite.

    Guarantee:
      Upper bounds, a relative 1e-6 above the norms for a model that is computed in float32.

    Example:
      >>> multimodal.lipschitz_constants(np.stack([np.eye(4, 3), 2 * np.eye(4, 3)]))
      array([1., 2.])
    """
    matrices = np.asarray(kernel, np.float64)
    if matrices.ndim != 3:
        raise ValueError(f"kernel must have shape (modalities, inputs, hidden), got {matrices.shape}.")
    if not np.isfinite(matrices).all():
        raise ValueError("kernel must be finite, got NaN or infinity.")
    return np.linalg.norm(matrices, ord=2, axis=(1, 2)) * (1 + 1e-6)


@_arguments.checked
def radius(
    scores: Float[Array, "batch modalities classes"],
    weights: Float[AnyArray, "modalities classes"],
    bias: Float[AnyArray, " classes"],
    constants: Float[AnyArray, " modalities"] | Float[AnyArray, "modalities classes"],
    *,
    labels: Int[Array, " batch"] | None = None,
    modality: int | None = None,
) -> Float[Array, " batch"]:
    r"""Computes the radius in which a weighted sum of modalities keeps its answer.

    .. math:: r(x) = \min_{j \ne y} \frac{\sum_m (a_{my} \zeta_{my} - a_{mj} \zeta_{mj}) + b_y - b_j}
              {\sqrt{\sum_m (|a_{my}| \tau_{my} + |a_{mj}| \tau_{mj})^2}}

    for models :math:`h_k = \sum_m a_{mk} \zeta_{mk} + b_k` whose scores :math:`\zeta_{mk}` have the l2 Lipschitz
    constants :math:`\tau_{mk}`. If only one modality changes, the sum under the root has only its term.

    Args:
      scores: ``(batch, modalities, classes)`` zeta; of :func:`robustjax.models.multimodal` the features, reshaped.
      weights: ``(modalities, classes)`` a, of any sign.
      bias: ``(classes,)`` b.
      constants: ``(modalities, classes)`` tau, or ``(modalities,)`` for all classes, see :func:`lipschitz_constants`.
      labels: ``(batch,)`` classes y; None for the answers themselves.
      modality: index of the modality that changes; None if all may change together.

    Returns:
      ``(batch,)`` radii in units of the inputs, negative where y is not the answer.

    Raises:
      ValueError: scores, weights or bias are not finite, labels are not classes, shapes do not fit, the modality does
        not exist, or a constant is negative or NaN.

    Guarantee:
      The answer is y for all changes with :math:`\sqrt{\sum_m \lVert \delta_m \rVert_2^2} < r`, of all modalities or of
      ``modality``, if the constants are upper bounds. The largest gradients seen in data, which the authors' code uses,
      give an estimate, not a guarantee.

    Example:
      >>> scores = jnp.array([[[0.9, 0.1], [0.6, 0.4]]])  # one input, two modalities, two classes
      >>> weights, bias = jnp.ones((2, 2)), jnp.zeros(2)
      >>> print(multimodal.radius(scores, weights, bias, constants=jnp.ones(2)))
      [0.35]
      >>> print(multimodal.radius(scores, weights, bias, constants=jnp.ones(2), modality=0))  # only one changes
      [0.5]

    Reference:
      Yang et al. 2024, Quantifying and Enhancing Multi-modal Robustness with Modality Preference, arXiv 2402.06244.
      Differs from the authors' code in the minimum over all classes, not only the runner-up, and in absolute values.
    """
    _validate.floating(3, scores=scores)
    if scores.shape[-1] < 2:
        raise ValueError(f"scores must have shape (batch, modalities, classes >= 2), got {scores.shape}.")
    shape = scores.shape[1:]
    if weights.shape != shape or bias.shape != shape[1:]:
        raise ValueError(
            f"weights and bias must have shapes {shape} and {shape[1:]}, got {weights.shape} and {bias.shape}."
        )
    for name, value in (("weights", weights), ("bias", bias)):
        if not isinstance(value, jax.core.Tracer) and not np.isfinite(np.asarray(value)).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity.")
    if constants.shape not in (shape, shape[:1]):
        raise ValueError(f"constants must have shape {shape} or {shape[:1]}, got {constants.shape}.")
    if not isinstance(constants, jax.core.Tracer) and not (np.asarray(constants) >= 0).all():
        raise ValueError(f"constants must be at least 0, got {np.min(np.asarray(constants))}.")
    if modality is not None:
        _validate.at_least(0, modality=modality)
        if modality >= shape[0]:
            raise ValueError(f"modality must be an integer from 0 to {shape[0] - 1}, got {modality}.")
    if labels is not None:
        _validate.labels(labels, scores.shape[0], shape[1])
    dtype = jnp.float64 if scores.dtype == jnp.float64 else jnp.float32
    scores, weights, bias, constants = (jnp.asarray(a).astype(dtype) for a in (scores, weights, bias, constants))
    constants = jnp.broadcast_to(constants.reshape(shape[0], -1), shape)
    if labels is None:
        labels = ((weights[None] * scores).sum(1) + bias[None]).argmax(-1)
    return pair_radii(scores, labels, weights, bias, constants, modality=modality).min(-1)
