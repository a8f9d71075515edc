"""Pre-training that makes the features of an image agree at all noise levels (rRCM)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.losses._classification import cross_entropy
from robustjax.losses._objectives import Augment, Aux
from robustjax.typing import Apply, Batch, ModelState


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyPretraining:
    r"""Contrast between two views of an image, and agreement of its features along one noise path; needs no labels.

    .. math:: C\bigl(p(a_0), \bar p(b_0)\bigr) + C\bigl(p(b_0), \bar p(a_0)\bigr) + C\bigl(q(a_i), \mathrm{sg}\,
              q(a_{i+1})\bigr), \qquad a_i = a + t_i \epsilon,\ b_0 = b + t_{\min} \epsilon

    C is :func:`info_nce`; a and b are two augmentations with the same draw of noise; p and q are two projections of the
    features, and the bar denotes an exponential moving average of the trained weights. The index i is random for each
    image, and i + 1 is the next smaller noise level.

    The state comes from :func:`pretraining_state`. Differs from the authors' code in three ways: the network learns the
    noise level only from :func:`precondition`, views have one size, and the number of levels and the decay are
    constant; see :func:`scheduled` for a decay that grows.

    Attributes:
      augment: ``(key, images) -> images``, called twice; None makes a and b the same.
      num_levels: number of noise levels, at least 2; 20 at the start in the paper.
      smallest: t_min, for images in [-1, 1].
      largest: t_max, for images in [-1, 1].
      temperature: temperature of the similarities.
      decay: decay of the moving average, in [0, 1]; in the paper from 0.99 to 0.9999.

    Example:
      >>> pretraining = losses.rrcm.pretraining_state(key, state, num_features=4)
      >>> objective = losses.rrcm.consistency_pretraining()
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, pretraining, batch)
      >>> f"contrast {aux.metrics['contrast']:.2f}, consistency {aux.metrics['consistency']:.2f}"
      'contrast 0.01, consistency 0.11'

    Reference:
      Lei et al. 2025, Robust Representation Consistency Model via Contrastive Denoising, arXiv 2501.13094.
    """

    augment: Augment | None = None
    num_levels: int = 20
    smallest: float = 0.002
    largest: float = 80.0
    temperature: float = 0.2
    decay: float = 0.99

    def __post_init__(self):
        _validate.at_least(2, num_levels=self.num_levels)
        noise_levels(self.num_levels, smallest=self.smallest, largest=self.largest)
        _validate.positive(temperature=self.temperature)
        _validate.not_negative(decay=self.decay)
        if not isinstance(self.decay, jax.core.Tracer) and self.decay > 1:
            raise ValueError(f"decay must be at most 1, got {self.decay}.")

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics ``loss``, ``contrast``, ``consistency``."""
        if "target" not in state.batch_stats:
            raise ValueError(f"state.batch_stats must hold 'target', got {sorted(state.batch_stats)}.")
        keys = jax.random.split(key, 4)
        views = [batch.image if self.augment is None else self.augment(k, batch.image) for k in keys[:2]]
        a, b = (view.astype(jnp.float32) for view in views)
        levels = jnp.asarray(noise_levels(self.num_levels, smallest=self.smallest, largest=self.largest), jnp.float32)
        noise = jax.random.normal(keys[2], a.shape, jnp.float32) / 2  # of t = 1
        index = jax.random.randint(keys[3], a.shape[:1], 0, self.num_levels - 1)

        def features(params: Any, *pairs: tuple[Array, Array]) -> list[Array]:
            """Features of images at noise levels, by one pass."""
            inputs = [precondition(x + t.reshape(-1, 1, 1, 1) * noise, t) for x, t in pairs]
            model = ModelState(params["model"], state.batch_stats["model"])
            outputs, renewed = apply(model, jnp.concatenate(inputs), train=True)
            stats.append(renewed.batch_stats)
            return jnp.split(in_float32(outputs.features), len(pairs))

        stats: list[Any] = []
        least = jnp.broadcast_to(levels[-1], index.shape)
        params, target = state.params, state.batch_stats["target"]
        of_a, of_b, noisier = features(params, (a, least), (b, least), (a, levels[index]))
        # The average already includes the current weights, which this step's gradient has not changed yet.
        target = jax.tree.map(
            lambda mean, new: self.decay * mean + (1 - self.decay) * jax.lax.stop_gradient(new), target, params
        )
        fixed = jax.lax.stop_gradient(params)
        mean_a, mean_b = features(target, (a, least), (b, least))
        (cleaner,) = features(fixed, (a, levels[index + 1]))
        p, mean_p = (_project(weights["contrast"]) for weights in (params, target))
        q, fixed_q = (_project(weights["consistency"]) for weights in (params, fixed))
        contrast = info_nce(p(of_a), mean_p(mean_b), temperature=self.temperature)
        contrast = (contrast + info_nce(p(of_b), mean_p(mean_a), temperature=self.temperature)).mean()
        consistency = info_nce(q(noisier), fixed_q(cleaner), temperature=self.temperature).mean()
        loss = contrast + consistency
        state = ModelState(params, {"target": target, "model": stats[0]})
        return loss, Aux(state, {"loss": loss, "contrast": contrast, "consistency": consistency})


