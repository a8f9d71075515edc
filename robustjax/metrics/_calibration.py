"""How far probabilities can be believed: calibration errors, proper scores and the risk of selective prediction."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import _arguments, _validate
from robustjax.typing import ArrayLike


class Reliability(NamedTuple):
    """How often a model is right at each confidence; host arrays, one entry for each bin that has a row.

    Attributes:
      confidence: mean confidence of the rows.
      accuracy: share of the rows that are classified correctly.
      share: share of all rows that lie in the bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray


@_arguments.checked
def reliability(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> Reliability:
    r"""Computes the points of a reliability diagram.

    The confidence of a row is its largest probability. The expected calibration error is
    ``(share * abs(accuracy - confidence)).sum()``.

    Args:
      probabilities: ``(batch, classes >= 2)``, rows that sum to 1.
      labels: ``(batch,)`` integer true classes.
      num_bins: number of bins.
      binning: as in ``expected_calibration_error``.

    Returns:
      A ``Reliability``, by rising confidence.

    Raises:
      ValueError: as ``expected_calibration_error``.

    Example:
      >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
      >>> print(metrics.reliability(probabilities, [0, 0, 1, 0]))
      Reliability(confidence=array([0.8, 0.9]), accuracy=array([0.5, 1. ]), share=array([0.5, 0.5]))

    Reference:
      Niculescu-Mizil and Caruana, ICML 2005; Guo et al., arXiv:1706.04599.
    """
    share, surplus, confidence = _bins(probabilities, labels, num_bins, binning)
    return Reliability(confidence, np.clip(confidence + surplus, 0.0, 1.0), share)


@_arguments.checked
def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    r"""Computes the expected calibration error (ECE) of the predicted class.

    .. math:: \sum_b \frac{n_b}{n}\, |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    over bins of the confidence, the largest probability of a row. The estimate is biased upwards: with few rows a
    calibrated model has a positive error, so report the number of rows too.

    Args:
      probabilities: ``(batch, classes >= 2)``, rows that sum to 1.
      labels: ``(batch,)`` integer true classes.
      num_bins: number of bins.
      binning: ``"width"`` cuts [0, 1] into bins of equal width, closed on the right, with edges in the dtype of the
        probabilities; ``"mass"`` cuts the rows, sorted by confidence, into parts of equal size (adaptive ECE), except
        that equal confidences all go to the part of the first of them.

    Returns:
      The error in [0, 1].

    Raises:
      ValueError: if probabilities are not ``(batch, classes)`` rows of numbers >= 0 with sum 1 (within 1e-3), labels do
        not fit them, ``num_bins`` is below 1, or ``binning`` is unknown.

    Example:
      >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
      >>> f"{metrics.expected_calibration_error(probabilities, [0, 0, 1, 0]):.2f}"  # |1 - 0.9| / 2 + |0.5 - 0.8| / 2
      '0.20'

    Reference:
      Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., arXiv:1706.04599. Adaptive: Nguyen and O'Connor,
      arXiv:1508.05154.
    """
    share, surplus, _ = _bins(probabilities, labels, num_bins, binning)
    return float((share * np.abs(surplus)).sum())


@_arguments.checked
def maximum_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Literal["width", "mass"] = "width",
) -> float:
    r"""Computes the maximum calibration error (MCE), the largest gap of any bin that has a row.

    .. math:: \max_{b:\, n_b > 0} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    Args:
      probabilities: ``(batch, classes >= 2)``, rows that sum to 1.
      labels: ``(batch,)`` integer true classes.
      num_bins: number of bins.
      binning: as in ``expected_calibration_error``.

    Returns:
      The error in [0, 1].

    Raises:
      ValueError: as ``expected_calibration_error``.

    Example:
      >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
      >>> f"{metrics.maximum_calibration_error(probabilities, [0, 0, 1, 0]):.2f}"  # |0.5 - 0.8|
      '0.30'

    Reference:
      Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., arXiv:1706.04599.
    """
    return float(np.abs(_bins(probabilities, labels, num_bins, binning)[1]).max())


