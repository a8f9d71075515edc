import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax import attacks, losses, training
from robustjax.typing import Batch, ModelState, Outputs

K, D = 3, 4


def apply(state, x, *, train=False):
    """A linear model, offset by its running mean at inference, that sums up all it was trained on."""
    flat = x.reshape(x.shape[0], -1)
    logits = flat @ state.params["w"] + state.params["b"][None]
    if not train:
        return Outputs(logits + state.batch_stats["offset"][None], flat), state
    stats = {"offset": state.batch_stats["offset"], "seen": 10 * state.batch_stats["seen"] + flat.sum()}
    return Outputs(logits, flat), state._replace(batch_stats=stats)


def brighter(key, logits_fn, x, labels):
    """Not an attack, but easy to follow."""
    del key, logits_fn, labels
    return x + 0.25


def gradient_sign(key, logits_fn, x, labels):
    """An attack whose result depends on all that it is given, differentiably."""
    noise = jax.random.uniform(key, x.shape)
    logits = logits_fn(x)
    target = jax.nn.one_hot(labels, K) if labels.ndim == 1 else jax.nn.softmax(labels)
    return x + 0.1 * noise + 0.01 * (logits * target).sum()


OBJECTIVES = {
    "adversarial_training": losses.adversarial.adversarial_training,
    "trades": losses.adversarial.trades,
    "mart": losses.adversarial.mart,
    "logit_pairing": losses.adversarial.logit_pairing,
    "awp": lambda **settings: losses.adversarial.awp(objective=losses.adversarial.trades(**settings)),
}


@pytest.fixture(scope="module")
def state():
    params = {"w": 3 * jax.random.normal(jax.random.key(1), (D, K)), "b": jnp.asarray([0.1, -0.2, 0.3])}
    return ModelState(params, {"offset": jnp.zeros(K), "seen": jnp.float32(0)})


@pytest.fixture(scope="module")
def batch():
    return Batch(jax.random.uniform(jax.random.key(2), (7, 2, 2, 1)), jnp.arange(7) % K, jnp.arange(7))


@pytest.fixture(scope="module")
def closed(state, batch):
    """Probabilities of clean and of brighter images, logits and labels, in float64."""
    w, b = (np.asarray(state.params[name], np.float64) for name in "wb")
    flat = np.asarray(batch.image, np.float64).reshape(7, D)
    logits = [x @ w + b for x in (flat, flat + 0.25)]
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in logits)
    return p, q, logits, np.asarray(batch.label)


def run(objective, state, batch, key=0):
    return objective(jax.random.key(key), apply, state, batch)


loss_and_gradient = jax.jit(
    lambda objective, state, batch: jax.value_and_grad(lambda state: run(objective, state, batch)[0])(state),
    static_argnums=0,
)


def cross_entropy(p, labels):
    return -np.log(p[range(len(labels)), labels])


def divergence(p, q):
    return (p * np.log(p / q)).sum(-1)


def check(result, want, closed, **metrics):
    p, q, _, labels = closed
    loss, aux = result
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert aux.metrics["loss"] == loss
    metrics = {"accuracy": (p.argmax(-1) == labels).mean(), **metrics}
    metrics["robust_accuracy"] = (q.argmax(-1) == labels).mean()
    assert aux.metrics.keys() == {"loss", *metrics}
    for name, value in metrics.items():
        np.testing.assert_allclose(aux.metrics[name], value, rtol=1e-5)


def test_adversarial_training_is_the_cross_entropy_of_adversarial_images(state, batch, closed):
    _, q, _, labels = closed
    result = run(losses.adversarial.adversarial_training(attack=brighter), state, batch)
    check(result, cross_entropy(q, labels).mean(), closed, accuracy=(q.argmax(-1) == labels).mean())


def test_trades_is_cross_entropy_and_divergence_from_the_clean_prediction(state, batch, closed):
    p, q, _, labels = closed
    want = cross_entropy(p, labels).mean() + 2.5 * divergence(p, q).mean()
    result = run(losses.adversarial.trades(attack=brighter, beta=2.5), state, batch)
    check(result, want, closed, robust_loss=divergence(p, q).mean())


