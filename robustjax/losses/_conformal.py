"""Training for small prediction sets: conformal prediction inside each step, made smooth so that it has gradients."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.losses._classification import of_label
from robustjax.losses._objectives import Aux
from robustjax.losses._smoothing import _images_and_noise, _log_mean_probabilities, _logits_of_copies, _normal_quantile
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConformalTraining:
    r"""Robust conformal training (RCT): small sets under noise, at a threshold that allows for an attack.

    .. math:: \ln\Bigl[\overline{1 - C_y} + \lambda\, \overline{\max\bigl(0, \textstyle\sum_k C_k - \kappa\bigr)}
              + 10^{-8}\Bigr], \qquad C_k = \mathrm{sigmoid}\Bigl(\frac{s_k - \tau}{T}\Bigr), \qquad
              s = \Phi^{-1}(p)

    p is the mean of the softmax over noisy copies. The first half of the batch calibrates: tau is the smoothed
    alpha-quantile of its :math:`s_y`, minus ``epsilon / sigma``. The means are over the second half. The scores are
    the THR scores with the opposite sign: a higher score conforms better.

    The authors fine-tune only the last layer of a model trained under noise; freeze the rest in the optimizer
    (``optax.partition``). The logarithm makes gradients steep where the loss is small: a model whose sets are already
    small needs a lower learning rate than the paper's 0.05.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      epsilon: l2 norm of the attack, at least 0, in units of [0, 1] images; 0 for conformal training without one.
      alpha: how often the true label may be missed.
      num_noise: copies of each image.
      size_weight: lambda, at least 0; in the paper 1 for CIFAR-10 and 0.01 for CIFAR-100.
      target_size: kappa, the set size up to which the size costs nothing.
      temperature: T; in the paper 0.1 for CIFAR-10 and 1 for CIFAR-100.
      dispersion: temperature of the quantile, see :func:`soft_quantile`.

    Example:
      >>> objective = losses.conformal_training(sigma=0.25, epsilon=0.5)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, sets of {aux.metrics['size']:.2f} classes"
      'loss -0.03, sets of 1.96 classes'

    Reference:
      Yan, Romano and Weng 2024, Provably Robust Conformal Prediction with Improved Efficiency, arXiv 2404.19651; Stutz
      et al. 2022, Learning Optimal Conformal Classifiers, arXiv 2110.09192. Both compute the smoothed quantile
      differently, by a sorting network or a projection; the first also starts from a new last layer.
    """

    sigma: float = 0.25
    epsilon: float = 0.125
    alpha: float = 0.1
    num_noise: int = 8
    size_weight: float = 1.0
    target_size: float = 1.0
    temperature: float = 0.1
    dispersion: float = 0.1

    def __post_init__(self):
        _validate.positive(sigma=self.sigma, temperature=self.temperature, dispersion=self.dispersion)
        _validate.not_negative(epsilon=self.epsilon, size_weight=self.size_weight, target_size=self.target_size)
        _validate.probability(alpha=self.alpha)
        _validate.at_least(1, num_noise=self.num_noise)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics; ``size`` is the mean size of the sets."""
        half = batch.label.shape[0] // 2
        if not half:
            raise ValueError(f"batch must hold at least 2 images, got {batch.label.shape[0]}.")
        images, noise = _images_and_noise(key, batch.image, self.sigma, self.num_noise)
        logits, state = _logits_of_copies(apply, state, images, noise)
        mean = _log_mean_probabilities(logits)
        scores = _normal_quantile(mean)
        rank = max(int(self.alpha * (half + 1)), 1)
        clean = of_label(scores, batch.label)[:half]
        tau = soft_quantile(clean, rank=rank, dispersion=self.dispersion) - self.epsilon / self.sigma
        sets = jax.nn.sigmoid((scores - tau) / self.temperature)
        size = sets[half:].sum(-1)
        missed = (1 - of_label(sets, batch.label)[half:]).mean()
        loss = jnp.log(missed + self.size_weight * jnp.maximum(size - self.target_size, 0).mean() + 1e-8)
        accuracy = (mean.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "size": size.mean()})


conformal_training = ConformalTraining


@_arguments.checked
def soft_quantile(
    values: Float[Array, " n"], *, rank: int | Array, dispersion: float | Array = 0.1
) -> Float[Array, ""]:
    r"""Computes a smooth approximation of the k-th smallest value.

    .. math:: q: \quad \sum_i \mathrm{sigmoid}\Bigl(\frac{q - v_i}{d}\Bigr) = k - \tfrac 1 2

    q tends to the k-th smallest value as d tends to 0. Its gradient, by the implicit function theorem, is a vector of
    weights that sum to 1 and are largest for the values nearest to q.

    Args:
      values: ``(n,)``, floating.
      rank: k, from 1 for the smallest to n; may be traced.
      dispersion: d, positive, in the units of the values; may be traced.

    Returns:
      The scalar q.

    Raises:
      ValueError: for values that are not a vector of at least one, a rank outside 1, ..., n, or a dispersion that is
        not positive.

    Example:
      >>> values = jnp.array([3.0, 1.0, 2.0])
      >>> smallest = jax.jit(jax.value_and_grad(lambda v: losses.soft_quantile(v, rank=1, dispersion=0.5)))
      >>> smooth, weights = smallest(values)
      >>> print(f"{smooth:.2f}", weights)
      0.81 [0.04 0.73 0.23]
    """
    _validate.positive(dispersion=dispersion)
    _validate.at_least(1, rank=rank)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values must be a vector of at least one number, got shape {values.shape}.")
    if not isinstance(rank, jax.core.Tracer) and rank > values.size:
        raise ValueError(f"rank must be at most {values.size}, the number of values, got {rank}.")
    d, target = jnp.asarray(dispersion, values.dtype), jnp.asarray(rank, values.dtype) - 0.5
    below = lambda q, values: jax.nn.sigmoid((q - values) / d)
    fixed = jax.lax.stop_gradient(values)

    def halve(_, ends):
        middle = ends.mean()
        return jnp.where(below(middle, fixed).sum() < target, ends.at[0].set(middle), ends.at[1].set(middle))

    margin = jax.lax.stop_gradient(d) * math.log(2 * values.size)  # wide enough that the root lies between the ends
    ends = jax.lax.fori_loop(0, 40, halve, jnp.stack([fixed.min() - margin, fixed.max() + margin]))
    root = jax.lax.stop_gradient(ends.mean())
    slope = jax.lax.stop_gradient(jax.grad(lambda q: below(q, fixed).sum())(root))
    # One Newton step, whose derivative is the derivative of the implicit function; none where the slope is 0.
    step = (below(root, values).sum() - target) / jnp.where(slope > 0, slope, 1)
    return root - jnp.where(slope > 0, step, 0)
