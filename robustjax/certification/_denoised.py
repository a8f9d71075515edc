"""Denoisers in front of a classifier: together they are the base classifier that is smoothed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.typing import ArrayLike, LogitsFn


@_arguments.checked
def denoised(logits_fn: LogitsFn, denoiser_fn: Callable[[Array], Array]) -> jax.tree_util.Partial:
    r"""Puts a denoiser in front of a classifier.

    .. math:: x \mapsto f(D(x))

    Args:
      logits_fn: f, ``(batch, ...) -> (batch, classes)``; the arrays of a pytree, such as ``jax.tree_util.Partial``,
        are arguments of compiled programs.
      denoiser_fn: D, from images with noise to images, ``(batch, ...) -> (batch, ...)``; also a pytree if possible.

    Returns:
      ``logits_fn`` of denoiser and classifier together, a pytree, for :func:`certify` and other functions of a model.

    Raises:
      ValueError: if an argument is not a function; and when called, if a denoised image has another shape.

    Guarantee:
      A certificate of the result holds for the smoothed classifier f(D(.)), by the same theorem, at the sigma of the
      measure, however D was trained.

    Example:
      >>> denoised_fn = certification.denoised(logits_fn, denoiser_fn=lambda x: jnp.clip(x, 0, 1))
      >>> print(denoised_fn(jnp.full((1, 4, 4, 1), 3.0)))
      [[-0.6  0.6]]

    Reference:
      Salman et al. 2020, Denoised Smoothing: A Provable Defense for Pretrained Classifiers, arXiv 2003.01908.
    """
    parts = _validate.as_pytree(logits_fn=logits_fn), _validate.as_pytree(denoiser_fn=denoiser_fn)
    return jax.tree_util.Partial(_denoised, *parts)


def _denoised(logits_fn: LogitsFn, denoiser_fn: Callable[[Array], Array], x: Array) -> Array:
    return logits_fn(_of_shape("denoiser_fn", denoiser_fn(x), x))


@_arguments.checked
def diffusion_denoised(
    logits_fn: LogitsFn, noise_fn: Callable[[Array, Array], Array], alphas_bar: ArrayLike, *, sigma: float
) -> jax.tree_util.Partial:
    r"""Puts one step of a diffusion model in front of a classifier, as its denoiser.

    The model works on images in [-1, 1], where noise of sigma on [0, 1] becomes noise of :math:`2 \sigma`. With t the
    step whose :math:`\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}` is nearest to :math:`2 \sigma`, a noisy image is
    :math:`x_t = \sqrt{\bar\alpha_t}\, (2 x - 1)`, and the classifier gets

    .. math:: \tfrac 1 2 \Bigl(1 + \mathrm{clip}_{[-1, 1]}\, \frac{x_t - \sqrt{1 - \bar\alpha_t}\,
              \epsilon(x_t, t)}{\sqrt{\bar\alpha_t}}\Bigr)

    The noise on x is exactly the noise of the measure, not the noise of the nearest step.

    Args:
      logits_fn: the classifier of [0, 1] images, ``(batch, ...) -> (batch, classes)``; the arrays of a pytree,
        such as ``jax.tree_util.Partial``, are arguments of compiled programs.
      noise_fn: epsilon, ``x_t (batch, ...), t (batch,) int32 -> (batch, ...)``, the noise of unit variance in x_t;
        also a pytree if possible.
      alphas_bar: ``(steps,)`` decreasing, strictly between 0 and 1, that the model was trained with; see
        :func:`robustjax.losses.denoising.alphas_bar`.
      sigma: standard deviation of the measure's noise, in units of [0, 1] images; radii are in these units too.

    Returns:
      ``logits_fn`` of denoiser and classifier together, a pytree, for :func:`certify` with ``gaussian(sigma)``. Another
      sigma does not compile again.

    Raises:
      ValueError: if a function is not callable, if alphas_bar are not as above, or if sigma is above the noise of the
        last step or below half of the noise of the first; and when called, if noise_fn returns another shape.

    Guarantee:
      As ``denoised``.

    Example:
      >>> alphas_bar = jnp.cumprod(jnp.linspace(0.9999, 0.98, 1000))
      >>> denoised_fn = certification.diffusion_denoised(
      ...     logits_fn, noise_fn=lambda x, time: jnp.zeros_like(x), alphas_bar=alphas_bar, sigma=0.25
      ... )
      >>> print(denoised_fn(x))  # certify it with gaussian(0.25)
      [[-0.1  0.1]
       [-0.5  0.5]]

    Reference:
      Carlini et al. 2022, (Certified!!) Adversarial Robustness for Free!, arXiv 2206.10550.
    """
    parts = _validate.as_pytree(logits_fn=logits_fn), _validate.as_pytree(2, noise_fn=noise_fn)
    _validate.positive(sigma=sigma)
    share = np.asarray(alphas_bar, np.float64)
    if share.ndim != 1 or not share.size or not ((share > 0) & (share < 1)).all() or (np.diff(share) >= 0).any():
        raise ValueError(
            f"alphas_bar must be decreasing numbers strictly between 0 and 1, got {_validate.short(share.tolist())}."
        )
    level = np.sqrt((1 - share) / share)
    if not level[0] / 2 <= 2 * sigma <= level[-1]:
        raise ValueError(
            f"sigma must lie between {level[0] / 4:.3g} and {level[-1] / 2:.3g}, for which alphas_bar has steps, "
            f"got {sigma}."
        )
    step = int(np.abs(level - 2 * sigma).argmin())
    scalars = jnp.int32(step), jnp.float32(np.sqrt(share[step])), jnp.float32(level[step])
    return jax.tree_util.Partial(_diffusion_denoised, *parts, *scalars)


def _diffusion_denoised(
    logits_fn: LogitsFn,
    noise_fn: Callable[[Array, Array], Array],
    step: Array,
    scale: Array,
    level: Array,
    x: Float[Array, "batch ..."],
) -> Array:
    centred = 2 * x - 1
    noise = noise_fn(scale * centred, jnp.full(x.shape[:1], step))
    clean = jnp.clip(centred - level * _of_shape("noise_fn", noise, x), -1, 1)
    return logits_fn((1 + clean) / 2)


def _of_shape(name: str, image: Array, x: Array) -> Array:
    if getattr(image, "shape", None) != x.shape:
        got = getattr(image, "shape", type(image).__name__)
        raise ValueError(f"{name} must return images of shape {x.shape}, got {got}.")
    return image
