"""The few types that every room shares; no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = jax.Array | np.ndarray
"""An array on a device or on the host, for shape annotations: ``Float[AnyArray, "batch ..."]``."""

ArrayLike = jax.Array | np.ndarray | np.generic | int | float | Sequence
"""Anything that ``np.asarray`` takes: for functions that compute on the host."""

LogitsFn = Callable[[Array], Array]
"""``x (batch, ...) -> logits (batch, classes)``: all that a certificate or an attack needs from a model.

A plain function, a ``functools.partial`` of an ``apply`` and its variables, or an Equinox or Flax NNX module.
"""


class Outputs(NamedTuple):
    """The outputs of a model for a batch.

    Attributes:
      logits: ``(batch, classes)``, float32.
      features: ``(batch, dim)``, float32, the input of the last linear layer.
    """

    logits: Float[Array, "batch classes"]
    features: Float[Array, "batch dim"]


class ModelState(NamedTuple):
    """The arrays of a model, apart from its code; both are plain nested dictionaries.

    Attributes:
      params: changed by the optimizer, float32.
      batch_stats: changed by training without a gradient (running means and variances); empty for most models.
    """

    params: Any
    batch_stats: Any


@runtime_checkable
class Apply(Protocol):
    """A model as a pure function; batch statistics are used if ``train`` is False, and updated if it is True."""

    def __call__(self, state: ModelState, x: Array, *, train: bool = False) -> tuple[Outputs, ModelState]:
        """Returns the outputs for ``x`` and the state with updated batch statistics."""
        ...


class Batch(NamedTuple):
    """A batch of labelled images.

    Attributes:
      image: ``(batch, height, width, channels)``, float32 in [0, 1].
      label: ``(batch,)``, int32; -1 for an input of no class, as in ``data.with_outliers``.
      id: ``(batch,)``, int32, the position in the split; PRNG keys of images are folded with it.
    """

    image: Float[Array, "batch height width channels"]
    label: Int[Array, " batch"]
    id: Int[Array, " batch"]