@_arguments.checked
def brier_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Computes the Brier score over all classes.

    .. math:: \frac 1 n \sum_i \sum_c (p_{ic} - 1[y_i = c])^2

    Args:
      probabilities: ``(batch, classes >= 2)``, rows that sum to 1.
      labels: ``(batch,)`` integer true classes.

    Returns:
      The score in [0, 2]; for two classes it is twice the ``(p - y)^2`` of the binary convention.

    Raises:
      ValueError: as ``expected_calibration_error``.

    Example:
      >>> f"{metrics.brier_score([[0.9, 0.1], [0.2, 0.8]], [0, 0]):.2f}"  # the mean of 0.02 and 1.28
      '0.65'

    Reference:
      Brier, Monthly Weather Review 78, 1950.
    """
    probabilities, labels = _checked(probabilities, labels)
    target = labels[:, None] == np.arange(probabilities.shape[1])
    return float(((probabilities.astype(np.float64) - target) ** 2).sum(axis=1).mean())


@_arguments.checked
def negative_log_likelihood(probabilities: ArrayLike, labels: ArrayLike) -> float:
    r"""Computes the mean negative log-likelihood of the labels.

    .. math:: -\frac 1 n \sum_i \ln p_{i, y_i}

    Args:
      probabilities: ``(batch, classes >= 2)``, rows that sum to 1.
      labels: ``(batch,)`` integer true classes.

    Returns:
      The mean in nats; infinite if the probability of a label is 0, because nothing is clipped. A float32 softmax is 0
      for logits about 100 below the largest: if you have logits, take the mean of ``losses.cross_entropy``.

    Raises:
      ValueError: as ``expected_calibration_error``.

    Example:
      >>> f"{metrics.negative_log_likelihood([[0.9, 0.1], [0.2, 0.8]], [0, 1]):.3f}"
      '0.164'
    """
    probabilities, labels = _checked(probabilities, labels)
    of_label = probabilities[np.arange(labels.size), labels].astype(np.float64)
    with np.errstate(divide="ignore"):
        return float(-np.log(of_label).mean())


@_arguments.checked
def aurc(scores: ArrayLike, errors: ArrayLike) -> float:
    r"""Computes the area under the risk-coverage curve (AURC) of selective prediction.

    .. math:: \frac 1 n \sum_{k=1}^n \frac 1 k \sum_{i \le k} e_{(i)}

    the mean error among the k inputs with the lowest scores, averaged over k. For tied scores it is the expectation
    over the orders of the tied inputs.

    Args:
      scores: ``(batch,)`` uncertainty, higher = less certain: minus the largest probability, or any score of
        ``robustjax.scoring``.
      errors: ``(batch,)`` 1 where the prediction is wrong and 0 where it is right, or any loss.

    Returns:
      The area, lower is better; 1 minus it is the AURRA of Hendrycks et al.

    Raises:
      ValueError: if scores and errors are not two vectors of one length, are empty, or hold a NaN.

    Example:
      >>> f"{metrics.aurc([0.1, 0.2, 0.3, 0.4], [False, False, True, False]):.3f}"  # the mean of 0, 0, 1/3 and 1/4
      '0.146'

    Reference:
      Geifman, Uziel and El-Yaniv, arXiv:1805.08206.
    """
    scores, errors = np.asarray(scores), np.asarray(errors, np.float64)
    if scores.ndim != 1 or scores.shape != errors.shape:
        raise ValueError(f"scores and errors must be vectors of one length, got {scores.shape} and {errors.shape}.")
    if not scores.size:
        raise ValueError("scores must not be empty: the risk of no inputs is undefined.")
    for name, values in (("scores", scores), ("errors", errors)):
        bad = int(np.isnan(values).sum())
        if bad:
            raise ValueError(f"{name} must have no NaN, got {bad} among {values.size} values.")
    _, tie, size = np.unique(scores, return_inverse=True, return_counts=True)
    expected = np.repeat(np.bincount(tie, errors) / size, size)
    return float((np.cumsum(expected) / np.arange(1, scores.size + 1)).mean())


def _bins(
    probabilities: ArrayLike, labels: ArrayLike, num_bins: int, binning: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each bin that has a row: its share of the rows, its accuracy minus its confidence, and its confidence."""
    _validate.at_least(1, num_bins=num_bins)
    probabilities, labels = _checked(probabilities, labels)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    if binning == "width":
        edges = np.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)
        index = np.searchsorted(edges[1:-1], confidence, side="left")
    elif binning == "mass":
        sizes = [part.size for part in np.array_split(confidence, num_bins)]
        first = np.searchsorted(np.sort(confidence), confidence)  # sorted: no order of rows matters
        index = np.repeat(np.arange(num_bins), sizes)[first]
    else:
        raise ValueError(f"binning must be 'width' or 'mass', got {binning!r}.")
    count = np.bincount(index, minlength=num_bins)
    surplus = np.bincount(index, correct - confidence.astype(np.float64), minlength=num_bins)
    total = np.bincount(index, confidence.astype(np.float64), minlength=num_bins)
    some = count > 0
    return count[some] / labels.size, surplus[some] / count[some], np.minimum(total[some] / count[some], 1.0)


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(probabilities, jax.core.Tracer) or isinstance(labels, jax.core.Tracer):
        raise ValueError("probabilities and labels must be arrays, not traced: this metric is computed on the host.")
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or not probabilities.shape[0]:
        raise ValueError(f"probabilities must be (batch >= 1, classes >= 2), got {probabilities.shape}.")
    dtype, (batch, classes) = probabilities.dtype, probabilities.shape
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"probabilities must be floating, got {dtype}.")
    given = probabilities
    probabilities = probabilities.astype(np.promote_types(np.float32, dtype)) if dtype.itemsize < 4 else probabilities
    bad = int(np.isnan(probabilities).any(axis=1).sum())
    if bad:
        raise ValueError(f"probabilities must have no NaN, got {bad} such rows among {batch}.")
    _validate.probabilities(probabilities=given)
    if labels.shape != (batch,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ({batch},) integers, got {labels.dtype} {labels.shape}.")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must lie in 0, ..., {classes - 1}, got {labels.min()} to {labels.max()}.")
    return probabilities, labels
