import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax import attacks, losses
from robustjax.attacks import _attack

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
EPSILON = {"linf": 0.05, "l2": 0.2, "l1": 0.4}
KEY = jax.random.key(0)
RNG = np.random.default_rng(34)
HIDDEN, OUT = (0.5 * RNG.normal(size=(16, 32))).astype(np.float32), (0.3 * RNG.normal(size=(32, 5))).astype(np.float32)
WEIGHT = RNG.normal(size=(16, 2)).astype(np.float32)
X = RNG.uniform(size=(12, 4, 4, 1)).astype(np.float32)


def layers(hidden, out, bias, x):
    return jax.nn.relu(x.reshape(x.shape[0], 16) @ hidden) @ out + bias


def model_of(hidden, out, bias):
    """A model of one structure, whose programs all tests share; a bias for each input."""
    bias = np.broadcast_to(np.asarray(bias, np.float32), (12, 5))
    return jax.tree_util.Partial(layers, *map(jnp.asarray, (hidden, out, bias)))


ask = jax.jit(lambda model, x: model(x))
cross_entropy = jax.jit(lambda logits, labels: losses.cross_entropy(logits, labels))
network = model_of(HIDDEN, OUT, 0)
LABELS = (np.maximum(X.reshape(12, 16) @ HIDDEN, 0) @ OUT).argmax(-1).astype(np.int32)
MANY = {
    "pgd": lambda norm: attacks.pgd(epsilon=EPSILON[norm], norm=norm, steps=20, restarts=2),
    "last": lambda norm: attacks.pgd(epsilon=EPSILON[norm], norm=norm, steps=20, keep="last"),
    "fgsm": lambda norm: attacks.fgsm(epsilon=EPSILON[norm], norm=norm),
    "momentum": lambda norm: attacks.momentum_iterative(epsilon=EPSILON[norm], norm=norm, steps=4),
}


SPOILT = X.copy()
SPOILT[3, 1, 1, 0] = np.nan
CASES = [*itertools.product(("pgd", "fgsm"), NORMS), ("last", "linf"), ("momentum", "linf"), ("momentum", "l2")]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_what_every_attack_promises(name, norm):
    attack = MANY[name](norm)
    x_adv = attack(KEY, network, X, LABELS)
    assert x_adv.shape == X.shape
    assert x_adv.dtype == X.dtype
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    change = (np.asarray(x_adv, np.float64) - np.asarray(X, np.float64)).reshape(12, -1)
    size = np.linalg.norm(change, ORDER[norm], axis=-1)
    assert size.max() <= EPSILON[norm] + (0 if norm == "linf" else 1e-6)
    assert size.max() > 0.5 * EPSILON[norm]
    np.testing.assert_array_equal(attack(KEY, network, X, LABELS), x_adv)
    order = np.array([3, 0, 7] * 4)  # in other company each is attacked as in the batch
    np.testing.assert_allclose(attack(KEY, network, X[order], LABELS[order]), x_adv[order], atol=1e-6)
    still = dataclasses.replace(attack, epsilon=0.0)(KEY, network, X, LABELS)
    np.testing.assert_array_equal(still, X)


def test_another_epsilon_does_not_trace_again():
    traced = []

    def counted(x):
        traced.append(x.shape)
        return network(x)

    for epsilon in (0.01, 0.02, 0.03):
        attacks.fgsm(epsilon=epsilon)(KEY, counted, X, LABELS)
        first = len(traced) if epsilon == 0.01 else first  # noqa: F821
    assert len(traced) == first


