"""Sanity checks of an evaluation: signs that the attacks are weaker than they look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from robustjax import attacks, certification, losses

from . import adversaries, classifiers
from .targets import ALPHA, Target

STEPS = (1, 2, 5, 10, 20, 40)
MAX_IMAGES = 200
"""Images for checks that need attacks of their own."""

Correct = Mapping[tuple[str, float, str], np.ndarray]
"""``(norm, epsilon, attack) -> (n,)``: which images are classified correctly with and without the attack."""


class Finding(NamedTuple):
    """The result of a check."""

    passed: bool | None  # None if the check could not be made
    text: str  # what was found

    @property
    def word(self) -> str:
        """pass, WARNING or not checked."""
        return "not checked" if self.passed is None else "pass" if self.passed else "WARNING"


def compared(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], passed: str, warning: str) -> Finding:
    """Passes if in no pair the first is correct more often than the second, by more than two standard errors."""
    if all(len(first) < 2 for first, _ in pairs.values()):
        return Finding(None, "Comparing attacks up to noise needs at least two images.")
    worst = (-math.inf, 0.0, 0.0, "")
    for where, (first, second) in pairs.items():
        difference = first.astype(np.float64) - second
        gain, noise = difference.mean(), 2 * difference.std(ddof=1) / math.sqrt(max(len(difference), 1))
        worst = max(worst, (gain - noise, gain, noise, where))
    excess, gain, noise, where = worst
    seen = f"{gain:+.3f}, two standard errors {noise:.3f}, at {where}"
    return Finding(False, f"{warning} ({seen}).") if excess > 0 else Finding(True, f"{passed} (at worst {seen}).")


def check(
    target: Target,
    found: Mapping[tuple[str, float, str], Mapping[str, Any]],
    steps: Mapping[str, dict[str, np.ndarray]],
    certificate: certification.Certificate | None,
    key: jax.Array,
) -> list[Finding]:
    """Makes all checks that these attacks allow."""
    smoothed, correct = target.measure is not None, {place: arrays["correct"] for place, arrays in found.items()}
    for (norm, epsilon, name), arrays in found.items():
        parts = arrays.get("part", np.zeros(0, np.str_)).tolist()
        correct |= {(norm, epsilon, f"{name}: {part}"): arrays["part_correct"][i] for i, part in enumerate(parts)}
    findings = [whole_box(target, jax.random.fold_in(key, 0))]
    if certificate is not None:
        answers, chance = {place: arrays["answer"] for place, arrays in found.items()}, 2 * ALPHA * smoothed
        findings.append(above_certified(answers, certificate, target.label, chance))
    if smoothed:
        return findings
    warnings = {
        f"AutoAttack at {norm} {adversaries.text_of(epsilon)}": tuple(arrays["warnings"].tolist())
        for (norm, epsilon, _), arrays in found.items()
        if "warnings" in arrays
    }
    findings += [more_steps(correct, steps), square_and_gradients(correct)]
    return [*findings, *diagnosis(target, jax.random.fold_in(key, 1), warnings)]


def whole_box(target: Target, key: jax.Array) -> Finding:
    """Passes if no accuracy is left when an image may be changed into any other."""
    target = target.first(MAX_IMAGES)
    norm, epsilon = ("linf", 1.0) if target.measure is None else ("l2", math.sqrt(target.image[0].size))
    attack = adversaries.make("pgd_20", epsilon, norm, samples=target.samples)
    left = (target.under(key, attack)["answer"] == target.label).mean()
    seen = f"PGD-20 at {norm} {epsilon:g}, where every image is within reach, leaves an accuracy of {left:.3f}"
    return Finding(not left, f"{seen}." if not left else f"{seen}, not 0: gradients may be masked.")


def over_steps(target: Target, key: jax.Array, norm: Any, epsilons: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Runs PGD with 1, 2, 5, ... steps, without random starts, and keeps the last point of each.

    Returns:
      ``loss`` (epsilons, steps), mean cross-entropy, and ``correct`` (epsilons, steps, n).
    """
    target = target.first(MAX_IMAGES)
    cross_entropy = jax.jit(losses.cross_entropy)
    found: dict[str, list] = {"loss": [], "correct": []}
    for epsilon in epsilons:
        for steps in STEPS:
            attack = attacks.pgd(epsilon=epsilon, norm=norm, steps=steps, random_start=False, keep="last")
            images = target.perturbed(key, attack)
            logits = classifiers.outputs_of(target.classifier, images, target.batch_size).logits
            found["loss"].append(np.asarray(cross_entropy(logits, target.label)).mean())
            found["correct"].append(np.asarray(logits).argmax(-1) == target.label)
    shape = (len(epsilons), len(STEPS))
    return {"epsilon": np.asarray(epsilons)} | {
        name: np.stack(values).reshape(*shape, *np.shape(values[0])) for name, values in found.items()
    }


