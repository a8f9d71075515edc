import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, losses

KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
HIDDEN, OUT = (0.5 * RNG.normal(size=(16, 32))).astype(np.float32), (0.3 * RNG.normal(size=(32, 5))).astype(np.float32)
X = jnp.asarray(RNG.uniform(size=(13, 4, 4, 1)).astype(np.float32))


def network(x):
    return jax.nn.relu(x.reshape(x.shape[0], 16) @ HIDDEN) @ OUT


LABELS = (np.maximum(np.asarray(X).reshape(13, 16) @ HIDDEN, 0) @ OUT).argmax(-1)
LABELS = jnp.asarray((LABELS + (np.arange(13) == 0)).astype(np.int32) % 5)  # the first is misclassified as it is
PGD = attacks.pgd(epsilon=0.05, steps=5)


@dataclasses.dataclass(frozen=True)
class Towards:
    """Moves the chosen inputs to a constant image."""

    value: float
    chosen: tuple[int, ...]

    def __call__(self, key, logits_fn, x, labels):
        return jnp.asarray(x).at[jnp.array(self.chosen)].set(self.value)


def test_worst_of_is_the_worst_of_each_input():
    two = (Towards(0.0, (1, 2, 3)), Towards(1.0, (3, 4, 5)))
    x_adv = np.asarray(attacks.worst_of(*two)(KEY, network, X, LABELS))
    points, labels = np.stack([np.array(X)] * 2), np.asarray(LABELS)
    for attack, moved in zip(two, points, strict=True):
        moved[list(attack.chosen)] = attack.value
    logits = np.maximum(points.reshape(2, 13, 16).astype(np.float64) @ np.asarray(HIDDEN), 0) @ np.asarray(OUT)
    fooled = logits.argmax(-1) != labels
    values = np.log(np.exp(logits).sum(-1)) - logits[:, np.arange(13), labels]
    for i in range(13):
        best = fooled[:, i].argmax() if fooled[:, i].any() else values[:, i].argmax()
        np.testing.assert_array_equal(x_adv[i], points[best, i])
    assert {0, 1} <= set(np.where(fooled.any(0), fooled.argmax(0), values.argmax(0))[1:6])


def test_worst_of_is_never_better_than_one_of_them():
    parts = (attacks.fgsm(epsilon=0.05), PGD)
    accuracy = lambda attack: attacks.robust_accuracy(KEY, attack, network, X, LABELS, batch_size=13)
    assert accuracy(attacks.worst_of(*parts)) <= min(map(accuracy, parts))


def test_equal_settings_are_one_attack():
    assert attacks.worst_of(PGD, attacks.fgsm(epsilon=0.1)) == attacks.worst_of(PGD, attacks.fgsm(epsilon=0.1))
    assert hash(PGD) == hash(attacks.pgd(epsilon=0.05, steps=5))


@pytest.mark.parametrize("batch_size", [5, 100])
def test_robust_accuracy_is_the_same_in_any_blocks(batch_size):
    accuracy = attacks.robust_accuracy(KEY, PGD, network, X, LABELS, batch_size=batch_size)
    expected = (network(PGD(KEY, network, X, LABELS)).argmax(-1) == LABELS) & (network(X).argmax(-1) == LABELS)
    assert accuracy == pytest.approx(float(expected.mean()))
    assert 0 < accuracy < 12 / 13


def test_robust_accuracy_counts_no_input_that_is_wrong_as_it_is():
    still = attacks.fgsm(epsilon=0.0)
    assert attacks.robust_accuracy(KEY, still, network, X, LABELS, batch_size=13) == pytest.approx(12 / 13)
    mend = Towards(0.0, (0,))  # an attack that happens to make the answer right
    labels = LABELS.at[0].set(network(jnp.zeros((1, 4, 4, 1))).argmax())
    if labels[0] != network(X[:1]).argmax():
        assert attacks.robust_accuracy(KEY, mend, network, X, labels, batch_size=13) <= 12 / 13


