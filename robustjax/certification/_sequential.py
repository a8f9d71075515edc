"""Randomized smoothing that draws only as many samples as an answer needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _summary, _validate
from robustjax.certification._counts import check_all_voted, check_measure, check_on_host, counts_on_host
from robustjax.certification._measures import Measure
from robustjax.certification._smoothing import ABSTAIN
from robustjax.certification._stopping import lower_bounds, needed_probability, radius_rule, stops, target_rule
from robustjax.typing import AnyArray, LogitsFn


class SequentialCertificate(NamedTuple):
    """A ``Certificate``, and what it cost; host arrays, one entry per input.

    Attributes:
      label: the certified class, or ``ABSTAIN``; int32.
      radius: the label is constant on the open ball of this radius, in the units of x and the norm of the measure;
        0 where abstained; float64.
      probability: lower confidence bound, at level 1 - alpha, of the probability of the selected class. With a target,
        the probability that the target needs, or 0 if it was not reached; without, the largest bound of all looks;
        float64.
      abstained: True where nothing is certified.
      num_samples: draws behind the answer, including the draws that select the class; int64.
    """

    label: np.ndarray
    radius: np.ndarray
    probability: np.ndarray
    abstained: np.ndarray
    num_samples: np.ndarray

    def __repr__(self) -> str:
        return _summary.of_radii(self)


@_arguments.checked
def certify_sequential(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    target_radius: float | None = None,
    alpha: float = 0.001,
    max_samples: int = 100_000,
    num_selection: int = 100,
    futility: float = 0.05,
    tolerance: float = 0.05,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> SequentialCertificate:
    r"""Certifies the smoothed classifier around each input, and stops drawing as soon as the answer is known.

    The class A with most of ``num_selection`` votes is selected; then the fresh votes for A are checked after 100, 125,
    157, ... and ``max_samples`` draws, at k looks in all.

    With ``target_radius`` the question is whether :math:`q = P[f(x + \epsilon) = A]` exceeds the probability
    :math:`p^*` that this radius needs. The answer is yes at the first look i with at least :math:`u_i` votes, where
    the :math:`u_i` are the smallest integers with

    .. math:: P\big[\exists j \le i:\ \mathrm{Binomial}(n_j, p^*) \ge u_j\big] \le \tfrac i k\, \alpha

    in the exact distribution of the counts at all looks together (a group-sequential test). The mirrored test, at the
    level ``futility``, gives up inputs that the last look would probably not certify either.

    Without a target, each look has a Clopper-Pearson bound at level :math:`\alpha / k`, and the largest bound gives the
    radius: a confidence sequence. Drawing stops where further draws would add little (``tolerance``), or where the
    class has hardly half of the votes. Near-certain classes need the most draws, because their radius grows with the
    number of draws.

    Draw i of an input is the same as in ``certify``, with all that ``sample_counts`` promises; results do not depend on
    ``batch_size`` or on the other inputs. Drawing stops only at the end of a block, so every input costs at least
    ``batch_size`` draws; devices that share an image add up their counts after each block.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``; normalisation belongs inside.
      x: ``(batch, ...)``, floating, [0, 1] images unnormalised.
      measure: the smoothing measure, for example ``gaussian(0.5)``.
      target_radius: a radius to decide on, at least 0, in the units of x and the norm of the measure; None for the
        largest that can be certified.
      alpha: probability, for each input, that its certificate is wrong.
      max_samples: largest number of draws for an input, in addition to the selection.
      num_selection: draws that select the class.
      futility: largest probability of giving up an input that ``max_samples`` draws would certify with probability
        1 - alpha or more; for inputs nearer to the threshold it may be larger.
      tolerance: without a target, the share of the radius that may be lost compared to ``certify`` with
        ``max_samples``, at the observed share of votes.
      batch_size: noisy copies in one call of ``logits_fn``; see ``sample_counts``.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      A ``SequentialCertificate`` of host arrays.

    Raises:
      ValueError: for an argument that is not as above, for a target beyond the reach of the noise, and for
        logits that are not finite among the draws behind an answer, or that change with the other copies in a block,
        see ``certify``.

    Guarantee:
      As ``certify``: for every single input, over the draws, with probability at least 1 - alpha the label is what the
      smoothed classifier returns everywhere in the open ball of ``radius``, or it is ``ABSTAIN``. This holds for any
      ``futility`` and ``tolerance``, and for one call: each repetition with another radius or key spends another alpha.

    Example:
      >>> measure = certification.gaussian(0.5)
      >>> certificate = certification.certify_sequential(jax.random.key(0), logits_fn, x, measure, target_radius=0.25)
      >>> print(certificate.abstained, certificate.num_samples)  # of at most 100,100
      [False False] [409 200]

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, for the certificate; Voracek, "Treatment of statistical estimation
      problems in randomized smoothing for adversarial robustness", arXiv:2406.17830, for sequential tests. Differs from
      the latter in the statistics (fixed looks and the exact distribution of the counts instead of betting at every
      draw), and selects the class by separate draws instead of taking the true label.
    """
    _validate.at_least(1, max_samples=max_samples, num_selection=num_selection)
    _validate.probability(alpha=alpha, futility=futility, tolerance=tolerance)
    if num_selection + max_samples > np.iinfo(np.int32).max:
        raise ValueError(f"max_samples must keep draw indices within int32, got {max_samples}.")
    check_measure(measure)
    alpha, futility, tolerance, max_samples = float(alpha), float(futility), float(tolerance), int(max_samples)
    if target_radius is None:
        needed = 0.5
        rule = radius_rule(measure, alpha, futility, max_samples, tolerance)
        possible = (lower_bounds(rule.looks, rule, alpha) > 0.5).any()
    else:
        _validate.not_negative(target_radius=target_radius)
        needed = needed_probability(measure, float(target_radius))
        rule = target_rule(needed, alpha, futility, max_samples)
        possible = (rule.first <= rule.looks).any()
    if not possible:
        _validate.warn(
            f"max_samples={max_samples} draws can never certify at alpha={alpha}: even if all agree, the bound does "
            f"not exceed {needed:.6g}."
        )
    check_on_host(key, x, measure, input_range)
    edges = np.concatenate([[0, num_selection], num_selection + rule.looks.astype(np.int64)])
    counts = counts_on_host(key, logits_fn, x, measure, edges, batch_size, np.stack(rule[1:]))
    label = counts[:, 0].argmax(-1).astype(np.int32)
    votes = np.take_along_axis(counts[:, 1:], label[:, None, None], axis=-1)[..., 0].cumsum(-1)
    look = stops(votes, *rule[1:]).argmax(-1)  # votes are whole up to the first look that stops, and used no further
    seen = np.arange(len(rule.looks)) <= look[:, None]
    num_samples = edges[look + 2]
    check_all_voted(counts[:, 0] + (counts[:, 1:] * seen[:, :, None]).sum(1), num_samples)
    if target_radius is None:
        probability = np.where(seen, lower_bounds(np.where(seen, votes, 0), rule, alpha), 0.0).max(-1)
        abstained = probability <= 0.5
        radius = np.where(abstained, 0.0, measure.radius(probability))
    else:
        abstained = np.take_along_axis(votes < rule.first, look[:, None], axis=-1)[:, 0]
        probability = np.where(abstained, 0.0, needed)
        radius = np.where(abstained, 0.0, float(target_radius))
    return SequentialCertificate(
        label=np.where(abstained, np.int32(ABSTAIN), label),
        radius=radius,
        probability=probability,
        abstained=abstained,
        num_samples=num_samples,
    )