consistency_pretraining = ConsistencyPretraining


@dataclasses.dataclass(frozen=True)
class Preconditioned:
    """A model at one noise level: ``function(state, x)`` of inputs that :func:`precondition` has scaled.

    Use it instead of the model for fine-tuning and certification. Two with equal arguments are equal.

    Attributes:
      function: ``(state, x, ...)``, such as ``apply`` and ``outputs`` of :func:`robustjax.models.functional`.
      sigma: standard deviation of the noise, in units of [0, 1] images; t is twice sigma.

    Example:
      >>> noisy_apply = losses.rrcm.preconditioned(apply, sigma=0.5)
      >>> outputs, _ = noisy_apply(state, image)
      >>> print(outputs.logits[:, 1])  # the logits of apply, divided by sqrt(1.25)
      [-1.07  0.36]
    """

    function: Callable[..., Any]
    sigma: float

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)

    def __call__(self, state: ModelState, x: Float[Array, "batch ..."], **settings: Any) -> Any:
        """Returns ``function(state, scaled x, **settings)``."""
        return self.function(state, precondition(x, jnp.full(x.shape[:1], 2 * self.sigma, jnp.float32)), **settings)


preconditioned = Preconditioned


@_arguments.checked
def precondition(x: Float[Array, "batch ..."], t: Float[Array, " batch"]) -> Float[Array, "batch ..."]:
    r"""Computes the network's inputs from noisy images: scales them to the same contrast at all noise levels.

    .. math:: \tfrac 1 2 + \frac{x - \tfrac 1 2}{\sqrt{t^2 + 0.25}}

    Args:
      x: ``(batch, ...)`` images in [0, 1] with noise of standard deviation t / 2, not clipped.
      t: ``(batch,)`` noise levels, for images in [-1, 1].

    Returns:
      An array of the shape of ``x``.

    Example:
      >>> x = jnp.array([[0.0, 1.0], [0.0, 1.0]])
      >>> print(losses.rrcm.precondition(x, jnp.array([0.0, 2.0])))
      [[-0.5   1.5 ]
       [ 0.26  0.74]]

    Reference:
      Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, where
      images in [-1, 1] have the standard deviation 1/2.
    """
    return 0.5 + (x - 0.5) / jnp.sqrt(t**2 + 0.25).reshape(-1, *(1,) * (x.ndim - 1))


@_arguments.checked
def noise_levels(num: int = 20, *, smallest: float = 0.002, largest: float = 80.0) -> np.ndarray:
    r"""Computes the noise levels of a path, from the largest to the smallest.

    .. math:: t_i = \Bigl(t_{\max}^{1/7} + \frac{i}{N - 1} \bigl(t_{\min}^{1/7} - t_{\max}^{1/7}\bigr)\Bigr)^7

    Args:
      num: N, at least 2.
      smallest: t_min, for images in [-1, 1].
      largest: t_max, for images in [-1, 1].

    Returns:
      ``(num,)`` float64 on the host, decreasing.

    Raises:
      ValueError: for an argument out of its range, or a largest level that is not above the smallest.

    Example:
      >>> print(losses.rrcm.noise_levels(5, smallest=0.01))
      [80.   19.81  3.46  0.34  0.01]

    Reference:
      Karras et al. 2022, arXiv 2206.00364.
    """
    _validate.at_least(2, num=num)
    _validate.positive(smallest=smallest, largest=largest)
    if smallest >= largest:
        raise ValueError(f"largest must be above smallest={smallest}, got {largest}.")
    return np.linspace(largest ** (1 / 7), smallest ** (1 / 7), num) ** 7


