import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax import attacks, losses

NORMS = ("linf", "l2", "l1")
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
EPSILON = {"linf": 0.05, "l2": 0.2, "l1": 0.4}
KEY = jax.random.key(0)
HIDDEN, OUT = (
    scale * jax.random.normal(jax.random.key(seed), shape)
    for seed, scale, shape in ((1, 0.5, (16, 32)), (2, 0.3, (32, 5)))
)
WEIGHT = jax.random.normal(jax.random.key(4), (16, 2))
X = jax.random.uniform(jax.random.key(3), (12, 4, 4, 1))


def network(x):
    return jax.nn.relu(x.reshape(x.shape[0], 16) @ HIDDEN) @ OUT


def linear(x):
    return x.reshape(x.shape[0], 16) @ WEIGHT


LABELS = network(X).argmax(-1)
MANY = {
    "pgd": lambda norm: attacks.pgd(epsilon=EPSILON[norm], norm=norm, steps=5, restarts=2),
    "last": lambda norm: attacks.pgd(epsilon=EPSILON[norm], norm=norm, steps=5, keep="last"),
    "fgsm": lambda norm: attacks.fgsm(epsilon=EPSILON[norm], norm=norm),
    "momentum": lambda norm: attacks.momentum_iterative(epsilon=EPSILON[norm], norm=norm, steps=5),
}


CASES = [*itertools.product(("pgd", "fgsm"), NORMS), ("last", "l2"), ("momentum", "linf"), ("momentum", "l2")]


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
        attacks.pgd(epsilon=epsilon, steps=2)(KEY, counted, X, LABELS)
        first = len(traced) if epsilon == 0.01 else first  # noqa: F821
    assert len(traced) == first


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_falls_where_theory_says(norm):
    """Away from the faces of [0, 1] an input stands if and only if its margin exceeds epsilon times the dual norm."""
    x = 0.5 + 0.2 * (jax.random.uniform(jax.random.key(5), (40, 4, 4, 1)) - 0.5)
    logits = np.asarray(linear(x))
    labels, direction = logits.argmax(-1), np.asarray(WEIGHT[:, 1] - WEIGHT[:, 0])
    distance = abs(logits[:, 1] - logits[:, 0]) / np.linalg.norm(direction, DUAL[norm])
    epsilon = float(np.median(distance)) if norm != "l1" else min(float(np.median(distance)), 0.3)
    clear = abs(distance - epsilon) > 1e-3
    x_adv = attacks.fgsm(epsilon=epsilon, norm=norm)(KEY, linear, x, labels)
    fooled = np.asarray(linear(x_adv).argmax(-1)) != labels
    np.testing.assert_array_equal(fooled[clear], (distance < epsilon)[clear])
    if norm != "l1":  # whose steps move one pixel here: not the whole of epsilon at once
        x_adv = attacks.pgd(epsilon=epsilon, norm=norm, steps=20)(KEY, linear, x, labels)
        fooled = np.asarray(linear(x_adv).argmax(-1)) != labels
        clear = abs(distance - epsilon) > 0.05 * epsilon  # a random start leaves a little to go
        np.testing.assert_array_equal(fooled[clear], (distance < epsilon)[clear])


def test_l1_fgsm_spends_epsilon_as_a_linear_programme_does():
    x, labels = X[:4], LABELS[:4]
    x_adv = attacks.fgsm(epsilon=1.5, norm="l1")(KEY, network, x, labels)
    gradient = jax.grad(lambda x: losses.cross_entropy(network(x), labels).sum())(x)
    for g, x0, moved in zip(*(np.asarray(a, np.float64).reshape(4, -1) for a in (gradient, x, x_adv)), strict=True):
        # Displacement as a difference of two non-negative parts, whose sum is at most epsilon.
        bounds = [(0, 1 - p) for p in x0] + [(0, p) for p in x0]
        best = optimize.linprog(-np.concatenate([g, -g]), np.ones((1, 32)), [1.5], bounds=bounds)
        assert g @ (moved - x0) == pytest.approx(-best.fun, rel=1e-4)


