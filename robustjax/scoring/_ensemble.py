"""One score from several: from several detectors of one model, or from one detector of several models."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments
from robustjax.scoring._detector import (
    Detector,
    as_outputs,
    cached_by_settings,
    check_detectors,
    fitted_shapes,
    make_detector,
    require,
)
from robustjax.typing import Outputs


class Member(NamedTuple):
    """State of one member of an ensemble.

    Attributes:
      state: the state of the detector.
      mean: mean of its scores of the training rows.
      deviation: standard deviation of its scores of the training rows.
    """

    state: Any
    mean: Float[Array, ""]
    deviation: Float[Array, ""]


def _fit_member(index: int, detector: Detector, outputs, labels, head) -> Member:
    state = detector.fit(outputs, labels, head)
    scores = detector.score(state, outputs)
    member = Member(state, scores.mean(), scores.std())
    if not 0 < member.deviation < jnp.inf:
        raise ValueError(
            f"the training scores of member {index} must vary and be finite to be standardised, got standard deviation "
            f"{float(member.deviation):g}."
        )
    return member


def _check_members(state: Any, number: int) -> tuple[None, None]:
    if len([member.deviation for member in state]) != number:
        raise ValueError(f"state must have {number} members, got {len(state)}.")
    return None, None


def _mean_standardised(members, scores) -> jax.Array:
    return jnp.stack([(score - member.mean) / member.deviation for member, score in zip(members, scores)]).mean(0)


@_arguments.checked
@cached_by_settings
def ensemble(*detectors: Detector) -> Detector:
    r"""Averages the scores of several detectors of one model, each standardised on the training rows.

    .. math:: s = \frac{1}{M} \sum_m \frac{s_m - \mu_m}{\sigma_m}

    where :math:`\mu_m` and :math:`\sigma_m` are the mean and standard deviation of the scores that detector m, fitted
    on the training rows, gives to the training rows.

    Args:
      *detectors: the members, one or more.

    Returns:
      The detector; ``fit`` needs what its members need, and raises ValueError if the training scores of a member are
      constant or not finite.

    Raises:
      ValueError: for no members.

    Example:
      >>> detector = scoring.ensemble(scoring.energy(), scoring.knn(k=3))
      >>> state = detector.fit(train)
      >>> print(detector.score(state, test))
      [-0.38  6.68]
    """
    if not detectors:
        raise ValueError("ensemble takes one or more detectors, got none.")
    check_detectors("ensemble", *detectors)

    def fit(outputs, labels, head):
        require("ensemble", outputs=outputs)
        return tuple(_fit_member(i, detector, outputs, labels, head) for i, detector in enumerate(detectors))

    def score(state, outputs):
        scores = [detector.score(member.state, outputs) for detector, member in zip(detectors, state)]
        return _mean_standardised(state, scores)

    return make_detector(fit, score, lambda state: _check_members(state, len(detectors)), needs_features=False)


@_arguments.checked
@cached_by_settings
def model_ensemble(detector: Detector) -> Detector:
    r"""Averages the scores that one detector gives to several models, each standardised on the training rows.

    The rule is the rule of ``ensemble``, with one member for each model. The models may differ in their features.

    Args:
      detector: the detector that is fitted to each model.

    Returns:
      The detector, whose functions take a sequence with one entry for each model: ``fit(outputs, labels, heads)``, with
      labels that all models share and optional heads, and ``score(state, outputs)``. Both raise ValueError for
      sequences of different lengths, and ``fit`` for the same training scores as ``fit`` of ``ensemble``.

    Example:
      >>> detector = scoring.model_ensemble(scoring.energy())
      >>> state = detector.fit([train.logits, 2 * train.logits])  # the logits of two models
      >>> print(detector.score(state, [test.logits, 2 * test.logits]))
      [-0.01  3.07]
    """
    check_detectors("model_ensemble", detector)

    def fit(outputs, labels=None, heads=None):
        if isinstance(outputs, (Outputs, jax.Array, np.ndarray)):
            got = type(outputs).__name__
            raise ValueError(f"outputs must be a sequence of Outputs, one for each model, got one {got}.")
        heads = [None] * len(outputs) if heads is None else heads
        if not outputs:
            raise ValueError("outputs must hold one Outputs or more, got none.")
        if len(outputs) != len(heads):
            raise ValueError(f"heads must be one for each of the {len(outputs)} models, got {len(heads)}.")
        return tuple(_fit_member(i, detector, one, labels, head) for i, (one, head) in enumerate(zip(outputs, heads)))

    def score(state, outputs):
        fitted_shapes(lambda state: _check_members(state, len(state)), state)
        rows = {as_outputs(one).logits.shape[0] for one in outputs}
        if len(outputs) != len(state) or len(rows) != 1:
            raise ValueError(
                f"outputs must be the same rows seen by each of {len(state)} models, got {len(outputs)} with rows "
                f"{sorted(rows)}."
            )
        return _mean_standardised(state, [detector.score(member.state, one) for member, one in zip(state, outputs)])

    return Detector(fit, score)
