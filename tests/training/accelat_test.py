import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import losses, training


def replay(accuracies, **settings):
    rule = training.accelat(**settings)
    state, rates = rule.init(), []
    for accuracy in accuracies:
        state, rate = rule.update(state, accuracy)
        rates.append(float(rate))
    assert rates[-1] == state.learning_rate
    return rates


def with_lists(accuracies, *, learning_rate, factor, minimum, window, patience, threshold):
    """The same rule told with everything remembered, in float64."""
    rates, means, quiet = [], [], patience
    for epoch in range(1, len(accuracies) + 1):
        mean = np.mean(accuracies[max(0, epoch - window) : epoch])
        quiet += 1
        if len(means) > window and quiet > patience and mean - means[-1] < threshold:
            learning_rate, quiet = learning_rate * factor, 1
        learning_rate = max(learning_rate, minimum)
        means.append(mean)
        rates.append(learning_rate)
    return rates


def reductions(rates):
    """Epochs, from 1, whose end brought a lower rate."""
    return [epoch for epoch in range(2, len(rates) + 1) if rates[epoch - 1] < rates[epoch - 2]]


def test_a_list_by_hand():
    """Window 2, patience 2: the mean rises by (a_t - a_{t-2}) / 2, judged from epoch 4 on."""
    accuracies = [0.1, 0.5, 0.3, 0.52, 0.5, 0.8, 0.8, 0.9, 0.9]
    # Gains from epoch 3 on: 0.1, 0.01, 0.1, 0.14, 0.15, 0.05, 0.05. Below 0.06 are 4, 8 and 9, which is too soon.
    rates = replay(accuracies, learning_rate=1.0, factor=0.5, window=2, patience=2, threshold=0.06)
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_rule_that_remembers_everything(seed):
    rng = np.random.default_rng(seed)
    accuracies = np.clip(1 - np.exp(-np.arange(40) / 10) + 0.03 * rng.normal(size=40), 0, 1).tolist()
    window, patience = 5 - seed, 5 + 2 * seed
    settings = dict(learning_rate=0.1, factor=0.7, minimum=0.03, window=window, patience=patience, threshold=0.01)
    want = with_lists(accuracies, **settings)
    np.testing.assert_allclose(replay(accuracies, **settings), want, rtol=1e-6)
    assert len(reductions(want)) >= 2


def test_a_plateau_is_first_met_at_epoch_w_plus_2_and_then_every_q_epochs():
    assert reductions(replay([0.7] * 30)) == [7, 12, 17, 22, 27]
    assert reductions(replay([0.7] * 16, window=3, patience=4)) == [5, 9, 13]


def test_rising_accuracy_keeps_the_rate_and_the_minimum_holds():
    assert set(replay([0.01 * epoch for epoch in range(100)])) == {np.float32(1e-3)}
    rates = replay([0.5] * 200, learning_rate=0.1, factor=0.1, minimum=0.004)
    np.testing.assert_allclose(sorted(set(rates)), [0.004, 0.01, 0.1], rtol=1e-6)


def test_under_jit_and_scan_as_outside():
    accuracies = jnp.asarray([0.2, 0.5, 0.6, 0.6, 0.6, 0.62, 0.61, 0.6, 0.65, 0.64])
    rule = training.accelat(window=2, patience=3)
    _, rates = jax.jit(lambda accuracies: jax.lax.scan(rule.update, rule.init(), accuracies))(accuracies)
    assert rates.tolist() == replay(accuracies.tolist(), window=2, patience=3)
    assert len(set(rates.tolist())) > 1


def test_drives_the_optimizer_of_a_fit_between_epochs(problem):
    """Epochs of five steps in one loop: three at a rate of 0.2, one at 0.1."""
    mesh = training.make_mesh({"data": 1})

    def fit(state, stream, optimizer, num_steps):
        settings = dict(objective=losses.standard(), optimizer=optimizer, mesh=mesh, progress=False)
        return training.fit(problem.apply, state, stream, num_steps=num_steps, **settings).state

    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.2)
    rule = training.accelat(learning_rate=0.2, factor=0.5, window=1, patience=1)
    controller, state, stream = (
        rule.init(),
        training.init(jax.random.key(0), problem.model, optimizer),
        problem.Stream(),
    )
    for epoch, accuracy in enumerate([0.2, 0.4, 0.4, 0.6], 1):
        state = fit(state, stream, optimizer, 5 * epoch)
        controller, rate = rule.update(controller, accuracy)
        state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=rate))
    assert rate == np.float32(0.1)

    want, stream = training.init(jax.random.key(0), problem.model, optax.sgd(0.2)), problem.Stream()
    for rate, num_steps in ((0.2, 15), (0.1, 20)):
        want = fit(want, stream, optax.sgd(rate), num_steps)
    for got, wanted in zip(jax.tree.leaves(state.model), jax.tree.leaves(want.model), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: training.accelat(learning_rate=0.0), "learning_rate must be positive and finite, got 0.0"),
        (lambda: training.accelat(factor=1.0), "factor must lie strictly between 0 and 1, got 1.0"),
        (lambda: training.accelat(minimum=0.01), "minimum must be at most learning_rate=0.001, got 0.01"),
        (lambda: training.accelat(window=0), "window must be an integer of at least 1, got 0"),
        (lambda: training.accelat(patience=0), "patience must be an integer of at least 1, got 0"),
        (lambda: replay([0.5, 87.0]), r"validation_accuracy must lie in \[0, 1\], got 87.0"),
        (lambda: replay([float("nan")]), r"validation_accuracy must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_step_may_donate_the_rate_that_it_was_given():
    rule, take = training.accelat(learning_rate=0.1), jax.jit(lambda rate: rate + 1, donate_argnums=0)
    state = rule.init()
    for update in (rule.update, jax.jit(rule.update)):
        state, rate = update(state, 0.5)
        take(rate)
        state, rate = update(state, 0.5)
        assert rate == state.learning_rate == jnp.float32(0.1)