def linear(shift):
    """A model of two classes, x @ WEIGHT + shift, where a linear function is its positive less its negative part."""
    hidden, out = np.zeros((16, 32), np.float32), np.zeros((32, 5), np.float32)
    hidden[:, :4] = np.concatenate([WEIGHT, -WEIGHT], 1)
    out[:4, :2] = np.concatenate([np.eye(2), -np.eye(2)])
    return model_of(hidden, out, [0, shift, -1000, -1000, -1000])


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_falls_where_theory_says(norm):
    """Away from the faces of [0, 1] an input stands if and only if its margin exceeds epsilon times the dual norm."""
    x = np.float32(0.5) + np.float32(0.2) * (np.asarray(X) - np.float32(0.5))
    model = linear(np.median(x.reshape(12, 16) @ (WEIGHT[:, 0] - WEIGHT[:, 1])))
    logits = np.asarray(ask(model, x))
    labels, direction = logits.argmax(-1), WEIGHT[:, 1] - WEIGHT[:, 0]
    distance = abs(logits[:, 1] - logits[:, 0]) / np.linalg.norm(direction, DUAL[norm])
    epsilon = float(np.median(distance)) if norm != "l1" else min(float(np.median(distance)), 0.3)
    for name, tolerance in (("fgsm", 1e-3), ("pgd", 0.05 * epsilon)):  # a random start leaves a little to go
        if (name, norm) == ("pgd", "l1"):  # whose steps move one pixel here: not the whole of epsilon at once
            continue
        x_adv = dataclasses.replace(MANY[name](norm), epsilon=epsilon)(KEY, model, x, labels)
        fooled, clear = np.asarray(ask(model, x_adv)).argmax(-1) != labels, abs(distance - epsilon) > tolerance
        assert {True, False} == set((distance < epsilon)[clear])
        np.testing.assert_array_equal(fooled[clear], (distance < epsilon)[clear])


def gradient_of_cross_entropy(x):
    """By hand, in float64, at all labels."""
    before = x.reshape(12, 16).astype(np.float64) @ HIDDEN
    logits = np.maximum(before, 0) @ OUT
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return ((probabilities - np.eye(5)[np.asarray(LABELS)]) @ OUT.T * (before > 0)) @ HIDDEN.T


def test_l1_fgsm_spends_epsilon_as_a_linear_programme_does():
    x, x_adv = (
        np.asarray(a, np.float64).reshape(12, 16)
        for a in (X, attacks.fgsm(epsilon=1.5, norm="l1")(KEY, network, X, LABELS))
    )
    for g, x0, moved in zip(gradient_of_cross_entropy(x), x, x_adv, strict=True):
        # Displacement as a difference of two non-negative parts, whose sum is at most epsilon.
        bounds = [(0, 1 - p) for p in x0] + [(0, p) for p in x0]
        best = optimize.linprog(-np.concatenate([g, -g]), np.ones((1, 32)), [1.5], bounds=bounds)
        assert g @ (moved - x0) == pytest.approx(-best.fun, rel=1e-4)


def test_one_step_without_a_random_start_is_fgsm():
    norm = "l2"
    pgd = attacks.pgd(epsilon=0.05, norm=norm, steps=1, step_size=0.05, random_start=False, keep="last")
    fgsm = attacks.fgsm(epsilon=0.05, norm=norm)
    np.testing.assert_allclose(pgd(KEY, network, X, LABELS), fgsm(KEY, network, X, LABELS), atol=1e-7)


def test_momentum_without_memory_is_pgd():
    norm = "l2"
    momentum = attacks.momentum_iterative(epsilon=0.05, norm=norm, steps=4, decay=0.0)(KEY, network, X, LABELS)
    settings = {"step_size": 0.05 / 4, "random_start": False, "keep": "last"}
    pgd = attacks.pgd(epsilon=0.05, norm=norm, steps=4, **settings)(KEY, network, X, LABELS)
    np.testing.assert_allclose(momentum, pgd, atol=1e-6)


