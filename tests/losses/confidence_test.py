"""Losses next to certainty: float32 values and derivatives beside the equations in 80 decimal digits."""

import decimal
import functools
from decimal import Decimal
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses
from robustjax.losses.adversarial import Examples
from robustjax.typing import Batch, ModelState, Outputs

decimal.setcontext(decimal.Context(prec=80))
LEADS = np.array([0, 2, 10, 17, 25, 40, 60, 80, -5, -17, -40, -80])
RNG = np.random.default_rng(0)
LOGITS, OTHER = RNG.normal(size=(2, len(LEADS), 4)).astype(np.float32)
LOGITS[:, 0], OTHER[:, 0] = LEADS, np.where(LEADS > 0, np.abs(LEADS - 7.5), LEADS + 3)  # class 0 is right
TARGET = np.exp(OTHER.astype(np.float64))
TARGET = (TARGET / TARGET.sum(-1, keepdims=True)).astype(np.float32)
TARGET[0] = [0.5, 0, 0.5, 0]
LABELS = jnp.zeros(len(LEADS), jnp.int32)


def objective_of(objective):
    """Of single images, as a function of the logits that the model answers: each its own batch."""

    def loss(*replies):
        left, state = iter(replies), ModelState({}, {})
        apply = lambda state, x, train=False: (Outputs(*2 * [next(left).reshape(len(x), -1)]), state)
        image, label = jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)
        if hasattr(objective, "loss"):
            return objective.loss(apply, state, Examples(image, image, label))[0]
        return objective(jax.random.key(0), apply, state, Batch(image, label, label))[0]

    return jax.vmap(loss)


def no_attack(key, logits_fn, x, labels):
    return x


LOSSES = {
    "cross_entropy": lambda z, other: losses.cross_entropy(z, LABELS),
    "soft_cross_entropy": lambda z, other: losses.soft_cross_entropy(z, jnp.asarray(TARGET)),
    "normalized_cross_entropy": lambda z, other: losses.normalized_cross_entropy(z, LABELS, tau=0.02),
    "uniform_cross_entropy": lambda z, other: losses.outliers.uniform_cross_entropy(z, LABELS - 1),
    "kl_divergence": losses.kl_divergence,
    "boosted_cross_entropy": lambda z, other: losses.boosted_cross_entropy(z, LABELS),
    "entropy": lambda z, other: losses.entropy(z),
    "trades": objective_of(losses.adversarial.trades(attack=no_attack, beta=3.0)),
    "mart": objective_of(losses.adversarial.mart(attack=no_attack, beta=3.0)),
    "stability": objective_of(losses.smoothing.stability(weight=3.0)),
    "consistency": lambda z, other: objective_of(losses.smoothing.consistency(weight=3.0))(jnp.stack([z, other], 1)),
    "smoothadv": lambda z, other: objective_of(losses.smoothing.macer(num_noise=2, weight=0.0))(
        jnp.stack([z, other], 1)
    ),
}


def softmax(z):
    e = [a.exp() for a in z]
    return [a / sum(e) for a in e]


def cross(p, q):
    return -sum(a * b.ln() for a, b in zip(p, q, strict=True))


def kl(p, q):
    return cross(p, q) - cross(p, p)


def boosted(p):
    return -p[0].ln() - (1 - max(p[1:])).ln()


def normalized(z):
    norm = Decimal("0.02") * sum(a * a for a in z).sqrt()
    return -softmax([a / norm for a in z])[0].ln()


def consistent(p, q):
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (cross_0(p) + cross_0(q)) / 2 + 3 * (kl(mean, p) + kl(mean, q)) / 2 + cross(mean, mean) / 2


def cross_0(p):
    return -p[0].ln()


