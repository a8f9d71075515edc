"""Mixtures of an accurate and a robust classifier, and the certified radii of the mixtures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from robustjax import _arguments, _validate
from robustjax.certification._binomial import binomial_lower_bound
from robustjax.certification._measures import resolved
from robustjax.certification._smoothing import check_counts
from robustjax.typing import AnyArray, Apply, ArrayLike, ModelState, Outputs


@_arguments.checked
def mix(
    standard_logits: Float[Array, "batch classes"],
    robust_logits: Float[Array, "batch classes"],
    *,
    alpha: float | Float[Array, ""] | Float[Array, " batch"],
    standard_scale: float = 1.0,
    robust_scale: float = 1.0,
) -> Float[Array, "batch classes"]:
    r"""Computes the logits of a mixture of two classifiers, whose softmax is the mixture of their probabilities.

    .. math:: \ln\bigl[(1 - \alpha)\, \mathrm{softmax}(s_g\, g(x)) + \alpha\, \mathrm{softmax}(s_h\, h(x))\bigr]

    Args:
      standard_logits: ``(batch, classes)`` g(x), of the accurate classifier.
      robust_logits: ``(batch, classes)`` h(x), of the robust classifier.
      alpha: share of the robust classifier in [0, 1], one number or one for each input; may be traced.
      standard_scale: s_g, inverse temperature; 1.2 in the authors' model for CIFAR-10.
      robust_scale: s_h; 0.5 in the authors' model for CIFAR-10.

    Returns:
      ``(batch, classes)`` log-probabilities; for alpha 0 and 1, exactly the log-probabilities of one classifier.

    Raises:
      ValueError: for an alpha outside [0, 1] or of another shape, scales that are not positive, or logits of different
        shapes.

    Example:
      >>> print(mixing.mix(jnp.array([[9.0, 0.0]]), jnp.array([[0.0, 1.0]]), alpha=0.9))
      [[-1.07 -0.42]]

    Reference:
      Bai et al. 2023, Improving the Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing,
      arXiv:2301.12554.
    """
    _validate.positive(standard_scale=standard_scale, robust_scale=robust_scale)
    if standard_logits.shape != robust_logits.shape:
        raise ValueError(
            f"standard_logits and robust_logits must have one shape, got {standard_logits.shape} and "
            f"{robust_logits.shape}."
        )
    if not isinstance(alpha, jax.core.Tracer) and not ((np.asarray(alpha) >= 0) & (np.asarray(alpha) <= 1)).all():
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    if jnp.shape(alpha) not in ((), standard_logits.shape[:1]):
        raise ValueError(f"alpha must be one number or ({standard_logits.shape[0]},), got shape {jnp.shape(alpha)}.")
    share = jnp.asarray(alpha, jnp.float32).reshape(-1, 1)
    standard = jax.nn.log_softmax(standard_scale * standard_logits)
    robust = jax.nn.log_softmax(robust_scale * robust_logits)

    def log(a):  # its gradient at 0 is 0, not infinite
        return jnp.where(a > 0, jnp.log(jnp.where(a > 0, a, 1.0)), -jnp.inf)

    return jnp.logaddexp(log(1 - share) + standard, log(share) + robust)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    r"""One model of two: a network sees the outputs of an accurate and a robust model and mixes them for each input.

    .. math::
        \ln\bigl[(1 - \alpha)\, \mathrm{softmax}(s_g\, g(x)) + \alpha\, \mathrm{softmax}(s_h\, h(x))\bigr] + \gamma,
        \qquad \alpha = l + (u - l)\, \mathrm{sigmoid}(\gamma), \quad \gamma = n\bigl(z_g(x), z_h(x)\bigr)

    with z the features of a model and its log-probabilities. Gamma is added to all logits, which changes no answer and
    no loss, and makes gamma the logsumexp of the logits. In training, the share of the robust model is sigmoid(gamma)
    itself. Gradients flow through both models and the network; an attack that held alpha constant would overestimate
    robustness.

    The mixture is an ``Apply`` for the state that :meth:`init` makes, in which only the network has parameters.

    Attributes:
      standard: g, the accurate model.
      robust: h, the robust model.
      network: n, for example a ``models.mixing_network``; its ``logits`` are ``(batch, 1)``.
      low: l, smallest share of the robust model; above 1/2, the radii below hold with ``alpha=low``.
      high: u, largest share of the robust model.
      standard_scale: s_g, see :func:`mix`.
      robust_scale: s_h, see :func:`mix`.

    Example:
      >>> standard, robust = (
      ...     models.functional(models.mlp(jax.random.key(i), hidden=(16,), image_shape=(8, 8, 1))) for i in range(2)
      ... )
      >>> network = models.functional(models.mixing_network(jax.random.key(2), num_inputs=52, hidden=(16,)))
      >>> apply = mixing.mixture(standard=standard.apply, robust=robust.apply, network=network.apply)
      >>> state = apply.init(standard.state, robust.state, network.state)
      >>> apply.logits_fn(state)(jnp.ones((2, 8, 8, 1))).shape
      (2, 10)

    Reference:
      Bai et al. 2023, Improving the Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing,
      arXiv:2301.12554.
    """

    standard: Apply
    robust: Apply
    network: Apply
    low: float = 0.84
    high: float = 0.99
    standard_scale: float = 1.0
    robust_scale: float = 1.0

    def __post_init__(self):
        if not 0 <= _validate.number(self.low) <= _validate.number(self.high) <= 1:
            raise ValueError(f"low and high must be 0 <= low <= high <= 1, got {self.low!r} and {self.high!r}.")
        _validate.positive(standard_scale=self.standard_scale, robust_scale=self.robust_scale)

    def init(self, standard: ModelState, robust: ModelState, network: ModelState) -> ModelState:
        """Makes one state of three: only the network has parameters, the models are among its batch statistics."""
        kept = {"network": network.batch_stats, "standard": standard._asdict(), "robust": robust._asdict()}
        return ModelState(network.params, kept)

    def __call__(
        self, state: ModelState, x: Float[Array, "batch ..."], *, train: bool = False
    ) -> tuple[Outputs, ModelState]:
        """Returns logits and the network's features, and the state with updated statistics of the network."""
        kept = state.batch_stats
        standard, _ = self.standard(ModelState(**kept["standard"]), x)
        robust, _ = self.robust(ModelState(**kept["robust"]), x)
        seen = [standard.features, robust.features, *map(jax.nn.log_softmax, (standard.logits, robust.logits))]
        of_network = ModelState(state.params, kept["network"])
        outputs, of_network = self.network(of_network, jnp.concatenate(seen, axis=-1), train=train)
        share = jax.nn.sigmoid(outputs.logits[:, 0])
        logits = mix(
            standard.logits,
            robust.logits,
            alpha=share if train else self.low + (self.high - self.low) * share,
            standard_scale=self.standard_scale,
            robust_scale=self.robust_scale,
        )
        renewed = state._replace(batch_stats={**kept, "network": of_network.batch_stats})
        return Outputs(logits + outputs.logits, outputs.features), renewed if train else state

    def logits_fn(self, state: ModelState) -> jax.tree_util.Partial:
        """``x -> logits`` at inference; all weights are arguments of compiled programs."""
        return jax.tree_util.Partial(_logits_of(self), state)