def test_more_steps_and_restarts_find_a_higher_loss():
    """Of the inputs that stand under all of them: an attack ends at the first point that fools."""
    fgsm, pgd = attacks.fgsm(epsilon=0.02), attacks.pgd(epsilon=0.02, steps=20)
    logits = [ask(network, a(KEY, network, X, LABELS)) for a in (fgsm, pgd, dataclasses.replace(pgd, restarts=2))]
    stands = np.all([np.argmax(z, -1) == LABELS for z in logits], axis=0)
    assert stands.sum() > 3
    losses_of = [np.asarray(cross_entropy(z, LABELS))[stands].mean() for z in logits]
    assert losses_of[0] <= losses_of[1] + 1e-6
    assert losses_of[1] <= losses_of[2] + 1e-6


def test_targeted_attacks_lower_the_loss_of_their_target():
    targets = (LABELS + 1) % 5
    for make in (attacks.pgd, attacks.fgsm, attacks.momentum_iterative):
        x_adv = make(epsilon=0.05, targeted=True)(KEY, network, X, targets)
        before, after = (cross_entropy(ask(network, z), targets).mean() for z in (X, x_adv))
        assert after < before


def test_the_first_point_that_fools_is_kept_and_the_last_is_not_the_first():
    pgd = attacks.pgd(epsilon=0.3, steps=20)
    best, last = (dataclasses.replace(pgd, keep=keep)(KEY, network, X, LABELS) for keep in ("best", "last"))
    fooled = np.asarray(ask(network, best).argmax(-1) != LABELS)
    assert fooled.sum() > 8
    value = lambda x: np.asarray(cross_entropy(ask(network, x), LABELS))[fooled].mean()
    assert value(last) > value(best)


def test_a_divergence_needs_a_start_beside_the_input():
    """At the input itself its gradient is rounding: the noise of TRADES is what attacks it."""
    clean = ask(network, X)

    def divergence(x):
        values = losses.kl_divergence(network(x), clean)
        return values.sum(), values

    divergence = jax.jit(jax.grad(divergence, has_aux=True))
    assert float(jnp.abs(divergence(X)[0]).max()) < 1e-6
    pgd = attacks.pgd(epsilon=0.05, steps=5, loss=losses.kl_divergence, keep="last", random_start=0.001)
    moved = pgd(KEY, network, X, clean)
    assert divergence(moved)[1].min() > 1e-4


