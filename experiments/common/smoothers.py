"""Smoothed classifiers: the noise, the training of the base classifier, and certification."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import _blocks, certification, losses, models, perturbations
from robustjax.typing import Apply, Batch, LogitsFn, ModelState, Outputs

from . import classifiers

TRAINING: dict[str, Any] = {
    "gaussian": losses.smoothing.gaussian_augmentation,
    "stability": losses.smoothing.stability,
    "smoothadv": losses.smoothing.smoothadv,
    "macer": losses.smoothing.macer,
    "consistency": losses.smoothing.consistency,
    "smoothmix": losses.smoothing.smoothmix,
}
"""By name: objectives with a ``sigma``."""
SETTINGS = {"train_weight": "weight", "train_epsilon": "epsilon", "train_steps": "steps", "train_draws": "num_noise"}
"""Settings of the experiment, and the fields of the objectives that they set."""
WARMED_UP = {"smoothadv": ("epsilon", 1 / 9), "smoothmix": ("weight", 1 / 9), "macer": ("weight", 0.0)}
"""The field that changes during training, and for which share of the steps by default: ten of the papers' 90 epochs."""


@dataclasses.dataclass(frozen=True)
class OnNoise:
    """Mean cross-entropy on a copy of each image with the noise of a smoothing measure, not clipped."""

    measure: certification.Measure

    def __call__(self, key: jax.Array, apply: Apply, state: ModelState, batch: Batch) -> tuple[jax.Array, losses.Aux]:
        """Returns the loss of ``batch``, and the renewed state with metrics."""
        noisy = jax.vmap(self.measure.sample)(perturbations.image_keys(key, batch.image), batch.image)
        return losses.standard()(key, apply, state, batch._replace(image=noisy))


def measure_of(noise: str, sigma: float, grid: int | None, norm: str | None, dimension: int) -> certification.Measure:
    """The smoothing measure with standard deviation ``sigma`` for images of ``dimension`` numbers."""
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


def objective_of(noise: str, sigma: float, training: str, **settings: Any) -> losses.Objective:
    """The training objective, without noise for sigma 0; ``settings`` as in ``SETTINGS``, None for the default.

    Raises:
      ValueError: a setting or a noise that this training does not have.
    """
    given = {SETTINGS[name]: value for name, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(TRAINING[training])}
    for name in sorted(set(given) - known):
        flag = next(flag for flag, field in SETTINGS.items() if field == name)
        raise ValueError(f"{flag} is not a setting of {training} training, got {given[name]}.")
    if training != "gaussian" and (noise != "gaussian" or not sigma):
        raise ValueError(f"{training} training needs gaussian noise, got {noise} noise with train_sigma {sigma:g}.")
    if not sigma:
        return losses.standard()
    if noise != "gaussian":
        return OnNoise(measure_of(noise, sigma, None, None, 1))
    if training == "smoothmix":  # the paper's on CIFAR-10, at each of its sigmas
        given["step_size"] = 2 * sigma
    return TRAINING[training](sigma=sigma, **given)


def warmed_up(training: str, objective: losses.Objective, share: float | None, num_steps: int) -> losses.Objective:
    """The objective with a warm-up in this share of the steps, None for the default.

    During the warm-up the field in ``WARMED_UP`` grows from 0; the weight of macer stays 0.

    Raises:
      ValueError: this training has no warm-up, or the share lies outside [0, 1).
    """
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"train_warmup must lie in [0, 1), got {share}.")
    if training not in WARMED_UP:
        if share is not None:
            raise ValueError(f"train_warmup is not a setting of {training} training, got {share}.")
        return objective
    name, usual = WARMED_UP[training]
    steps = round((usual if share is None else share) * num_steps)
    if not steps:
        return objective
    begin, steps = (steps, 0) if training == "macer" else (0, steps)
    return losses.scheduled(objective, **{name: losses.ramp(end=getattr(objective, name), begin=begin, steps=steps)})


def halves_of(functional: models.Functional) -> tuple[models.Functional, ...]:
    """The model on each half of a checkerboard, with 0 at the pixels of the other half."""
    return tuple(
        functional._replace(apply=_of_half(functional.apply, i), outputs=_of_half(functional.outputs, i))
        for i in (0, 1)
    )


@functools.cache  # one function for each half of an architecture, so that compiled programs are shared
def _of_half(function: Callable, half: int) -> Callable:
    def of_half(state, x, **kwargs):
        pixels = certification.checkerboard(*x.shape[1:3]) == (half == 0)
        return function(state, jnp.where(pixels[None, :, :, None], x, 0), **kwargs)

    return of_half


