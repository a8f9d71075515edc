"""Randomized smoothing: certificates and predictions from vote counts, on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _summary, _validate
from robustjax.certification._binomial import binomial_lower_bound, sign_test_p_value
from robustjax.certification._counts import check_all_voted, check_on_host, counts_on_host
from robustjax.certification._measures import Measure
from robustjax.typing import AnyArray, LogitsFn

ABSTAIN = -1
"""The label of an input for which no class can be certified or predicted."""


class Certificate(NamedTuple):
    """Certificates of the smoothed classifier; host arrays, one entry per input.

    Attributes:
      label: the certified class, or ``ABSTAIN``; int32.
      radius: the label is constant on the open ball of this radius, in the units of x and the norm of the measure;
        0 where abstained; float64.
      probability: lower confidence bound, at level 1 - alpha, of the probability of the selected class; float64.
      abstained: True where the bound does not exceed 1/2.
    """

    label: np.ndarray
    radius: np.ndarray
    probability: np.ndarray
    abstained: np.ndarray

    def __repr__(self) -> str:
        return _summary.of_radii(self)


@_arguments.checked
def certify(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    num_selection: int = 100,
    num_estimation: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> Certificate:
    r"""Certifies the smoothed classifier around each input.

    The class A with the most of ``num_selection`` votes is selected. The :math:`n_A` votes for A among
    ``num_estimation`` fresh votes give the Clopper-Pearson bound :math:`\underline{p_A}`, and the radius is
    ``measure.radius(p_A)``.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``; normalisation belongs inside.
      x: ``(batch, ...)``, floating, [0, 1] images unnormalised.
      measure: the smoothing measure, for example ``gaussian(0.5)``.
      num_selection: draws that select the class.
      num_estimation: draws that bound its probability.
      alpha: probability, for each input, that its certificate is wrong.
      batch_size: noisy copies in one call of ``logits_fn``; see ``sample_counts``.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      A ``Certificate`` of host arrays.

    Raises:
      ValueError: for an argument that is not as above, for logits that are not finite, and for a model whose logits
        change with the other copies in a block, as in training mode: one block more is drawn of the first input.

    Guarantee:
      For every input, over the draws: with probability at least 1 - alpha, the label is what the smoothed classifier
      returns everywhere in the open ball of ``radius``, or it is ``ABSTAIN``. This holds for each single input: of m
      certificates, m * alpha may be wrong. It concerns the smoothed classifier, not ``logits_fn``, and holds in exact
      arithmetic; see :func:`gaussian` for floating point.

    Example:
      >>> measure = certification.gaussian(0.5)
      >>> certificate = certification.certify(jax.random.key(0), logits_fn, x, measure, num_estimation=10_000)
      >>> print(certificate.label, certificate.radius)
      [1 1] [0.37 1.6 ]

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "Certify". At a bound of exactly 1/2 the paper returns a
      class; here it is ``ABSTAIN``, because two classes may tie.
    """
    _validate.at_least(1, num_selection=num_selection, num_estimation=num_estimation)
    _validate.probability(alpha=alpha)
    if alpha ** (1 / num_estimation) <= 0.5:
        _validate.warn(
            f"num_estimation={num_estimation} draws can never certify at alpha={alpha}: even if all agree, the bound "
            "does not exceed 1/2."
        )
    check_on_host(key, x, measure, input_range)
    edges = (0, num_selection, num_selection + num_estimation)
    counts = counts_on_host(key, logits_fn, x, measure, edges, batch_size)
    check_all_voted(counts[:, 0], num_selection)
    check_all_voted(counts[:, 1], num_estimation)
    return certificate_from_counts(counts[:, 0], counts[:, 1], measure, alpha=alpha)


@_arguments.checked
def predict(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    num_samples: int = 1000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> np.ndarray:
    """Predicts with the smoothed classifier, or abstains.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``.
      x: ``(batch, ...)``, floating.
      measure: the smoothing measure.
      num_samples: draws for each input.
      alpha: probability, for each input, of returning another class than the smoothed classifier's.
      batch_size: noisy copies in one call of ``logits_fn``; see ``sample_counts``.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      ``(batch,)`` int32 host array of classes and ``ABSTAIN``.

    Raises:
      ValueError: for an argument that is not as above, for logits that are not finite, and for a model whose logits
        change with the other copies in a block, as in training mode: one block more is drawn of the first input.

    Guarantee:
      For every single input, over the draws: a class other than the smoothed classifier's is returned with
      probability at most alpha.

    Example:
      >>> print(certification.predict(jax.random.key(0), logits_fn, x, certification.gaussian(0.5)))
      [1 1]

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "Predict".
    """
    _validate.at_least(1, num_samples=num_samples)
    _validate.probability(alpha=alpha)
    if 2.0 * 0.5**num_samples > alpha:
        _validate.warn(
            f"num_samples={num_samples} draws can never decide at alpha={alpha}: even if all agree, the p-value "
            "exceeds it."
        )
    check_on_host(key, x, measure, input_range)
    counts = counts_on_host(key, logits_fn, x, measure, (0, num_samples), batch_size)[:, 0]
    check_all_voted(counts, num_samples)
    return prediction_from_counts(counts, alpha=alpha)


def check_counts(name: str, counts) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] < 2 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"{name} must be integers (batch, classes >= 2), got {counts.dtype} {counts.shape}.")
    if (counts < 0).any():
        raise ValueError(f"{name} must not be negative, got {counts.min()}.")
    return counts


@_arguments.checked
def certificate_from_counts(
    selection_counts: Int[AnyArray, "batch classes"],
    estimation_counts: Int[AnyArray, "batch classes"],
    measure: Measure,
    *,
    alpha: float = 0.001,
    num_estimation: int | None = None,
) -> Certificate:
    """Turns vote counts into certificates, in float64 on the host.

    Args:
      selection_counts: ``(batch, classes)`` votes that select the class.
      estimation_counts: ``(batch, classes)`` votes of other draws, which bound its probability.
      measure: the measure that the draws were made with.
      alpha: probability, for each input, that its certificate is wrong.
      num_estimation: draws behind each row of ``estimation_counts``; None is the sum of the row. Where draws were lost
        (logits that are not finite), pass the number of all draws: a lost draw counts against the class.

    Returns:
      A ``Certificate``.

    Raises:
      ValueError: for counts that are not (batch, classes) integers >= 0, that differ in shape or exceed
        ``num_estimation``, and for alpha outside (0, 1).

    Guarantee:
      As ``certify``, if the two sets of draws are independent and their numbers were fixed beforehand.

    Example:
      >>> selection, estimation = np.array([[2, 98], [51, 49]]), np.array([[100, 9900], [5010, 4990]])
      >>> certificate = certification.certificate_from_counts(selection, estimation, certification.gaussian(0.5))
      >>> print(certificate.label, certificate.radius)  # the second abstains
      [ 1 -1] [1.11 0.  ]
    """
    selection = check_counts("selection_counts", selection_counts)
    estimation = check_counts("estimation_counts", estimation_counts)
    if selection.shape != estimation.shape:
        raise ValueError(
            f"selection_counts and estimation_counts must have one shape, got {selection.shape} and {estimation.shape}."
        )
    sums = estimation.sum(-1)
    if num_estimation is not None and (sums > num_estimation).any():
        raise ValueError(f"num_estimation={num_estimation} is less than the {sums.max()} votes of a row.")
    if num_estimation is None and (sums == 0).any():
        raise ValueError(
            f"estimation_counts must hold at least one vote in each row, row {int(sums.argmin())} has none."
        )
    label = selection.argmax(-1).astype(np.int32)
    successes = np.take_along_axis(estimation, label[:, None], axis=-1)[:, 0]
    probability = binomial_lower_bound(successes, sums if num_estimation is None else num_estimation, alpha)
    abstained = probability <= 0.5
    return Certificate(
        label=np.where(abstained, np.int32(ABSTAIN), label),
        radius=np.where(abstained, 0.0, measure.radius(probability)),
        probability=probability,
        abstained=abstained,
    )


@_arguments.checked
def prediction_from_counts(counts: Int[AnyArray, "batch classes"], *, alpha: float = 0.001) -> np.ndarray:
    """Turns vote counts into predictions: the top class, if it beats the second by a sign test at level alpha.

    Args:
      counts: ``(batch, classes)`` votes.
      alpha: probability, for each input, of returning another class than the smoothed classifier's.

    Returns:
      ``(batch,)`` int32 host array of classes and ``ABSTAIN``.

    Raises:
      ValueError: for counts that are not (batch, classes) integers >= 0, and for alpha outside (0, 1).

    Example:
      >>> print(certification.prediction_from_counts(np.array([[20, 980], [510, 490]])))  # the second abstains
      [ 1 -1]

    Reference:
      Hung and Fithian, "Rank verification for exponential families", arXiv:1610.03944, which makes the test valid
      although the two classes are chosen by the same counts.
    """
    _validate.probability(alpha=alpha)
    counts = check_counts("counts", counts)
    second, first = np.sort(counts, axis=-1)[:, -2:].T
    return np.where(sign_test_p_value(first, second) <= alpha, counts.argmax(-1), ABSTAIN).astype(np.int32)
