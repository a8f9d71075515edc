"""Checks of an evaluation: signs that attacks are weaker than they look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import adversaries, classifiers
from experiments.common.targets import Target
from robustjax import attacks, certification, losses

STEPS = (1, 2, 5, 10, 20, 40)
MAX_IMAGES = 200
"""Images for what is not part of the table."""

Correct = Mapping[tuple[str, float, str], np.ndarray]
"""``(norm, epsilon, attack) -> (n,)``, which images are answered correctly, as they are and under the attack."""


class Finding(NamedTuple):
    """The result of a check.

    Attributes:
      passed: None where the check could not be made.
      text: what was seen.
    """

    passed: bool | None
    text: str

    @property
    def word(self) -> str:
        """How it is told: pass, WARNING or not checked."""
        return "not checked" if self.passed is None else "pass" if self.passed else "WARNING"


def compared(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], passed: str, warning: str) -> Finding:
    """Whether in no pair more of the first is correct than of the second, by more than two standard errors."""
    worst = (-math.inf, 0.0, 0.0, "")
    for where, (first, second) in pairs.items():
        difference = first.astype(np.float64) - second
        gain, noise = difference.mean(), 2 * difference.std(ddof=1) / math.sqrt(max(len(difference), 1))
        worst = max(worst, (gain - noise, gain, noise, where))
    excess, gain, noise, where = worst
    seen = f"{gain:+.3f}, two standard errors {noise:.3f}, at {where}"
    return Finding(False, f"{warning} ({seen}).") if excess > 0 else Finding(True, f"{passed} (at worst {seen}).")


def whole_box(target: Target, key: jax.Array) -> Finding:
    """Whether nothing is left when an image may be changed into any other."""
    target = target.first(MAX_IMAGES)
    norm, epsilon = ("linf", 1.0) if target.measure is None else ("l2", math.sqrt(target.image[0].size))
    attack = adversaries.make("pgd_20", epsilon, norm, samples=target.samples)
    left = (target.under(key, attack)["answer"] == target.label).mean()
    seen = f"PGD-20 at {norm} {epsilon:g}, where every image is within reach, leaves {left:.3f}"
    return Finding(not left, f"{seen}." if not left else f"{seen}, not 0: gradients seem to be masked.")


def over_steps(target: Target, key: jax.Array, norm: Any, epsilons: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Runs PGD of 1, 2, 5, ... steps, each from the images themselves to its last point.

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
    """Whether twice the steps do not help the defender: PGD-20 and PGD-40 of the table, and without random starts."""
    pairs = {}
    for (norm, epsilon, name), left in correct.items():
        if name == "pgd_40" and (norm, epsilon, "pgd_20") in correct:
            where = f"{norm} {adversaries.text_of(epsilon)}, pgd_40 against pgd_20"
            pairs[where] = left, correct[norm, epsilon, "pgd_20"]
    for norm, found in steps.items():
        for epsilon, left in zip(found["epsilon"].tolist(), found["correct"], strict=True):
            where = f"{norm} {adversaries.text_of(epsilon)}, {STEPS[-1]} steps against {STEPS[-2]} from the image"
            pairs[where] = left[-1], left[-2]
    if not pairs:
        return Finding(None, "Whether more steps help the defender: needs pgd_20 and pgd_40 among the attacks.")
    return compared(
        pairs,
        "More steps of PGD help the defender by no more than noise",
        "More steps of PGD help the defender: the loss that they follow misleads",
    )


def square_and_gradients(correct: Correct) -> Finding:
    """Whether an attack without gradients does not find what those with them, of AutoAttack too, together miss."""
    pairs = {}
    for (norm, epsilon, name), left in correct.items():
        same = {other: of for (n, e, other), of in correct.items() if (n, e) == (norm, epsilon)}
        rivals = [of for other, of in same.items() if "apgd" in other or "fab" in other]
        if name.endswith("square") and rivals:  # that of AutoAttack sees what those before it have left
            pairs[f"{norm} {adversaries.text_of(epsilon)}, {name}"] = np.all(rivals, axis=0), left
    if not pairs:
        return Finding(None, "Whether Square is stronger than APGD: needs autoattack, or square and apgd_ce.")
    return compared(
        pairs,
        "Square, which sees no gradients, is not stronger than attacks that do by more than noise",
        "Square, which sees no gradients, is stronger than attacks that do: gradients are masked, or losses mislead",
    )


def diagnosis(target: Target, key: jax.Array, told: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """What ``attacks.diagnose`` says of the model, and what AutoAttack has ``told``, by where it was."""
    target = target.first(MAX_IMAGES)
    found = attacks.diagnose(key, target.classifier.logits_fn(), target.image, target.label)
    sentences = dict.fromkeys(found.warnings, "The model")
    for where, others in told.items():
        sentences = {**dict.fromkeys(others, where), **sentences}
    sound = Finding(
        True, f"The model has gradients at all {len(target.id)} images tried, is deterministic, and gives logits."
    )
    return [Finding(False, f"{where}: {sentence}") for sentence, where in sentences.items()] or [sound]


def above_certified(
    answers: Mapping[tuple[str, float, str], np.ndarray],
    certificate: certification.Certificate,
    label: np.ndarray,
    chance: float,
) -> Finding:
    """Whether no image is answered wrongly within the radius that is certified for it, nor too many left undecided.

    ``chance`` is the probability, for each image, that a certificate or an answer is wrong.
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
    seen = f"of {total} certified images, {fooled} are fooled within their radius and {int(undecided.sum())} abstain"
    if fooled:
        return Finding(False, f"Certificates do not hold: {seen}; chance allows {chance * total:.1f} to be fooled.")
    if below:
        return Finding(False, f"Robust accuracy is below what is certified ({', '.join(below)}): {seen}.")
    return Finding(True, f"Robust accuracy is nowhere below what is certified: {seen}.")
