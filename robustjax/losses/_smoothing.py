"""Objectives that train a base classifier for randomized smoothing, which asks it about noisy images."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32, log_softmax
from robustjax.losses._classification import cross_entropy, of_label, soft_cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.typing import Apply, Batch, ModelState

_SMALLEST_NORM = 1e-30


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    r"""Cross-entropy on the image, and the cross-entropy between the predictions without and with noise.

    .. math:: \ell\bigl(f(x), y\bigr) - \lambda \sum_c \mathrm{softmax}_c f(x) \ln \mathrm{softmax}_c f(x + d)

    Gradients flow through both predictions.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      weight: lambda, at least 0.

    Example:
      >>> objective = losses.smoothing.stability(sigma=0.25)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 1.48, accuracy 0.50'

    Reference:
      Li et al. 2019, Certified Adversarial Robustness with Additive Noise, arXiv 1809.03113.
    """

    sigma: float = 0.5
    weight: float = 2.0

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        images, noise = _images_and_noise(key, batch.image, self.sigma, 1)
        outputs, state = apply(state, images, train=True)
        noisy, state = _logits_of_copies(apply, state, images, noise)
        divergence = soft_cross_entropy(noisy[:, 0], jnp.exp(log_softmax(in_float32(outputs.logits)))).mean()
        loss = cross_entropy(outputs.logits, batch.label).mean() + self.weight * divergence
        return loss, _aux(state, loss, noisy, batch.label)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    r"""Cross-entropy under noise, and the divergence of the predictions for copies of one image from their mean.

    .. math:: \frac 1 m \sum_i \Bigl[\ell(f_i, y) + \lambda\, \mathrm{KL}(p \,\|\, p_i)\Bigr] + \eta\, H(p)

    Gradients also flow through the mean p. If lambda is too large, the model gives the same answer everywhere.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      num_noise: m, copies of each image, at least 2.
      weight: lambda, at least 0; in the paper 10 or 20 for CIFAR-10 at sigma 0.25, and 5 to 10 at larger sigma.
      entropy_weight: eta, at least 0.

    Example:
      >>> objective = losses.smoothing.consistency(sigma=0.25)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.88, accuracy 1.00'

    Reference:
      Jeong and Shin 2020, Consistency Regularization for Certified Robustness of Smoothed Classifiers,
      arXiv 2006.04062.
    """

    sigma: float = 0.5
    num_noise: int = 2
    weight: float = 10.0
    entropy_weight: float = 0.5

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)
        _validate.at_least(2, num_noise=self.num_noise)
        _validate.not_negative(weight=self.weight, entropy_weight=self.entropy_weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        images, noise = _images_and_noise(key, batch.image, self.sigma, self.num_noise)
        logits, state = _logits_of_copies(apply, state, images, noise)
        log_p, log_mean = log_softmax(logits), _log_mean_probabilities(logits)
        mean = jnp.exp(log_mean)
        divergence = (mean[:, None] * (log_mean[:, None] - log_p)).sum(-1).mean()
        entropy = -(mean * log_mean).sum(-1).mean()
        loss = _cross_entropy_of_copies(logits, batch.label).mean()
        loss += self.weight * divergence + self.entropy_weight * entropy
        return loss, _aux(state, loss, logits, batch.label)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MACER:
    r"""Cross-entropy of the mean prediction, and a hinge on the certified radius where that prediction is right.

    .. math:: -\ln p_y + \frac{\lambda \sigma}{2}\, \bigl(\gamma - \xi\bigr)\, 1[\hat y = y,\ |\xi| \le \gamma],
              \qquad \xi = \Phi^{-1}(z_{\hat y}) - \Phi^{-1}(z_{(2)})

    z is the mean of ``softmax(beta f_i)``, close to the share of votes, and :math:`\sigma \xi / 2` is the radius.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      num_noise: number of copies of each image.
      weight: lambda, at least 0; in the paper 12 for CIFAR-10 at sigma 0.25 and 4 at 0.5; 16 for MNIST, after a first
        third of the training with 0.
      beta: inverse temperature of the soft votes.
      gamma: radius, in units of sigma / 2, beyond which the hinge is 0.

    Example:
      >>> objective = losses.smoothing.macer(sigma=0.25)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 4.82, accuracy 1.00'

    Reference:
      Zhai et al. 2020, MACER: Attack-free and Scalable Robust Training via Maximizing Certified Radius,
      arXiv 2001.02378.
    """

    sigma: float = 0.5
    num_noise: int = 16
    weight: float = 12.0
    beta: float = 16.0
    gamma: float = 8.0

    def __post_init__(self):
        _validate.positive(sigma=self.sigma, beta=self.beta, gamma=self.gamma)
        _validate.at_least(1, num_noise=self.num_noise)
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        images, noise = _images_and_noise(key, batch.image, self.sigma, self.num_noise)
        logits, state = _logits_of_copies(apply, state, images, noise)
        log_likelihood = of_label(_log_mean_probabilities(logits), batch.label)
        votes = _log_mean_probabilities(self.beta * logits)
        first, second = _normal_quantile(jax.lax.top_k(votes, 2)[0]).T
        xi = first - second
        active = (votes.argmax(-1) == batch.label) & (jnp.abs(xi) <= self.gamma)
        hinge = jnp.where(active, self.sigma / 2 * (self.gamma - jnp.where(active, xi, self.gamma)), 0.0)
        loss = -log_likelihood.mean() + self.weight * hinge.mean()
        return loss, _aux(state, loss, logits, batch.label)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothAdv:
    r"""Cross-entropy under noise around an adversarial image of the smoothed classifier.

    .. math:: \frac 1 m \sum_i \ell\bigl(f(x' + d_i), y\bigr), \qquad
              x' = \arg\max_{\lVert x' - x \rVert_2 \le \epsilon} -\ln \frac 1 m \sum_i p_y(x' + d_i)

    The attack takes ``steps`` gradient steps of length 2 epsilon / steps on the model at inference, with the same noise
    in all steps and in the loss; x' stays in [0, 1]. Maximising the mean of the cross-entropies would be a different,
    weaker attack. The authors let epsilon grow over the first ten epochs; here it is constant, see :func:`scheduled`.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      epsilon: radius of the attack, l2, in units of [0, 1] images.
      steps: number of steps of the attack.
      num_noise: m, number of copies of each image.

    Example:
      >>> objective = losses.smoothing.smoothadv(sigma=0.25, epsilon=0.5, num_noise=2)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 1.27, accuracy 0.50'

    Reference:
      Salman et al. 2019, Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers,
      arXiv 1906.04584.
    """

    sigma: float = 0.5
    epsilon: float = 1.0
    steps: int = 10
    num_noise: int = 4

    def __post_init__(self):
        _validate.positive(sigma=self.sigma, epsilon=self.epsilon)
        _validate.at_least(1, steps=self.steps, num_noise=self.num_noise)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        key, attack_key = jax.random.split(key)
        images, noise = _images_and_noise(key, batch.image, self.sigma, self.num_noise)
        step_size = 2 * self.epsilon / self.steps
        hard = _ascend(attack_key, apply, state, images, batch.label, noise, self.steps, step_size, self.epsilon)
        logits, state = _logits_of_copies(apply, state, hard, noise)
        loss = _cross_entropy_of_copies(logits, batch.label).mean()
        return loss, _aux(state, loss, logits, batch.label)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothMix:
    r"""Cross-entropy under noise, and less confident targets on the way to an adversarial image.

    .. math:: \frac 1 m \sum_i \Bigl[\ell(f_i, y) + \eta\, 1[\hat y = y]\, \mathrm{KL}\bigl((1 - \lambda)\, p +
              \lambda / K \,\|\, p(x_\lambda + d_i)\bigr)\Bigr], \qquad x_\lambda = (1 - \lambda)\, x + \lambda\, x'

    x' is ``steps`` gradient steps of length ``step_size`` away, which maximise the loss of the :func:`smoothadv` attack
    within [0, 1] and without another bound. Each image draws its lambda uniformly from [0, 1/2]. Gradients flow through
    p. The authors' option to start from a one-step adversarial image is left out.

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.
      weight: eta, at least 0.
      steps: number of steps of the attack.
      step_size: l2, in units of [0, 1] images; in the paper for CIFAR-10 0.5, 1 and 2 at sigma 0.25, 0.5 and 1.
      num_noise: m, number of copies of each image.

    Example:
      >>> objective = losses.smoothing.smoothmix(sigma=0.25, step_size=0.5)
      >>> loss, aux = jax.jit(objective, static_argnums=1)(key, apply, state, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 2.32, accuracy 1.00'

    Reference:
      Jeong et al. 2021, SmoothMix: Training Confidence-calibrated Smoothed Classifiers for Certified Robustness,
      arXiv 2111.09277.
    """

    sigma: float = 0.5
    weight: float = 5.0
    steps: int = 4
    step_size: float = 1.0
    num_noise: int = 2

    def __post_init__(self):
        _validate.positive(sigma=self.sigma, step_size=self.step_size)
        _validate.at_least(1, steps=self.steps, num_noise=self.num_noise)
        _validate.not_negative(weight=self.weight)

    def __call__(
        self, key: Key[Array, ""], apply: Apply, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics."""
        key, attack_key, share_key = jax.random.split(key, 3)
        images, noise = _images_and_noise(key, batch.image, self.sigma, self.num_noise)
        far = _ascend(attack_key, apply, state, images, batch.label, noise, self.steps, self.step_size, math.inf)
        share = jax.random.uniform(share_key, (images.shape[0],), maxval=0.5)
        of_images = lambda a: a.reshape(-1, *(1,) * (images.ndim - 1))
        logits, state = _logits_of_copies(apply, state, images, noise)
        mixed = images + of_images(share) * (far - images)
        mixed_logits, state = _logits_of_copies(apply, state, mixed, noise)
        mean = jnp.exp(_log_mean_probabilities(logits))
        target = (1 - share)[:, None] * mean + share[:, None] / logits.shape[-1]
        log_target = jnp.log(jnp.maximum(target, jnp.finfo(target.dtype).tiny))
        divergence = (target[:, None] * (log_target[:, None] - log_softmax(mixed_logits))).sum(-1).mean(1)
        right = mean.argmax(-1) == batch.label
        loss = _cross_entropy_of_copies(logits, batch.label).mean()
        loss += self.weight * jnp.where(right, divergence, 0.0).mean()
        return loss, _aux(state, loss, logits, batch.label)


stability = Stability
consistency = Consistency
macer = MACER
smoothadv = SmoothAdv
smoothmix = SmoothMix


def _images_and_noise(key, images, sigma, num_noise) -> tuple[Array, Array]:
    """Images ``(batch, ...)`` and noise for them ``(batch, num_noise, ...)``, both float32."""
    shape = (images.shape[0], num_noise, *images.shape[1:])
    return images.astype(jnp.float32), sigma * jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.float32)


def _logits_of_copies(apply, state, images, noise, *, train=True) -> tuple[Array, ModelState]:
    """``(batch, num_noise, classes)`` by one pass, so that batch statistics cover all copies."""
    copies = (images[:, None] + noise).reshape(-1, *images.shape[1:])
    outputs, state = apply(state, copies, train=train)
    return in_float32(outputs.logits).reshape(*noise.shape[:2], -1), state


def _log_mean_probabilities(logits: Array) -> Array:
    """``(batch, classes)`` of ``(batch, num_noise, classes)``."""
    log_p = log_softmax(logits)
    log_mean = jax.nn.logsumexp(log_p, axis=1) - math.log(logits.shape[1])
    near_1 = log_mean > -0.5  # where 1 - p is the number that keeps its digits
    doubt = -jnp.expm1(jnp.where(near_1[:, None], log_p, 0)).mean(1)
    return jnp.where(near_1, jnp.log1p(-doubt), log_mean)


def _normal_quantile(log_p: Array) -> Array:
    """The standard normal quantile of p, kept 1e-7 from 0 and 1: finite, as is its gradient; from 1 - p near 1."""
    near_1 = log_p > -0.5
    tail = jnp.clip(jnp.where(near_1, -jnp.expm1(log_p), jnp.exp(log_p)), 1e-7, 1)
    return jnp.where(near_1, -1, 1) * jax.scipy.special.ndtri(tail)


def _cross_entropy_of_copies(logits: Array, labels: Array) -> Array:
    """``(batch, num_noise)``."""
    return jax.vmap(cross_entropy, (1, None), 1)(logits, labels)


def _ascend(key, apply, state, images, labels, noise, steps, step_size, epsilon) -> Array:
    """Images with a higher ``-ln p_y``: normalised gradient steps, in [0, 1] and within epsilon."""
    # The direction of a step where the gradient is 0, which would otherwise leave the image where it is.
    stray = jax.random.normal(key, images.shape, jnp.float32)
    norm = lambda a: jnp.sqrt((a**2).sum(range(1, a.ndim), keepdims=True))

    def loss(delta):
        log_mean = _log_mean_probabilities(_logits_of_copies(apply, state, images + delta, noise, train=False)[0])
        return -jnp.take_along_axis(log_mean, labels[:, None], axis=-1).sum()

    def step(_, delta):
        gradient = jax.grad(loss)(delta)
        largest = jnp.abs(gradient).max(range(1, gradient.ndim), keepdims=True)
        gradient = gradient / jnp.where(largest > 0, largest, 1)  # squares of small gradients vanish
        direction = jnp.where(largest > 0, gradient / jnp.maximum(norm(gradient), 1), stray / norm(stray))
        delta = jnp.clip(images + delta + step_size * direction, 0, 1) - images
        return delta * jnp.minimum(1, epsilon / jnp.maximum(norm(delta), _SMALLEST_NORM))

    delta = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(images))
    return jax.lax.stop_gradient(images + delta)


def _aux(state: ModelState, loss: Array, logits: Array, labels: Array) -> Aux:
    answer = _log_mean_probabilities(logits).argmax(-1)
    return Aux(state, {"loss": loss, "accuracy": (answer == labels).mean(dtype=jnp.float32)})
