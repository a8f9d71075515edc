"""PRNG keys that belong to an input, not to its place in a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.perturbations._normal import threefry_2x32
from robustjax.typing import AnyArray


@_arguments.checked
def image_keys(key: Key[Array, "..."], x: Float[AnyArray, "batch ..."]) -> Key[Array, " batch"]:
    """Gives every input its own PRNG key, which depends on the input and not on its place in a batch.

    Args:
      key: one key, into which a 64-bit fingerprint of each input's float32 bits is folded; or ``(batch,)`` keys, one
        for each input, which are returned unchanged (for example ``fold_in`` of the example's id, or ``split`` to treat
        the same input several times independently).
      x: ``(batch, ...)``, floating.

    Returns:
      ``(batch,)`` keys. Equal inputs have equal keys.

    Raises:
      ValueError: ``key`` is neither one typed key nor one for each input.

    Example:
      >>> keys = perturbations.image_keys(jax.random.key(0), np.array([[0.1], [0.2], [0.1]]))
      >>> print(keys[0] == keys[2], keys[0] == keys[1])
      True False
    """
    _validate.key(key, x.shape[0])
    if key.ndim:
        return key

    def of_image(image):
        pixels = image.reshape(-1).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(jnp.where(pixels == 0, 0.0, pixels), jnp.uint32)  # -0.0 is 0.0
        zero = jnp.zeros((), jnp.uint32)
        low, high = threefry_2x32((zero, zero), (bits, jnp.arange(bits.size, dtype=jnp.uint32)))
        # Integer sums are exact in any order, so they agree on every device and under every sharding.
        return jax.random.fold_in(jax.random.fold_in(key, low.sum(dtype=jnp.uint32)), high.sum(dtype=jnp.uint32))

    return jax.vmap(of_image)(x)
