"""Detectors that see inputs through a model, and what they share: checks of inputs, and small blocks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax._precision import in_float32, log_softmax
from robustjax.scoring._detector import Detector, check_finite, in_blocks
from robustjax.scoring._logits import msp
from robustjax.typing import LogitsFn

IMAGES = 128
"""Inputs that go through a model at once."""


def of_inputs(function: Callable[[Any, Any], Any], state: Any, x: Any, *, model: str = "layers_fn") -> Any:
    """``function(state, x)`` by blocks of ``IMAGES`` rows.

    Raises:
      ValueError: ``x`` is not floating, one of both is not finite, or the results for some inputs change with the
        others, for which the first block is computed twice.
    """
    leaves = jax.tree.leaves(x)
    if not leaves or any(not jnp.issubdtype(getattr(leaf, "dtype", jnp.int32), jnp.floating) for leaf in leaves):
        got = ", ".join(str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves) or "no array"
        raise ValueError(f"x must be floating, got {got}.")
    if any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) != 1:
        raise ValueError(f"x must have the batch as first axis, got {', '.join(str(leaf.shape) for leaf in leaves)}.")
    for leaf in leaves:
        check_finite("x", leaf)
    found = in_blocks(function, state, x, IMAGES)
    for leaf in jax.tree.leaves(found):
        check_finite("what the model gives for x", leaf)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, x))):
        _check_each_row(function, state, x, found, model)
    return found


def _check_each_row(function, state, x, found, model):
    """Every other row of the first block, of each device, once more beside other inputs, in the same program."""
    devices = max(len(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else 1 for leaf in jax.tree.leaves(x))
    rows = min(jax.tree.leaves(x)[0].shape[0], IMAGES * devices)
    if rows < 2:
        return

    def results(beside_others):
        def block(a):
            some = np.array(a[:rows])
            some[1::2] = _validate.unlike(some[1::2]) if beside_others else some[1::2]
            return jax.device_put(some, a.sharding) if isinstance(a, jax.Array) and a.committed else some

        return in_blocks(function, state, jax.tree.map(block, x), IMAGES)

    # Rows of several devices were in other places, which may change rounding, and a rounded bin changes a score.
    first, second = found if devices == 1 else results(False), results(True)
    for pair in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        a, b = (np.asarray(leaf[:rows:2], np.float32) for leaf in pair)
        if (np.abs(a - b) > 0.01 * np.ptp(a, axis=0) + 1e-5 * np.abs(a).max(0)).any():
            raise _validate.depends_on_batch(model)


def descend(loss: Callable[[Any], Float[Array, " batch"]], x: Any, epsilon: Any) -> Any:
    """``x`` after one sign step of size ``epsilon`` that lowers ``loss``; coordinates without gradient stay.

    The losses are summed, not averaged, so that a row does not depend on the rest of the batch.
    """
    gradient = jax.grad(lambda x: loss(x).sum())(x)
    return jax.tree.map(lambda a, g: a - epsilon * jnp.sign(g), x, gradient)


@_arguments.checked
def odin(logits_fn: LogitsFn, *, temperature: float = 1000.0, epsilon: float = 0.0014) -> Detector:
    r"""Scores images by the maximum softmax probability at a high temperature, after a step that raises it.

    .. math:: s(x) = \ln(1 - \max_k p_k(x')), \qquad
              x' = x - \epsilon\, \mathrm{sign}\bigl(-\nabla_x \ln \max_k p_k(x)\bigr), \qquad
              p = \mathrm{softmax}(l / T)

    which ranks as :math:`-\max_k p_k(x')` does and, for :math:`\epsilon = 0, T = 1`, is the score of ``msp``. The step
    is computed in float32 and is 0 where the gradient is 0, and x' is not clipped to the range of images.

    Args:
      logits_fn: ``images (batch, ...) -> logits (batch, classes)``, each row independently. All uses of one function
        share a compiled program, and the arrays that it closes over become constants of the program. To score several
        models of one architecture with one program, pass modules of Equinox or Flax NNX, or ``functools.partial`` or
        ``jax.tree_util.Partial`` of ``(f, state)`` for ``f(state, images)``.
      temperature: T, positive.
      epsilon: size of the step, in units of the images. The published value is divided by the standard deviation of
        the channels; a model that normalises inside needs no such division.

    Returns:
      The detector, whose functions take images instead of outputs: ``score(state, images)``. There is nothing to fit:
      the state is ``()``, and ``fit`` ignores its arguments.

    Raises:
      ValueError: for settings out of their range; from ``score``, for images that are not floating or not finite, and
        for logits that are not ``(batch, classes >= 2)`` or change with the rest of the batch.

    Example:
      >>> detector = scoring.odin(lambda images: images.reshape(len(images), -1), temperature=0.1)
      >>> images = jnp.array([[[0.9, 0.1]], [[0.5, 0.4]]])  # two images of two pixels
      >>> print(detector.score((), images))
      [-8.03 -1.33]

    Reference:
      Liang, Li and Srikant, "Enhancing the reliability of out-of-distribution image detection in neural networks",
      arXiv:1706.02690. The authors' code moves a pixel without gradient by the whole step.
    """
    _validate.positive(temperature=temperature)
    _validate.not_negative(epsilon=epsilon)
    model = _validate.as_pytree(logits_fn=logits_fn)
    settings = model, temperature, epsilon
    return Detector(lambda *_, **__: (), lambda _, images: of_inputs(_odin, settings, images, model="logits_fn"))


@jax.jit
def _odin(state, images):
    logits_fn, temperature, epsilon = state

    def logits(images):
        values = logits_fn(images)
        shape = getattr(values, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != images.shape[0] or shape[1] < 2:
            got = type(values).__name__ if shape is None else shape
            raise ValueError(f"logits_fn must return shape ({images.shape[0]}, classes >= 2), got {got}.")
        return in_float32(values) / temperature

    images = descend(lambda x: -log_softmax(logits(x)).max(-1), images.astype(jnp.float32), epsilon)
    return msp().score((), logits(images))
