"""How well scores separate out-of-distribution from in-distribution inputs; exact, with the textbook rule for ties.

Every metric reads the same curve: how many in-distribution and how many out-of-distribution scores are at or below each
distinct score. The host counts in integers, a device in float32; the formulas at the end serve both.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.typing import AnyArray, ArrayLike


class DetectionMetrics(NamedTuple):
    """The usual metrics of out-of-distribution detection, as fractions in [0, 1].

    Attributes:
      auroc: area under the ROC curve; it is the same for either positive class.
      aupr_in: average precision with in-distribution as the positive class; depends on the ratio of the two sets.
      aupr_out: average precision with out-of-distribution as the positive class; it depends on the ratio too.
      fpr_id_positive: share of out-of-distribution inputs that pass when a share ``tpr`` of in-distribution ones pass.
      fpr_ood_positive: share of in-distribution inputs flagged when a share ``tpr`` of out-of-distribution ones are.
      detection_error: smallest mean of the two error rates over all thresholds.
    """

    auroc: float | Array
    aupr_in: float | Array
    aupr_out: float | Array
    fpr_id_positive: float | Array
    fpr_ood_positive: float | Array
    detection_error: float | Array


@_arguments.checked
def auroc(scores_in: ArrayLike, scores_out: ArrayLike) -> float:
    r"""Computes the area under the ROC curve, the probability that the order of two scores is right.

    .. math:: P(s_{out} > s_{in}) + \tfrac 1 2 P(s_{out} = s_{in})

    Ties depend on the dtype: scores rounded to float32 may tie where float64 scores do not.

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution; may be infinite.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.

    Returns:
      The area in [0, 1], from integer counts: 0.5 for constant scores and 1 for separated ones, without rounding.

    Raises:
      ValueError: if scores are not a vector, are empty, not real, or hold a NaN or an integer beyond 2^53.

    Example:
      >>> metrics.auroc([0.1, 0.2, 0.3], [0.25, 0.8])  # of six pairs, five are in order
      0.8333333333333334

    Reference:
      Hendrycks and Gimpel, arXiv:1610.02136.
    """
    return float(_auroc(*_counts(scores_in, scores_out)))


@_arguments.checked
def aupr(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    positive: Literal["ood", "id"] = "ood",
    interpolation: Literal["step", "trapezoid"] = "step",
) -> float:
    r"""Computes the area under the precision-recall curve: AUPR-out, or AUPR-in with ``positive="id"``.

    .. math:: \sum_i (R_i - R_{i-1}) P_i

    over distinct thresholds (average precision), so that constant scores give the share of positives. It depends on
    the ratio m : n, so report the ratio too.

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.
      positive: the class to find; for ``"id"``, low scores mean positive.
      interpolation: ``"trapezoid"`` takes :math:`(P_i + P_{i-1}) / 2` with :math:`P_0 = 1`, which flatters tied scores;
        OpenOOD and pytorch-ood publish it.

    Returns:
      The area in [0, 1].

    Raises:
      ValueError: as ``auroc``, and if ``positive`` or ``interpolation`` is unknown.

    Example:
      >>> metrics.aupr([0.1, 0.2, 0.3], [0.25, 0.8])
      0.8333333333333333

    Reference:
      Hendrycks and Gimpel, arXiv:1610.02136; Davis and Goadrich, ICML 2006, on the interpolation.
    """
    _one_of(positive=(positive, ("ood", "id")), interpolation=(interpolation, ("step", "trapezoid")))
    return float(_aupr(*_counts(scores_in, scores_out), positive, interpolation))


@_arguments.checked
def fpr_at_tpr(
    scores_in: ArrayLike, scores_out: ArrayLike, *, tpr: float = 0.95, positive: Literal["ood", "id"] = "ood"
) -> float:
    """Computes the false positive rate at the first threshold whose true positive rate is at least ``tpr``.

    Two conventions are in print, and their numbers may differ by a factor of two:

    - ``positive="ood"`` (OpenOOD since 1.5, pytorch-ood): a share ``tpr`` of out-of-distribution inputs is flagged;
      the result is the share of in-distribution inputs that are flagged too.
    - ``positive="id"`` (ODIN, energy; 1 minus the TNR@TPR95 of Mahalanobis): a share ``tpr`` of in-distribution inputs
      passes; the result is the share of out-of-distribution inputs that pass too.

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.
      tpr: wanted true positive rate, in (0, 1]; thresholds are scores that occur, without interpolation.
      positive: the class that ``tpr`` refers to.

    Returns:
      The rate in [0, 1].

    Raises:
      ValueError: as ``auroc``, and if ``tpr`` is outside (0, 1] or ``positive`` is unknown.

    Example:
      >>> metrics.fpr_at_tpr([0.1, 0.2, 0.3], [0.25, 0.8])  # the threshold is 0.25: one of three is flagged
      0.3333333333333333
      >>> metrics.fpr_at_tpr([0.1, 0.2, 0.3], [0.25, 0.8], positive="id")
      0.5

    Reference:
      Liang, Li and Srikant, "ODIN", arXiv:1706.02690; Zhang et al., "OpenOOD v1.5", arXiv:2306.09301.
    """
    _one_of(positive=(positive, ("ood", "id")))
    scores_in, scores_out = _on_host("scores_in", scores_in), _on_host("scores_out", scores_out)
    # Two selections in linear time; the curve would need all scores sorted.
    if positive == "id":
        last = _needed(tpr, scores_in.size) - 1
        return float((scores_out <= np.partition(scores_in, last)[last]).mean())
    last = scores_out.size - _needed(tpr, scores_out.size)
    return float((scores_in >= np.partition(scores_out, last)[last]).mean())


@_arguments.checked
def detection_error(scores_in: ArrayLike, scores_out: ArrayLike) -> float:
    r"""Computes the smallest detection error over all thresholds, with the two classes equally likely.

    .. math:: \min_t\ \tfrac 1 2 P(s_{out} < t) + \tfrac 1 2 P(s_{in} \ge t)

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.

    Returns:
      The error in [0, 0.5]; detection accuracy is 1 minus it.

    Raises:
      ValueError: as ``auroc``.

    Example:
      >>> metrics.detection_error([0.1, 0.2, 0.3], [0.25, 0.8])  # a threshold between 0.2 and 0.25
      0.16666666666666666

    Reference:
      Liang, Li and Srikant, "ODIN", arXiv:1706.02690, which fixes the true positive rate at 95%; Lee et al.,
      arXiv:1807.03888, take the minimum over all thresholds.
    """
    return float(_detection_error(*_counts(scores_in, scores_out)))


@_arguments.checked
def detection_metrics(scores_in: ArrayLike, scores_out: ArrayLike, *, tpr: float = 0.95) -> DetectionMetrics:
    """Computes all detection metrics from one sort of the scores.

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.
      tpr: the true positive rate of the two false positive rates, in (0, 1].

    Returns:
      The values of ``auroc``, ``aupr``, ``fpr_at_tpr`` and ``detection_error``, as floats.

    Raises:
      ValueError: as ``auroc``, and if ``tpr`` is outside (0, 1].

    Example:
      >>> found = metrics.detection_metrics([0.1, 0.2, 0.3], [0.25, 0.8])
      >>> f"AUROC {found.auroc:.3f}, FPR@95TPR {found.fpr_ood_positive:.3f}"
      'AUROC 0.833, FPR@95TPR 0.333'
    """
    below_in, below_out = (below.astype(np.float64) for below in _counts(scores_in, scores_out))
    needed = _needed(tpr, int(below_in[-1])), _needed(tpr, int(below_out[-1]))
    return DetectionMetrics(*map(float, _all(below_in, below_out, *needed)))


@_arguments.checked
def detection_metrics_on_device(
    scores_in: Float[AnyArray, " m"], scores_out: Float[AnyArray, " n"], *, tpr: float = 0.95
) -> DetectionMetrics:
    """Computes ``detection_metrics`` in float32 and only with JAX: for ``jit``, ``vmap`` and compiled loops.

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs, higher = more out-of-distribution.
      scores_out: ``(n,)`` scores of out-of-distribution inputs, of the same dtype.
      tpr: the true positive rate of the two false positive rates, in (0, 1]; a Python float.

    Returns:
      float32 scalars, within 1e-6 of ``detection_metrics``; all are NaN if a score is NaN.

    Raises:
      ValueError: if scores are not vectors, are empty or differ in dtype, if there are more than 2^24 of them (float32
        counts no further), or if ``tpr`` is outside (0, 1].

    Example:
      >>> found = jax.jit(metrics.detection_metrics_on_device)(jnp.array([0.1, 0.2, 0.3]), jnp.array([0.25, 0.8]))
      >>> f"{found.auroc:.3f}"
      '0.833'
    """
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        _shape(name, scores)
    if scores_in.dtype != scores_out.dtype or not jnp.issubdtype(scores_in.dtype, jnp.floating):
        raise ValueError(
            f"scores_in and scores_out must be of one floating dtype, got {scores_in.dtype} and {scores_out.dtype}."
        )
    m, n = scores_in.shape[0], scores_out.shape[0]
    if m + n > 2**24:
        raise ValueError(f"scores_in and scores_out must be at most 2^24 together, got {m + n}: use detection_metrics.")
    needed = _needed(tpr, m), _needed(tpr, n)
    has_nan = jnp.isnan(scores_in).any() | jnp.isnan(scores_out).any()
    scores_in = jnp.sort(_ordered_bits(scores_in))
    scores = jnp.sort(jnp.concatenate([scores_in, _ordered_bits(scores_out)]))
    # Shapes are fixed, so tied scores repeat the point of the last of them: steps of length zero, which add nothing.
    is_last = jnp.append(scores[1:] != scores[:-1], True)
    below = jax.lax.cummin(jnp.where(is_last, jnp.arange(1, m + n + 1, dtype=jnp.int32), m + n), reverse=True)
    below_in = jnp.searchsorted(scores_in, scores, side="right").astype(jnp.int32)
    below_in, below_out = (jnp.pad(count.astype(jnp.float32), (1, 0)) for count in (below_in, below - below_in))
    metrics = _all(below_in, below_out, *needed)
    return DetectionMetrics(*(jnp.where(has_nan, jnp.nan, value) for value in metrics))


@_arguments.checked
def ranks(scores_in: ArrayLike, scores_out: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Replaces scores by their ranks among all scores; tied scores share a rank.

    Detection metrics are the same for ranks, and float32 keeps ranks apart where it would tie float64 scores::

        bootstrap_interval(key, detection_metrics_on_device, *ranks(scores_in, scores_out))

    Args:
      scores_in: ``(m,)`` scores of in-distribution inputs.
      scores_out: ``(n,)`` scores of out-of-distribution inputs.

    Returns:
      ``(m,)`` and ``(n,)``, float32 whole numbers from 0, exact up to 2^24.

    Raises:
      ValueError: as ``auroc``.

    Example:
      >>> metrics.ranks([0.1, 0.2, 0.2], [0.2, 0.8])
      (array([0., 1., 1.], dtype=float32), array([1., 2.], dtype=float32))
    """
    scores_in, scores_out = _on_host("scores_in", scores_in), _on_host("scores_out", scores_out)
    _, places = np.unique(np.concatenate([scores_in, scores_out]), return_inverse=True)
    places = places.astype(np.float32)
    return places[: scores_in.size], places[scores_in.size :]


