"""Augmentations of training images; each takes a key and a batch, and draws independently for every image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate


@_arguments.checked
def random_crop(
    key: Key[Array, ""], x: Float[Array, "batch height width channels"], *, padding: int = 4
) -> Float[Array, "batch height width channels"]:
    """Pads each image with zeros and cuts a window of the original size at a random place.

    Args:
      key: typed PRNG key.
      x: images ``(batch, height, width, channels)``.
      padding: pixels of zeros on every side; offsets are uniform on ``0, ..., 2 * padding`` in both directions.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: ``x`` does not have four axes, or ``padding`` is negative.

    Example:
      >>> x = jnp.ones((2, 8, 8, 1))
      >>> perturbations.random_crop(jax.random.key(0), x, padding=2).shape
      (2, 8, 8, 1)
    """
    _validate.images(x=x)
    _validate.channels_last(x=x)
    _validate.at_least(0, padding=padding)
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (x.shape[0], 2), 0, 2 * padding + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))(padded, offsets)


@_arguments.checked
def random_horizontal_flip(
    key: Key[Array, ""], x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """Mirrors each image left to right with probability one half.

    Args:
      key: typed PRNG key.
      x: images ``(batch, height, width, channels)``.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: ``x`` does not have four axes.

    Example:
      >>> x = jnp.tile(jnp.arange(3.0).reshape(1, 1, 3, 1), (4, 1, 1, 1))  # four images of one row
      >>> print(perturbations.random_horizontal_flip(jax.random.key(0), x)[:, 0, :, 0])
      [[0. 1. 2.]
       [0. 1. 2.]
       [2. 1. 0.]
       [2. 1. 0.]]
    """
    _validate.images(x=x)
    _validate.channels_last(x=x)
    flip = jax.random.bernoulli(key, shape=(x.shape[0], 1, 1, 1))
    return jnp.where(flip, x[:, :, ::-1], x)


@dataclasses.dataclass(frozen=True)
class Compose:
    """Perturbations applied one after another, each with its own key; equal when their functions are equal.

    Attributes:
      functions: ``(key, x) -> x``, in the order of application.
    """

    functions: tuple[Callable[[Array, Array], Array], ...]

    def __post_init__(self):
        for function in self.functions:
            if not callable(function):
                raise ValueError(f"functions must be functions of (key, x), got {function!r}.")

    def __call__(self, key: Key[Array, ""], x: Array) -> Array:
        """Returns ``x`` after all functions."""
        for function, subkey in zip(self.functions, jax.random.split(key, len(self.functions)), strict=True):
            x = function(subkey, x)
        return x


@_arguments.checked
def compose(*functions: Callable[[Array, Array], Array]) -> Compose:
    """Composes perturbations from left to right, e.g. ``compose(random_crop, random_horizontal_flip)``.

    Args:
      *functions: each ``(key, x) -> x``.

    Returns:
      One function ``(key, x) -> x``, hashable, so that it can be part of an objective.

    Raises:
      ValueError: one of the functions cannot be called.

    Example:
      >>> augment = perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip)
      >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
      (2, 8, 8, 1)
    """
    return Compose(functions)