mixture = Mixture


@functools.cache  # one function for equal mixtures, so that compiled programs are shared
def _logits_of(apply: Apply) -> Callable[[ModelState, Array], Array]:
    return lambda state, x: apply(state, x)[0].logits


class ClassBounds(NamedTuple):
    """Bounds on the probabilities of classes under noise; host arrays, one entry for each input.

    Attributes:
      label: the class that was selected; int32.
      first: lower bound of its probability; float64.
      second: upper bound of the largest probability of another class; float64.
    """

    label: np.ndarray
    first: np.ndarray
    second: np.ndarray


@_arguments.checked
def bounds_from_counts(
    selection_counts: Int[AnyArray, "batch classes"],
    estimation_counts: Int[AnyArray, "batch classes"],
    *,
    alpha: float = 0.001,
    num_estimation: int | None = None,
) -> ClassBounds:
    r"""Bounds the probabilities of the first and the second class from votes, for the radii below.

    The bounds are Clopper-Pearson bounds: at level alpha / 2 for the first class, and at alpha / 2 shared by all other
    classes, because any of them may be the second. The second bound is at most 1 minus the first.

    Args:
      selection_counts: ``(batch, classes)`` votes that select the class.
      estimation_counts: ``(batch, classes)`` votes of other draws, which bound the probabilities.
      alpha: probability, for each input, that one of its bounds fails.
      num_estimation: draws behind each row of ``estimation_counts``; None is the sum of the row. Where draws were lost
        (logits that are not finite), pass the number of all draws: a lost draw counts against the first class and
        for the others.

    Returns:
      A ``ClassBounds``.

    Raises:
      ValueError: for counts that are not (batch, classes >= 2) integers >= 0 of one shape with votes in each row,
        for more of them than ``num_estimation``, or alpha outside (0, 1).

    Guarantee:
      For every input, over the draws: with probability at least 1 - alpha both bounds hold.

    Example:
      >>> bounds = mixing.bounds_from_counts(np.array([[2, 98, 0]]), np.array([[100, 9900, 0]]))
      >>> print(bounds.label, bounds.first, bounds.second)
      [1] [0.99] [0.01]

    Reference:
      Bai et al. 2023, arXiv:2301.12554, whose code takes the averages themselves; the bounds are ours.
    """
    _validate.probability(alpha=alpha)
    selection, estimation = (
        check_counts(name, counts)
        for name, counts in (("selection_counts", selection_counts), ("estimation_counts", estimation_counts))
    )
    if selection.shape != estimation.shape:
        raise ValueError(
            f"selection_counts and estimation_counts must have one shape, got {selection.shape} and {estimation.shape}."
        )
    votes = estimation.sum(-1, keepdims=True)
    if not votes.all():
        raise ValueError(f"estimation_counts must hold votes in each row, row {int(votes.argmin())} has none.")
    if num_estimation is not None and (votes > num_estimation).any():
        raise ValueError(f"num_estimation={num_estimation} is less than the {votes.max()} votes of a row.")
    draws = votes if num_estimation is None else np.full_like(votes, num_estimation)
    label, others = selection.argmax(-1).astype(np.int32), estimation.shape[1] - 1
    chosen = np.arange(others + 1) == label[:, None]
    first = binomial_lower_bound(estimation[chosen], draws[:, 0], alpha / 2)
    upper = 1 - binomial_lower_bound(votes - estimation, draws, alpha / (2 * others))
    second = np.where(chosen, 0.0, upper).max(-1)
    return ClassBounds(label, first, np.minimum(second, 1 - first))