def test_one_step_without_a_random_start_is_fgsm():
    norm = "l2"
    pgd = attacks.pgd(epsilon=0.05, norm=norm, steps=1, step_size=0.05, random_start=False, keep="last")
    fgsm = attacks.fgsm(epsilon=0.05, norm=norm)
    np.testing.assert_allclose(pgd(KEY, network, X, LABELS), fgsm(KEY, network, X, LABELS), atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_without_memory_is_pgd(norm):
    momentum = attacks.momentum_iterative(epsilon=0.05, norm=norm, steps=4, decay=0.0)(KEY, network, X, LABELS)
    settings = {"step_size": 0.05 / 4, "random_start": False, "keep": "last"}
    pgd = attacks.pgd(epsilon=0.05, norm=norm, steps=4, **settings)(KEY, network, X, LABELS)
    np.testing.assert_allclose(momentum, pgd, atol=1e-6)


def test_more_steps_and_restarts_find_a_higher_loss():
    loss = lambda attack: float(losses.cross_entropy(network(attack(KEY, network, X, LABELS)), LABELS).mean())
    fgsm, pgd = attacks.fgsm(epsilon=0.02), attacks.pgd(epsilon=0.02, steps=20)
    assert loss(fgsm) <= loss(pgd) + 1e-6
    assert loss(pgd) <= loss(dataclasses.replace(pgd, restarts=3)) + 1e-6


def test_targeted_attacks_lower_the_loss_of_their_target():
    targets = (LABELS + 1) % 5
    for make in (attacks.pgd, attacks.fgsm, attacks.momentum_iterative):
        x_adv = make(epsilon=0.05, targeted=True)(KEY, network, X, targets)
        before, after = (losses.cross_entropy(network(z), targets).mean() for z in (X, x_adv))
        assert after < before


def test_the_first_point_that_fools_is_kept_and_the_last_is_not_the_first():
    pgd = attacks.pgd(epsilon=0.3, steps=20)
    best, last = (dataclasses.replace(pgd, keep=keep)(KEY, network, X, LABELS) for keep in ("best", "last"))
    fooled = network(best).argmax(-1) != LABELS
    assert fooled.sum() > 8
    value = lambda x: losses.cross_entropy(network(x), LABELS)[fooled].mean()
    assert value(last) > value(best)


def test_a_divergence_needs_a_start_beside_the_input():
    """At the input itself its gradient is rounding: the noise of TRADES is what attacks it."""
    gradient = jax.grad(lambda x: losses.kl_divergence(network(x), network(X)).sum())(X)
    assert float(jnp.abs(gradient).max()) < 1e-6
    pgd = attacks.pgd(epsilon=0.05, steps=5, loss=losses.kl_divergence, keep="last", random_start=0.001)
    moved = pgd(KEY, network, X, network(X))
    assert losses.kl_divergence(network(moved), network(X)).min() > 1e-4


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", lambda logits, labels: -logits[:, 0]])
def test_losses_by_name_and_by_function(loss):
    x_adv = attacks.pgd(epsilon=0.02, steps=3, loss=loss)(KEY, network, X, LABELS)
    assert float(jnp.abs(x_adv - X).max()) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0 and finite, got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be at least 0 and finite, got nan"),
        ({"epsilon": None}, "epsilon must be at least 0 and finite, got None"),
        ({"epsilon": np.array([0.1, 0.2])}, r"epsilon must be at least 0 and finite, got array\(\[0.1, 0.2\]\)"),
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
        ({"x": X.at[3, 1, 1, 0].set(jnp.nan)}, r"x must lie in \[0, 1\], got values from 0.0.* to 0.9.* and NaN"),
        ({"x": (255 * X).astype(jnp.uint8)}, "x must be a float32 array, got uint8"),
        ({"x": X[:, 0, 0, 0]}, r"x must have shape \(batch, ...\), got \(12,\)"),
        ({"labels": LABELS + 4}, "labels must be 0 to 4, got values from 4 to"),
        ({"labels": LABELS[:3]}, r"labels must be an array of 12, got \(3,\)"),
        ({"labels": LABELS.astype(jnp.float32)}, r"labels must be \(12,\) integers, got float32"),
        ({"logits_fn": lambda x: network(x)[:, 0]}, r"logits_fn must return shape \(12, classes >= 2\), got \(12,\)"),
        ({"logits_fn": lambda x: network(x).astype(int)}, "logits_fn must return floating-point logits, got int32"),
        ({"logits_fn": 3}, "logits_fn must be a function of inputs, got 3"),
        ({"key": 0}, "key must be a typed key from jax.random.key, got 0"),
        ({"logits_fn": lambda x: network(x)[:, :2], "labels": LABELS % 2}, "needs logits of at least 3 classes, got 2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_inputs_are_named(change, message):
    arguments = {"key": KEY, "logits_fn": network, "x": X, "labels": LABELS, **change}
    with pytest.raises(ValueError, match=message):
        attacks.pgd(epsilon=0.1, steps=2, loss="dlr")(**arguments)


def test_it_is_a_constant_to_differentiation():
    attack = attacks.pgd(epsilon=0.05, steps=2)
    gradient = jax.grad(lambda x: jnp.square(attack(KEY, network, x, LABELS)).sum())(X)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.usefixtures("unchecked")
def test_inside_a_compiled_program_it_is_the_same():
    """With inputs and labels that are constants there, and with an epsilon that is not."""
    expected = attacks.pgd(epsilon=0.05, steps=2)(KEY, network, X, LABELS)
    x_adv = jax.jit(lambda x: attacks.pgd(epsilon=0.05, steps=2)(KEY, network, x, LABELS))(X)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)
    x_adv = jax.jit(lambda e: attacks.pgd(epsilon=e, steps=2)(KEY, network, X, LABELS))(0.05)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)
    wrong = LABELS + 4
    with pytest.raises(ValueError, match="labels must be 0 to 4, got values from 4 to"):
        jax.jit(lambda x: attacks.pgd(epsilon=0.05, steps=2)(KEY, network, x, wrong))(X)


def test_a_nan_fools_nobody_and_moves_nothing():
    broken = lambda x: jnp.where(jnp.arange(x.shape[0])[:, None] == 1, jnp.nan, network(x))
    x_adv = attacks.pgd(epsilon=0.05, steps=3)(KEY, broken, X, LABELS)
    assert bool(jnp.isfinite(x_adv).all())


def test_an_empty_batch_is_one():
    plain = lambda x: x.reshape(x.shape[0], -1) @ WEIGHT  # which fails for no rows
    assert attacks.pgd(epsilon=0.1, norm="l1", steps=2)(KEY, plain, X[:0], LABELS[:0]).shape == (0, 4, 4, 1)
    found = attacks.fab(steps=2)(KEY, plain, X[:0], LABELS[:0])
    assert found.distance.shape == found.success.shape == (0,)
