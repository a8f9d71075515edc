"""Scores of nonconformity: ``(probabilities, uniforms) -> (batch, classes)`` in [0, 1], LOWER = the label conforms.

Scores of arrays are float64 on the host, where labels of probability 1e-8 and 1e-9 have scores that differ; the float32
numbers next to 1 are 6e-8 apart. Under ``jit``, as in ``smoothed_scores``, scores have the dtype of the probabilities.

Bind settings with ``jax.tree_util.Partial(raps, weight=0.1)``: its numbers are arguments of compiled programs, so other
numbers do not compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.typing import AnyArray, ArrayLike

ScoreFn: TypeAlias = Callable[[Array, Array], AnyArray]
"""``(probabilities (batch, classes), uniforms (batch,)) -> (batch, classes)`` scores in [0, 1], traceable."""


@_arguments.checked
def thr(
    probabilities: Float[AnyArray, "batch classes"], uniforms: Float[AnyArray, " batch"] | None = None
) -> Float[AnyArray, "batch classes"]:
    r"""Computes the threshold score (THR, also HPS) of each label.

    .. math:: S(x, y) = 1 - \pi_y(x)

    Args:
      probabilities: ``(batch, classes)``, rows that sum to 1.
      uniforms: not used; all scores share one signature.

    Returns:
      ``(batch, classes)`` in [0, 1], lower where the label conforms.

    Raises:
      ValueError: for probabilities that are negative or do not sum to 1, such as logits.

    Example:
      >>> print(conformal.thr(jnp.array([[0.7, 0.2, 0.1]])))
      [[0.3 0.8 0.9]]

    Reference:
      Sadinle, Lei and Wasserman, arXiv:1609.00451.
    """
    del uniforms
    xp, probabilities = _checked(probabilities)
    return xp.clip(1 - probabilities, 0, 1)  # a softmax may exceed 1 by rounding


@_arguments.checked
def aps(
    probabilities: Float[AnyArray, "batch classes"], uniforms: Float[AnyArray, " batch"]
) -> Float[AnyArray, "batch classes"]:
    r"""Computes the score of adaptive prediction sets (APS) of each label.

    .. math:: S(x, y) = \sum_{k:\, o_k \le o_y} \pi_k(x) - u\, \pi_y(x)

    with :math:`o_y` the rank of the label, from 1 for the most probable. Equal probabilities rank by class.

    Args:
      probabilities: ``(batch, classes)``, rows that sum to 1.
      uniforms: ``(batch,)``, u uniform on [0, 1), one for each input; 0 for the deterministic score.

    Returns:
      ``(batch, classes)`` in [0, 1], lower where the label conforms. For the true probabilities, the
      score of the true label is uniform.

    Raises:
      ValueError: for probabilities that are negative or do not sum to 1, such as logits, and for
        uniforms that are not ``(batch,)`` in [0, 1].

    Example:
      >>> print(conformal.aps(jnp.array([[0.7, 0.2, 0.1]]), uniforms=jnp.zeros(1)))
      [[0.7 0.9 1. ]]

    Reference:
      Romano, Sesia and Candes, arXiv:2006.02544.
    """
    return _ranked(probabilities, uniforms)[1]


@_arguments.checked
def raps(
    probabilities: Float[AnyArray, "batch classes"],
    uniforms: Float[AnyArray, " batch"],
    *,
    weight: float | Array = 0.2,
    k_reg: int | Array = 5,
) -> Float[AnyArray, "batch classes"]:
    r"""Computes the regularized score (RAPS) of each label: APS, and a penalty on ranks beyond ``k_reg``.

    .. math:: S(x, y) = \frac{1}{1 + w} \Bigl[S_{\mathrm{APS}}(x, y) + w\, \frac{\max(0, o_y - k)}{K - k}\Bigr]

    The division by 1 + w keeps it in [0, 1], which smoothing needs; it changes no set of plain conformal prediction.
    The paper's lambda is ``weight / (classes - k_reg)``. With ``k_reg >= classes`` there is no penalty.

    Args:
      probabilities: ``(batch, classes)``, rows that sum to 1.
      uniforms: ``(batch,)``, as for ``aps``.
      weight: w, the penalty of the last rank, at least 0.
      k_reg: k, how many ranks are free, at least 0.

    Returns:
      ``(batch, classes)`` in [0, 1], lower where the label conforms.

    Raises:
      ValueError: as ``aps``, and for a negative weight or k_reg.

    Example:
      >>> print(conformal.raps(jnp.array([[0.7, 0.2, 0.1]]), uniforms=jnp.zeros(1), weight=0.2, k_reg=1))
      [[0.58 0.83 1.  ]]

    Reference:
      Angelopoulos et al., arXiv:2009.14193. Defaults and scale are those of Gendler et al., ICLR 2022, whose code has
      no division by 1 + w but a cut at 1, or neither.
    """
    _validate.not_negative(weight=weight)
    _validate.at_least(0, k_reg=k_reg)
    xp, scores, rank = _ranked(probabilities, uniforms, weight, k_reg)
    if xp is np:
        weight, k_reg = float(weight), int(k_reg)
    beyond = xp.maximum(rank - k_reg, 0) / xp.maximum(scores.shape[-1] - k_reg, 1)
    return xp.minimum((scores + weight * beyond.astype(scores.dtype)) / (1 + weight), 1)


@_arguments.checked
def ptt(
    holdout_scores: ArrayLike,
    score: ScoreFn,
    *,
    temperature: float | Float[Array, ""] = 1 / 400,
    bias: float | Float[Array, ""] = 0.9,
) -> ScoreFn:
    r"""Transforms a score after training (PTT), so that smoothed scores of true and false labels lie farther apart.

    .. math:: S'(x, y) = \Bigl[1 + e^{-(q - b) / T}\Bigr]^{-1}, \qquad
              q = \tfrac 1 N\, \#\{i : s_i \le S(x, y)\}

    the rank among the scores :math:`s_i` of true labels, and a sigmoid that is steep where the threshold will be.

    Args:
      holdout_scores: ``(N,)`` scores of the true labels of inputs that are used for nothing else; the authors use 500,
        each from one noisy copy, as ``smoothed_scores`` with ``num_samples=1`` returns them.
      score: the score to transform, which also computed ``holdout_scores``.
      temperature: T, positive.
      bias: b, the paper's 1 - alpha.

    Returns:
      A score, to pass to ``smoothed_scores`` instead of ``score``.

    Raises:
      ValueError: for holdout_scores that are not a vector of numbers, or a temperature that is not positive.

    Guarantee:
      The transformation never decreases and does not depend on calibration or test inputs, so that every guarantee of
      the score holds for the new one. Ranks cause ties: without smoothing, sets can only grow.

    Example:
      >>> score = conformal.ptt(np.linspace(0, 1, 500), conformal.thr)
      >>> print(score(jnp.array([[0.7, 0.2, 0.1]]), None))  # ranks 0.3, 0.8 and 0.9, through the sigmoid at 0.9
      [[0.  0.  0.5]]

    Reference:
      Yan, Romano and Weng, arXiv:2404.19651.
    """
    _validate.positive(temperature=temperature)
    _validate.finite_number(bias=bias)
    holdout = np.asarray(holdout_scores)
    if holdout.ndim != 1 or not holdout.size or not np.isfinite(holdout).all():
        raise ValueError(f"holdout_scores must be a vector of finite numbers, got {_validate.short(holdout_scores)}.")
    holdout = jnp.sort(jnp.asarray(holdout, jnp.float32))
    return jax.tree_util.Partial(_transformed, holdout, _validate.as_pytree(2, score=score), temperature, bias)


def _transformed(holdout, score, temperature, bias, probabilities, uniforms):
    scores = score(probabilities, uniforms).astype(holdout.dtype)
    rank = jnp.searchsorted(holdout, scores, side="right").astype(holdout.dtype) / holdout.size
    return jax.nn.sigmoid((rank - bias) / temperature)


def _checked(probabilities: Any, *others: Any) -> tuple[Any, Any]:
    """NumPy and float64 probabilities, or ``jax.numpy`` and the probabilities as they are if anything is traced."""
    if not isinstance(probabilities, jax.Array):
        probabilities = np.asarray(probabilities)
    _validate.probabilities(probabilities=probabilities)
    if any(isinstance(value, jax.core.Tracer) for value in (probabilities, *others)):
        return jnp, jnp.asarray(probabilities)
    return np, np.asarray(probabilities, np.float64)


def _ranked(probabilities: Any, uniforms: Any, *settings: Any) -> tuple[Any, Any, Any]:
    """NumPy or ``jax.numpy``, APS, and the rank of each label from 1."""
    xp, probabilities = _checked(probabilities, uniforms, *settings)
    uniforms = xp.asarray(uniforms)
    if uniforms.shape != probabilities.shape[:1]:
        raise ValueError(f"uniforms must be ({probabilities.shape[0]},), got shape {uniforms.shape}.")
    if xp is np and not ((uniforms >= 0) & (uniforms <= 1)).all():
        raise ValueError(f"uniforms must lie in [0, 1], got values from {uniforms.min()} to {uniforms.max()}.")
    order = xp.argsort(-probabilities, axis=-1, stable=True)
    rank = xp.argsort(order, axis=-1)
    # From the small end: next to 1, float32 would round the probabilities of all later labels away.
    ascending = xp.flip(xp.take_along_axis(probabilities, order, -1), -1)
    later = xp.flip(xp.pad(xp.cumsum(ascending, -1)[:, :-1], ((0, 0), (1, 0))), -1)
    scores = 1 - xp.take_along_axis(later, rank, -1) - uniforms[:, None].astype(probabilities.dtype) * probabilities
    return xp, xp.clip(scores, 0, 1), rank + 1
