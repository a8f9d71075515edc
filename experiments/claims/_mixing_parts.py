"""Answers of mixtures under attack; and certificates of the mixture with a smoothed classifier, attacked as well."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import attacks, certification, data
from robustjax.certification import mixing

from ..common import classifiers, smoothers, subsets

BLOCK = 250
NUM_ANSWERED, VOTES_OF_ANSWER = 1000, 1000
"""Images behind the clean accuracies, at most, and noisy copies behind each answer without a certificate."""
RADII = (0.0, 0.25, 0.5, 0.75)
KEPT = 0.6
"""What a certified mixture must keep of the certified accuracy of its smoothed part."""
BETTER, PART = "certified: better part", f"certified: {KEPT:.0%} of smoothed"


def answers_of(logits_fn: Callable, image: np.ndarray) -> np.ndarray:
    """The classes of images."""
    logits = subsets.in_blocks(functools.partial(_logits, logits_fn), min(BLOCK, len(image)), image)
    if not np.isfinite(logits).all():
        raise ValueError(f"logits are not finite at {(~np.isfinite(logits)).any(-1).sum()} of {len(image)} images.")
    return logits.argmax(-1)


_logits = jax.jit(lambda logits_fn, x: logits_fn(x))


def stands(
    key: jax.Array, attack: Any, seen: Callable, image: np.ndarray, label: np.ndarray, whole: Callable | None = None
) -> np.ndarray:
    """Which answers of ``whole`` are right, on the images and on what an attack on ``seen`` makes of them."""
    x_adv = subsets.in_blocks(lambda x, y: attack(key, seen, x, y), min(BLOCK, len(image)), image, label)
    return (answers_of(whole or seen, image) == label) & (answers_of(whole or seen, x_adv) == label)


def _beside_noise(standard: Callable, scale: Any, noisy: Callable, alpha: Any, key: jax.Array, x: jax.Array):
    """The mixture with one draw of noise, whose mean probabilities an attack follows."""
    return mixing.mix(scale * standard(x), noisy(key, x), alpha=alpha)


def certified(
    config: Any, found: dict[str, classifiers.Classifier], test: data.Dataset, key: jax.Array
) -> dict[str, dict[str, Any]]:
    """Accuracy and certified accuracy of the mixture and of its parts, and what attacks within its radii change."""
    standard, smoothed = found["standard"], found["smoothed"].logits_fn()
    measure, alpha = certification.gaussian(config.sigma), config.certified_alpha

    def votes(key: jax.Array, image: np.ndarray, num_samples: int, first_sample: int = 0) -> np.ndarray:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(image)))
        some = {"num_samples": num_samples, "first_sample": first_sample}
        counts = np.asarray(certification.sample_counts(keys, smoothed, image, measure, **some))
        if (lost := num_samples - counts.sum(-1)).any():
            raise ValueError(f"the smoothed model gave logits that are not finite for {lost.sum()} noisy copies.")
        return counts

    def answers(image: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        logits = np.asarray(classifiers.outputs_of(standard, image).logits, np.float64)
        weights = np.exp(config.standard_scale * (logits - logits.max(-1, keepdims=True)))
        mixed = (1 - alpha) * weights / weights.sum(-1, keepdims=True) + alpha * counts / counts.sum(-1, keepdims=True)
        return {"accurate": logits.argmax(-1), "smoothed": counts.argmax(-1), "mixture": mixed.argmax(-1)}

    answer_key, counts_key, attack_key, judge_key = jax.random.split(key, 4)
    image, label, _ = (np.asarray(part) for part in test[subsets.evenly(len(test), NUM_ANSWERED)])
    answered = answers(image, votes(answer_key, image, VOTES_OF_ANSWER))
    clean = {name: (answer == label).mean() for name, answer in answered.items()}

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
        seen = standard.logits_fn(), config.standard_scale, smoothers.noisy(smoothed, measure), alpha
        seen = jax.tree_util.Partial(_beside_noise, *seen)
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
    mixed = np.where(radius > 0, bounds.label, certification.ABSTAIN)
    arms = arms_of(clean, ids, label, smoothed=(alone.label, alone.radius), mixture=(mixed, radius))
    changes = {"attacked": len(attacked), "changed": changed.sum(), "least_excess": excess.min(initial=np.inf)}
    arms["certified: mixture"] |= changes
    return arms


def arms_of(
    clean: dict[str, float], ids: np.ndarray, label: np.ndarray, **certified: tuple[np.ndarray, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Clean accuracies, those at radii of the parts with certificates ``(classes, radii)``, and what the bars ask."""
    arms: dict[str, dict[str, Any]] = {f"certified: {name}": {"clean": accuracy} for name, accuracy in clean.items()}
    for name, (predicted, radius) in certified.items():
        right = predicted == label
        at = {f"at_{r:g}": (right & (radius >= r)).mean() for r in RADII}
        kept = {"radius": radius, "right": right, "predicted": predicted, "id": ids, "label": label}
        arms[f"certified: {name}"] |= at | kept
    arms[BETTER] = {"clean": max(clean["accurate"], clean["smoothed"])}
    arms[PART] = {f"at_{r:g}": KEPT * arms["certified: smoothed"][f"at_{r:g}"] for r in RADII}
    return arms
