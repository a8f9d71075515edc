"""Additive noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate


@_arguments.checked
def gaussian_noise(
    key: Key[Array, ""], x: Float[Array, " *shape"], *, sigma: float | Float[Array, ""]
) -> Float[Array, " *shape"]:
    r"""Adds isotropic Gaussian noise to inputs.

    .. math:: x + \sigma z, \qquad z \sim \mathcal{N}(0, I)

    Noise is drawn and added in float32 whatever the dtype of ``x``: in bfloat16 the sum has too few bits to follow a
    Gaussian distribution, and a model would be trained or certified on another one. The result is not clipped.

    Args:
      key: typed PRNG key.
      x: inputs of any shape, floating.
      sigma: standard deviation, in the units of ``x``; may be traced.

    Returns:
      Noisy inputs, float32, shape of ``x``.

    Raises:
      ValueError: ``sigma`` is not positive and finite.

    Example:
      >>> x = jnp.full((2, 8, 8, 1), 0.5)
      >>> noisy = perturbations.gaussian_noise(jax.random.key(0), x, sigma=0.25)
      >>> f"{(noisy - x).std():.2f}"
      '0.23'
    """
    if not isinstance(sigma, jax.core.Tracer):
        _validate.positive(sigma=float(sigma))
    noise = jax.random.normal(key, x.shape, jnp.float32)
    return x.astype(jnp.float32) + jnp.asarray(sigma, jnp.float32) * noise
