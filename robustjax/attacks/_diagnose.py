"""Signs that the result of an attack says little about a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from robustjax import _arguments, _summary, _validate, losses
from robustjax._precision import in_float32
from robustjax.attacks import _box
from robustjax.attacks._attack import check_inputs, check_settings, fold_in
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray

_PASSES = 5
_LOGITS_DIFFER = 1e-4  # in l2, for logits scaled to norm 1
_PROBABILITIES = 1e-5


class Diagnosis(NamedTuple):
    """Signs that attacks on a model are not reliable, at some inputs.

    Attributes:
      zero_gradient: ``(batch,)``, whether the gradient of the margin is zero in every pixel.
      non_finite_gradient: ``(batch,)``, whether it has a NaN or an infinity.
      randomised: whether five passes over the same inputs disagree.
      probabilities: whether all outputs lie in [0, 1] and sum to 1.
    """

    zero_gradient: Bool[AnyArray, " batch"]
    non_finite_gradient: Bool[AnyArray, " batch"]
    randomised: Bool[AnyArray, ""]
    probabilities: Bool[AnyArray, ""]

    def __repr__(self) -> str:
        def words():
            signs = "".join(f"\n  {sentence}" for sentence in self.warnings)
            return f"{_summary.inputs(len(self.zero_gradient))}:{signs or ' no warning'}"

        return _summary.of(self, words)

    @property
    def no_gradient(self) -> Bool[AnyArray, " batch"]:
        """``(batch,)``, whether there is no gradient to follow."""
        return self.zero_gradient | self.non_finite_gradient

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each sign that is found; none for a sound model."""
        zero, non_finite, sentences = int(np.sum(self.zero_gradient)), int(np.sum(self.non_finite_gradient)), []
        if zero or non_finite:
            sentences.append(
                f"gradients are masked or broken: zero at {zero} and not finite at {non_finite} of "
                f"{len(self.zero_gradient)} inputs, where gradient-based attacks say nothing."
            )
        if self.randomised:
            sentences.append(
                "the model gives different logits for the same input: attack it as a random model, "
                "with samples=20 or version='rand'."
            )
        if self.probabilities:
            sentences.append("the model's outputs look like probabilities: attacks need logits, which do not saturate.")
        return tuple(sentences)


@_arguments.checked
def diagnose(
    key: Key[Array, "..."],
    logits_fn: Callable,
    x: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"],
    *,
    samples: int | None = None,
    bounds: _box.Bounds | None = (0.0, 1.0),
) -> Diagnosis:
    r"""Checks a model for masked or broken gradients, randomness, and probabilities instead of logits.

    The gradient is the gradient of the margin :math:`\max_{k \ne y} f_k - f_y`, which does not saturate: where it is
    zero, the model is flat, not the loss. A function ``x -> logits`` is reported as random if it draws different
    numbers each time it is traced.

    Args:
      key: one typed key, or ``(batch,)`` keys.
      logits_fn: ``x -> logits``; with ``samples``, ``(key, x) -> logits``, called with one key and one input at a time.
      x: ``(batch, ...)``, float32 within ``bounds``.
      labels: ``(batch,)``, integer.
      samples: number of draws of a random model to average the gradient over, or None for a deterministic model.
      bounds: the range of x, as for :func:`pgd`.

    Returns:
      The :class:`Diagnosis`, whose ``warnings`` are sentences.

    Raises:
      ValueError: inputs of the wrong kind, or no inputs.

    Example:
      >>> attacks.diagnose(key, logits_fn, x, labels).warnings
      ()
      >>> print(*attacks.diagnose(key, lambda x: jax.nn.softmax(logits_fn(x)), x, labels).warnings)
      the model's outputs look like probabilities: attacks need logits, which do not saturate.

    Reference:
      Croce and Hein 2020, arXiv 2003.01690, whose code makes these checks; Athalye et al. 2018, Obfuscated Gradients
      Give a False Sense of Security, arXiv 1802.00420.
    """
    check_settings(samples=samples)
    logits_fn = _validate.as_pytree(None, logits_fn=logits_fn)
    check_inputs(key, logits_fn, x, labels, bounds=_box.frozen(bounds), samples=samples)
    if not x.shape[0]:
        raise ValueError("x must hold at least one input, got none.")
    return _diagnose(key, logits_fn, jnp.asarray(x), labels, samples=samples)


@jax.jit(static_argnames="samples")
def _diagnose(key, logits_fn, x, labels, *, samples):
    keys = image_keys(key, x)

    def answer(x, draw):
        if samples is None:
            return in_float32(logits_fn(x))
        return in_float32(jax.vmap(lambda key, x: logits_fn(key, x[None])[0])(fold_in(keys, draw), x))

    def margins(x):
        return jax.lax.map(lambda draw: losses.margin(answer(x, draw), labels).sum(), jnp.arange(samples or 1)).sum()

    gradient = jax.grad(margins)(x).reshape(x.shape[0], -1)
    if samples is None:
        logits = jnp.stack([answer(x, 0) for _ in range(_PASSES)])  # XLA compiles equal passes to one
    else:
        logits = jax.lax.map(lambda draw: answer(x, draw), jnp.arange(_PASSES))
    scaled = logits / (jnp.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)
    apart = jnp.linalg.norm(scaled.max(0) - scaled.min(0), axis=-1)
    in_range = (logits[0] >= -_PROBABILITIES) & (logits[0] <= 1 + _PROBABILITIES)
    sums_to_1 = jnp.abs(logits[0].sum(-1) - 1) < _PROBABILITIES
    return Diagnosis(
        zero_gradient=(gradient == 0).all(-1),
        non_finite_gradient=~jnp.isfinite(gradient).all(-1),
        randomised=(apart > _LOGITS_DIFFER).any(),
        probabilities=in_range.all() & sums_to_1.all() & (x.shape[0] > 0),
    )
