"""Objectives for networks in front of a classifier: denoisers, and the noise predictor of a diffusion model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.losses._classification import cross_entropy
from robustjax.losses._objectives import Aux
from robustjax.perturbations import gaussian_noise
from robustjax.typing import Batch, ModelState, Outputs

Schedule = Literal["cosine", "linear"]
"""How the noise of a diffusion grows with its steps."""


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    r"""Mean squared error of denoised images, per pixel.

    .. math:: \frac 1 d\, \mathbb{E}_{z \sim \mathcal{N}(0, I)} \lVert D(x + \sigma z) - x \rVert_2^2

    Attributes:
      sigma: standard deviation of the noise, in units of [0, 1] images.

    Example:
      >>> loss, aux = losses.denoising.mse(sigma=0.25)(key, denoise, model, batch)
      >>> f"loss {loss:.3f}"
      'loss 0.022'

    Reference:
      Salman et al. 2020, Denoised Smoothing: A Provable Defense for Pretrained Classifiers, arXiv 2003.01908.
    """

    sigma: float = 0.5

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)

    def __call__(
        self, key: Key[Array, ""], apply: Callable, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with ``loss`` as the only metric."""
        images, noisy = _noisy_images(key, batch.image, self.sigma)
        found, state = apply(state, noisy, train=True)
        loss = jnp.square(_checked(found, images) - images).mean()
        return loss, Aux(state, {"loss": loss})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingStability:
    r"""Cross-entropy of a classifier behind the denoiser, with its own answers to the clean images as labels.

    .. math:: \mathbb{E}_{z \sim \mathcal{N}(0, I)}\, \ell\bigl(f(D(x + \sigma z)),\ \arg\max f(x)\bigr)

    No labels are needed. The classifier f is not trained: its arrays are in ``state.batch_stats["classifier"]``, a
    dictionary of ``params`` and ``batch_stats``, so that a compiled step takes them as arguments. Batch statistics of
    the denoiser itself, if any, are in the same dictionary ``state.batch_stats``.

    Attributes:
      classify: f as ``(state, x) -> Outputs``, such as ``outputs`` of :func:`robustjax.models.functional`.
      sigma: standard deviation of the noise, in units of [0, 1] images.

    Example:
      >>> classify = lambda state, x: apply(state, x)[0]
      >>> with_classifier = model._replace(batch_stats={"classifier": state._asdict()})
      >>> objective = losses.denoising.stability(classify=classify, sigma=0.25)
      >>> loss, aux = objective(key, denoise, with_classifier, batch)
      >>> f"loss {loss:.2f}, accuracy {aux.metrics['accuracy']:.2f}"
      'loss 0.47, accuracy 0.50'

    Reference:
      Salman et al. 2020, Denoised Smoothing: A Provable Defense for Pretrained Classifiers, arXiv 2003.01908.
    """

    classify: Callable[[ModelState, Array], Outputs]
    sigma: float = 0.5

    def __post_init__(self):
        _validate.positive(sigma=self.sigma)

    def __call__(
        self, key: Key[Array, ""], apply: Callable, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with metrics; ``accuracy`` is measured under noise."""
        if "classifier" not in state.batch_stats:
            raise ValueError(f"state.batch_stats must hold 'classifier', got {sorted(state.batch_stats)}.")
        frozen = state.batch_stats["classifier"]
        rest = {name: value for name, value in state.batch_stats.items() if name != "classifier"}
        classify = functools.partial(self.classify, ModelState(**frozen))
        images, noisy = _noisy_images(key, batch.image, self.sigma)
        found, state = apply(ModelState(state.params, rest), noisy, train=True)
        logits = classify(_checked(found, images)).logits
        loss = cross_entropy(logits, classify(images).logits.argmax(-1)).mean()
        accuracy = (logits.argmax(-1) == batch.label).mean(dtype=jnp.float32)
        state = state._replace(batch_stats={**state.batch_stats, "classifier": frozen})
        return loss, Aux(state, {"loss": loss, "accuracy": accuracy})


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion:
    r"""Mean squared error of the predicted noise, at a random step of a diffusion.

    .. math:: \frac 1 d\, \mathbb{E}_{t, \epsilon}\, \Bigl\lVert \epsilon - \epsilon_\theta\bigl(\sqrt{\bar\alpha_t}\,
              (2 x - 1) + \sqrt{1 - \bar\alpha_t}\, \epsilon,\ t\bigr) \Bigr\rVert_2^2

    The time is uniform on 0, ..., num_steps - 1, and the network is called as ``apply(state, x_t, t, train=True)``.

    Attributes:
      num_steps: of the diffusion.
      schedule: of :func:`alphas_bar`.

    Example:
      >>> predict = lambda state, x, t, *, train: (state.params["kept"] * x, state)  # half of what it sees is noise
      >>> loss, aux = losses.denoising.diffusion()(key, predict, model, batch)
      >>> f"loss {loss:.2f}"
      'loss 0.78'

    Reference:
      Ho, Jain and Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    """

    num_steps: int = 1000
    schedule: Schedule = "cosine"

    def __post_init__(self):
        alphas_bar(self.num_steps, schedule=self.schedule)

    def __call__(
        self, key: Key[Array, ""], apply: Callable, state: ModelState, batch: Batch
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of ``batch``, and the updated state with ``loss`` as the only metric."""
        time_key, noise_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
        images = batch.image
        share = alphas_bar(self.num_steps, schedule=self.schedule)
        time = jax.random.randint(time_key, images.shape[:1], 0, self.num_steps)
        of_image = lambda values: jnp.asarray(values, jnp.float32)[time].reshape(-1, *(1,) * (images.ndim - 1))
        noise = jax.random.normal(noise_key, images.shape, jnp.float32)
        noisy = of_image(np.sqrt(share)) * (2 * images.astype(jnp.float32) - 1) + of_image(np.sqrt(1 - share)) * noise
        found, state = apply(state, noisy, time, train=True)
        loss = jnp.square(_checked(found, images) - noise).mean()
        return loss, Aux(state, {"loss": loss})


mse = Denoising
stability = DenoisingStability
diffusion = Diffusion


@_arguments.checked
def alphas_bar(num_steps: int = 1000, *, schedule: Schedule = "cosine") -> np.ndarray:
    r"""Computes the share of an image's variance that is left at each step of a diffusion.

    .. math:: \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)

    ``linear``: beta rises from 1e-4 to 0.02 in 1000 steps, and is scaled by 1000 / T for T steps. ``cosine``:
    :math:`\beta_t = \min\bigl(1 - a_{t+1} / a_t,\ 0.999\bigr)` with
    :math:`a_t = \cos^2\bigl(\frac{\pi}{2} \cdot \frac{t / T + 0.008}{1.008}\bigr)`.

    Args:
      num_steps: T, at least 2.
      schedule: ``"cosine"`` or ``"linear"``.

    Returns:
      ``(num_steps,)`` float64 on the host, decreasing, strictly between 0 and 1.

    Raises:
      ValueError: for an unknown schedule, or too few steps: at least 2, and 21 for the linear schedule.

    Example:
      >>> losses.denoising.alphas_bar(4)
      array([0.85, 0.49, 0.14, 0.  ])

    Reference:
      linear: Ho, Jain and Abbeel 2020, arXiv 2006.11239; cosine: Nichol and Dhariwal 2021, Improved Denoising
      Diffusion Probabilistic Models, arXiv 2102.09672.
    """
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"schedule must be 'cosine' or 'linear', got {schedule!r}.")
    _validate.at_least(21 if schedule == "linear" else 2, num_steps=num_steps)
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, num_steps) * 1000 / num_steps
    else:
        a = np.cos(np.pi / 2 * (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008) ** 2
        beta = np.minimum(1 - a[1:] / a[:-1], 0.999)
    return np.cumprod(1 - beta)


def _noisy_images(key: Array, images: Array, sigma: float) -> tuple[Array, Array]:
    """The images, and the images with noise, both float32."""
    return images.astype(jnp.float32), gaussian_noise(jax.random.fold_in(key, 1), images, sigma=sigma)


def _checked(found: Array, images: Array) -> Array:
    if getattr(found, "shape", None) != images.shape:
        got = getattr(found, "shape", type(found).__name__)
        raise ValueError(f"apply must return images of shape {images.shape}, got {got}.")
    return in_float32(found)