@_arguments.checked
def lipschitz_radius(first: ArrayLike, second: ArrayLike, *, alpha: float, lipschitz: float) -> np.ndarray:
    r"""Computes the radius in which a mixture keeps the class of its robust part, from a Lipschitz constant.

    .. math:: R = \frac{1}{2 L} \max\Bigl(0,\ h_{(1)} - h_{(2)} - \frac{1 - \alpha}{\alpha}\Bigr)

    Args:
      first: ``(...)`` probability of the robust part's class, or a lower bound of it.
      second: ``(...)`` largest probability of another class, or an upper bound of it.
      alpha: least share of the robust part anywhere in the ball; up to 1/2 nothing is certified.
      lipschitz: L, a Lipschitz constant of each probability of the robust part, in any norm; 1 / (sigma sqrt(2 pi)) in
        l2 for the mean of any function with values in [0, 1] under Gaussian noise.

    Returns:
      ``(...)`` float64, in that norm.

    Raises:
      ValueError: for probabilities or alpha outside [0, 1], or a constant that is not positive.

    Guarantee:
      The mixture's class is constant on the open ball, whatever the accurate part does: it can move a difference of
      probabilities by at most 1.

    Example:
      >>> mixing.lipschitz_radius([0.9, 0.6], [0.1, 0.4], alpha=0.9, lipschitz=2.0)
      array([0.17, 0.02])

    Reference:
      Bai et al. 2023, arXiv:2301.12554; its constant for smoothed classifiers is twice the constant above.
    """
    _validate.positive(lipschitz=lipschitz)
    first, second, margin = _margin(first, second, alpha)
    return np.asarray(np.maximum(first - second - margin, 0.0) / (2 * lipschitz))