def more_steps(correct: Correct, steps: Mapping[str, dict[str, np.ndarray]]) -> Finding:
    """Passes if twice the steps do not help the defender: PGD-20 and PGD-40 of the table, and without random starts."""
    pairs = {}
    for (norm, epsilon, name), left in correct.items():
        if name == "pgd_40" and (norm, epsilon, "pgd_20") in correct:
            where = f"{norm} {adversaries.text_of(epsilon)}, pgd_40 against pgd_20"
            pairs[where] = left, correct[norm, epsilon, "pgd_20"]
    for norm, found in steps.items():
        for epsilon, left in zip(found["epsilon"].tolist(), found["correct"], strict=True):
            where = f"{norm} {adversaries.text_of(epsilon)}, {STEPS[-1]} steps against {STEPS[-2]}"
            pairs[where] = left[-1], left[-2]
    if not pairs:
        return Finding(None, "Comparing PGD with more steps needs the attacks pgd_20 and pgd_40.")
    return compared(
        pairs,
        "More steps of PGD do not help the defender, up to noise",
        "More steps of PGD help the defender: PGD follows a misleading loss",
    )


def square_and_gradients(correct: Correct) -> Finding:
    """Passes if Square, without gradients, is not stronger than all gradient attacks together, also in AutoAttack."""
    pairs = {}
    for (norm, epsilon, name), left in correct.items():
        same = {other: of for (n, e, other), of in correct.items() if (n, e) == (norm, epsilon)}
        rivals = [of for other, of in same.items() if "apgd" in other or "fab" in other]
        if name.endswith("square") and rivals:  # in AutoAttack, Square attacks what the parts before it left
            pairs[f"{norm} {adversaries.text_of(epsilon)}, {name}"] = np.all(rivals, axis=0), left
    if not pairs:
        return Finding(
            None, "Comparing Square with gradient attacks needs the attack autoattack, or square and apgd_ce."
        )
    return compared(
        pairs,
        "Square, which uses no gradients, is not stronger than gradient attacks, up to noise",
        "Square, which uses no gradients, is stronger than gradient attacks: gradients may be masked",
    )


def diagnosis(target: Target, key: jax.Array, warnings: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """Warnings of ``attacks.diagnose`` about the model, and those of AutoAttack by the place where they occurred."""
    target = target.first(MAX_IMAGES)
    found = attacks.diagnose(key, target.classifier.logits_fn(), target.image, target.label)
    sentences = dict.fromkeys(found.warnings, "The model")
    for where, others in warnings.items():
        sentences = {**dict.fromkeys(others, where), **sentences}
    sound = Finding(
        True, f"The model is deterministic, returns logits, and has gradients at all {len(target.id)} images tried."
    )
    return [Finding(False, f"{where}: {sentence}") for sentence, where in sentences.items()] or [sound]


def above_certified(
    answers: Mapping[tuple[str, float, str], np.ndarray],
    certificate: certification.Certificate,
    label: np.ndarray,
    chance: float,
) -> Finding:
    """Passes if no image is misclassified within its certified radius, and robust accuracy is not below certified.

    ``chance`` is the probability, for each image, that a certificate or a prediction is wrong.
    """
    certified, wrong, undecided = np.zeros((3, len(label)), bool)
    below = []
    for (norm, epsilon, name), answer in answers.items():
        safe = (certificate.label == label) & (certificate.radius >= epsilon)
        certified |= safe
        undecided |= safe & (answer == certification.ABSTAIN)
        wrong |= safe & (answer != label) & (answer != certification.ABSTAIN)
        if (answer == label).mean() < safe.mean():
            below.append(f"{name} at {norm} {adversaries.text_of(epsilon)}")
    fooled, total = int(wrong.sum()), int(certified.sum())
    seen = (
        f"of {total} certified images, {fooled} are misclassified within their radius, {int(undecided.sum())} abstain"
    )
    if fooled:
        return Finding(False, f"Certificates do not hold: {seen}; expected by chance: at most {chance * total:.1f}.")
    if below:
        return Finding(False, f"Robust accuracy is below certified accuracy ({', '.join(below)}): {seen}.")
    return Finding(True, f"Robust accuracy is nowhere below certified accuracy: {seen}.")