def test_losses_by_name_and_by_function():
    named = {"cross_entropy": losses.cross_entropy, "ce": losses.cross_entropy, "margin": losses.margin}
    named["dlr"] = losses.difference_of_logits_ratio
    assert {name: _attack.loss_of(name) for name in named} == named
    first = attacks.fgsm(epsilon=0.02, loss=lambda logits, labels: -logits[:, 0])(KEY, network, X, LABELS)
    assert (ask(network, first)[:, 0] < ask(network, X)[:, 0]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0 and finite, got nan"),
        ({"epsilon": None}, "epsilon must be at least 0 and finite, got None"),
        ({"epsilon": np.array([0.1, 0.2])}, r"epsilon must be at least 0 and finite, got float64 of shape \(2,\)"),
        ({"steps": None}, "steps must be an integer of at least 1, got None"),
        ({"loss": ["ce"]}, r"loss must be one of .* or a function, got \['ce'\]"),
        ({"norm": "l0"}, "norm must be one of linf, l2, l1, got 'l0'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"restarts": 0}, "restarts must be an integer of at least 1, got 0"),
        ({"step_size": 0.0}, "step_size must be positive and finite, got 0.0"),
        ({"loss": "nll"}, "loss must be one of cross_entropy, ce, dlr, margin, or a function, got 'nll'"),
        ({"keep": "worst"}, "keep must be best or last, got 'worst'"),
        ({"quantile": 1.0}, "quantile must lie strictly between 0 and 1, got 1.0"),
        ({"random_start": 1.0}, "random_start must lie strictly between 0 and 1, got 1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.pgd(**{"epsilon": 0.1, **settings})


@pytest.mark.usefixtures("unchecked")
def test_settings_must_be_hashable():
    with pytest.raises(ValueError, match=r"settings of an attack must be hashable, Python's own numbers, got PGD\("):
        attacks.pgd(epsilon=0.1, step_size=jnp.float32(0.1))(KEY, network, X, LABELS)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 'x'"):
        attacks.momentum_iterative(epsilon=0.1, decay="x")


def test_steps_that_cannot_reach_the_ball_are_told():
    with pytest.warns(UserWarning, match="2 steps of step_size 0.01 cannot reach epsilon 0.1"):
        attacks.pgd(epsilon=0.1, steps=2, step_size=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 2 * X}, r"x must lie in \[0, 1\], got values from 0.0.* to 1.9"),
        ({"x": SPOILT}, r"x must lie in \[0, 1\], got values from 0.0.* to 0.9.* and NaN"),
        ({"x": (255 * X).astype(np.uint8)}, r"x must be a floating array \(batch, \.\.\.\), got uint8"),
        ({"x": X[:, 0, 0, 0]}, r"x must have shape \(batch, ...\), got \(12,\)"),
        ({"labels": LABELS + 4}, "labels must be 0 to 4, got values from 4 to"),
        ({"labels": LABELS[:3]}, r"one row for each input, got x of .* and labels \(3,\); a single image is x\[None\]"),
        ({"labels": LABELS.astype(np.float32)}, r"labels must be \(12,\) integers, got float32"),
        ({"logits_fn": lambda x: network(x)[:, 0]}, r"logits_fn must return shape \(12, classes >= 2\), got \(12,\)"),
        ({"logits_fn": lambda x: network(x).astype(int)}, "logits_fn must return floating-point logits, got int32"),
        ({"logits_fn": 3}, "logits_fn must be a function, got 3"),
        ({"key": 0}, "key must be a typed key from jax.random.key, got 0"),
        ({"logits_fn": lambda x: network(x)[:, :2], "labels": LABELS % 2}, "needs logits of at least 3 classes, got 2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_inputs_are_named(change, message):
    arguments = {"key": KEY, "logits_fn": network, "x": X, "labels": LABELS, **change}
    with pytest.raises(ValueError, match=message):
        attacks.pgd(epsilon=0.1, steps=2, loss="dlr")(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_inside_a_compiled_program_it_is_the_same_and_a_constant_to_differentiation():
    """With an epsilon that is traced; and with inputs and labels that are constants there."""

    def attacked(x, epsilon):
        x_adv = attacks.pgd(epsilon=epsilon, steps=20, restarts=2)(KEY, network, x, LABELS)
        return jnp.square(x_adv).sum(), x_adv

    gradient, x_adv = jax.jit(jax.grad(attacked, has_aux=True))(X, 0.05)
    np.testing.assert_allclose(x_adv, MANY["pgd"]("linf")(KEY, network, X, LABELS), atol=1e-6)
    np.testing.assert_array_equal(gradient, 0.0)
    assert jax.eval_shape(lambda epsilon: attacked(X, epsilon)[1], 0.05).shape == X.shape
    wrong = LABELS + 4
    with pytest.raises(ValueError, match="labels must be 0 to 4, got values from 4 to"):
        jax.eval_shape(lambda x: attacks.fgsm(epsilon=0.05)(KEY, network, x, wrong), X)


def test_a_nan_fools_nobody_and_moves_nothing():
    broken = model_of(HIDDEN, OUT, np.where(np.arange(12) == 1, np.nan, 0)[:, None])
    x_adv = MANY["pgd"]("linf")(KEY, broken, X, LABELS)
    assert bool(jnp.isfinite(x_adv).all())


def test_an_empty_batch_is_one():
    plain = lambda x: x.reshape(x.shape[0], -1) @ WEIGHT  # which fails for no rows
    assert attacks.fgsm(epsilon=0.1)(KEY, plain, X[:0], LABELS[:0]).shape == (0, 4, 4, 1)
    found = attacks.fab(steps=2, num_targets=1)(KEY, plain, X[:0], LABELS[:0])
    assert found.distance.shape == found.success.shape == (0,)
