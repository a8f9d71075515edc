"""Training with outliers: rows of a batch with the label -1, inputs that belong to no class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32, log_softmax
from robustjax.losses._classification import check_logits_and_labels, cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
def uniform_cross_entropy(logits: Float[Array, "..."], labels: Array) -> Float[Array, " batch"]:
    r"""Computes the cross-entropy of each example with its label or, for an outlier, with the uniform distribution.

    .. math:: \ln \sum_k e^{f_k(x)} - f_y(x) \quad\text{or}\quad \ln \sum_k e^{f_k(x)} - \frac{1}{K} \sum_k f_k(x)

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer, in ``0, ..., classes - 1``, or negative for an outlier.

    Returns:
      ``(batch,)`` losses; the loss of an outlier is at least :math:`\ln K`, which equal logits attain.

    Raises:
      ValueError: shapes or dtypes do not fit.

    Example:
      >>> print(losses.outliers.uniform_cross_entropy(logits, jnp.array([0, -1])))  # the second is an outlier
      [0.19 1.94]

    Reference:
      Hendrycks, Mazeika and Dietterich 2019, Deep Anomaly Detection with Outlier Exposure, arXiv 1812.04606.
    """
    check_logits_and_labels(logits, labels)
    # A mean of differences, not a difference of means: exact where all logits are large and equal.
    to_uniform = -log_softmax(in_float32(logits)).mean(-1)
    return jnp.where(labels < 0, to_uniform, cross_entropy(logits, jnp.maximum(labels, 0)))


@_arguments.checked
def energy_hinge(
    logits: Float[Array, "..."],
    labels: Array,
    *,
    m_in: float | Float[Array, ""] = -23.0,
    m_out: float | Float[Array, ""] = -5.0,
) -> Float[Array, " batch"]:
    r"""Computes the squared hinge of each example's energy: by how much it violates its margin.

    .. math:: \max(0, E - m_\mathrm{in})^2 \quad\text{or, for an outlier,}\quad \max(0, m_\mathrm{out} - E)^2,
       \qquad E = -\ln \sum_k e^{f_k(x)}

    Args:
      logits: ``(batch, classes)``, floating.
      labels: ``(batch,)``, integer; negative for an outlier, any other value for an example of a class.
      m_in: energy below which an example of a class costs nothing, less than ``m_out``; may be traced.
      m_out: energy above which an outlier costs nothing; may be traced.

    Returns:
      ``(batch,)`` losses, zero where the energy is beyond its margin.

    Raises:
      ValueError: shapes or dtypes do not fit, or ``m_in`` is not less than ``m_out``.

    Example:
      >>> print(-jax.nn.logsumexp(logits, axis=-1))  # energies
      [-3.19 -2.44]
      >>> print(losses.outliers.energy_hinge(logits, jnp.array([0, -1]), m_in=-4.0, m_out=-1.0))
      [0.66 2.07]

    Reference:
      Liu, Wang, Owens and Li 2020, Energy-based Out-of-distribution Detection, arXiv 2010.03759.
    """
    _check_margins(m_in, m_out)
    check_logits_and_labels(logits, labels)
    energy = -jax.nn.logsumexp(in_float32(logits), axis=-1)
    return jnp.square(jax.nn.relu(jnp.where(labels < 0, m_out - energy, energy - m_in)))


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierExposure:
    r"""Cross-entropy, with the uniform distribution as the target of outliers.

    .. math:: \mathbb{E}_\mathrm{in}\, \ell\bigl(f(x), y\bigr)
       + \lambda\, \mathbb{E}_\mathrm{out}\, \ell\bigl(f(x), \tfrac{1}{K}\bigr)

    The first expectation is the mean over the rows with a label, the second the mean over the rows with label -1; a
    group without rows adds 0. Batch normalisation sees both groups together. The metric ``accuracy`` counts only the
    rows with a label; ``outlier_loss`` is the second expectation, at least :math:`\ln K`.

    Attributes:
      weight: weight of the outliers, :math:`\lambda`.

    Example:
      >>> loss, aux = losses.outliers.outlier_exposure(weight=0.5)(key, apply, state, mixed)
      >>> f"loss {loss:.2f}, outlier loss {aux.metrics['outlier_loss']:.2f}"
      'loss 0.47, outlier loss 0.77'

    Reference:
      Hendrycks, Mazeika and Dietterich 2019, Deep Anomaly Detection with Outlier Exposure, arXiv 1812.04606.
    """

    weight: float = 0.5

    def __post_init__(self):
        _validate.positive(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        outputs, state = apply(state, batch.image, train=True)
        losses, known = uniform_cross_entropy(outputs.logits, batch.label), batch.label >= 0
        outlier_loss = _mean(losses, ~known)
        loss = _mean(losses, known) + self.weight * outlier_loss
        accuracy = _mean(outputs.logits.argmax(-1) == batch.label, known)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "outlier_loss": outlier_loss})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyBounded:
    r"""Cross-entropy, with the energy held below one margin for examples of a class and above another for outliers.

    .. math:: \mathbb{E}_\mathrm{in}\, \ell\bigl(f(x), y\bigr) + \lambda \bigl(
       \mathbb{E}_\mathrm{in} \max(0, E(x) - m_\mathrm{in})^2 + \mathbb{E}_\mathrm{out} \max(0, m_\mathrm{out} - E(x))^2
       \bigr), \qquad E(x) = -\ln \sum_k e^{f_k(x)}

    :math:`\mathbb{E}_\mathrm{in}` is the mean over the rows with a label, :math:`\mathbb{E}_\mathrm{out}` the mean over
    the rows with label -1; a group without rows adds 0. Batch normalisation sees both groups together. The metric
    ``accuracy`` counts only the rows with a label; ``energy_loss`` is the term that :math:`\lambda` multiplies.

    The objective fine-tunes a trained model, in the paper for 10 epochs at learning rate 0.001. Choose the margins from
    the energies that the model assigns to training images and outliers: the paper's margins fit a trained Wide ResNet
    on CIFAR-10, and an untrained model's energies are far from them.

    Attributes:
      m_in: energy below which examples of a class cost nothing.
      m_out: energy above which outliers cost nothing.
      weight: weight of the energy terms, :math:`\lambda`.

    Example:
      >>> objective = losses.outliers.energy_bounded(m_in=-1.0, m_out=-0.5)
      >>> loss, aux = objective(key, apply, state, mixed)
      >>> f"loss {loss:.2f}, energy loss {aux.metrics['energy_loss']:.2f}"
      'loss 0.09, energy loss 0.07'

    Reference:
      Liu, Wang, Owens and Li 2020, Energy-based Out-of-distribution Detection, arXiv 2010.03759.
    """

    m_in: float = -23.0
    m_out: float = -5.0
    weight: float = 0.1

    def __post_init__(self):
        _check_margins(self.m_in, self.m_out)
        _validate.positive(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        outputs, state = apply(state, batch.image, train=True)
        known = batch.label >= 0
        bounds = energy_hinge(outputs.logits, batch.label, m_in=self.m_in, m_out=self.m_out)
        energy_loss = _mean(bounds, known) + _mean(bounds, ~known)
        loss = _mean(cross_entropy(outputs.logits, jnp.maximum(batch.label, 0)), known) + self.weight * energy_loss
        accuracy = _mean(outputs.logits.argmax(-1) == batch.label, known)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "energy_loss": energy_loss})


outlier_exposure = OutlierExposure
energy_bounded = EnergyBounded


def _mean(values: Array, rows: Array) -> Array:
    """The mean over some rows, 0 if there are none."""
    return values.sum(where=rows, dtype=jnp.float32) / jnp.maximum(rows.sum(dtype=jnp.float32), 1)


def _check_margins(m_in: float | Array, m_out: float | Array) -> None:
    if isinstance(m_in, jax.core.Tracer) or isinstance(m_out, jax.core.Tracer):
        return
    if not m_in < m_out:
        raise ValueError(f"m_in must be less than m_out, got m_in={m_in!r} and m_out={m_out!r}.")