def test_mart_weighs_the_divergence_by_the_probability_of_a_wrong_answer(state, batch, closed):
    p, q, _, labels = closed
    wrong = np.where(np.eye(K, dtype=bool)[labels], 0, q).max(-1)
    robust_loss = (divergence(p, q) * (1 - p[range(7), labels])).mean()
    want = (cross_entropy(q, labels) - np.log(1 - wrong)).mean() + 2.5 * robust_loss
    result = run(losses.adversarial.mart(attack=brighter, beta=2.5), state, batch)
    check(result, want, closed, robust_loss=robust_loss)


def test_logit_pairing_is_the_mean_over_both_and_the_mean_square_over_batch_and_classes(state, batch, closed):
    p, q, logits, labels = closed
    pairing_loss = np.square(logits[0] - logits[1]).mean()
    want = (cross_entropy(p, labels) + cross_entropy(q, labels)).mean() / 2 + 0.7 * pairing_loss
    result = run(losses.adversarial.logit_pairing(attack=brighter, weight=0.7), state, batch)
    check(result, want, closed, pairing_loss=pairing_loss)


def test_entropy_regularization(state, batch, closed):
    p, _, _, labels = closed
    entropy = -(p * np.log(p)).sum(-1).mean()
    loss, aux = run(losses.adversarial.entropy_regularization(weight=0.7), state, batch)
    np.testing.assert_allclose(loss, cross_entropy(p, labels).mean() + 0.7 * entropy, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["entropy"], entropy, rtol=1e-5)
    assert aux.metrics["loss"] == loss
    assert (
        run(losses.adversarial.entropy_regularization(weight=0.0), state, batch)[0]
        == run(losses.standard(), state, batch)[0]
    )


def test_gradients_flow_through_both_predictions_and_the_weight(state, batch):
    """Central differences of the loss in float64, with the images held fixed."""

    def mart(w):
        flat = np.asarray(batch.image, np.float64).reshape(7, D)
        labels, b = np.asarray(batch.label), np.asarray(state.params["b"], np.float64)
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (flat @ w + b, (flat + 0.25) @ w + b))
        wrong = np.where(np.eye(K, dtype=bool)[labels], 0, q).max(-1)
        weighed = divergence(p, q) * (1 - p[range(7), labels])
        return (cross_entropy(q, labels) - np.log(1 - wrong) + 6 * weighed).mean()

    w = np.asarray(state.params["w"], np.float64)
    want = np.zeros_like(w)
    for index in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[index] = 1e-6
        want[index] = (mart(w + step) - mart(w - step)) / 2e-6
    _, gradient = loss_and_gradient(losses.adversarial.mart(attack=brighter), state, batch)
    np.testing.assert_allclose(gradient.params["w"], want, rtol=1e-4, atol=1e-5)


def test_beta_0_is_standard_training(state, batch):
    value_and_grad = lambda objective: jax.value_and_grad(lambda s: run(objective, s, batch)[0])(state)
    for got, want in zip(
        jax.tree.leaves(value_and_grad(losses.adversarial.trades(attack=brighter, beta=0.0))),
        jax.tree.leaves(value_and_grad(losses.standard())),
    ):
        np.testing.assert_array_equal(got, want)


def test_without_a_perturbation_adversarial_training_is_standard_training(state, batch):
    same = lambda key, logits_fn, x, labels: x
    want, _ = run(losses.standard(), state, batch)
    for objective in (losses.adversarial.adversarial_training(attack=same), losses.adversarial.trades(attack=same)):
        np.testing.assert_array_equal(run(objective, state, batch)[0], want)
    np.testing.assert_allclose(run(losses.adversarial.logit_pairing(attack=same), state, batch)[0], want, rtol=1e-6)