def test_an_attack_that_leaves_the_images_is_refused():
    with pytest.raises(ValueError, match=r"attack must return inputs in \[0, 1\]"):
        attacks.robust_accuracy(KEY, Towards(2.0, (1,)), network, X, LABELS)
    with pytest.raises(ValueError, match=r"attack must return inputs in \[0, 1\]"):
        attacks.robust_accuracy(KEY, Towards(float("nan"), (1,)), network, X, LABELS)
    with pytest.raises(
        ValueError, match=r"attack must return inputs of shape \(8, 4, 4, 1\), .* returned \(2, 4, 4, 1\)\."
    ):
        attacks.robust_accuracy(KEY, lambda key, logits_fn, x, labels: x[:2], network, X, LABELS, batch_size=8)
    with pytest.raises(ValueError, match="x must hold at least one input"):
        attacks.robust_accuracy(KEY, PGD, network, X[:0], LABELS[:0])


def test_a_model_that_gives_nan_has_no_accuracy():
    broken = lambda x: jnp.where(x.reshape(x.shape[0], 16)[:, :1] > 0.9, jnp.nan, network(x))
    with pytest.raises(ValueError, match="must return finite logits, got NaN or infinity for adversarial inputs"):
        attacks.robust_accuracy(KEY, Towards(1.0, (1,)), broken, X.at[:, 0, 0].min(0.9), LABELS)
    with pytest.raises(ValueError, match="logits_fn must return finite logits, got NaN or infinity for inputs"):
        attacks.robust_accuracy(KEY, Towards(1.0, (1,)), broken, X.at[0].set(1.0), LABELS)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_attack_is_named():
    with pytest.raises(ValueError, match=r"attacks must be a function, got \[PGD"):
        attacks.worst_of([PGD])
    search = lambda key, logits_fn, x, labels: attacks.MinimumNorm(x, jnp.zeros(13), jnp.zeros(13, bool))
    with pytest.raises(ValueError, match=r"\(13, 4, 4, 1\), .* returned MinimumNorm; wrap it in attacks.at_budget\."):
        attacks.worst_of(search)(KEY, network, X, LABELS)
    with pytest.raises(ValueError, match=r"attack must return a MinimumNorm, PGD\(.* returned ArrayImpl"):
        attacks.at_budget(PGD, 0.1)(KEY, network, X, LABELS)


def test_expectation_over_a_model_without_noise_is_the_attack_itself():
    averaged = attacks.expectation_over_transformation(PGD, samples=1)
    x_adv = averaged(KEY, lambda key, x: network(x), X, LABELS)
    np.testing.assert_allclose(x_adv, PGD(KEY, network, X, LABELS), atol=1e-6)


def test_expectation_follows_the_mean_gradient():
    """A model whose gradients are hidden under noise of mean zero: many draws find the way, a single one does not."""
    weight = jax.random.normal(jax.random.key(7), (16, 2))

    def noisy(key, x):
        return x.reshape(x.shape[0], 16) @ (weight + 3 * jax.random.normal(key, weight.shape))

    x, labels = np.full((40, 4, 4, 1), 0.5, np.float32), np.zeros(40, np.int32)
    step = attacks.fgsm(epsilon=0.1, loss="margin")
    keys = jax.random.split(KEY, 40)

    def margin(x):
        logits = np.asarray(x).reshape(40, 16) @ np.asarray(weight)
        return (logits[:, 1] - logits[:, 0]).mean()

    gain = {
        n: margin(attacks.expectation_over_transformation(step, samples=n)(keys, noisy, x, labels)) for n in (1, 100)
    }
    direction = np.sign(np.asarray(weight[:, 1] - weight[:, 0])).reshape(1, 4, 4, 1)
    best, start = margin(x + 0.1 * direction), margin(x)
    assert gain[100] - start > 0.8 * (best - start) > gain[1] - start


def test_only_what_averages_can_expect():
    with pytest.raises(ValueError, match="attack must have a field samples, to average over draws"):
        attacks.expectation_over_transformation(attacks.worst_of(PGD))
    with pytest.raises(ValueError, match="samples must be an integer of at least 1, got 0"):
        attacks.expectation_over_transformation(PGD, samples=0)


def test_a_budget_keeps_what_is_near():
    def search(key, logits_fn, x, labels):
        distance = jnp.where(jnp.arange(13) == 5, jnp.inf, 0.01 * jnp.arange(13, dtype=jnp.float32))
        return attacks.MinimumNorm(jnp.zeros_like(x), distance, jnp.isfinite(distance))

    x_adv = attacks.at_budget(search, 0.035)(KEY, network, X, LABELS)
    moved = np.asarray((x_adv != X).any((1, 2, 3)))
    np.testing.assert_array_equal(moved, np.arange(13) <= 3)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        attacks.at_budget(search, -1.0)
    with pytest.raises(ValueError, match="attacks must be one or more functions"):
        attacks.worst_of()