@_arguments.checked
def smoothed_radius(first: ArrayLike, second: ArrayLike, *, alpha: float, sigma: float) -> np.ndarray:
    r"""Computes the l2 radius in which a mixture keeps the class of its robust part, which is smoothed by a Gaussian.

    R solves

    .. math:: \Phi\bigl(\Phi^{-1}(h_{(1)}) - R / \sigma\bigr) - \Phi\bigl(\Phi^{-1}(h_{(2)}) + R / \sigma\bigr) =
              \frac{1 - \alpha}{\alpha}

    and is 0 where ``first - second`` does not exceed the right side. For alpha = 1 it is the radius of Cohen et al.
    R is at most 5.17 sigma, as for :func:`robustjax.certification.gaussian`.

    Args:
      first: ``(...)`` probability of the smoothed part's class, or a lower bound of it.
      second: ``(...)`` largest probability of another class, or an upper bound that holds together with ``first``.
      alpha: least share of the robust part anywhere in the ball; up to 1/2 nothing is certified.
      sigma: standard deviation of the noise.

    Returns:
      ``(...)`` float64, in the units of sigma.

    Raises:
      ValueError: for probabilities or alpha outside [0, 1], or a sigma that is not positive and finite.

    Guarantee:
      As ``lipschitz_radius``; both bounds on probabilities have to hold.

    Example:
      >>> mixing.smoothed_radius([0.99, 0.6], [0.01, 0.4], alpha=0.9, sigma=0.5)
      array([1.09, 0.06])

    Reference:
      Bai et al. 2023, arXiv:2301.12554. Larger than its
      :math:`\frac \sigma 2 (\Phi^{-1}(\alpha h_{(1)}) - \Phi^{-1}(\alpha h_{(2)} + 1 - \alpha))`, because each
      probability changes along its own curve: 0.780 instead of 0.323 for 0.97, 0.02, alpha 0.76 and sigma 0.5.
    """
    from scipy import special

    _validate.positive(sigma=sigma)
    first, second, margin = np.broadcast_arrays(*_margin(first, second, alpha))
    rounded_up = np.where(second < 2**-18, 1 - resolved(1 - second), second)
    above, below = special.ndtri(resolved(first)), special.ndtri(rounded_up)
    certified = first - second > margin
    low, high = np.zeros(first.shape), np.where(certified, 80.0, 0.0)  # in sigma: beyond, float64 has no tail
    for _ in range(100):
        middle = (low + high) / 2
        holds = special.ndtr(above - middle) - special.ndtr(below + middle) > margin
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return np.asarray(sigma * np.where(certified, low, 0.0))


def _margin(first: ArrayLike, second: ArrayLike, alpha: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Both in float64, and the value that their difference has to exceed."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    for name, value in (("first", first), ("second", second), ("alpha", np.asarray(alpha))):
        if not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    return first, second, (1 - alpha) / alpha if alpha else np.inf
