"""Training of several modalities so that no single modality decides the answer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.losses._classification import cross_entropy, of_label
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
def unimodal_margin(scores: Float[Array, "batch modalities classes"], labels: Int[Array, " batch"]) -> Array:
    r"""Computes a smooth maximum of the label's deficits over all modalities: small where each modality is right.

    .. math:: \ln\Bigl(\sum_m \sum_{k \ne y} e^{\zeta_{mk} - \zeta_{my}} + 10^{-5}\Bigr)

    Args:
      scores: ``(batch, modalities, classes)``, the score of each modality for each class.
      labels: ``(batch,)``, integer.

    Returns:
      ``(batch,)``, at least ln 1e-5.

    Example:
      >>> scores = jnp.array([[[3.0, 1.0], [2.0, 0.0]], [[3.0, 1.0], [0.0, 2.0]]])  # two modalities of two classes
      >>> print(losses.unimodal_margin(scores, labels))  # the second modality is wrong about the second input
      [-1.31  2.02]

    Reference:
      Yang et al. 2024, arXiv 2402.06244.
    """
    scores = in_float32(scores)
    own = jax.vmap(of_label, (1, None), 1)(scores, labels)[..., None]
    other = jnp.arange(scores.shape[-1])[None, None] != labels[:, None, None]
    deficits = jnp.where(other, scores - own, -jnp.inf).reshape(scores.shape[0], -1)
    return jnp.logaddexp(jax.nn.logsumexp(deficits, axis=-1), jnp.log(jnp.asarray(1e-5, scores.dtype)))


@_arguments.checked
def pair_radii(
    scores: Float[Array, "batch modalities classes"],
    labels: Int[Array, " batch"],
    weights: Float[Array, "modalities classes"],
    bias: Float[Array, " classes"],
    constants: Float[Array, "modalities classes"],
    *,
    modality: int | None = None,
) -> Float[Array, "batch classes"]:
    """Radii of :func:`robustjax.certification.multimodal.radius` before the minimum over classes.

    Args:
      scores: ``(batch, modalities, classes)``.
      labels: ``(batch,)``, the classes y.
      weights: ``(modalities, classes)``.
      bias: ``(classes,)``.
      constants: ``(modalities, classes)``.
      modality: index of the modality that changes; None for all.

    Returns:
      ``(batch, classes)``, signed; infinite at y.
    """
    if bias.shape != scores.shape[2:]:
        raise ValueError(f"bias must have shape {scores.shape[2:]}, got {bias.shape}.")
    if modality is not None:
        _validate.at_least(0, below=scores.shape[1], modality=modality)
    logits = (weights[None] * in_float32(scores)).sum(1) + bias[None]
    margins = of_label(logits, labels)[:, None] - logits
    slope = jnp.abs(weights) * constants
    slope = slope if modality is None else slope[modality : modality + 1]
    of_pair = slope.T[labels][:, :, None] + slope[None]
    # The norm is 0 where no score can change: a little more keeps the radius and its gradient finite.
    radii = margins / jnp.sqrt(jnp.square(of_pair).sum(1) + 1e-24)
    return jnp.where(jnp.arange(logits.shape[-1])[None] == labels[:, None], jnp.inf, radii)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalMargin:
    r"""First step of certifiable robust multi-modal training (CRMT): cross-entropy and the margin of each modality.

    .. math:: \mathbb{E}\Bigl[\ell(h(x), y) + \rho \ln\Bigl(\sum_m \sum_{k \ne y} e^{\zeta_{mk} - \zeta_{my}}
              + 10^{-5}\Bigr)\Bigr]

    For models whose features are the scores of each modality, as :func:`robustjax.models.multimodal` makes them.

    Attributes:
      rho: weight of the margins, at least 0.
      num_modalities: number of modalities of the model.

    Example:
      >>> module = models.multimodal(key, hidden=None, image_shape=(2, 2, 1), num_classes=2)
      >>> model = models.functional(module)  # a left and a right half
      >>> loss, aux = jax.jit(losses.multimodal_margin(rho=2.0), static_argnums=1)(key, model.apply, model.state, batch)
      >>> f"loss {loss:.2f}, margin {aux.metrics['unimodal_margin']:.2f}"
      'loss 1.78, margin 0.55'

    Reference:
      Yang et al. 2024, Quantifying and Enhancing Multi-modal Robustness with Modality Preference, arXiv 2402.06244.
    """

    rho: float = 2.0
    num_modalities: int = 2

    def __post_init__(self):
        _validate.not_negative(rho=self.rho)
        _validate.at_least(1, num_modalities=self.num_modalities)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of ``batch``, and the updated state with metrics."""
        outputs, state = apply(state, batch.image, train=True)
        scores = outputs.features.reshape(len(batch.image), self.num_modalities, -1)
        margin = unimodal_margin(scores, batch.label).mean()
        loss = cross_entropy(outputs.logits, batch.label).mean() + self.rho * margin
        accuracy = (outputs.logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy, "unimodal_margin": margin})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultimodalRadius:
    r"""Second step of CRMT: the weights of the modalities that certify the largest mean radius.

    .. math:: -\mathbb{E}\, \min_{j \ne y} r_j(x)

    with the signed radii of :func:`robustjax.certification.multimodal.radius`. The model must be a
    :func:`robustjax.models.multimodal`. Only its ``weights`` get a gradient: mask all other parameters from weight
    decay (``optax.masked``).

    Attributes:
      constants: Lipschitz constants of the scores of the given model, for each modality a tuple with one constant for
        each class. Training the ``weights`` does not change them.

    Example:
      >>> module = models.multimodal(key, hidden=None, image_shape=(2, 2, 1), num_classes=2)
      >>> model = models.functional(module)  # linear encoders, with Lipschitz constants of 1
      >>> objective = losses.multimodal_radius(constants=((1.0, 1.0), (1.0, 1.0)))
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, model.apply, model.state, batch)
      >>> f"mean radius {aux.metrics['radius']:.3f}"
      'mean radius 0.100'

    Reference:
      Yang et al. 2024, arXiv 2402.06244. Differs from the authors' code, which takes for j the runner-up, whose radius
      need not be the smallest, and for the constants the largest gradients seen in training, which are no bounds.
    """

    constants: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        rows = self.constants
        if not (isinstance(rows, tuple) and rows and all(isinstance(row, tuple) for row in rows)):
            raise ValueError(f"constants must be a tuple of tuples of numbers, got {_validate.short(rows)}.")
        for constant in (c for row in rows for c in row):
            _validate.not_negative(constants=constant)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the negative mean radius of ``batch``, and the state with metrics."""
        params = jax.lax.stop_gradient(state.params) | {"weights": state.params["weights"]}
        outputs, state = apply(state._replace(params=params), batch.image, train=True)
        constants = jnp.asarray(self.constants, jnp.float32)
        scores = outputs.features.reshape(len(batch.image), *constants.shape)
        radius = pair_radii(scores, batch.label, params["weights"], params["bias"], constants).min(-1).mean()
        accuracy = (outputs.logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        return -radius, Aux(state, {"loss": -radius, "accuracy": accuracy, "radius": radius})


multimodal_margin = MultimodalMargin
multimodal_radius = MultimodalRadius