def _ordered_bits(scores: AnyArray) -> AnyArray:
    """Integers in the same order as the scores: XLA on CPUs sorts them four times as fast as floats."""
    if scores.dtype.itemsize > 4:
        return scores
    bits = jax.lax.bitcast_convert_type(jnp.asarray(scores, jnp.float32), jnp.int32)
    return jnp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # sign and magnitude, so that -0.0 ties with 0.0


def _counts(scores_in: ArrayLike, scores_out: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """How many scores of each set are at or below each distinct score, ascending, from (0, 0) to (m, n)."""
    scores_in, scores_out = _on_host("scores_in", scores_in), _on_host("scores_out", scores_out)
    # Two fast sorts of plain numbers, then a stable sort of two ascending runs, which only merges them:
    # twice as fast as one argsort of all.
    scores = np.concatenate([np.sort(scores_in), np.sort(scores_out)])
    order = np.argsort(scores, kind="stable")
    scores = scores[order]
    is_new = np.ones(scores.size + 1, bool)
    np.not_equal(scores[1:], scores[:-1], out=is_new[1:-1])
    below = np.flatnonzero(is_new)
    below_out = np.zeros(scores.size + 1, np.int64)
    np.cumsum(order >= scores_in.size, out=below_out[1:])
    below_out = below_out[below]
    return below - below_out, below_out


def _roc(below_in: Any, below_out: Any, positive: str) -> tuple[Any, Any]:
    """True and false positives at each threshold, from none to all."""
    if positive == "id":
        return below_in, below_out
    return below_out[-1] - below_out[::-1], below_in[-1] - below_in[::-1]


def _auroc(below_in: Any, below_out: Any) -> Any:
    twice_the_area = ((below_out[1:] - below_out[:-1]) * (below_in[1:] + below_in[:-1])).sum()
    return twice_the_area / (2 * below_in[-1] * below_out[-1])


def _aupr(below_in: Any, below_out: Any, positive: str, interpolation: str) -> Any:
    true, false = _roc(below_in, below_out, positive)
    precision = true[1:] / (true + false)[1:].clip(1)
    if interpolation == "trapezoid":
        precision = (precision + np.append(1.0, precision[:-1])) / 2
    return ((true[1:] - true[:-1]) * precision).sum() / true[-1]


def _fpr(below_in: Any, below_out: Any, positive: str, needed: int) -> Any:
    true, false = _roc(below_in, below_out, positive)
    rate = false / false[-1]
    return (rate + (true < needed).astype(rate.dtype)).min()


def _detection_error(below_in: Any, below_out: Any) -> Any:
    return (below_out / below_out[-1] + (below_in[-1] - below_in) / below_in[-1]).min() / 2


def _all(below_in: Any, below_out: Any, needed_in: int, needed_out: int) -> DetectionMetrics:
    return DetectionMetrics(
        auroc=_auroc(below_in, below_out),
        aupr_in=_aupr(below_in, below_out, "id", "step"),
        aupr_out=_aupr(below_in, below_out, "ood", "step"),
        fpr_id_positive=_fpr(below_in, below_out, "id", needed_in),
        fpr_ood_positive=_fpr(below_in, below_out, "ood", needed_out),
        detection_error=_detection_error(below_in, below_out),
    )


def _needed(tpr: float, total: int) -> int:
    """The smallest k with k / total >= tpr; ``ceil`` may be off by one, because tpr * total is rounded."""
    if not 0 < _validate.number(tpr) <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr!r}.")
    near = math.ceil(tpr * total)
    return next(k for k in (near - 1, near, near + 1) if k / total >= tpr)


