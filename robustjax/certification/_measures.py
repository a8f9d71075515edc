"""Smoothing measures: how to draw a noisy copy, and what radius a probability buys."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.perturbations import standard_normal
from robustjax.typing import ArrayLike


@runtime_checkable
class Measure(Protocol):
    """A smoothing measure: any hashable object with this attribute and these two methods.

    Attributes:
      norm: the norm in which ``radius`` is measured, such as ``"l2"``.
    """

    @property
    def norm(self) -> str:
        """The norm of the radius."""
        ...

    def sample(self, key: Key[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Draws one noisy copy of one input, in float32."""
        ...

    def radius(self, probability: ArrayLike) -> np.ndarray:
        """Returns the certified radius for a lower bound of the top class's probability; 0 for 1/2 or less."""
        ...


@_arguments.checked
@dataclasses.dataclass(frozen=True)
class Gaussian:
    r"""Isotropic Gaussian smoothing, which certifies l2 balls.

    .. math:: g(x) = \arg\max_c P[f(x + \epsilon) = c],\ \epsilon \sim N(0, \sigma^2 I), \qquad
              R = \sigma\, \Phi^{-1}(\underline{p_A})

    Noise is drawn and added in float32, in [0, 1] pixels, and the noisy copy is not clipped.

    Args:
      sigma: standard deviation in units of [0, 1] images, positive and finite.
      grid: step of the lattice that noisy copies are rounded to, or None for plain float32 addition. 8-bit images lie
        on the lattice when ``1 / (255 * grid)`` is a whole number; ``grid=1/4080`` is 16 steps to a grey level.

    Raises:
      ValueError: for a sigma or grid that is not positive and finite, and for a grid coarser than sigma or finer than
        float32 resolves.

    Guarantee:
      With exact arithmetic, g is constant on the open l2 ball of radius R whenever ``P[f(x + noise) = A] >= p_A``.
      In floating point the default breaks a small promise: ``fl(x + noise)`` keeps traces of x in its last bits, so
      that two nearby inputs do not have exactly shifted noise, and a base classifier built to read those bits can
      void the certificate (Voracek and Hein). With ``grid``, a copy is
      ``grid * (round(x / grid) + round(noise / grid))`` in integers, so that for x on the lattice it is exactly the
      rounded ``x + noise`` and its noise no longer depends on x; the certificate holds for the base classifier
      after rounding, around the lattice point nearest to x. One approximation remains: the normal draws themselves
      have 23 bits, the same for every x. Their largest value is 5.22 sigma, and no radius exceeds 5.17 sigma, however
      many draws agree: probabilities above 1 - 2^-18 are rounded down to a multiple of 2^-23, which the noise resolves.

    Example:
      >>> certification.gaussian(0.5).radius(np.array([0.5, 0.9, 0.99]))
      array([0.  , 0.64, 1.16])

    Reference:
      Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via randomized smoothing", arXiv:1902.02918;
      Voracek and Hein, "Sound randomized smoothing in floating-point arithmetics", arXiv:2207.07209.
    """

    sigma: float
    grid: float | None = None
    norm = "l2"

    def __post_init__(self):
        object.__setattr__(self, "sigma", _as_number(sigma=self.sigma))
        if self.grid is not None:
            object.__setattr__(self, "grid", _as_number(grid=self.grid))
            finest = (1 + 6 * self.sigma) / 2**24
            if not finest <= self.grid <= self.sigma:
                raise ValueError(
                    f"grid must be at most sigma={self.sigma:g} and at least {finest:.1e}, the step that float32 "
                    f"resolves on noisy images, got {self.grid!r}."
                )

    def sample(self, key: Key[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Draws one noisy copy of one input.

        Args:
          key: one key.
          x: one input of any shape, floating.

        Returns:
          float32 array of the shape of ``x``.
        """
        noise, x = self.sigma * standard_normal(key, x.shape), x.astype(jnp.float32)
        if self.grid is None:
            return x + noise
        steps = jnp.rint(x / self.grid).astype(jnp.int32) + jnp.rint(noise / self.grid).astype(jnp.int32)
        return jnp.where(jnp.isfinite(x), steps.astype(jnp.float32) * self.grid, jnp.nan)

    def radius(self, probability: ArrayLike) -> np.ndarray:
        """Computes sigma * Phi^-1(probability) in float64; 0 for probabilities of 1/2 or less, at most 5.17 sigma."""
        from scipy import special

        return np.asarray(self.sigma * special.ndtri(_at_least_half(probability)))


@_arguments.checked
@dataclasses.dataclass(frozen=True)
class Uniform:
    r"""Smoothing with uniform noise on a cube, which certifies l1 balls.

    .. math:: g(x) = \arg\max_c P[f(x + \epsilon) = c],\ \epsilon \sim \mathrm{Uniform}[-\lambda, \lambda]^d, \qquad
              R = 2 \lambda\, (\underline{p_A} - 1/2)

    A shift by delta moves at most :math:`\lVert\delta\rVert_1 / (2 \lambda)` of the mass. The radius stays below
    lambda, however many draws agree. The standard deviation is lambda / sqrt(3); at equal standard deviations the paper
    finds larger l1 radii than with Laplace noise.

    Args:
      half_width: lambda, in units of [0, 1] images, positive and finite.

    Raises:
      ValueError: for a half_width that is not positive and finite.

    Guarantee:
      In exact arithmetic, g is constant on the open l1 ball of radius R whenever ``P[f(x + noise) = A] >= p_A``. In
      floating point as for :func:`gaussian` without a grid. The largest draw, and so the largest radius, is
      :math:`(1 - 2^{-22})\, \lambda`.

    Example:
      >>> certification.uniform(0.5).radius(np.array([0.5, 0.9, 0.99]))
      array([0.  , 0.4 , 0.49])

    Reference:
      Yang et al., "Randomized smoothing of all shapes and sizes", arXiv:2002.08118.
    """

    half_width: float
    norm = "l1"

    def __post_init__(self):
        object.__setattr__(self, "half_width", _as_number(half_width=self.half_width))

    def sample(self, key: Key[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Draws one noisy copy of one input of any shape, in float32."""
        noise = jax.random.uniform(key, x.shape, jnp.float32, -self.half_width, self.half_width)
        return x.astype(jnp.float32) + noise

    def radius(self, probability: ArrayLike) -> np.ndarray:
        """Computes 2 lambda (probability - 1/2) in float64; 0 for probabilities of 1/2 or less."""
        return np.asarray(2 * self.half_width * (_at_least_half(probability) - 0.5))


@_arguments.checked
@dataclasses.dataclass(frozen=True)
class Laplace:
    r"""Smoothing with independent Laplace noise, which certifies l1 balls.

    .. math:: g(x) = \arg\max_c P[f(x + \epsilon) = c],\ p(\epsilon) \propto e^{-\lVert\epsilon\rVert_1 / \lambda},
              \qquad R = -\lambda \ln\bigl(2\, (1 - \underline{p_A})\bigr)

    Args:
      scale: lambda, in units of [0, 1] images, positive and finite; the standard deviation is sqrt(2) of it.

    Raises:
      ValueError: for a scale that is not positive and finite.

    Guarantee:
      In exact arithmetic, g is constant on the open l1 ball of radius R whenever ``P[f(x + noise) = A] >= p_A``. In
      floating point as for :func:`gaussian` without a grid. The largest draw, and so the largest radius, is
      :math:`22 \ln 2 = 15.25` times lambda.

    Example:
      >>> certification.laplace(0.5).radius(np.array([0.5, 0.9, 0.99]))
      array([0.  , 0.8 , 1.96])

    Reference:
      Yang et al., "Randomized smoothing of all shapes and sizes", arXiv:2002.08118; Teng, Lee and Yuan, "l1 adversarial
      robustness certificates: a randomized smoothing approach", 2020.
    """

    scale: float
    norm = "l1"

    def __post_init__(self):
        object.__setattr__(self, "scale", _as_number(scale=self.scale))

    def sample(self, key: Key[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Draws one noisy copy of one input of any shape, in float32."""
        return x.astype(jnp.float32) + self.scale * jax.random.laplace(key, x.shape, jnp.float32)

    def radius(self, probability: ArrayLike) -> np.ndarray:
        """Computes -lambda ln(2 (1 - probability)) in float64; 0 for 1/2 or less, at most 15.25 lambda."""
        return np.asarray(self.scale * np.log(0.5 / (1 - _at_least_half(probability))))


@_arguments.checked
@dataclasses.dataclass(frozen=True)
class InNorm:
    r"""A measure with certificates in another norm: the largest ball of that norm inside the certified ball.

    .. math:: R_q = R_p\, d^{\min(0,\, 1/q - 1/p)}

    From l2 to linf this is :math:`R_2 / \sqrt d`: sound and small; in many dimensions no independent noise does much
    better.

    Args:
      measure: the measure, with a norm of l1, l2 or linf.
      norm: l1, l2 or linf.
      dimension: d, numbers in one input.

    Raises:
      ValueError: for another norm, or a dimension below 1.

    Guarantee:
      As ``measure``, whose largest radius is converted too.

    Example:
      >>> measure = certification.in_norm(certification.gaussian(0.5), "linf", 28 * 28)
      >>> f"{255 * measure.radius(np.array(0.99)):.1f} grey levels"  # an l2 radius of 1.16, divided by 28
      '10.6 grey levels'

    Reference:
      Yang et al., arXiv:2002.08118, on why linf is hard; Salman et al., arXiv:1906.04584, for such certificates.
    """

    measure: Measure
    norm: str
    dimension: int

    def __post_init__(self):
        for name, norm in (("norm", self.norm), ("measure.norm", getattr(self.measure, "norm", self.measure))):
            if norm not in _INVERSE_ORDER:
                raise ValueError(f"{name} must be one of {', '.join(_INVERSE_ORDER)}, got {norm!r}.")
        _validate.at_least(1, dimension=self.dimension)

    def sample(self, key: Key[Array, ""], x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Draws one noisy copy of one input, as ``measure`` does."""
        if x.size != self.dimension:
            raise ValueError(f"dimension={self.dimension} must be the size of an input, got inputs of shape {x.shape}.")
        return self.measure.sample(key, x)

    def radius(self, probability: ArrayLike) -> np.ndarray:
        """Computes the radius of ``measure``, converted to the norm, in float64."""
        exponent = min(0.0, _INVERSE_ORDER[self.norm] - _INVERSE_ORDER[self.measure.norm])
        return np.asarray(self.measure.radius(probability) * float(self.dimension) ** exponent)


gaussian = Gaussian
uniform = Uniform
laplace = Laplace
in_norm = InNorm

_INVERSE_ORDER = {"l1": 1.0, "l2": 0.5, "linf": 0.0}


def resolved(probability: ArrayLike) -> np.ndarray:
    r"""Rounds probabilities down to what the noise resolves, in the tails where this is more than nothing.

    .. math:: p \mapsto 2^{-23} (\lceil 2^{23} p \rceil - 1) \quad \text{where } \min(p, 1 - p) < 2^{-18}

    A float32 draw of Gaussian, Laplace or uniform noise has one of :math:`2^{23}` values, all equally likely. So the
    noise of a pixel stays below a threshold with a probability that exceeds that of the exact distribution by up to
    :math:`2^{-23}`, and never passes a threshold beyond its largest value. The radius of the probability rounded down
    is at most the quantile of the noise as it is drawn. Other probabilities stay as they are: fewer than 1.8 million
    draws at alpha = 0.001 lead to no others, and :math:`2^{-23}` is at most 1/32 of their tail.

    Args:
      probability: ``(...)`` in [0, 1].

    Returns:
      ``(...)`` float64, at most ``probability``.
    """
    probability = np.asarray(probability, np.float64)
    below = np.maximum(np.ceil(probability * 2**23) - 1, 0) / 2**23
    return np.where(np.abs(probability - 0.5) > 0.5 - 2**-18, below, probability)


def _at_least_half(probability: ArrayLike) -> np.ndarray:
    try:
        numbers = np.asarray(probability, np.float64)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    if not ((numbers >= 0) & (numbers <= 1)).all():
        raise ValueError(f"probability must lie in [0, 1], got {_validate.short(probability)}.")
    return resolved(np.maximum(numbers, 0.5))


def _as_number(**argument: float) -> float:
    """The argument as a float, so that equal settings are equal; ValueError if traced, or not positive and finite."""
    ((name, value),) = argument.items()
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a number, not traced: a measure is a static argument.")
    _validate.positive(**argument)
    return float(value)
