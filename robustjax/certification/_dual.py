"""Dual randomized smoothing: each half of the pixels is smoothed and classified separately."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from robustjax import _arguments, _summary, _validate
from robustjax.certification._binomial import binomial_lower_bound
from robustjax.certification._counts import check_all_voted, check_on_host, counts_on_host
from robustjax.certification._measures import Gaussian, resolved
from robustjax.certification._smoothing import ABSTAIN
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray, ArrayLike, LogitsFn


class DualCertificate(NamedTuple):
    """Certificates of the sum of two smoothed classifiers; host arrays, one entry per input.

    Attributes:
      label: ``(batch,)`` the certified class, or ``ABSTAIN``; int32.
      radius: ``(batch,)`` the label is constant on the open l2 ball of this radius; 0 where abstained; float64.
      probability: ``(batch, 2)`` lower confidence bounds of the probability of the selected class in each half, which
        hold together with probability 1 - alpha; float64.
      abstained: ``(batch,)``.
    """

    label: np.ndarray
    radius: np.ndarray
    probability: np.ndarray
    abstained: np.ndarray

    def __repr__(self) -> str:
        return _summary.of_radii(self)


@_arguments.checked
def checkerboard(height: int, width: int) -> np.ndarray:
    """Marks every other pixel, as the black fields of a checkerboard.

    Args:
      height: height of the images.
      width: width of the images.

    Returns:
      ``(height, width)`` bool.

    Example:
      >>> certification.checkerboard(2, 4).astype(int)
      array([[1, 0, 1, 0],
             [0, 1, 0, 1]])
    """
    _validate.at_least(1, height=height, width=width)
    return np.indices((height, width)).sum(0) % 2 == 0


@_arguments.checked
def dual_radius(probability: ArrayLike, measure: Gaussian) -> np.ndarray:
    r"""Computes the radius in which the sum of two smoothed classifiers keeps its class.

    .. math:: R = \frac{\sigma}{\sqrt 2}\, \max\bigl(0,\ \Phi^{-1}(p_1) + \Phi^{-1}(p_2)\bigr)

    A change of length a in one half and b in the other leaves at least :math:`\Phi(\Phi^{-1}(p_1) - a/\sigma) +
    \Phi(\Phi^{-1}(p_2) - b/\sigma)` to the class. The class wins while this sum exceeds 1, that is, while a + b
    is below :math:`\sigma (\Phi^{-1}(p_1) + \Phi^{-1}(p_2))`; the shortest such change has a = b. A half with a
    probability below 1/2 counts against the other half. The radius is at most 7.31 sigma: each
    half reaches 5.17 sigma, as ``measure`` does.

    Args:
      probability: ``(..., 2)`` lower bounds of the probability of the class in each half.
      measure: the Gaussian that smooths both.

    Returns:
      ``(...)`` float64, in the units of sigma.

    Raises:
      ValueError: for another shape, or probabilities outside [0, 1).

    Example:
      >>> certification.dual_radius([0.99, 0.5], certification.gaussian(0.5))  # 0.5 * 2.33 / sqrt(2)
      array(0.82)

    Reference:
      Xia et al. 2024, arXiv:2404.09586. Differs from the authors' code, which has sqrt(R_1^2 + R_2^2) for CIFAR-10 (for
      p = 0.99 and 0.5 that is 2.33 sigma, but at 1.65 sigma the classes are even) and counts a half below 1/2 as 0 for
      ImageNet.
    """
    from scipy import special

    probability = np.asarray(probability, np.float64)
    if probability.shape[-1:] != (2,):
        raise ValueError(f"probability must have shape (..., 2), got {probability.shape}.")
    if not ((probability >= 0) & (probability < 1)).all():
        raise ValueError(f"probability must lie in [0, 1), got values from {probability.min()} to {probability.max()}.")
    return np.asarray(measure.sigma / np.sqrt(2) * np.maximum(special.ndtri(resolved(probability)).sum(-1), 0.0))


@_arguments.checked
def dual(
    key: Key[Array, "..."],
    logits_fns: tuple[LogitsFn, LogitsFn],
    x: Float[AnyArray, "batch height width channels"],
    measure: Gaussian,
    *,
    mask: Bool[AnyArray, "height width"] | None = None,
    num_selection: int = 200,
    num_estimation: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> DualCertificate:
    r"""Certifies a dual smoothed classifier around each input.

    .. math:: g(x) = \arg\max_c P[f_1(x_1 + \epsilon) = c] + P[f_2(x_2 + \epsilon) = c]

    :math:`x_1` are the pixels of the mask and :math:`x_2` the other pixels, each with its own noise; a classifier sees
    the pixels of its half, and 0 at all other pixels. ``num_selection`` draws for each half select the class with the
    most votes; ``num_estimation`` fresh draws for each half give two Clopper-Pearson bounds at level alpha / 2, and
    :func:`dual_radius` gives the radius. The cost is twice the draws of ``certify`` with the same numbers.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fns: for each half, maps ``(batch_size, height, width, channels)`` float32 to ``(batch_size, classes)``.
      x: ``(batch, height, width, channels)``, floating.
      measure: the Gaussian.
      mask: ``(height, width)`` the pixels of the first half; None for :func:`checkerboard`. Any mask is sound,
        because the second half consists of all other pixels.
      num_selection: draws for each half that select the class.
      num_estimation: draws for each half that bound its probability.
      alpha: probability, for each input, that its certificate is wrong.
      batch_size: noisy copies in one call; see ``sample_counts``.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      A ``DualCertificate`` of host arrays.

    Raises:
      ValueError: for an argument that is not as above, and for logits that are not finite or that change with the other
        copies in a block, see ``certify``.

    Guarantee:
      As ``certify``, for the classifier above.

    Example:
      >>> measure = certification.gaussian(0.5)
      >>> certificate = certification.dual(
      ...     jax.random.key(0), (logits_fn, logits_fn), x, measure, num_estimation=1000
      ... )
      >>> print(certificate.label, certificate.radius)
      [0 1] [1.07 0.3 ]

    Reference:
      Xia et al. 2024, Mitigating the Curse of Dimensionality for Certified Robustness via Dual Randomized Smoothing,
      arXiv:2404.09586. Differs from the authors' code in the radius, see :func:`dual_radius`, and in alpha, which is
      for both halves together here.
    """
    _validate.at_least(1, num_selection=num_selection, num_estimation=num_estimation)
    _validate.probability(alpha=alpha)
    if batch_size is not None:
        _validate.at_least(1, batch_size=batch_size)
    if not isinstance(measure, Gaussian):
        raise ValueError(f"measure must be a Gaussian: its tails give the radius of two halves, got {measure!r}.")
    if not isinstance(x, (jax.Array, np.ndarray)) or x.ndim != 4:
        raise ValueError(f"x must have shape (batch, height, width, channels), got {getattr(x, 'shape', x)}.")
    if not isinstance(logits_fns, tuple) or len(logits_fns) != 2:
        raise ValueError(f"logits_fns must be a pair of functions, got {logits_fns!r}.")
    mask = checkerboard(*x.shape[1:3]) if mask is None else np.asarray(mask)
    if mask.shape != x.shape[1:3] or mask.dtype != bool:
        raise ValueError(f"mask must be bool of shape {x.shape[1:3]}, got {mask.dtype} of {mask.shape}.")
    _validate.channels_last(x=x)
    check_on_host(key, x, measure, input_range)
    _validate.key(key, x.shape[0])
    edges, keys, halves = (0, num_selection, num_selection + num_estimation), image_keys(key, jnp.asarray(x)), []
    for i, (logits_fn, pixels) in enumerate(zip(logits_fns, (mask, ~mask), strict=True)):
        of_half = jax.tree_util.Partial(_of_half, _validate.as_pytree(logits_fn=logits_fn), pixels[None, ..., None])
        keys_of_half = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        counts = counts_on_host(keys_of_half, of_half, x, measure, edges, batch_size)
        check_all_voted(counts[:, 0], num_selection)
        check_all_voted(counts[:, 1], num_estimation)
        halves.append(counts)
    if halves[0].shape != halves[1].shape:
        classes = " and ".join(str(counts.shape[-1]) for counts in halves)
        raise ValueError(f"logits_fns must have the same number of classes, got {classes}.")
    selection, estimation = (np.stack([counts[:, part] for counts in halves], 1) for part in (0, 1))
    label = selection.sum(1).argmax(-1).astype(np.int32)
    votes = np.take_along_axis(estimation, label[:, None, None], axis=-1)[..., 0]
    probability = binomial_lower_bound(votes, num_estimation, alpha / 2)
    radius = dual_radius(probability, measure)
    abstained = radius == 0
    return DualCertificate(np.where(abstained, np.int32(ABSTAIN), label), radius, probability, abstained)


def _of_half(logits_fn, pixels, x):
    return logits_fn(jnp.where(pixels, x, 0.0))