def _one_of(**values: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")


def _shape(name: str, scores: Any) -> None:
    if len(scores.shape) != 1:
        raise ValueError(f"{name} must be a vector, one score per input, got shape {scores.shape}.")
    if not scores.shape[0]:
        raise ValueError(f"{name} must not be empty: a rate of no inputs is undefined.")


def _on_host(name: str, scores: ArrayLike) -> np.ndarray:
    if isinstance(scores, jax.core.Tracer):
        raise ValueError(f"{name} is traced, but this metric is computed on the host: use detection_metrics_on_device.")
    scores = np.asarray(scores)
    _shape(name, scores)
    if jnp.issubdtype(scores.dtype, jnp.floating):
        scores = scores.astype(np.float32) if scores.dtype.itemsize < 4 else scores
    elif scores.dtype.kind in "biu":
        if scores.dtype.itemsize == 8 and not -(2**53) <= scores.min() <= scores.max() <= 2**53:
            raise ValueError(
                f"{name} must be integers up to 2^53, beyond which float64 would tie them, got values from "
                f"{scores.min()} to {scores.max()}."
            )
        scores = scores.astype(np.float64)
    else:
        raise ValueError(f"{name} must be real numbers, got {scores.dtype}.")
    bad = int(np.isnan(scores).sum())
    if bad:
        raise ValueError(f"{name} must have no NaN, got {bad} among {scores.size} scores.")
    return scores
