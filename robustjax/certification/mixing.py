"""Mixtures of an accurate and a robust classifier, and the radii that the robust one lends to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _validate
from robustjax.typing import ArrayLike


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
      robust_logits: ``(batch, classes)`` h(x), of the robust one.
      alpha: share of the robust one in [0, 1], one or one for each input; may be traced.
      standard_scale: s_g, inverse temperature; 1.2 in the authors' model for CIFAR-10.
      robust_scale: s_h; 0.5 there.

    Returns:
      ``(batch, classes)`` log-probabilities, exactly those of one classifier for alpha 0 and 1.

    Raises:
      ValueError: for an alpha outside [0, 1], scales that are not positive, or logits of different shapes.

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
    share = jnp.asarray(alpha, jnp.float32).reshape(-1, 1)
    standard = jax.nn.log_softmax(standard_scale * standard_logits)
    robust = jax.nn.log_softmax(robust_scale * robust_logits)

    def log(a):  # its gradient at 0 is 0, not infinite
        return jnp.where(a > 0, jnp.log(jnp.where(a > 0, a, 1.0)), -jnp.inf)

    return jnp.logaddexp(log(1 - share) + standard, log(share) + robust)


def lipschitz_radius(first: ArrayLike, second: ArrayLike, *, alpha: float, lipschitz: float) -> np.ndarray:
    r"""Computes the radius in which a mixture keeps the class of its robust part, by a Lipschitz constant of that.

    .. math:: R = \frac{1}{2 L} \max\Bigl(0,\ h_{(1)} - h_{(2)} - \frac{1 - \alpha}{\alpha}\Bigr)

    Args:
      first: ``(...)`` probability of the robust part's class, or a lower bound of it.
      second: ``(...)`` largest probability of another class, or an upper bound of it.
      alpha: least share of the robust part anywhere in the ball; up to 1/2 nothing is certified.
      lipschitz: L, a Lipschitz constant of each probability, in a norm of your choice; 1 / (sigma sqrt(2 pi)) in l2 for
        the mean of anything in [0, 1] under Gaussian noise.

    Returns:
      ``(...)`` float64, in that norm.

    Raises:
      ValueError: for probabilities or alpha outside [0, 1], or a constant that is not positive.

    Guarantee:
      The mixture's class is constant on the open ball, whatever the accurate part does: it can move a difference of
      probabilities by at most 1.

    Reference:
      Bai et al. 2023, arXiv:2301.12554; its constant for smoothed classifiers is twice the least one above.
    """
    _validate.positive(lipschitz=lipschitz)
    first, second, margin = _margin(first, second, alpha)
    return np.asarray(np.maximum(first - second - margin, 0.0) / (2 * lipschitz))


def smoothed_radius(first: ArrayLike, second: ArrayLike, *, alpha: float, sigma: float) -> np.ndarray:
    r"""Computes the l2 radius in which a mixture keeps the class of its robust part, which is smoothed by a Gaussian.

    R solves

    .. math:: \Phi\bigl(\Phi^{-1}(h_{(1)}) - R / \sigma\bigr) - \Phi\bigl(\Phi^{-1}(h_{(2)}) + R / \sigma\bigr) =
              \frac{1 - \alpha}{\alpha}

    and is 0 where ``first - second`` does not exceed the right side. For alpha = 1 it is that of Cohen et al.

    Args:
      first: ``(...)`` probability of the smoothed part's class, or a lower bound of it.
      second: ``(...)`` largest probability of another class, or an upper bound that holds together with ``first``.
      alpha: least share of the robust part anywhere in the ball; up to 1/2 nothing is certified.
      sigma: of the noise.

    Returns:
      ``(...)`` float64, in the units of sigma.

    Raises:
      ValueError: for probabilities or alpha outside [0, 1], or a sigma that is not positive and finite.

    Guarantee:
      As ``lipschitz_radius``; both bounds on probabilities have to hold.

    Reference:
      Bai et al. 2023, arXiv:2301.12554. Larger than its
      :math:`\frac \sigma 2 (\Phi^{-1}(\alpha h_{(1)}) - \Phi^{-1}(\alpha h_{(2)} + 1 - \alpha))`, because each
      probability moves along its own curve: 0.780 beside 0.323 for 0.97, 0.02, alpha 0.76 and sigma 0.5.
    """
    from scipy import special

    _validate.positive(sigma=sigma)
    first, second, margin = np.broadcast_arrays(*_margin(first, second, alpha))
    above, below = special.ndtri(first), special.ndtri(second)
    certified = first - second > margin
    low, high = np.zeros(first.shape), np.where(certified, 80.0, 0.0)  # in sigma: beyond, float64 has no tail
    for _ in range(100):
        middle = (low + high) / 2
        holds = special.ndtr(above - middle) - special.ndtr(below + middle) > margin
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return np.asarray(sigma * np.where(certified, low, 0.0))


def _margin(first: ArrayLike, second: ArrayLike, alpha: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Both in float64, and what their difference has to exceed."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    for name, value in (("first", first), ("second", second), ("alpha", np.asarray(alpha))):
        if not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    return first, second, (1 - alpha) / alpha if alpha else np.inf
