"""The checks of an evaluation, on models and tables for which the finding is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import classifiers, sanity
from experiments.common.targets import Target
from robustjax import certification


class Fake:
    """A classifier for 8x8 images whose gradients are there, zero, or not finite at some inputs."""

    def __init__(self, outputs=lambda x: x.reshape(-1, 64)[:, :10]):
        self.outputs = outputs

    def logits_fn(self):
        return self.outputs

    def place(self, rows):
        return rows


def a_target(outputs, n=8):
    image = np.random.default_rng(0).uniform(0.4, 0.6, (n, 8, 8, 1)).astype(np.float32)
    return Target(Fake(outputs), np.arange(n), image, image.reshape(n, 64)[:, :10].argmax(-1).astype(np.int32), n)


@pytest.fixture
def plain_outputs(monkeypatch):
    def outputs_of(classifier, images, batch_size):
        return type("Outputs", (), {"logits": np.asarray(classifier.outputs(jnp.asarray(images)))})

    monkeypatch.setattr(classifiers, "outputs_of", outputs_of)


def masked(x):
    return jnp.round(8 * x.reshape(-1, 64)[:, :10])


@pytest.mark.parametrize(("measure", "reach"), [(None, "linf 1"), (certification.gaussian(0.5), "l2 8")])
def test_the_whole_box_must_leave_nothing(monkeypatch, measure, reach):
    target = a_target(masked)._replace(measure=measure, samples=None if measure is None else 3)
    seen = []
    monkeypatch.setattr(Target, "under", lambda self, key, attack: seen.append(attack) or {"answer": self.label + 1})
    finding = sanity.whole_box(target, jax.random.key(0))
    assert finding == (True, f"PGD-20 at {reach}, where every image is within reach, leaves an accuracy of 0.000.")
    assert (seen[0].steps, seen[0].samples) == (20, target.samples)
    monkeypatch.setattr(Target, "under", lambda self, key, attack: {"answer": self.label})
    finding = sanity.whole_box(target, jax.random.key(0))
    assert finding.word == "WARNING"
    assert finding.text.endswith("leaves an accuracy of 1.000, not 0: gradients may be masked.")


@pytest.mark.usefixtures("plain_outputs")
def test_logits_that_are_not_finite_are_reported():
    target = a_target(lambda x: jnp.where(x.reshape(-1, 64)[:, :10] > 0.59, jnp.nan, 0.0))
    with pytest.raises(ValueError, match=r"logits are not finite at \d of 8 inputs"):
        target.answers(jax.random.key(0), target.image)


def test_masked_gradients_are_reported():
    target = a_target(masked)
    findings = sanity.diagnosis(target, jax.random.key(0), {"AutoAttack at linf 0.1": ("something else.",)})
    assert [finding.word for finding in findings] == ["WARNING", "WARNING"]
    texts = " ".join(finding.text for finding in findings)
    assert "The model: gradients are masked or broken: zero at 8" in texts
    assert "AutoAttack at linf 0.1: something else." in texts
    (sound,) = sanity.diagnosis(a_target(lambda x: x.reshape(-1, 64)[:, :10]), jax.random.key(0), {})
    assert sound == (True, "The model is deterministic, returns logits, and has gradients at all 8 images tried.")


def test_square_must_not_be_stronger_than_attacks_with_gradients():
    stands = np.arange(100) < 60
    table = {("linf", 0.1, "apgd_ce"): stands, ("linf", 0.1, "square"): np.arange(100) < 58}
    finding = sanity.square_and_gradients(table)
    assert finding.word == "pass"
    assert finding.text.endswith("up to noise (at worst +0.020, two standard errors 0.028, at linf 0.1, square).")
    finding = sanity.square_and_gradients({**table, ("linf", 0.1, "square"): np.arange(100) < 40})
    assert finding.word == "WARNING"
    warned = "stronger than gradient attacks: gradients may be masked (+0.200, two standard errors 0.080"
    assert warned in finding.text
    better = {("linf", 0.1, "square"): np.arange(100) < 40, ("linf", 0.1, "autoattack: apgd-t"): np.arange(100) < 30}
    assert sanity.square_and_gradients({**table, **better}).word == "pass"
    parts = {"apgd-ce": stands, "fab-t": np.arange(100) < 50, "square": np.arange(100) < 30}
    finding = sanity.square_and_gradients({("linf", 0.1, f"autoattack: {name}"): of for name, of in parts.items()})
    assert finding.word == "WARNING"
    assert "(+0.200, two standard errors 0.080, at linf 0.1, autoattack: square)" in finding.text
    finding = sanity.square_and_gradients({("linf", 0.1, "square"): stands})
    assert finding == (
        None,
        "Comparing Square with gradient attacks needs the attack autoattack, or square and apgd_ce.",
    )


def test_more_steps_must_not_help():
    fewer, more = np.arange(100) < 40, np.arange(100) < 60
    table = {("l2", 0.5, "pgd_20"): fewer, ("l2", 0.5, "pgd_40"): more}
    finding = sanity.more_steps(table, {})
    assert finding.word == "WARNING"
    assert finding.text.startswith("More steps of PGD help the defender: PGD follows a misleading loss (+0.200")
    assert "at l2 0.5, pgd_40 against pgd_20" in finding.text
    steps = {"linf": {"epsilon": np.array([8 / 255]), "correct": np.stack([more, fewer])[None]}}
    assert sanity.more_steps({}, steps).word == "pass"
    assert "at linf 8/255, " in sanity.more_steps({}, steps).text
    assert sanity.more_steps({}, {}).word == "not checked"


def test_what_is_certified_must_not_be_fooled():
    label = np.array([0, 1, 2, 3])
    certificate = certification.Certificate(
        np.array([0, 1, 2, -1]), np.array([0.5, 0.2, 0.5, 0.0]), np.ones(4), label == 3
    )
    answers = {("l2", 0.3, "pgd_20"): np.array([0, 1, -1, 7]), ("l2", 1.0, "pgd_20"): np.array([7, 7, 7, 7])}
    finding = sanity.above_certified(answers, certificate, label, 0.002)
    assert finding.word == "pass"
    assert finding.text.endswith("of 2 certified images, 0 are misclassified within their radius, 1 abstain.")
    finding = sanity.above_certified({("l2", 0.3, "fgsm"): np.array([-1, 7, -1, 7])}, certificate, label, 0.002)
    assert finding.word == "WARNING"
    assert finding.text.startswith("Robust accuracy is below certified accuracy (fgsm at l2 0.3): of 2 certified")
    finding = sanity.above_certified({("l2", 0.3, "fgsm"): np.array([7, 1, 2, 3])}, certificate, label, 0.002)
    assert finding.word == "WARNING"
    assert "of 2 certified images, 1 are misclassified within their radius" in finding.text