EQUATIONS = {
    "cross_entropy": lambda z, other, q: cross_0(softmax(z)),
    "soft_cross_entropy": lambda z, other, q: cross(q, softmax(z)),
    "normalized_cross_entropy": lambda z, other, q: normalized(z),
    "uniform_cross_entropy": lambda z, other, q: cross([Decimal("0.25")] * 4, softmax(z)),
    "kl_divergence": lambda z, other, q: kl(softmax(other), softmax(z)),
    "boosted_cross_entropy": lambda z, other, q: boosted(softmax(z)),
    "entropy": lambda z, other, q: cross(softmax(z), softmax(z)),
    "trades": lambda z, other, q: cross_0(softmax(z)) + 3 * kl(softmax(z), softmax(other)),
    "mart": lambda z, other, q: boosted(softmax(other)) + 3 * kl(softmax(z), softmax(other)) * (1 - softmax(z)[0]),
    "stability": lambda z, other, q: cross_0(softmax(z)) + 3 * cross(softmax(z), softmax(other)),
    "consistency": lambda z, other, q: consistent(softmax(z), softmax(other)),
    "smoothadv": lambda z, other, q: -((softmax(z)[0] + softmax(other)[0]) / 2).ln(),
}


def wanted(name, row):
    """The value, and its gradient with respect to both logits by central differences."""
    z, other, q = ([Decimal(float(a)) for a in each[row]] for each in (LOGITS, OTHER, TARGET))
    step, at = Decimal("1e-20"), [*z, *other]
    value = lambda at: EQUATIONS[name](at[:4], at[4:], q)
    moved = lambda i, by: value([a + by * (i == j) for j, a in enumerate(at)])
    slope = [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(8)]
    return [float(a) for a in (value(at), *slope)]


@functools.cache
def found():
    def all_of(z, other):
        def of(f):
            value, pull_back = jax.vjp(f, z, other)
            return jnp.concatenate([value[:, None], *pull_back(jnp.ones_like(value))], -1)

        return {name: of(f) for name, f in LOSSES.items()}

    return jax.tree.map(np.asarray, jax.jit(all_of)(jnp.asarray(LOGITS), jnp.asarray(OTHER)))


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_exact_up_to_leads_of_80(name):
    want = np.array([wanted(name, row) for row in range(len(LEADS))])
    np.testing.assert_allclose(found()[name], want, rtol=5e-5, atol=1e-37)


def test_second_derivatives_are_exact_too_in_every_mode():
    """Of cross-entropy: the diagonal is p (1 - p)."""
    p = [softmax([Decimal(float(a)) for a in row]) for row in LOGITS]
    want = np.array([[float(a * (1 - a)) for a in row] for row in p])
    cross_entropy = lambda z: losses.cross_entropy(z[None], LABELS[:1])[0]
    soft = lambda z: losses.soft_cross_entropy(z[None], jax.nn.one_hot(LABELS[:1], 4))[0]
    modes = (jax.jacfwd(jax.grad(f)) for f in (cross_entropy, soft))
    modes = (*modes, *(jax.jacrev(jax.grad(f)) for f in (cross_entropy, soft)), jax.jacfwd(jax.jacfwd(soft)))
    for found in jax.jit(lambda z: [jax.vmap(mode)(z) for mode in modes])(jnp.asarray(LOGITS)):
        np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), want, rtol=2e-5, atol=1e-37)
        np.testing.assert_allclose(found.sum(-1), np.zeros_like(want), atol=1e-6)


def test_forward_mode_is_exact():
    change = RNG.normal(size=LOGITS.shape).astype(np.float32)
    of = lambda name: lambda z: LOSSES[name](z, jnp.asarray(OTHER))
    names = ("cross_entropy", "kl_divergence", "boosted_cross_entropy", "entropy")
    slopes = jax.jit(lambda z, change: [jax.jvp(of(name), (z,), (change,))[1] for name in names])(LOGITS, change)
    for name, slope in zip(names, slopes, strict=True):
        gradient = found()[name][:, 1:5].astype(np.float64)
        np.testing.assert_allclose(slope, (gradient * change).sum(-1), rtol=1e-4, atol=1e-37)


def test_infinite_logits_ties_and_one_class():
    value = jax.jit(jax.value_and_grad(lambda z, y: losses.cross_entropy(z, y).sum()))
    infinite = np.inf

    def at(z, label):
        return [np.asarray(a) for a in value(jnp.asarray([z], jnp.float32), jnp.asarray([label]))]

    for label, want in ((0, np.log(2)), (1, np.log(2)), (2, infinite)):  # a class that the model rules out
        loss, gradient = at([1, 1, -infinite], label)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        assert np.isfinite(gradient).all()
    assert np.isnan(at([infinite, 0, 0], 0)[0])
    assert np.isnan(at([0, infinite, 0], 0)[0])
    assert [float(a.sum()) for a in at([3], 0)] == [0, 0]
    gradients = jax.jit(jax.grad(lambda z: losses.soft_cross_entropy(z, jnp.asarray([[0.5, 0.25, 0.25]])).sum()))
    for z, want in (([7, 7, 7], [-1 / 6, 1 / 12, 1 / 12]), ([90, 90, -90], [0, 0.25, -0.25])):
        np.testing.assert_allclose(gradients(jnp.asarray([z], jnp.float32))[0], want, atol=1e-6)


