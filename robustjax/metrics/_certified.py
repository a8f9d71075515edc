"""Numbers computed from certificates: certified accuracy and average certified radius."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from robustjax import _arguments, _validate
from robustjax.certification import Certificate, DualCertificate, SequentialCertificate
from robustjax.typing import ArrayLike

AnyCertificate: TypeAlias = Certificate | SequentialCertificate | DualCertificate


def _correct(certificate: AnyCertificate, labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != np.shape(certificate.label):
        raise ValueError(
            f"labels must have shape {np.shape(certificate.label)}, one per certificate, got {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    if not labels.size:
        raise ValueError("labels must not be empty: the accuracy of no images is undefined.")
    return (np.asarray(certificate.label) == labels) & ~np.asarray(certificate.abstained)


@_arguments.checked
def certified_accuracy(certificate: AnyCertificate, labels: ArrayLike, radii: ArrayLike) -> np.ndarray:
    r"""Computes the share of inputs that are classified correctly and certified at each radius.

    .. math:: \frac 1 m \sum_{i} 1[\hat y_i = y_i,\ R_i \ge r]

    Args:
      certificate: ``(m,)`` fields; abstentions count as wrong, also at r = 0.
      labels: ``(m,)`` integer true classes.
      radii: ``(k,)`` radii >= 0, in the units and norm of the certificate.

    Returns:
      ``(k,)`` float64 in [0, 1].

    Raises:
      ValueError: if labels have another length or are empty, or radii are negative or not ``(k,)``.

    Example:
      >>> certificate = certification.Certificate(
      ...     label=np.array([0, 1, -1]), radius=np.array([0.6, 0.3, 0.0]), probability=np.array([0.9, 0.7, 0.5]),
      ...     abstained=np.array([False, False, True]),
      ... )
      >>> metrics.certified_accuracy(certificate, labels=[0, 1, 1], radii=[0.0, 0.25, 0.5])
      array([0.67, 0.67, 0.33])

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918 ("approximate certified accuracy").
    """
    radii = np.asarray(radii, np.float64)
    if radii.ndim != 1 or not (radii >= 0).all():
        raise ValueError(f"radii must be a vector of numbers >= 0, got {radii}.")
    correct = _correct(certificate, labels)
    return (correct[None] & (np.asarray(certificate.radius)[None] >= radii[:, None])).mean(axis=1)


@_arguments.checked
def average_certified_radius(certificate: AnyCertificate, labels: ArrayLike) -> float:
    r"""Computes the average certified radius (ACR).

    .. math:: \frac 1 m \sum_{i} R_i\, 1[\hat y_i = y_i]

    Args:
      certificate: ``(m,)`` fields; wrong or abstained inputs contribute 0.
      labels: ``(m,)`` integer true classes.

    Returns:
      The average, in the units and norm of the certificate.

    Raises:
      ValueError: if labels have another length or are empty.

    Example:
      >>> certificate = certification.Certificate(
      ...     label=np.array([0, 1, -1]), radius=np.array([0.6, 0.3, 0.0]), probability=np.array([0.9, 0.7, 0.5]),
      ...     abstained=np.array([False, False, True]),
      ... )
      >>> f"{metrics.average_certified_radius(certificate, labels=[0, 1, 1]):.2f}"
      '0.30'

    Reference:
      Zhai et al., "MACER", arXiv:2001.02378.
    """
    return float(np.where(_correct(certificate, labels), certificate.radius, 0.0).mean())


@_arguments.checked
def certified_accuracy_lower_bound(
    certificate: AnyCertificate, labels: ArrayLike, radii: ArrayLike, *, alpha: float = 0.001, rho: float = 0.001
) -> np.ndarray:
    r"""Computes a lower bound of the certified accuracy of these inputs that allows for wrong certificates.

    .. math:: \max\Bigl(a - \frac q m,\ 0\Bigr), \qquad q = \min\{k : P[\mathrm{Binomial}(m, \alpha) > k] \le \rho\}

    with a the ``certified_accuracy``. Each certificate is wrong with probability at most alpha, independently of the
    others, so that more than q of the m are wrong with probability at most rho.

    Args:
      certificate: ``(m,)`` fields, from independent draws for each input.
      labels: ``(m,)`` integer true classes.
      radii: ``(k,)`` radii >= 0.
      alpha: the level that each certificate was made at.
      rho: probability that the bound fails, separately for each radius.

    Returns:
      ``(k,)`` float64, not below 0.

    Raises:
      ValueError: as ``certified_accuracy``, and if alpha or rho is outside (0, 1).

    Example:
      >>> certificate = certification.Certificate(
      ...     label=np.zeros(500, int), radius=np.full(500, 0.6), probability=np.full(500, 0.9),
      ...     abstained=np.zeros(500, bool),
      ... )
      >>> metrics.certified_accuracy_lower_bound(certificate, labels=np.zeros(500, int), radii=[0.5])
      array([0.99])

    Guarantee:
      With probability at least 1 - rho over the noise, at each radius separately, the share of these inputs that the
      smoothed classifier answers correctly throughout the ball is at least the bound.

    Differs from:
      Cohen, Rosenfeld and Kolter bound the number of wrong certificates by Bernstein's inequality without its factor
      2, which fails more often than rho; the binomial quantile is exact and smaller than the corrected bound.

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, appendix ("high-probability certified accuracy").
    """
    from scipy import stats

    _validate.probability(alpha=alpha, rho=rho)
    accuracy, m = certified_accuracy(certificate, labels, radii), np.size(labels)
    # isf goes through 1 - rho, which rounds: settle the last unit by the tail itself.
    wrong = int(stats.binom.isf(rho, m, alpha))
    while stats.binom.sf(wrong, m, alpha) > rho:
        wrong += 1
    while wrong and stats.binom.sf(wrong - 1, m, alpha) <= rho:
        wrong -= 1
    return np.maximum(accuracy - wrong / m, 0.0)