@_arguments.checked
def info_nce(
    queries: Float[Array, "batch dim"], keys: Float[Array, "batch dim"], *, temperature: float = 0.2
) -> Float[Array, " batch"]:
    r"""Computes the loss of finding each query's own key among all keys of the batch.

    .. math:: -\ln \frac{e^{\cos(q_i, k_i) / \tau}}{\sum_j e^{\cos(q_i, k_j) / \tau}}

    Args:
      queries: ``(batch, dim)``.
      keys: ``(batch, dim)``; row i is the key of query i.
      temperature: tau.

    Returns:
      ``(batch,)`` losses.

    Raises:
      ValueError: for a temperature that is not positive, or shapes that differ.

    Example:
      >>> queries, keys = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(losses.info_nce(queries, keys, temperature=1.0))
      [0.56 0.4 ]

    Reference:
      van den Oord, Li and Vinyals 2018, Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748.
    """
    _validate.positive(temperature=temperature)
    if queries.shape != keys.shape:
        raise ValueError(f"queries and keys must have one shape, got {queries.shape} and {keys.shape}.")
    # The square root has no gradient at 0: rows of zeros get a norm of 1e-6.
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
    similarity = unit(in_float32(queries)) @ unit(in_float32(keys)).T / temperature
    return cross_entropy(similarity, jnp.arange(similarity.shape[0]))


@_arguments.checked
def pretraining_state(
    key: Key[Array, ""], model: ModelState, *, num_features: int, width: int = 128, dim: int = 64
) -> ModelState:
    """Makes the state of :func:`consistency_pretraining` from the state of a model.

    Args:
      key: typed PRNG key for the projections.
      model: state of the model; :func:`pretrained_model` takes it out again after training.
      num_features: size of ``Outputs.features``.
      width: size of the hidden layer of each projection.
      dim: size of the output of each projection.

    Returns:
      A state with the parameters ``model``, ``contrast`` and ``consistency`` (the two projections), and the batch
      statistics ``model`` and ``target``, the moving average of all parameters, which starts at their values.

    Example:
      >>> pretraining = losses.rrcm.pretraining_state(key, state, num_features=4)
      >>> sorted(pretraining.params), sorted(pretraining.batch_stats)
      (['consistency', 'contrast', 'model'], ['model', 'target'])
    """
    _validate.key(key)
    _validate.at_least(1, num_features=num_features, width=width, dim=dim)

    def projection(key: Array) -> dict[str, Array]:
        first, second = jax.random.split(key)
        scaled = lambda key, inputs, outputs: jax.random.normal(key, (inputs, outputs)) * math.sqrt(2 / inputs)
        return {
            "hidden": scaled(first, num_features, width),
            "bias": jnp.zeros((1, width)),
            "out": scaled(second, width, dim),
        }

    names = ("contrast", "consistency")
    projections = {name: projection(k) for name, k in zip(names, jax.random.split(key), strict=True)}
    params = {"model": model.params, **projections}
    return ModelState(params, {"target": jax.tree.map(jnp.copy, params), "model": model.batch_stats})


@_arguments.checked
def pretrained_model(state: ModelState) -> ModelState:
    """Takes the model out of a pre-training state.

    Args:
      state: a trained state from :func:`pretraining_state`.

    Returns:
      The state of the model only, with the trained weights, not their moving average.

    Example:
      >>> pretraining = losses.rrcm.pretraining_state(key, state, num_features=4)
      >>> list(losses.rrcm.pretrained_model(pretraining).params)
      ['kernel']
    """
    return ModelState(state.params["model"], state.batch_stats["model"])


def _project(weights: dict[str, Array]) -> Callable[[Array], Array]:
    return lambda features: jax.nn.relu(features @ weights["hidden"] + weights["bias"]) @ weights["out"]