@pytest.mark.parametrize("name", ["adversarial_training", "trades", "mart", "logit_pairing"])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits_give_finite_losses_and_gradients(state, batch, name, scale):
    large = state._replace(params={"w": scale * jnp.sign(state.params["w"]), "b": jnp.zeros(K)})
    value, gradient = loss_and_gradient(OBJECTIVES[name](attack=brighter), large, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_gradient_flows_through_the_attack(state, batch, name):
    """With the images as constants the gradient is the same, for parameters, statistics and clean images."""
    examples = losses.adversarial.trades(attack=gradient_sign) if name == "trades" or name == "awp" else None
    examples = examples or OBJECTIVES[name](attack=gradient_sign)
    fixed = examples.examples(jax.random.key(0), apply, state, batch).adversarial
    assert abs(fixed - batch.image).min() > 0

    def gradients(attack):
        objective = OBJECTIVES[name](attack=attack)
        return jax.grad(lambda s, images: run(objective, s, batch._replace(image=images))[0], (0, 1))(
            state, batch.image
        )

    got, want = gradients(gradient_sign), gradients(lambda key, logits_fn, x, labels: fixed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


def recorder(calls):
    def attack(key, logits_fn, x, labels):
        calls.append((key, logits_fn(x), x, labels))
        return x + 0.25

    return attack


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_attack_meets_running_statistics_and_labels_or_logits(state, batch, name):
    calls = []
    shifted = state._replace(batch_stats=state.batch_stats | {"offset": jnp.asarray([1.0, 2.0, 3.0])})
    _, aux = run(OBJECTIVES[name](attack=recorder(calls)), shifted, batch)
    ((_, logits, x, labels),) = calls  # one attack, under AWP too
    np.testing.assert_array_equal(x, batch.image)
    np.testing.assert_allclose(logits, apply(shifted, x)[0].logits, rtol=1e-6)
    np.testing.assert_array_equal(labels, logits if name in ("trades", "awp") else batch.label)
    assert aux.state.params is shifted.params


@pytest.mark.parametrize("name", OBJECTIVES)
def test_which_passes_renew_the_batch_statistics(state, batch, name):
    """Clean first, then adversarial; both at once for pairing; adversarial alone in adversarial training."""
    _, aux = run(OBJECTIVES[name](attack=brighter), state, batch)
    clean, adversarial = batch.image.sum(), (batch.image + 0.25).sum()
    want = {"adversarial_training": adversarial, "logit_pairing": clean + adversarial}
    np.testing.assert_allclose(aux.state.batch_stats["seen"], want.get(name, 10 * clean + adversarial), rtol=1e-6)


def test_awp_moves_each_kernel_by_gamma_of_its_norm_along_the_gradient_and_nothing_else(state, batch):
    seen = []

    def seeing(state, x, *, train=False):
        seen.append(state.params)
        return apply(state, x, train=train)

    params = {"w": state.params["w"], "b": state.params["b"], "unused": jnp.ones((2, 2, 2)), "still": jnp.zeros((2, 2))}
    extended = state._replace(params=params)
    objective = losses.adversarial.adversarial_training(attack=brighter)
    value, aux = losses.adversarial.awp(objective=objective, gamma=0.02)(jax.random.key(0), seeing, extended, batch)
    perturbed = seen[-1]
    moved = np.asarray(perturbed["w"], np.float64) - np.asarray(params["w"], np.float64)
    gradient = loss_and_gradient(objective, state, batch)[1].params["w"]
    assert np.linalg.norm(moved) / np.linalg.norm(params["w"]) == pytest.approx(0.02, abs=1e-6)
    cosine = (moved * gradient).sum() / np.linalg.norm(moved) / np.linalg.norm(gradient)
    assert cosine == pytest.approx(1, abs=1e-6)
    for name in ("b", "unused", "still"):
        np.testing.assert_array_equal(perturbed[name], params[name])
    base = run(objective, state, batch)[0]
    assert value > base
    assert value == run(objective, state._replace(params={"w": perturbed["w"], "b": params["b"]}), batch)[0]
    assert aux.state.params is extended.params


@pytest.mark.parametrize("name", ["adversarial_training", "trades", "mart", "logit_pairing"])
def test_awp_of_gamma_0_is_its_objective_bit_for_bit(state, batch, name):
    base = OBJECTIVES[name](attack=gradient_sign)
    step = lambda objective: jax.value_and_grad(lambda s: run(objective, s, batch), has_aux=True)(state)
    got, want = step(losses.adversarial.awp(objective=base, gamma=0.0)), step(base)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_awp_gives_the_gradient_of_the_perturbed_weights_to_the_weights(state, batch):
    objective = losses.adversarial.trades(attack=brighter)
    seen = []

    def seeing(state, x, *, train=False):
        seen.append(state.params)
        return apply(state, x, train=train)

    losses.adversarial.awp(objective=objective, gamma=0.1)(jax.random.key(0), seeing, state, batch)
    at = lambda params: loss_and_gradient(objective, state._replace(params=params), batch)[1].params
    got = loss_and_gradient(losses.adversarial.awp(objective=objective, gamma=0.1), state, batch)[1].params
    for name in "wb":
        # Two programs, which XLA fuses apart: either gradient is within 3e-6 of the one in float64.
        np.testing.assert_allclose(got[name], at(seen[-1])[name], rtol=1e-5)
        assert abs(got[name] - at(state.params)[name]).max() > 1e-3


KL_ATTACK = attacks.pgd(epsilon=0.1, steps=3, random_start=0.001, loss=losses.kl_divergence, keep="last")


def test_the_attack_of_trades_finds_what_diverges(state, batch):
    signs = np.sign(np.random.default_rng(3).normal(size=batch.image.shape)).astype(np.float32)
    corner = batch.image + np.float32(0.1) * signs
    here, elsewhere = (losses.adversarial.trades(attack=attack) for attack in (KL_ATTACK, lambda *arguments: corner))
    robust_loss = jax.jit(lambda objective: run(objective, state, batch)[1].metrics["robust_loss"], static_argnums=0)
    found, other = map(robust_loss, (here, elsewhere))
    assert found > 1.5 * other


def test_a_step_with_awp_and_pgd_is_traced_once(state, batch):
    traces = []

    def counting(state, x, *, train=False):
        traces.append(train)
        return apply(state, x, train=train)

    @functools.partial(jax.jit, static_argnums=0)
    def step(objective, key, state):
        return jax.value_and_grad(lambda s: objective(key, counting, s, batch)[0])(state)

    counts = []
    for _ in range(2):
        attack = attacks.pgd(epsilon=0.1, steps=3, random_start=0.001, loss=losses.kl_divergence, keep="last")
        objective = losses.adversarial.awp(objective=losses.adversarial.trades(attack=attack))
        jax.eval_shape(lambda state, objective=objective: step(objective, jax.random.key(0), state), state)
        counts.append(len(traces))
    assert counts[0] == counts[1]
    assert sum(traces) == 4  # two passes of the loss at the weights, two at the perturbed ones


def test_eight_devices_equal_one(state, batch):
    objective, optimizer = losses.adversarial.adversarial_training(attack=attacks.fgsm(epsilon=0.1)), optax.sgd(0.1)
    eight = jax.tree.map(lambda rows: jnp.concatenate([rows, rows[:1]]), batch)
    results = []
    for devices in (1, 8):
        mesh = training.make_mesh({"data": devices})
        initial = training.replicate(training.init(jax.random.key(0), state, optimizer), mesh)
        results.append(training.make_step(objective, optimizer)(apply, initial, training.shard_batch(eight, mesh)))
    for one, many in zip(*map(jax.tree.leaves, ([r[0].model, r[1]] for r in results)), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_the_papers():
    assert losses.adversarial.trades(attack=brighter).beta == losses.adversarial.mart(attack=brighter).beta == 6.0
    assert losses.adversarial.logit_pairing(attack=brighter).weight == 0.5
    assert losses.adversarial.awp(objective=losses.adversarial.trades(attack=brighter)).gamma == 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.adversarial.trades(attack=brighter, beta=-1.0), "beta must be at least 0 and finite, got -1.0"),
        (
            lambda: losses.adversarial.mart(attack=brighter, beta=float("nan")),
            "beta must be at least 0 and finite, got nan",
        ),
        (
            lambda: losses.adversarial.logit_pairing(attack=brighter, weight=-0.5),
            "weight must be at least 0 and finite, got -0.5",
        ),
        (
            lambda: losses.adversarial.entropy_regularization(weight=-0.5),
            "weight must be at least 0 and finite, got -0.5",
        ),
        (
            lambda: losses.adversarial.awp(objective=losses.adversarial.trades(attack=brighter), gamma=float("inf")),
            "gamma must be at least 0 and finite, got inf",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_awp_refuses_an_objective_without_an_attack():
    unchecked = types.SimpleNamespace(objective=losses.standard(), gamma=0.01)  # a type checker is in the way otherwise
    with pytest.raises(ValueError, match=r"objective must have the methods examples and loss, got Standard\("):
        losses.adversarial.awp.__post_init__(unchecked)


def test_an_attack_that_does_not_fit_is_refused(state, batch):
    with pytest.raises(ValueError, match="attack must have loss=losses.kl_divergence, .*, got 'ce'"):
        losses.adversarial.trades(attack=attacks.pgd(epsilon=0.1, loss="ce", keep="last"))
    with pytest.raises(ValueError, match=r"attack must return images of shape \(7, .*\), got MinimumNorm"):
        run(
            losses.adversarial.adversarial_training(attack=lambda key, logits_fn, x, y: attacks.MinimumNorm(x, y, y)),
            state,
            batch,
        )
