"""Mixtures beside plain probabilities, their radii beside brute force and the worst that an attacker can do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from robustjax import attacks, certification
from robustjax.certification import mixing
from robustjax.typing import ModelState, Outputs

RNG = np.random.default_rng(0)
G, H = (jnp.asarray(RNG.normal(size=(6, 4)) * 5, jnp.float32) for _ in range(2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.84, 1.0])
def test_a_mixture_of_probabilities(alpha):
    mixed = mixing.mix(G, H, alpha=alpha, standard_scale=1.2, robust_scale=0.5)
    expected = (1 - alpha) * special.softmax(1.2 * np.asarray(G), -1) + alpha * special.softmax(0.5 * np.asarray(H), -1)
    np.testing.assert_allclose(np.exp(mixed), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(mixed).sum(-1), 1, rtol=1e-6)


def test_the_ends_are_one_classifier_and_have_gradients():
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=1.0), jax.nn.log_softmax(H))
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=0.0), jax.nn.log_softmax(G))
    each = jnp.array([0.0, 1.0, 0.5, 0.0, 1.0, 0.9])
    gradients = jax.jit(jax.grad(lambda *a: mixing.mix(*a[:2], alpha=a[2])[:, 0].sum(), (0, 1, 2)))(G, 100 * H, each)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(mixing.mix(G, H, alpha=each)[1], jax.nn.log_softmax(H)[1])


def test_smoothed_radius_for_the_robust_part_alone_is_that_of_cohen():
    first, second = np.array([0.6, 0.9, 0.999, 1 - 1e-5]), np.array([0.3, 0.1, 1e-4, 1e-5])
    expected = 0.25 * (special.ndtri(first) - special.ndtri(second))
    np.testing.assert_allclose(mixing.smoothed_radius(first, second, alpha=1.0, sigma=0.5), expected, rtol=1e-9)
    reach = certification.gaussian(0.5).radius(1.0)  # beyond it, the noise is not drawn
    assert mixing.smoothed_radius(1.0, 0.0, alpha=1.0, sigma=0.5) == pytest.approx(reach, rel=1e-9)


def test_smoothed_radius_is_larger_than_the_published_one():
    found = mixing.smoothed_radius(0.97, 0.02, alpha=0.76, sigma=0.5)
    official = 0.25 * (special.ndtri(0.76 * 0.97) - special.ndtri(0.76 * 0.02 + 0.24))
    assert found == pytest.approx(0.780, abs=1e-3)
    assert official == pytest.approx(0.323, abs=1e-3)


def test_radii_hold_at_every_step_of_the_worst_attack():
    """Three classes; the robust part moves as fast as it can, the accurate one is wholly for the runner-up."""
    sigma, lipschitz = 0.5, 1 / (0.5 * np.sqrt(2 * np.pi))
    for _ in range(200):
        first, second = np.sort(RNG.dirichlet([4, 1, 1]))[[-1, -2]]
        alpha = RNG.uniform(0.5, 1)
        smoothed = mixing.smoothed_radius(first, second, alpha=alpha, sigma=sigma)
        linear = mixing.lipschitz_radius(first, second, alpha=alpha, lipschitz=lipschitz)
        assert linear <= smoothed + 1e-12
        step = np.linspace(0, 1, 101) * smoothed * (1 - 1e-9)
        ours = alpha * special.ndtr(special.ndtri(first) - step / sigma)
        theirs = alpha * special.ndtr(special.ndtri(second) + step / sigma) + (1 - alpha)
        assert smoothed == 0 or (ours > theirs).all()
        if smoothed > 0:
            beyond = smoothed * (1 + 1e-6) / sigma
            assert alpha * special.ndtr(special.ndtri(first) - beyond) < alpha * special.ndtr(
                special.ndtri(second) + beyond
            ) + (1 - alpha)


def test_no_more_than_half_of_it_certifies_nothing():
    for alpha in (0.0, 0.3, 0.5):
        assert mixing.smoothed_radius(1.0, 0.0, alpha=alpha, sigma=0.5) == 0
        assert mixing.lipschitz_radius(1.0, 0.0, alpha=alpha, lipschitz=1.0) == 0
    assert np.isfinite(mixing.smoothed_radius(1.0, 0.0, alpha=0.9, sigma=0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing.mix(G, H, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: mixing.mix(G, H, alpha=np.full(3, 0.5)), r"alpha must be one number or \(6,\), got shape \(3,\)"),
        (lambda: mixing.mix(G[:1], H[:1], alpha=np.full(3, 0.5)), r"alpha must be one number or \(1,\), got shape"),
        (lambda: mixing.mix(G, H[:, :3], alpha=0.5), r"must have one shape, got \(6, 4\) and \(6, 3\)"),
        (lambda: mixing.mix(G, H, alpha=0.5, robust_scale=0.0), "robust_scale must be positive and finite, got 0.0"),
        (lambda: mixing.smoothed_radius(1.2, 0.1, alpha=0.9, sigma=0.5), r"first must lie in \[0, 1\], got 1.2"),
        (lambda: mixing.smoothed_radius(0.8, np.nan, alpha=0.9, sigma=0.5), r"second must lie in \[0, 1\], got nan"),
        (lambda: mixing.smoothed_radius(0.8, 0.1, alpha=-1.0, sigma=0.5), r"alpha must lie in \[0, 1\], got -1"),
        (lambda: mixing.lipschitz_radius(0.8, 0.1, alpha=0.9, lipschitz=0.0), "lipschitz must be positive"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


SIGMA, DIMENSION = 0.1, 12
DIRECTION = np.eye(DIMENSION)[0] * 0.6 + np.eye(DIMENSION)[1] * 0.8


def exactly_smoothed(state, x, *, train=False):
    """The Gaussian mean of votes of a half-space, between class 0 and class 1; class 2 gets none."""
    x = x.reshape(x.shape[0], -1)
    place = (x @ jnp.asarray(DIRECTION, jnp.float32) - state.params["offset"]) / SIGMA
    none = jnp.full_like(place, -60.0)
    return Outputs(jnp.stack([jax.scipy.stats.norm.logcdf(place), jax.scipy.stats.norm.logcdf(-place), none], -1), x), (
        state
    )


def against(state, x, *, train=False):
    """The worst accurate part there is: sure of class 1, wherever it looks."""
    logits = jnp.broadcast_to(jnp.asarray([-40.0, 40.0, -40.0]), (x.shape[0], 3))
    return Outputs(logits, x.reshape(x.shape[0], -1)), state


def gullible(state, z, *, train=False):
    """A network that an attack can turn: more for the accurate part the farther the robust one is moved."""
    return Outputs(50.0 * (z[:, -3:-2] - state.params["threshold"]), z), state


@pytest.fixture(scope="module")
def half_space():
    mixture = mixing.mixture(standard=against, robust=exactly_smoothed, network=gullible, low=0.8, high=0.9)
    state = mixture.init(
        ModelState({}, {}),
        ModelState({"offset": jnp.float32(0.7)}, {}),
        ModelState({"threshold": jnp.float32(np.log(0.97))}, {}),
    )
    x = RNG.uniform(0.45, 0.55, (24, DIMENSION)).astype(np.float32)
    x += ((0.7 + RNG.uniform(0.0, 0.25, 24) - x @ DIRECTION)[:, None] * DIRECTION).astype(np.float32)
    first = special.ndtr((x @ DIRECTION - 0.7) / SIGMA)
    return mixture, state, jnp.asarray(x.reshape(24, 2, 6, 1)), first


def test_a_mixture_is_the_mixture_of_its_models(half_space):
    mixture, state, x, first = half_space
    logits = np.asarray(jax.jit(mixture.logits_fn(state))(x), np.float64)
    gamma = 50 * (np.log(first) - np.log(0.97))
    alpha = 0.8 + 0.1 * special.expit(gamma)
    np.testing.assert_allclose(special.logsumexp(logits, -1), gamma, atol=2e-3)
    np.testing.assert_allclose(special.softmax(logits, -1)[:, 0], alpha * first, atol=1e-4)
    (training, _), renewed = jax.jit(lambda *a: mixture(*a, train=True))(state, x)
    share = special.expit(gamma)
    np.testing.assert_allclose(special.softmax(np.asarray(training, np.float64), -1)[:, 0], share * first, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, renewed, state)  # none of the three has statistics to renew


def test_attacks_inside_the_radius_find_nothing_and_beyond_it_all(half_space):
    """Whatever the network says, its share stays above the least; and with that share no radius is larger."""
    mixture, state, x, first = half_space
    radius = mixing.smoothed_radius(first, 1 - first, alpha=mixture.low, sigma=SIGMA)
    certified = np.flatnonzero(radius)
    assert 8 <= certified.size < len(x)
    attack = attacks.fgsm(epsilon=1.0, norm="l2")  # one direction decides all: no attack is stronger

    @jax.jit
    def answers(state, epsilon):  # each input within its own radius
        def answer(epsilon, x):
            logits_fn, zero = mixture.logits_fn(state), jnp.zeros(1, jnp.int32)
            x_adv = attack.perturb(jax.random.split(jax.random.key(0), 1), logits_fn, x[None], zero, epsilon)
            return logits_fn(x_adv)[0].argmax()

        return jax.vmap(answer)(epsilon, x[certified])

    least = state._replace(params={"threshold": jnp.float32(0.6)})  # gamma below -30
    inside, beyond = (jnp.asarray(radius[certified] * factor, jnp.float32) for factor in (1 - 1e-3, 1 + 1e-3))
    np.testing.assert_array_equal(answers(state, inside), 0)
    np.testing.assert_array_equal(answers(least, inside), 0)
    np.testing.assert_array_equal(answers(least, beyond), 1)


def test_an_attack_that_holds_alpha_constant_is_weaker():
    """Pixel 0 moves the accurate part, which must also get its share: that is pixel 1."""

    def of_pixel(state, x, *, train=False):
        x = x.reshape(x.shape[0], -1)
        place = state.params["slope"] * (x[:, :1] - 0.5) + state.params["offset"]
        return Outputs(jnp.concatenate([place, jnp.zeros_like(place)], -1), x), state

    def network(state, z, *, train=False):
        return Outputs(10.0 * (z[:, 1:2] - 0.3), z), state

    def detached(state, z, *, train=False):
        return jax.lax.stop_gradient(network(state, z)[0]), state

    states = [
        ModelState({"slope": jnp.float32(slope), "offset": jnp.float32(offset)}, {})
        for slope, offset in ((4.0, 0.0), (0.0, np.log(0.65 / 0.35)))
    ]
    x, label = jnp.full((3, 2, 1, 1), 0.5), jnp.zeros(3, jnp.int32)
    mixture = mixing.mixture(standard=of_pixel, robust=of_pixel, network=network, low=0.0, high=1.0)
    state = mixture.init(*states, ModelState({}, {}))
    attack, found = attacks.fgsm(epsilon=0.2), {}
    for name, seen in (("adaptive", mixture), ("blind", dataclasses.replace(mixture, network=detached))):
        found[name] = mixture.logits_fn(state)(attack(jax.random.key(0), seen.logits_fn(state), x, label)).argmax(-1)
    np.testing.assert_array_equal(found["adaptive"], 1)
    np.testing.assert_array_equal(found["blind"], 0)


def test_equal_mixtures_share_what_is_compiled(half_space):
    mixture, state, _, _ = half_space
    again = dataclasses.replace(mixture)
    assert hash(again) == hash(mixture)
    assert again.logits_fn(state).func is mixture.logits_fn(state).func
    assert dataclasses.replace(mixture, low=0.7).logits_fn(state).func is not mixture.logits_fn(state).func


def test_bounds_are_those_of_clopper_and_pearson():
    estimation = np.array([[970, 20, 10], [1000, 0, 0], [300, 300, 400]])
    bounds = mixing.bounds_from_counts(np.eye(3, dtype=int)[[0, 0, 1]], estimation, alpha=0.01)
    np.testing.assert_array_equal(bounds.label, [0, 0, 1])
    beta = stats.beta.ppf
    np.testing.assert_allclose(bounds.first, [beta(0.005, 970, 31), 0.005**1e-3, beta(0.005, 300, 701)])
    # Of the first row's others 20 votes are the most; of the second's, 1 less the first says more than no votes.
    np.testing.assert_allclose(
        bounds.second, [beta(1 - 0.0025, 21, 980), 1 - 0.005**1e-3, beta(1 - 0.0025, 401, 600)], rtol=1e-9
    )


@pytest.mark.parametrize("probabilities", [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.98, 0.01, 0.01]])
def test_bounds_fail_together_no_more_often_than_they_say(probabilities):
    repetitions, alpha = 20_000, 0.05
    counts = np.random.default_rng(1).multinomial(200, probabilities, repetitions)
    selected = np.tile([1, 0, 0], (repetitions, 1))
    bounds = mixing.bounds_from_counts(selected, counts, alpha=alpha)
    failed = (bounds.first > probabilities[0]) | (bounds.second < max(probabilities[1:]))
    assert failed.mean() <= alpha + 3 * np.sqrt(alpha / repetitions)
    naive = (counts[:, 0] / 200 > probabilities[0]) | (counts[:, 1:].max(-1) / 200 < max(probabilities[1:]))
    assert naive.mean() > 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing.mixture(standard=against, robust=against, network=against, low=0.9, high=0.8), "low and high"),
        (
            lambda: mixing.mixture(standard=against, robust=against, network=against, robust_scale=0.0),
            "robust_scale must be positive and finite",
        ),
        (
            lambda: mixing.bounds_from_counts(np.ones((2, 3), int), np.ones((3, 3), int)),
            r"must have one shape, got \(2, 3\) and \(3, 3\)",
        ),
        (
            lambda: mixing.bounds_from_counts(np.ones((2, 3), int), np.eye(3, dtype=int)[:2] * [[1], [0]]),
            "votes in each row, row 1 has none",
        ),
        (
            lambda: mixing.bounds_from_counts(np.ones((2, 3), int), np.ones((2, 3), int), num_estimation=2),
            "num_estimation=2 is less than the 3 votes of a row",
        ),
        (
            lambda: mixing.bounds_from_counts(np.ones((2, 3), int), np.ones((2, 3), int), alpha=1.0),
            "alpha must lie strictly between 0 and 1",
        ),
    ],
)
def test_bad_settings_of_mixtures_and_bounds_are_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()


def test_lost_draws_count_for_other_classes():
    selected, counts = np.array([[9, 0, 0]]), np.array([[60, 10, 0]])
    lost = mixing.bounds_from_counts(selected, counts, alpha=0.01, num_estimation=100)
    voted = mixing.bounds_from_counts(selected, np.array([[60, 40, 0]]), alpha=0.01)  # as if all were for the second
    assert lost.first == voted.first
    assert lost.second == voted.second
    assert lost.first < mixing.bounds_from_counts(selected, counts, alpha=0.01).first