def test_half_precision_is_raised_before_anything_is_computed():
    half = jnp.asarray(LOGITS[:, [0, 1, 1, 2, 3]], jnp.bfloat16)  # a tie, too
    of_logits = (
        losses.cross_entropy, losses.margin, losses.difference_of_logits_ratio, losses.boosted_cross_entropy,
        losses.normalized_cross_entropy, losses.outliers.uniform_cross_entropy, losses.outliers.energy_hinge,
        losses.adaptive_cross_entropy(), functools.partial(losses.targeted_difference_of_logits_ratio, targets=LABELS),
        lambda z, y: losses.kl_divergence(z, z[::-1]), lambda z, y: losses.entropy(z),
        lambda z, y: losses.soft_cross_entropy(z, jax.nn.one_hot(y, 5, dtype=z.dtype)),
    )  # fmt: skip
    coarse, fine = (jax.jit(lambda z: [f(z, LABELS) for f in of_logits])(z) for z in (half, half.astype(jnp.float32)))
    assert {a.dtype for a in coarse} == {jnp.dtype(jnp.float32)}
    for a, b in zip(coarse, fine, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_macer_measures_radii_from_the_small_tail():
    objective = objective_of(losses.smoothing.macer(sigma=0.5, num_noise=2, weight=1.0, beta=1.0, gamma=10.0))
    logits = jnp.asarray([[[12.0, 0.0]] * 2])
    value, gradient = jax.jit(jax.value_and_grad(lambda z: objective(z)[0]))(logits)
    tail = 1 / (1 + np.exp(12.0))
    xi = -2 * NormalDist().inv_cdf(tail)
    np.testing.assert_allclose(value, tail + 0.25 * (10 - xi), rtol=2e-6)
    slope = tail * (1 - tail) * (1 + 0.5 / NormalDist().pdf(xi / 2)) / 2  # of each copy
    np.testing.assert_allclose(gradient, [[[-slope, slope]] * 2], rtol=1e-4)


def test_a_mixing_network_that_is_certain_still_learns():
    """Gamma is -30 at the clean and 30 at the attacked image."""
    training = losses.mixing_training(attack=no_attack, binary=1.0, classes=0.0, product=0.0)
    logits = jnp.asarray([[[-30.0, -30.0], [30.0, 30.0]]]) - np.log(2)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: objective_of(training)(z)[0]))(logits)
    np.testing.assert_allclose(value, np.exp(-30), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.exp(-30) * np.asarray([[[1, 1], [-1, -1]]]) / 4, rtol=1e-5)


def linear(state, x, *, train=False):
    """Two classes, as a function of two pixels; the lead of class 0 is its logit."""
    logits = x.reshape(len(x), -1) @ state.params["kernel"]
    return Outputs(logits, logits), state


CERTAIN = ModelState({"kernel": jnp.asarray([[90.0, 0.0], [30.0, 0.0]])}, {})
BATCH = Batch(jnp.full((1, 1, 2, 1), 0.5), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))  # a lead of 60


@pytest.mark.parametrize(
    ("objective", "lead"),
    [
        (losses.smoothing.smoothadv(sigma=1e-7, epsilon=0.1, steps=2, num_noise=1), 60 - 0.1 * np.hypot(90, 30)),
        (
            losses.adversarial.awp(objective=losses.adversarial.adversarial_training(attack=no_attack), gamma=0.1),
            60 - 0.1 * np.hypot(90, 30) * np.sqrt(2 * 0.5),  # the perturbation lies along the pixels, and splits in two
        ),
    ],
)
def test_steps_follow_gradients_whose_squares_vanish(objective, lead):
    loss = jax.jit(objective, static_argnums=1)(jax.random.key(0), linear, CERTAIN, BATCH)[0]
    np.testing.assert_allclose(np.log(loss), -lead, rtol=1e-4)
