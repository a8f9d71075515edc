"""Radii of weighted modalities: closed forms, and attacks that find nothing inside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, models
from robustjax.certification import multimodal

RNG = np.random.default_rng(0)
SHAPE, CLASSES = (4, 4, 1), 3
compiled_radius = jax.jit(multimodal.radius, static_argnames="modality")


def of(seed, hidden):
    """A model whose weights have both signs, as pure functions and parameters."""
    settings = {"hidden": hidden, "image_shape": SHAPE, "num_classes": CLASSES}
    functional = models.functional(models.multimodal(jax.random.key(seed), **settings))
    rng = np.random.default_rng(seed)
    params = functional.state.params | {
        "weights": jnp.asarray(rng.normal(size=(2, CLASSES)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=CLASSES) * 0.1, jnp.float32),
    }
    return functional, functional.state._replace(params=params)


def radius_of(functional, state, x, **settings):
    params, outputs = state.params, jax.jit(functional.outputs)(state, x)
    constants = multimodal.lipschitz_constants(params["kernel"]) if "kernel" in params else np.ones(2)
    scores = outputs.features.reshape(len(x), 2, CLASSES)
    return np.asarray(compiled_radius(scores, params["weights"], params["bias"], constants, **settings))


@pytest.mark.parametrize("modality", [None, 0, 1])
def test_the_radius_is_its_equation(modality):
    scores, a, b = RNG.normal(size=(60, 2, 3)), RNG.normal(size=(2, 3)), RNG.normal(size=3)
    tau, labels = RNG.uniform(0.5, 2, (2, 3)), RNG.integers(0, 3, 60)
    expected = np.full(60, np.inf)
    for i, y in enumerate(labels):
        for j in set(range(3)) - {y}:
            margin = sum(a[m, y] * scores[i, m, y] - a[m, j] * scores[i, m, j] for m in range(2)) + b[y] - b[j]
            terms = [abs(a[m, y]) * tau[m, y] + abs(a[m, j]) * tau[m, j] for m in range(2)]
            length = np.hypot(*terms) if modality is None else terms[modality]
            expected[i] = min(expected[i], margin / length)
    arrays = (jnp.asarray(scores, jnp.float32), np.float32(a), np.float32(b), np.float32(tau))
    found = compiled_radius(*arrays, labels=jnp.asarray(labels), modality=modality)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    answers = compiled_radius(*arrays, modality=modality)
    assert (answers >= -1e-6).all()
    np.testing.assert_array_equal(answers[found > 0], found[found > 0])


def test_linear_encoders_of_opposite_rows_are_reached():
    """Two classes whose rows are opposite: the radius is the distance to the boundary, of one modality and of both."""
    w = RNG.normal(size=(2, 5))
    w /= np.linalg.norm(w, axis=-1, keepdims=True)
    x, a = RNG.normal(size=(30, 2, 5)), np.array([[0.7, 0.7], [2.0, 2.0]])
    zeta = np.einsum("bmp,mp->bm", x, w)
    scores = jnp.asarray(np.stack([zeta, -zeta], -1), jnp.float32)
    margin = 2 * (zeta @ a[:, 0])
    arrays = (scores, np.float32(a), np.zeros(2, np.float32), np.ones(2))
    both = compiled_radius(*arrays)
    np.testing.assert_allclose(both, np.abs(margin) / np.linalg.norm(2 * a[:, 0]), rtol=1e-4)
    np.testing.assert_allclose(compiled_radius(*arrays, modality=1), np.abs(margin) / 4.0, rtol=1e-4)
    gradient = np.stack([2 * a[m, 0] * w[m] for m in range(2)])
    moved = x - (np.sign(margin) * np.asarray(both) * 1.001)[:, None, None] * gradient / np.linalg.norm(gradient)
    assert (np.sign(2 * np.einsum("bmp,mp,m->b", moved, w, a[:, 0])) != np.sign(margin)).all()


def test_constants_are_norms_and_bound_all_slopes():
    kernel = RNG.normal(size=(2, 8, 6)).astype(np.float32)
    constants = multimodal.lipschitz_constants(kernel)
    assert constants.dtype == np.float64
    norms = np.array([np.linalg.norm(k.astype(np.float64), 2) for k in kernel])
    np.testing.assert_allclose(constants, norms * (1 + 1e-6), rtol=1e-9)  # room for a model in float32
    functional, state = of(3, 16)
    x, y = (RNG.uniform(size=(300, *SHAPE)).astype(np.float32) for _ in range(2))
    outputs = jax.jit(functional.outputs)
    one, other = (np.asarray(outputs(state, z).features).reshape(300, 2, CLASSES) for z in (x, y))
    apart = np.sqrt(np.square((x - y).reshape(300, 4, 2, 2)).sum((1, 3)))
    slopes = (np.abs(one - other) / apart[:, :, None]).max((0, 2))
    constants = multimodal.lipschitz_constants(state.params["kernel"])
    assert (slopes <= constants).all()
    assert (slopes > 0.1 * constants).all()


@pytest.mark.parametrize("hidden", [pytest.param(None, marks=pytest.mark.slow), 16])
def test_attacks_find_nothing_inside(hidden):
    functional, state = of(1, hidden)
    x = jnp.asarray(np.random.default_rng(4).uniform(0.2, 0.8, (60, *SHAPE)), jnp.float32)
    logits = jax.jit(lambda x: functional.outputs(state, x).logits)
    labels = logits(x).argmax(-1)

    def attacked(moves, z):
        return functional.outputs(state, jnp.where(moves, z, jax.lax.stop_gradient(z))).logits

    def of_side(side):
        moves = [side in (None, column // 2) for column in range(4)]
        return jax.tree_util.Partial(attacked, jnp.asarray(moves)[None, None, :, None])  # one program for all sides

    found = {}
    for side in (None, 1):
        radius = radius_of(functional, state, x, modality=side)
        assert (radius > 0).mean() > 0.9
        result = attacks.fab(norm="l2", steps=20, num_targets=2)(jax.random.key(0), of_side(side), x, labels)
        distance = np.asarray(result.distance)
        assert (distance >= radius).all()
        found[side] = np.nanmin(distance / radius)
        if side == 1:
            np.testing.assert_allclose(result.x[:, :, :2], x[:, :, :2], atol=1e-6)
        epsilon = float(np.quantile(radius, 0.5))
        pgd = attacks.pgd(epsilon=epsilon, norm="l2", steps=20, random_start=False, loss="margin")
        moved = pgd(jax.random.key(1), of_side(side), x, labels)
        wrong = np.asarray(logits(moved)).argmax(-1) != np.asarray(labels)
        assert not (wrong & (radius > epsilon)).any()
    assert found[None] < (3 if hidden is None else 8)  # the attack is one, and the radius no small number


def test_changes_of_one_modality_may_be_larger():
    functional, state = of(2, 16)
    x = jnp.asarray(RNG.uniform(size=(60, *SHAPE)), jnp.float32)
    both, one, two = (radius_of(functional, state, x, modality=m) for m in (None, 0, 1))
    assert (both < np.minimum(one, two) + 1e-6).all()


def test_what_looks_at_nothing_has_a_finite_radius():
    zero = np.zeros((2, 3), np.float32)
    found = compiled_radius(np.ones((60, 2, 3), np.float32), zero, np.array([1.0, 0.0, 0.0], np.float32), np.ones(2))
    assert np.isfinite(found).all()
    assert (found > 1e6).all()


SCORES, WEIGHTS, BIAS = np.ones((5, 2, 3), np.float32), np.ones((2, 3), np.float32), np.zeros(3, np.float32)


def with_one(value, array):
    """The array, with another first number."""
    return np.where(np.arange(array.size).reshape(array.shape) == 0, np.float32(value), array)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: multimodal.radius(SCORES[0], WEIGHTS, BIAS, np.ones(2)),
            r"scores must be .* got .* \(2, 3\)",
        ),
        (lambda: multimodal.radius(SCORES.astype(int), WEIGHTS, BIAS, np.ones(2)), "scores must be a floating array"),
        (
            lambda: multimodal.radius(SCORES * np.inf, WEIGHTS, BIAS, np.ones(2)),
            "scores must be finite, got 30 that are not",
        ),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS, BIAS, np.ones(2), labels=np.full(5, 3)),
            "labels must be 0 to 2, got values from 3 to 3",
        ),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS, BIAS, np.ones(2), modality=True),
            "modality must be an integer or None, got True",
        ),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS[:1], BIAS, np.ones(2)),
            r"weights and bias must have shapes \(2, 3\)",
        ),
        (
            lambda: multimodal.radius(SCORES, with_one(np.nan, WEIGHTS), BIAS, np.ones(2)),
            "weights must be finite, got NaN",
        ),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS, with_one(np.inf, BIAS), np.ones(2)),
            "bias must be finite, got NaN or inf",
        ),
        (lambda: multimodal.radius(SCORES, WEIGHTS, BIAS, np.ones(3)), r"constants must have shape .* got \(3,\)"),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS, BIAS, with_one(-1, np.ones(2))),
            "constants must be at least 0, got -1.0",
        ),
        (
            lambda: multimodal.radius(SCORES, WEIGHTS, BIAS, np.ones(2), modality=2),
            "modality must be an integer from 0 to 1, got 2",
        ),
        (lambda: multimodal.lipschitz_constants(WEIGHTS), r"kernel must be .* hidden\), got .* \(2, 3\)"),
        (lambda: multimodal.lipschitz_constants(with_one(np.nan, np.ones((1, 2, 2)))), "kernel must be finite"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
