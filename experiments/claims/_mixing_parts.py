"""Answers of mixtures under attack; and certificates of the mixture with a smoothed classifier, attacked as well."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import classifiers, subsets
from robustjax import attacks, certification, data
from robustjax.certification import mixing

BLOCK = 250
NUM_ANSWERED, VOTES_OF_ANSWER = 1000, 1000
"""Images behind the clean accuracies, at most, and noisy copies behind each answer without a certificate."""


def answers_of(logits_fn: Callable, image: np.ndarray) -> np.ndarray:
    """The classes of images."""
    logits = subsets.in_blocks(functools.partial(_logits, logits_fn), BLOCK, image)
    if not np.isfinite(logits).all():
        raise ValueError(f"logits are not finite at {(~np.isfinite(logits)).any(-1).sum()} of {len(image)} images.")
    return logits.argmax(-1)


_logits = jax.jit(lambda logits_fn, x: logits_fn(x))


def stands(
    key: jax.Array, attack: Any, seen: Callable, image: np.ndarray, label: np.ndarray, whole: Callable | None = None
) -> np.ndarray:
    """Which answers of ``whole`` are right, on the images and on what an attack on ``seen`` makes of them."""
    x_adv = subsets.in_blocks(lambda x, y: attack(key, seen, x, y), BLOCK, image, label)
    return (answers_of(whole or seen, image) == label) & (answers_of(whole or seen, x_adv) == label)


def certify(
    config: Any, found: dict[str, classifiers.Classifier], test: data.Dataset, key: jax.Array
) -> dict[str, np.ndarray]:
    """Answers to many images, certificates of some, and what attacks within the radii of these change."""
    standard, smoothed = found["standard"], found["smoothed"]
    measure, alpha = certification.gaussian(config.sigma), config.certified_alpha

    def votes(key: jax.Array, image: np.ndarray, num_samples: int, first_sample: int = 0) -> np.ndarray:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
        some = {"num_samples": num_samples, "first_sample": first_sample}
        counts = np.asarray(certification.sample_counts(keys, smoothed.logits_fn(), image, measure, **some))
        if (lost := num_samples - counts.sum(-1)).any():
            raise ValueError(f"the smoothed model gave logits that are not finite for {lost.sum()} noisy copies.")
        return counts

    def answers(image: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        logits = np.asarray(classifiers.outputs_of(standard, image).logits, np.float64)
        weights = np.exp(config.standard_scale * (logits - logits.max(-1, keepdims=True)))
        mixed = (1 - alpha) * weights / weights.sum(-1, keepdims=True) + alpha * counts / counts.sum(-1, keepdims=True)
        return {"standard": logits.argmax(-1), "smoothed": counts.argmax(-1), "mixture": mixed.argmax(-1)}

    answer_key, counts_key, attack_key, judge_key = jax.random.split(key, 4)
    image, label, _ = (np.asarray(part) for part in test[subsets.evenly(len(test), NUM_ANSWERED)])
    answered = answers(image, votes(answer_key, image, VOTES_OF_ANSWER))
    arrays = {"answered_label": label, **{f"answered_{name}": answer for name, answer in answered.items()}}

    most = config.num_certified or (100 if config.dataset == "digits" else len(test))
    image, label, ids = (np.asarray(part) for part in test[subsets.evenly(len(test), most)])
    selection = votes(counts_key, image, config.num_selection)
    estimation = votes(counts_key, image, config.num_estimation, config.num_selection)
    alone = certification.certificate_from_counts(selection, estimation, measure, alpha=config.failure)
    bounds = mixing.bounds_from_counts(selection, estimation, alpha=config.failure)
    radius = mixing.smoothed_radius(bounds.first, bounds.second, alpha=alpha, sigma=config.sigma)
    attacked = np.flatnonzero(radius)
    changed, excess = np.zeros(0, bool), np.zeros(0)
    if attacked.size:
        noisy = _noisy(standard.functional.outputs, smoothed.functional.outputs, measure, config.standard_scale)
        seen = jax.tree_util.Partial(noisy, (standard.state, smoothed.state), jnp.float32(alpha))
        attack, x_adv = attacks.pgd(epsilon=1.0, norm="l2", steps=20, keep="last", samples=16), []
        for i in attacked:  # each within its own radius, which compiles once
            inside = dataclasses.replace(attack, epsilon=float(radius[i]) * 0.999)
            x_adv.append(np.asarray(inside(attack_key, seen, image[i : i + 1], bounds.label[i : i + 1])))
        images = np.concatenate(x_adv)
        filled = np.concatenate([images, image[len(images) :]])  # one program serves, however many there are
        counts = votes(judge_key, filled, VOTES_OF_ANSWER)[: len(images)]
        changed = answers(images, counts)["mixture"] != bounds.label[attacked]
        shares = counts / counts.sum(-1, keepdims=True)
        its = np.arange(counts.shape[-1]) == bounds.label[attacked][:, None]
        excess = shares[its] - np.where(its, 0, shares).max(-1) - (1 - alpha) / alpha
    return arrays | {
        "id": ids, "label": label, "smoothed_label": alone.label, "smoothed_radius": alone.radius,
        "mixture_label": np.where(radius > 0, bounds.label, certification.ABSTAIN), "mixture_radius": radius,
        "changed": changed, "excess": excess,
    }  # fmt: skip


@functools.cache
def _noisy(standard: Callable, smoothed: Callable, measure: certification.Measure, scale: float) -> Callable:
    """The mixture with one draw of noise, whose mean probabilities an attack follows."""

    def logits(states, alpha, key, x):
        of_noise = smoothed(states[1], measure.sample(key, x[0])[None]).logits
        return mixing.mix(standard(states[0], x).logits, of_noise, alpha=alpha, standard_scale=scale)

    return logits
