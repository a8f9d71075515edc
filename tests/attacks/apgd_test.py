import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks
from robustjax.attacks import _apgd

NORMS = ("linf", "l2", "l1")
EPSILON = {"linf": 0.05, "l2": 0.2, "l1": 0.4}
KEY = jax.random.key(0)

RNG = np.random.default_rng(39)
HIDDEN, OUT = (0.5 * RNG.normal(size=(16, 32))).astype(np.float32), (0.3 * RNG.normal(size=(32, 5))).astype(np.float32)


def layers(hidden, out, bias, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ hidden) @ out + bias


def model_of(hidden, out, bias):
    """A model of one structure, whose programs all tests share; a bias for each input."""
    bias = np.broadcast_to(np.asarray(bias, np.float32), (16, 5))
    return jax.tree_util.Partial(layers, *map(jnp.asarray, (hidden, out, bias)))


ask = jax.jit(lambda model, x: model(x))
network = model_of(HIDDEN, OUT, 0)


def plane(weights, label, bias):
    """A model whose logit of one class is x @ weights, the positive less the negative part, beside fixed others."""
    hidden, out = np.zeros((16, 32), np.float32), np.zeros((32, 5), np.float32)
    hidden[:, 0], hidden[:, 1] = weights, -weights
    out[:2, label] = 1, -1
    return model_of(hidden, out, bias)


@pytest.fixture(scope="module")
def inputs():
    x = RNG.uniform(size=(16, 4, 4, 1)).astype(np.float32)
    labels = np.array(ask(network, x).argmax(-1))
    labels[0] = (labels[0] + 1) % 5  # the first is misclassified as it is
    x[1, 0], x[1, 1] = 0.0, 1.0
    return x, labels


