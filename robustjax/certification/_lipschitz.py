"""Certified l2 radii from Lipschitz constants, and Lipschitz constants of layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate
from robustjax.typing import AnyArray


@_arguments.checked
def convolution_norm(kernel: Float[AnyArray, "height width inputs outputs"], image_size: int) -> Float[Array, ""]:
    r"""Bounds from above the spectral norm of a zero-padded convolution of square images: its l2 Lipschitz constant.

    .. math:: \lVert K * x \rVert_2 \le \max_\omega \lVert \hat K(\omega) \rVert_2\, \lVert x \rVert_2

    A convolution with or without zero padding is a part of the periodic convolution on a torus that is larger by the
    size of the kernel. The singular values of the periodic convolution are the singular values of the kernel's Fourier
    transform at each frequency. The norm of the kernel as a matrix is not a bound, and a power iteration approaches the
    norm from below.

    Args:
      kernel: weights, height by width by channels in by channels out, of a convolution without groups or dilation.
      image_size: height and width of the images, the larger of the two.

    Returns:
      The bound; it also holds with a stride, less tightly. The norm of a dense layer is
      ``jnp.linalg.norm(kernel, ord=2)``.

    Raises:
      ValueError: ``kernel`` is not finite with four axes, or ``image_size`` is not at least 1.

    Guarantee:
      In exact arithmetic; computed in the dtype of ``kernel``, with relative errors of some 1e-6 in float32.

    Example:
      >>> kernel = jnp.full((3, 3, 1, 1), 1 / 9)  # a blur
      >>> f"{certification.convolution_norm(kernel, image_size=8):.3f}"
      '1.000'

    Reference:
      Sedghi, Gupta and Long 2019, The Singular Values of Convolutional Layers, arXiv 1805.10408, for the torus.
    """
    _validate.at_least(1, image_size=image_size)
    _validate.floating(4, kernel=kernel)
    kernel = jnp.asarray(kernel)
    if kernel.dtype.itemsize < 4:
        raise ValueError(f"kernel must be float32 or float64, got {kernel.dtype}.")
    torus = [image_size + size - 1 for size in kernel.shape[:2]]
    transform = jnp.fft.rfft2(kernel, torus, axes=(0, 1))  # real weights: the other half is its conjugate
    return jnp.linalg.norm(transform, ord=2, axis=(2, 3)).max()


@_arguments.checked
def lipschitz_radius(
    logits: Float[Array, "batch classes"],
    constants: Float[AnyArray, "classes classes"] | Float[AnyArray, ""] | float,
    labels: Int[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    r"""Computes the radius within which a model with Lipschitz differences of logits keeps its answer.

    .. math:: R(x) = \max\Bigl(0,\ \min_{j \ne y} \frac{f_y(x) - f_j(x)}{L_{yj}}\Bigr)

    where :math:`|(f_y - f_j)(x) - (f_y - f_j)(x')| \le L_{yj} \lVert x - x' \rVert`. For a linear head with
    rows :math:`w_j` on features with the constant L, :math:`L_{yj} = L\, \lVert w_y - w_j \rVert_2`. L is at most the
    product of the norms of the layers; ReLU and max pooling without overlap have the norm 1.

    Args:
      logits: ``(batch, classes)``, floating and finite; used in float32 at least.
      constants: :math:`L_{yj}`, ``(classes, classes)`` with a diagonal that is ignored, or one number for all pairs.
      labels: ``(batch,)``, classes y; None for the answers themselves.

    Returns:
      ``(batch,)`` radii in the norm and the units of the constants; 0 where another class has the same or a larger
      logit. Infinite where all constants are 0, as for a model that ignores its input.

    Raises:
      ValueError: logits are not floating or not finite, labels are no classes, shapes do not fit, or a constant is
        negative or NaN.

    Guarantee:
      Holds in exact arithmetic if the constants are upper bounds; the largest gradients seen in data are not.

    Example:
      >>> logits = jnp.array([[1.0, 0.2, 0.0], [0.1, 0.2, 0.3]])
      >>> print(certification.lipschitz_radius(logits, 2.0))
      [0.4  0.05]
    """
    _validate.floating(2, logits=logits)
    classes = logits.shape[-1]
    if labels is not None:
        _validate.labels(labels, *logits.shape)
    if jnp.shape(constants) not in ((), (classes, classes)):
        raise ValueError(f"constants must be one number or ({classes}, {classes}), got shape {jnp.shape(constants)}.")
    if not isinstance(constants, jax.core.Tracer):
        known = np.broadcast_to(np.asarray(constants), (classes, classes))[~np.eye(classes, dtype=bool)]
        if not (known >= 0).all():
            raise ValueError(f"constants must be at least 0, got {known.min()}.")
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    constants = jnp.broadcast_to(jnp.asarray(constants).astype(logits.dtype), (classes, classes))
    labels = logits.argmax(-1) if labels is None else labels
    margins = jnp.take_along_axis(logits, labels[:, None], axis=-1) - logits
    other = jnp.arange(classes)[None] != labels[:, None]
    radii = jnp.where(margins > 0, margins / constants[labels], 0.0)
    return jnp.where(other, radii, jnp.inf).min(-1)
