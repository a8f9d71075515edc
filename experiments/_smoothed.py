"""What the noise of a smoothed classifier is, and how its base classifier is trained for it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from experiments import _classifier
from robustjax import certification, losses, perturbations

TRAINING: dict[str, Any] = {
    "gaussian": losses.gaussian_augmentation,
    "stability": losses.stability,
    "smoothadv": losses.smoothadv,
    "macer": losses.macer,
    "consistency": losses.consistency,
    "smoothmix": losses.smoothmix,
}
"""By name: objectives with a ``sigma``."""
SETTINGS = {"train_weight": "weight", "train_epsilon": "epsilon", "train_steps": "steps", "train_draws": "num_noise"}
"""Settings of the experiment, and of the objectives that have them."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a smoothing measure as an augmentation."""

    measure: certification.Measure

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Returns a noisy copy of each image, not clipped."""
        return jax.vmap(self.measure.sample)(perturbations.image_keys(key, images), images)


def measure_of(noise: str, sigma: float, grid: int | None, norm: str | None, dimension: int) -> certification.Measure:
    """The smoothing measure with this standard deviation, of images with so many numbers."""
    if noise != "gaussian" and grid is not None:
        raise ValueError(f"grid is for gaussian noise, got grid {grid} with {noise} noise.")
    if noise == "uniform":
        measure = certification.uniform(sigma * math.sqrt(3))
    elif noise == "laplace":
        measure = certification.laplace(sigma / math.sqrt(2))
    else:
        measure = certification.gaussian(sigma, None if grid is None else 1 / (255 * grid))
    if norm is None or norm == measure.norm:
        return measure
    return certification.in_norm(measure, norm, dimension)


def objective_of(noise: str, sigma: float, training: str, *, augment: bool, **settings: Any) -> losses.Objective:
    """What is minimised; without noise for sigma 0. ``settings`` are those of ``SETTINGS``, None for the objective's.

    Raises:
      ValueError: a setting that this training does not have, or noise that it is not made for.
    """
    images = _classifier.augmentation() if augment else None
    given = {SETTINGS[name]: value for name, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(TRAINING[training])}
    for name in sorted(set(given) - known):
        flag = next(flag for flag, field in SETTINGS.items() if field == name)
        raise ValueError(f"{flag} is no setting of {training} training, got {given[name]}.")
    if training != "gaussian" and (noise != "gaussian" or not sigma):
        raise ValueError(f"{training} training needs gaussian noise, got {noise} noise with train_sigma {sigma:g}.")
    if not sigma:
        return losses.standard(augment=images)
    if noise != "gaussian":
        noisy = Noise(measure_of(noise, sigma, None, None, 1))
        return losses.standard(augment=noisy if images is None else perturbations.compose(images, noisy))
    if training == "smoothmix":  # the paper's on CIFAR-10, at each of its sigmas
        given["step_size"] = 2 * sigma
    return TRAINING[training](sigma=sigma, augment=images, **given)
