"""Normalisation as a part of a model, so that attacks and certificates see images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from robustjax import _arguments, _validate
from robustjax.typing import AnyArray, ArrayLike


@_arguments.checked
def normalized(fn: Callable[[Array], Any], mean: ArrayLike, std: ArrayLike) -> jax.tree_util.Partial:
    r"""Puts the normalisation of images inside a model.

    .. math:: x \mapsto f\Bigl(\frac{x - \mu}{s}\Bigr)

    A radius or an epsilon then is in units of [0, 1] images, whatever the model was trained on.

    Args:
      fn: f, a model of any framework; its arrays stay arguments of compiled programs, and so do mean and std.
      mean: one number, or ``(channels,)``, in units of [0, 1] images.
      std: one number, or ``(channels,)``, positive.

    Returns:
      The model of images ``(..., channels)``, a pytree, for all functions that take a model.

    Raises:
      ValueError: ``fn`` is not a function of inputs; mean or std are not finite numbers of these shapes, or std is not
        positive; and when called, x is not floating or its last axis has another number of channels.

    Example:
      >>> logits_fn = models.normalized(lambda x: x.mean((1, 2)), mean=[0.5, 0.4, 0.3], std=[0.5, 0.5, 0.1])
      >>> print(logits_fn(jnp.ones((1, 4, 4, 3))))
      [[1.  1.2 7. ]]
    """
    parts = [_validate.as_pytree(fn=fn)]
    for name, value in (("mean", mean), ("std", std)):
        numbers = value if isinstance(value, jax.Array) else np.asarray(value)
        if numbers.ndim > 1 or not numbers.size or not jnp.issubdtype(numbers.dtype, np.number):
            raise ValueError(f"{name} must be one number or (channels,), got {_validate.short(value)}.")
        wanted = "positive and finite" if name == "std" else "finite"
        if not isinstance(numbers, jax.core.Tracer):
            right = np.isfinite(np.asarray(numbers)) & ((np.asarray(numbers) > 0) | (name == "mean"))
            if not right.all():
                raise ValueError(f"{name} must be {wanted}, got {_validate.short(np.asarray(value).tolist())}.")
        parts.append(jnp.asarray(numbers, jnp.float32))
    shapes = {part.shape for part in parts[1:]} - {()}
    if len(shapes) > 1:
        raise ValueError(f"std must have one number for each channel of mean, got {parts[2].size} for {parts[1].size}.")
    return jax.tree_util.Partial(_normalized, *parts)


def _normalized(fn: Callable[[Array], Any], mean: Array, std: Array, x: AnyArray) -> Any:
    if not jnp.issubdtype(getattr(x, "dtype", jnp.int32), jnp.floating):
        raise ValueError(f"x must be floating images in [0, 1], got {_validate.short(x)}.")
    channels = max(mean.size, std.size)
    if max(mean.ndim, std.ndim) and x.shape[-1:] != (channels,):
        raise ValueError(f"x must have {channels} channels as its last axis, as mean and std do, got shape {x.shape}.")
    per_channel = lambda a: a.astype(x.dtype).reshape(*(1,) * (x.ndim - a.ndim), *a.shape)
    return fn((x - per_channel(mean)) / per_channel(std))
