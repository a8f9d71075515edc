"""A model and images under attack, and how much accuracy the attacks leave."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from robustjax import attacks, certification

from . import classifiers, files, runtimes, smoothers, subsets

ALPHA = 0.001
"""Probability, for each image, that a prediction or a certificate of a smoothed model is wrong."""
NUM_PREDICTION, NUM_ESTIMATION = 1000, 10_000
"""Draws behind a prediction, and behind a certificate."""


class Target(NamedTuple):
    """A model and the images on which it is attacked."""

    classifier: classifiers.Classifier  # the model
    id: np.ndarray  # ``(n,)``, positions in the split
    image: np.ndarray  # ``(n, height, width, channels)``
    label: np.ndarray  # ``(n,)``
    batch_size: int  # images that are attacked at once
    measure: certification.Measure | None = None  # of a smoothed model, else None
    samples: int | None = None  # draws behind each gradient of a smoothed model, else None

    def first(self, most: int) -> Target:
        """At most ``most`` of the images, evenly spaced."""
        chosen = subsets.evenly(len(self.id), most)
        return self._replace(id=self.id[chosen], image=self.image[chosen], label=self.label[chosen])

    def answers(self, key: jax.Array, images: np.ndarray) -> np.ndarray:
        """The predicted classes ``(n,)``; a smoothed model, on fresh noise, may return ``ABSTAIN``."""
        if self.measure is not None:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, self.id)
            return certification.predict(
                keys, self.classifier.logits_fn(), self.classifier.place(images), self.measure,
                num_samples=NUM_PREDICTION, alpha=ALPHA,
            )  # fmt: skip
        logits = classifiers.outputs_of(self.classifier, images, self.batch_size).logits
        if not np.isfinite(logits).all():
            count = int((~np.isfinite(logits)).any(-1).sum())
            raise ValueError(f"the model's logits are not finite at {count} of {len(logits)} inputs.")
        return np.asarray(logits).argmax(-1)

    def perturbed(self, key: jax.Array, attack: Any) -> np.ndarray:
        """Adversarial images, computed in blocks of one size."""
        logits_fn = self.classifier.logits_fn()
        if self.measure is not None:
            logits_fn = smoothers.noisy(logits_fn, self.measure)
        of_block = lambda image, label: attack(key, logits_fn, self.classifier.place(image), label)
        return subsets.in_blocks(of_block, self.batch_size, self.image, self.label)

    def under(self, key: jax.Array, attack: Any) -> dict[str, Any]:
        """What an attack finds and what it costs: arrays for an npz file."""
        started = time.perf_counter()
        images = self.perturbed(jax.random.fold_in(key, 0), attack)
        seconds = time.perf_counter() - started
        answers = self.answers(jax.random.fold_in(key, 1), images)
        queries = attacks.queries_of(attack)
        return {"x_adv": images, "answer": answers, "seconds": seconds, "queries": queries}

    def attacked(self, key: jax.Array, attack: Any, path: epath.Path) -> dict[str, Any]:
        """As ``under``; each part of AutoAttack is kept beside ``path`` until all of them are done."""
        if not hasattr(attack, "evaluate"):
            return self.under(key, attack)
        parts = path.with_suffix(".parts.npz")
        kept = files.read_arrays(parts) if parts.exists() else None
        arrays = self.under_autoattack(key, attack, kept=kept, keep=lambda a: files.write_arrays(parts, a))
        parts.unlink(missing_ok=True)
        return arrays

    def under_autoattack(self, key: jax.Array, attack: Any, *, kept: dict | None, keep: Callable) -> dict[str, Any]:
        """As ``under``; ``keep`` receives the state after each of its attacks, and ``kept``, if given, is resumed."""
        resume, correct = None, []
        if kept is not None:
            resume, correct = _evaluation_of(kept), [*kept["part_correct"]]

        def on_attack(name, evaluation):
            correct.append(evaluation.correct)
            left, seconds = evaluation.robust_accuracy, evaluation.seconds.get(name, 0.0)
            runtimes.log(f"AutoAttack: {name} leaves an accuracy of {left:.3f}, {seconds:.1f} s")
            keep(_arrays_of(evaluation, correct))

        attack = dataclasses.replace(attack, batch_size=self.batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the evaluation
            evaluation = attack.evaluate(
                jax.random.fold_in(key, 0), self.classifier.logits_fn(), self.classifier.place(self.image), self.label,
                on_attack=on_attack, resume=resume,
            )  # fmt: skip
        return {**_arrays_of(evaluation, correct), "answer": self.answers(jax.random.fold_in(key, 1), evaluation.x_adv)}


def _arrays_of(evaluation: attacks.Evaluation, correct: list[np.ndarray]) -> dict[str, Any]:
    """An evaluation, and what each of its attacks and those before it have left, as arrays for an npz file."""
    names = list(evaluation.per_attack)
    return {
        "x_adv": evaluation.x_adv,
        "clean_accuracy": evaluation.clean_accuracy,
        "queries": sum(evaluation.queries.values()),
        "seconds": math.fsum(evaluation.seconds.values()),
        "part": np.asarray(names, np.str_),
        "part_accuracy": np.asarray([evaluation.per_attack[name] for name in names]),
        "part_correct": np.asarray(correct, bool).reshape(-1, len(evaluation.correct)),
        "part_queries": np.asarray([evaluation.queries[name] for name in names], np.int64),
        "part_seconds": np.asarray([evaluation.seconds[name] for name in names]),
        "warnings": np.asarray(evaluation.warnings, np.str_),
    }


def _evaluation_of(arrays: dict[str, Any]) -> attacks.Evaluation:
    of_parts = lambda name: dict(zip(arrays["part"].tolist(), arrays[name].tolist(), strict=True))
    accuracies = of_parts("part_accuracy")
    clean = float(arrays["clean_accuracy"])
    return attacks.Evaluation(
        clean_accuracy=clean, robust_accuracy=[clean, *accuracies.values()][-1], per_attack=accuracies,
        correct=arrays["part_correct"][-1], x_adv=arrays["x_adv"], queries=of_parts("part_queries"),
        seconds=of_parts("part_seconds"), warnings=tuple(arrays["warnings"].tolist()),
    )  # fmt: skip