TARGETED = attacks.pgd(epsilon=0.05, targeted=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: attacks.robust_accuracy(KEY, TARGETED, network, X, LABELS),
        lambda: attacks.robust_accuracy(
            KEY, attacks.at_budget(attacks.carlini_wagner(targeted=True), 0.1), network, X, LABELS
        ),
        lambda: attacks.worst_of(PGD, TARGETED),
        lambda: losses.adversarial.trades(attack=TARGETED),
    ],
)
def test_where_labels_are_the_true_classes_no_attack_is_targeted(call):
    with pytest.raises(ValueError, match="attack must not be targeted where labels are the true classes, got"):
        call()


def test_a_model_that_depends_on_its_batch_has_no_accuracy():
    model = lambda x: network(x) - network(x).mean(0, keepdims=True)  # as batch normalisation does in training
    with pytest.raises(ValueError, match="must answer each input by itself, got other answers .* in another batch"):
        attacks.robust_accuracy(KEY, attacks.fgsm(epsilon=0.05), model, X, LABELS, batch_size=5)


@pytest.mark.parametrize(
    ("call", "farthest"),
    [
        (lambda: attacks.pgd(epsilon=8.0), "1, the largest linf"),
        (lambda: attacks.autoattack(epsilon=1.1), "1, the largest linf"),
        (lambda: attacks.pgd(epsilon=128.0, norm="l2")(KEY, network, X, LABELS), "4, the largest l2"),
        (lambda: attacks.fgsm(epsilon=17.0, norm="l1")(KEY, network, X, LABELS), "16, the largest l1"),
        (
            lambda: attacks.at_budget(attacks.deepfool(norm="linf", steps=1), 8.0)(KEY, network, X, LABELS),
            "1, the largest linf",
        ),
    ],
)
def test_no_ball_is_larger_than_the_box(call, farthest):
    with pytest.raises(ValueError, match=f"epsilon must be at most {farthest} distance of inputs in"):
        call()


EVERY = {
    "pgd": PGD,
    "apgd": attacks.apgd(epsilon=0.05, steps=3),
    "apgd_targeted": attacks.apgd_targeted(epsilon=0.05, steps=3, num_targets=1),
    "fab": attacks.fab(steps=1, num_targets=1),
    "deepfool": attacks.deepfool(steps=2),
    "square": attacks.square(epsilon=0.05, queries=3),
}


@pytest.mark.parametrize("name", EVERY)
def test_logits_may_have_another_dtype_than_inputs(name):
    narrow = lambda x: network(x).astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        found = jax.eval_shape(lambda: EVERY[name](KEY, narrow, X, LABELS))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} <= {jnp.dtype("float32"), jnp.dtype("bool")}


def test_no_inputs_are_told_or_attacked_whatever_the_model():
    model = lambda x: x.reshape(x.shape[0], -1) @ HIDDEN  # which cannot tell -1 of nothing
    nothing, labels = X[:0], LABELS[:0]
    assert attacks.worst_of(PGD)(KEY, model, nothing, labels).shape == nothing.shape
    for call in (
        lambda: attacks.robust_accuracy(KEY, PGD, model, nothing, labels),
        lambda: attacks.autoattack(epsilon=0.1).evaluate(KEY, model, nothing, labels),
        lambda: attacks.diagnose(KEY, model, nothing, labels),
    ):
        with pytest.raises(ValueError, match="x must hold at least one input, got none"):
            call()


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda logits, labels: logits.sum(), r"float32 of shape \(\)"),
        (lambda logits, labels: logits.argmax(-1), r"int32 of shape \(13,\)"),
    ],
)
def test_a_loss_gives_a_number_for_each_input(loss, got):
    with pytest.raises(ValueError, match=rf"loss must return \(13,\) floating values, got {got}"):
        attacks.pgd(epsilon=0.05, steps=2, loss=loss)(KEY, network, X, LABELS)


def test_models_take_the_arguments_that_attacks_give():
    with pytest.raises(ValueError, match=r"logits_fn must take a key and inputs, \(key, x\) -> logits, but too many"):
        attacks.expectation_over_transformation(PGD, samples=2)(KEY, network, X, LABELS)
    with pytest.raises(ValueError, match="logits_fn must take only inputs, x -> logits, but missing"):
        PGD(KEY, lambda key, x: network(x), X, LABELS)