def joined(parts: tuple[classifiers.Classifier, ...]) -> classifiers.Classifier:
    """The classifier that adds the probabilities of several."""
    functions = tuple(classifier.functional.outputs for classifier in parts)

    def outputs(states, x):
        found = [function(state, x) for function, state in zip(functions, states, strict=True)]
        log_p = jnp.stack([jax.nn.log_softmax(each.logits) for each in found])
        return Outputs(jax.nn.logsumexp(log_p, axis=0), jnp.concatenate([each.features for each in found], -1))

    functional: Any = parts[0].functional._replace(outputs=outputs)
    states: Any = tuple(classifier.state for classifier in parts)
    return classifiers.Classifier(functional, states, parts[0].mesh)


def largest_radius(measure: Any, *, num_estimation: int, alpha: float, dual: bool = False) -> float:
    """The radius that is certified where all draws agree."""
    if dual:  # each half has its share of the draws and of alpha
        bound = certification.binomial_lower_bound(num_estimation // 2, num_estimation // 2, alpha / 2)
        return float(certification.dual_radius(np.repeat(bound, 2), measure))
    return float(measure.radius(certification.binomial_lower_bound(num_estimation, num_estimation, alpha)))


def default_radii(largest: float) -> tuple[float, ...]:
    """At most 12 multiples of a round number, 0.25 where that suits, below the largest radius that is certified."""
    round_numbers = lambda powers: [a * 10.0**b for b in powers for a in (1, 2, 5)]
    steps = [0.25, 0.5, *round_numbers(range(9))] if largest > 0.5 else round_numbers(range(-6, 0))
    step = next((step for step in steps if largest <= (12 if largest > 3 else 6) * step), steps[-1])
    return tuple((step * np.arange(math.ceil(largest / step))).tolist())


def noisy(logits_fn: LogitsFn, measure: certification.Measure) -> jax.tree_util.Partial:
    """``(key, x) -> logits`` of one image with a draw of noise: what an attack on the smoothed classifier follows."""
    return jax.tree_util.Partial(_noisy(measure), logits_fn)


@functools.cache  # one function for each measure, so that compiled programs are shared
def _noisy(measure: certification.Measure) -> Callable:
    return lambda logits_fn, key, x: logits_fn(measure.sample(key, x[0])[None])


Procedure = Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
"""``(keys, x, warm_up=False) -> label, radius, probability, draws`` of each image; a warm-up takes few draws."""


def procedure(
    logits_fns: tuple[LogitsFn, ...],
    measure: certification.Measure,
    *,
    num_selection: int,
    num_estimation: int,
    alpha: float,
    batch_size: int | None,
    sequential: bool = False,
    target_radius: float | None = None,
) -> Procedure:
    """Certification of a base classifier, or of two by dual smoothing; with a fixed number of draws, or in sequence."""
    common: Any = {"measure": measure, "alpha": alpha}
    of_each = (num_selection + num_estimation) // len(logits_fns)
    # A warm-up takes fewer draws: in the same blocks, so that its program serves all images.
    block_of = lambda x: batch_size or _blocks.of_draws(of_each, x.shape[1:])[0]

    def in_sequence(keys, x, warm_up=False):
        found = certification.certify_sequential(
            keys, logits_fns[0], x, num_selection=num_selection, max_samples=num_estimation,
            target_radius=target_radius, batch_size=batch_size, **common,
        )  # fmt: skip
        return found.label, found.radius, found.probability, found.num_samples

    def fixed(keys, x, warm_up=False):
        selection, estimation = (1, 100) if warm_up else (num_selection, num_estimation)
        found = certification.certify(
            keys, logits_fns[0], x, num_selection=selection, num_estimation=estimation, batch_size=block_of(x), **common
        )
        return found.label, found.radius, found.probability, np.full(len(x), selection + estimation)

    def dual(keys, x, warm_up=False):
        selection, estimation = (1, 50) if warm_up else (num_selection // 2, num_estimation // 2)
        both, draws = (logits_fns[0], logits_fns[1]), {"num_selection": selection, "num_estimation": estimation}
        found = certification.dual(keys, both, x, batch_size=block_of(x), **draws, **common)
        return found.label, found.radius, found.probability.min(-1), np.full(len(x), 2 * (selection + estimation))

    return dual if len(logits_fns) > 1 else in_sequence if sequential or target_radius is not None else fixed