def recorded(function):
    """The function, and the list of inputs that it meets when it runs."""
    seen = []

    def recording(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return function(x)

    return recording, seen


# The schedule.


def test_checkpoints_are_those_of_the_paper():
    assert _apgd.checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert _apgd.checkpoints(20) == (4, 7, 9, *range(10, 21))
    assert _apgd.checkpoints(1) == (1,)


def test_step_size_is_halved_by_few_rises_or_without_progress_but_not_twice_for_that():
    def at(rises, value, last_value, highest, last_highest, halved, most_rises=6):
        state = _apgd._Halving(*map(jnp.atleast_1d, (1.0, last_value, jnp.int32(rises), last_highest, halved)))
        return _apgd.halve(state, jnp.int32(8), jnp.array([value]), jnp.array([highest]), jnp.int32(most_rises))

    few, after = at(rises=5, value=2.0, last_value=1.0, highest=9.0, last_highest=8.0, halved=False)
    assert few[0]  # the last step is the 6th rise of 8: not more than 0.75 * 8
    assert (after.step_size[0], after.rises[0], after.highest[0], after.halved[0]) == (0.5, 0, 9.0, True)
    assert not at(rises=6, value=2.0, last_value=1.0, highest=9.0, last_highest=8.0, halved=False)[0][0]
    assert at(rises=6, value=1.0, last_value=1.0, highest=9.0, last_highest=8.0, halved=False)[0][0]  # no rise
    assert at(rises=8, value=2.0, last_value=1.0, highest=9.0, last_highest=9.0, halved=False)[0][0]
    assert not at(rises=8, value=2.0, last_value=1.0, highest=9.0, last_highest=9.0, halved=True)[0][0]
    halved, after = at(0, value=2.0, last_value=1.0, highest=9.0, last_highest=9.0, halved=False, most_rises=-1)
    assert not halved[0]  # no checkpoint
    assert (after.step_size[0], after.rises[0], after.value[0], after.halved[0]) == (1.0, 1, 2.0, False)


def test_l1_step_size_falls_until_the_best_point_changes_fewer_pixels():
    state = _apgd._Sparsity(jnp.array([0.3, 0.3, 0.12, 0.3]), jnp.array([20, 20, 20, 0]))
    back, after = _apgd.sparsen(state, jnp.array([18, 19, 20, 0]), jnp.float32(1), jnp.array(True))
    np.testing.assert_array_equal(back, [True, False, False, False])
    np.testing.assert_allclose(after.step_size, [1.0, 0.2, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(after.changed, [18, 19, 20, 0])
    back, after = _apgd.sparsen(state, jnp.array([1, 1, 1, 1]), jnp.float32(1), jnp.array(False))
    assert not back.any()
    np.testing.assert_array_equal(after.step_size, state.step_size)


def test_l1_step_moves_two_thirds_as_many_pixels_as_are_changed():
    gradient = jnp.array([[[5.0, -4.0, 3.0]], [[0.0, 0.0, -2.0]], [[0.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]]])
    want = [[[0.5, -0.5, 0.0]], [[0.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]
    np.testing.assert_array_equal(_apgd._sparse(gradient, jnp.array([3, 3, 3, 0])), want)


def test_steps_are_those_computed_by_hand():
    """One pixel, ball [0.25, 0.75], loss 1 - |x - 0.5625|; below in u = (x - 0.5) / 0.25, whose best is 0.25.

    Checkpoints are after 2, 3, 4, ... of 10 steps. From u = 1 with eta = 2:
      1 -> aim -1, no momentum -> -1; its loss is above 0, which counts as a rise, though that of the start was higher
      -1 -> aim 1: -1 + 0.75 * 2 + 0.25 * -2 = 0; the second rise of 2: more than 0.75 * 2, eta stays
      0 -> aim 1: 0.75 * 1 + 0.25 * (0 - -1) = 1; worse, eta = 1, back to 0 whose predecessor is now 0 itself
      0 -> aim 1: 0.75; above the loss at 1, and halved just now: eta stays, though the best is still that of 0
      0.75 -> aim -0.25: 0.75 - 0.75 + 0.25 * 0.75 = 0.1875, the best; and so on.
    """
    model, seen = recorded(lambda x: jnp.stack([jnp.full(x.shape[0], 9.0), 1 - jnp.abs(x[:, 0] - 0.5625)], -1))
    x, labels = jnp.full((8, 1), 0.5), jnp.zeros(8, jnp.int32)
    attack = attacks.apgd(epsilon=0.25, steps=10, loss=lambda logits, labels: logits[:, 1])
    best = attack(jax.random.split(KEY, 8), model, x, labels)
    jax.effects_barrier()
    traces = (np.concatenate(seen, -1) - 0.5) / 0.25
    up = [1, -1, 0, 1, 0.75, 0.1875, 0.65625, 0.5625, 0.28125, -0.1640625, 0.09375]
    down = [-1, 1, 0, 0.5, 0.75, 0.375, 0.09375, 0.1875, 0.328125, 0.28125, 0.2109375]
    assert set(traces[:, 0]) == {1, -1}
    for trace in traces:
        np.testing.assert_array_equal(trace, up if trace[0] > 0 else down)
    np.testing.assert_array_equal(best, np.full((8, 1), 0.5 + 0.28125 * 0.25))


def test_l1_shrinks_the_ball_from_three_epsilon_and_takes_no_result_before_it_is_there():
    model, seen = recorded(lambda x: jnp.stack([jnp.full(x.shape[0], 0.5), 20 * (x[:, :4].mean(-1) - 0.5)], -1))
    x, labels = jnp.full((2, 6), 0.5), jnp.zeros(2, jnp.int32)
    best = attacks.apgd(epsilon=0.09, norm="l1", steps=10)(KEY, model, x, labels)
    jax.effects_barrier()
    changes = np.abs(np.stack(seen) - 0.5).sum(-1)
    assert len(seen) == 4 + 4 + 5  # 3, 3 and 4 steps, and a look at each start
    for first, last, radius in ((0, 4, 0.27), (4, 8, 0.18), (8, 13, 0.09)):
        assert (changes[first:last] <= radius + 1e-6).all()
        np.testing.assert_allclose(changes[first:last].max(0), radius, atol=1e-6)
    # fooled at 0.27 and at 0.18, where 5 * change > 0.5, but not at 0.09
    np.testing.assert_allclose(np.abs(best - x).sum(-1), 0.09, atol=1e-6)


# Strength.


def targeted(**settings):
    return attacks.apgd_targeted(**{"num_targets": 2, **settings})


@pytest.mark.parametrize("norm", NORMS)
def test_linear_model_is_robust_exactly_up_to_its_distance(norm):
    # Two largest weights, as an l1 step moves two thirds of the pixels in use, rounded up: 2 of 2.
    rng = np.random.default_rng(1)
    weights = np.array([3, -3, *np.clip(rng.normal(size=14), -2.9, 2.9)], np.float32)
    x = rng.uniform(0.4, 0.6, (16, 4, 4, 1)).astype(np.float32)
    epsilon, dual = {"linf": (0.04, 1), "l2": (0.1, 2), "l1": (0.1, np.inf)}[norm]
    share = np.linspace(0.9, 1.1, 16)  # distance to the boundary, in epsilons
    labels = np.arange(16) % 2
    margin = np.where(labels == 1, 1, -1) * share * epsilon * np.linalg.norm(weights, dual)
    bias = np.full((16, 5), -1000.0)
    bias[:, 0], bias[:, 1] = 0, margin - x.reshape(16, 16) @ weights
    model = plane(weights, 1, bias)
    adversarial = attacks.apgd(epsilon=epsilon, norm=norm)(KEY, model, x, labels)
    np.testing.assert_array_equal(ask(model, adversarial).argmax(-1) == labels, share > 1)


def test_ce_raises_the_loss_at_least_as_far_as_pgd(inputs):
    x, labels = inputs
    found = [make(epsilon=0.05)(KEY, network, x, labels) for make in (attacks.apgd, attacks.pgd)]
    logits = [np.asarray(ask(network, x_adv), np.float64) for x_adv in found]
    stands = [z.argmax(-1) == labels for z in logits]
    apgd, pgd = (np.log(np.exp(z).sum(-1)) - z[np.arange(16), labels] for z in logits)
    both = stands[0] & stands[1]
    assert both.sum() > 4
    assert stands[0].sum() <= stands[1].sum() + 1  # either may be lucky at one input
    assert apgd[both].mean() >= pgd[both].mean() - 1e-6


def test_targets_reach_every_class_up_to_its_distance():
    """Classes 1 and 2 are ranked second and third but never move: only the attack on the fourth can succeed."""
    rng = np.random.default_rng(2)
    weights, x = rng.normal(size=16).astype(np.float32), rng.uniform(0.4, 0.6, (16, 4, 4, 1)).astype(np.float32)
    share = np.repeat([0.5, 0.9, 0.95, 0.99, 1.01, 1.05, 1.1, 1.5], 2)  # distance to the boundary, in epsilons
    bias = np.tile([0, -0.01, -0.02, 0, -1000.0], (16, 1))
    bias[:, 3] = -x.reshape(16, 16) @ weights - share * 0.04 * abs(weights).sum()
    model, labels = plane(weights, 3, bias), np.zeros(16, np.int32)
    answers = {
        targets: ask(model, targeted(epsilon=0.04, num_targets=targets)(KEY, model, x, labels)).argmax(-1)
        for targets in (2, 4)
    }
    np.testing.assert_array_equal(answers[4], np.where(share < 1, 3, 0))
    np.testing.assert_array_equal(answers[2], labels)


def test_targeted_attack_makes_the_model_answer_the_target(inputs):
    x, labels = inputs
    targets = (labels + 1) % 5
    adversarial = attacks.apgd(epsilon=0.5, targeted=True)(KEY, network, x, targets)
    np.testing.assert_array_equal(ask(network, adversarial).argmax(-1), targets)


def test_restarts_go_on_until_one_fools():
    """A valley between a high hill and a low one: which hill is climbed depends on the side of the start."""
    hills = lambda x: jnp.where(x < 0.5, 2.0, 0.5) * jnp.abs(x - 0.5)
    model = lambda x: jnp.concatenate([jnp.full_like(x, 0.3), hills(x)], -1)
    x, labels, keys = jnp.full((16, 1), 0.5), jnp.zeros(16, jnp.int32), jax.random.split(KEY, 16)
    once, often = (attacks.apgd(epsilon=0.25, restarts=n)(keys, model, x, labels)[:, 0] for n in (1, 20))
    assert set(np.asarray(once)) == {0.25, 0.75}
    np.testing.assert_array_equal(often, jnp.full(16, 0.25))


# Promises.


@pytest.mark.parametrize(
    "attack",
    [
        targeted(epsilon=0.03, num_targets=4),
        attacks.at_budget(attacks.fab(epsilon=0.03, num_targets=4, steps=10), 0.03),
    ],
)
def test_targets_one_by_one_find_what_all_find(attack, inputs):
    x, labels = inputs
    fools = lambda z: np.asarray(ask(network, z).argmax(-1) != labels)
    found, fooled, fallen = np.array(x), np.zeros(len(x), bool), []
    for number in range(4):
        one = attack.attempt(np.int32(number), KEY, network, x, labels)
        first = fools(one) & ~fooled
        found[first], fooled = np.asarray(one)[first], fooled | first
        fallen.append(int(first.sum()))
    together = np.asarray(attack(KEY, network, x, labels))
    np.testing.assert_array_equal(fools(together), fooled)
    np.testing.assert_allclose(together[fooled], found[fooled], atol=1e-6)
    assert fooled.any()
    assert not fooled.all(), fallen


@pytest.mark.parametrize(
    ("make", "norm"), [(attacks.apgd, "linf"), (attacks.apgd, "l2"), (attacks.apgd, "l1"), (targeted, "linf")]
)
def test_promises(make, norm, inputs):
    x, labels = inputs
    attack = make(epsilon=EPSILON[norm], norm=norm)
    adversarial = np.asarray(attack(KEY, network, x, labels))
    assert adversarial.shape == x.shape
    assert adversarial.dtype == x.dtype
    assert ((adversarial >= 0) & (adversarial <= 1)).all()  # also not NaN
    distance = np.abs(np.float64(adversarial) - np.float64(x)).reshape(16, -1)
    length = {"linf": distance.max(-1), "l1": distance.sum(-1), "l2": np.sqrt((distance**2).sum(-1))}[norm]
    assert (length <= EPSILON[norm] + (0 if norm == "linf" else 1e-6)).all()
    answers = np.asarray(ask(network, adversarial)).argmax(-1)
    assert 4 < (answers == labels).sum() < 15  # some fall, some stand
    if make is targeted:  # as it does for an input that is misclassified as it is
        np.testing.assert_array_equal(adversarial[0], x[0])

    np.testing.assert_array_equal(attack(KEY, network, x, labels), adversarial)
    assert (attack(jax.random.key(1), network, x, labels) != adversarial).any()
    np.testing.assert_array_equal(make(epsilon=0.0, norm=norm)(KEY, network, x, labels), x)
    others = np.concatenate([1 - x[:8], x[8:]])
    np.testing.assert_array_equal(np.asarray(attack(KEY, network, others, labels))[8:], adversarial[8:])


def test_random_model_without_noise_is_attacked_as_the_model_itself(inputs):
    x, labels = inputs
    averaged = attacks.expectation_over_transformation(attacks.apgd(epsilon=0.05), samples=2)
    model = lambda key, x: layers(HIDDEN, OUT, np.zeros((1, 5), np.float32), x)
    answers = ask(network, averaged(KEY, model, x, labels)).argmax(-1)
    alone = attacks.apgd(epsilon=0.05)(KEY, network, x, labels)
    np.testing.assert_array_equal(answers, ask(network, alone).argmax(-1))


def test_model_without_gradient_or_finite_logits_gives_finite_inputs(inputs):
    x, labels = inputs
    bias = np.where(np.arange(16) < 8, np.nan, 0)[:, None]
    for broken in (model_of(HIDDEN, OUT, bias), model_of(HIDDEN, 0 * OUT, bias)):
        adversarial = attacks.apgd(epsilon=0.1, norm="l2")(KEY, broken, x, labels)
        assert ((adversarial >= 0) & (adversarial <= 1)).all()


# Wrong use.


def test_more_targets_than_wrong_classes_warn_where_the_program_is_traced_once_for_all_epsilons(inputs):
    x, labels = inputs
    traces = []

    def counted(x):
        traces.append(x)
        return network(x)

    with pytest.warns(UserWarning, match="num_targets=9 exceeds the wrong answers of a model of 5 classes: only 4 are"):
        jax.eval_shape(lambda: attacks.apgd_targeted(epsilon=0.05)(KEY, counted, x, labels))
    before = len(traces)
    jax.eval_shape(lambda: attacks.apgd_targeted(epsilon=0.1)(KEY, counted, x, labels))
    assert len(traces) == before


def test_dlr_needs_enough_classes(inputs):
    x, labels = inputs
    three, two = (lambda x: network(x)[:, :3]), (lambda x: network(x)[:, :2])
    with pytest.raises(ValueError, match="targeted_.* needs logits of at least 4 classes, got 3"):
        attacks.apgd_targeted(epsilon=0.05)(KEY, three, x, labels % 3)
    with pytest.raises(ValueError, match="difference_of_logits_ratio needs logits of at least 3 classes, got 2"):
        attacks.apgd(epsilon=0.05, loss="dlr")(KEY, two, x, labels % 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, got -0.1"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"restarts": 0}, "restarts must be an integer of at least 1, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"rho": 1.0}, "rho must lie strictly between 0 and 1, got 1.0"),
        ({"loss": "hinge"}, "loss must be one of .*, got 'hinge'"),
        ({"num_targets": 0}, "num_targets must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(settings, message, unchecked):
    for make in (attacks.apgd, attacks.apgd_targeted):
        if set(settings) <= {field.name for field in dataclasses.fields(make)}:
            with pytest.raises(ValueError, match=message):
                make(**{"epsilon": 0.1, **settings})
