import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.attacks import at_budget, deepfool

KEY = jax.random.key(0)
DUAL = {"linf": 1, "l2": 2}
SHAPE, CLASSES = (8, 2, 3, 1), 4


def linear(weights, bias, x):
    return x.reshape(x.shape[0], -1) @ weights + bias[None]


def linear_problem(seed=0, *, spread=0.02):
    """A linear model, inputs around the middle of the box, their labels and the gaps and slopes to all classes."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(6, CLASSES)).astype(np.float32)
    x = np.clip(rng.normal(0.5, spread, SHAPE), 0, 1).astype(np.float32)
    bias = (rng.normal(size=CLASSES) * 0.1 - 0.5 * weights.sum(0)).astype(np.float32)
    model = jax.tree_util.Partial(linear, jnp.asarray(weights), jnp.asarray(bias))
    logits = x.reshape(8, 6).astype(np.float64) @ weights + bias
    labels = logits.argmax(-1).astype(np.int32)
    gaps = logits[np.arange(8), labels][:, None] - logits
    return model, x, labels, gaps, weights[:, labels].T[:, None] - weights.T[None]


def distances(gaps, slopes, norm):
    sizes = np.linalg.norm(slopes, DUAL[norm], axis=-1)
    return np.where(sizes > 0, gaps / np.where(sizes > 0, sizes, 1), np.inf)


@pytest.mark.parametrize("norm", DUAL)
def test_one_step_on_a_linear_model(norm):
    model, x, labels, gaps, slopes = linear_problem()
    found = deepfool(norm=norm)(KEY, model, x, labels)
    assert found.success.all()
    np.testing.assert_allclose(found.distance, 1.02 * distances(gaps, slopes, norm).min(-1), rtol=2e-5, atol=1e-7)
    far, x, labels, gaps, slopes = linear_problem(3, spread=0.5)  # the box is in the way
    found = deepfool(norm=norm)(KEY, far, x, labels)
    assert found.success.any()
    np.testing.assert_array_equal(far(found.x).argmax(-1) != labels, found.success)
    assert (found.distance > distances(gaps, slopes, norm).min(-1)).all()


def test_steps_at_the_border_of_the_box():
    """A pixel that cannot move takes half of each step, so that the gap shrinks to 0.49 of itself and not to 0."""
    model = jax.tree_util.Partial(linear, jnp.asarray([[1.0, 0.0], [1.0, 0.0]]), jnp.asarray([-0.2, 0.0]))
    x, labels = np.asarray([[0.0, 0.5]], np.float32), np.zeros(1, np.int32)
    total, z, steps = 0.0, 0.5, 0
    while z > 0.2:
        total, steps = total + max((z - 0.2) / 2, 1e-5), steps + 1
        z = 0.5 - 1.02 * total
    assert 10 < steps < 20
    found = deepfool(norm="linf", steps=steps)(KEY, model, x, labels)
    np.testing.assert_allclose(found.x, [[0.0, z]], atol=1e-6)
    assert not deepfool(norm="linf", steps=steps - 1)(KEY, model, x, labels).success.any()


def test_results_keep_their_promises():
    model, x, labels, _, _ = linear_problem()
    labels[0] = (labels[0] + 1) % CLASSES
    found = deepfool()(KEY, model, x, labels)
    assert (found.x.shape, found.x.dtype) == (x.shape, jnp.float32)
    assert ((found.x >= 0) & (found.x <= 1)).all()
    np.testing.assert_allclose(found.distance, np.linalg.norm((found.x - x).reshape(8, -1), axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(model(found.x).argmax(-1) != labels, found.success)
    assert (found.distance[0], found.success[0]) == (0, True)
    jax.tree.map(np.testing.assert_array_equal, found, deepfool()(jax.random.key(1), model, x, labels))
    others = x.copy()
    others[4:] = others[4:][::-1] * 0.5
    np.testing.assert_array_equal(deepfool()(KEY, model, others, labels).x[:4], found.x[:4])
    epsilon = float(np.median(found.distance))
    adversarial = at_budget(deepfool(), epsilon)(KEY, model, x, jnp.asarray(labels))
    near = np.asarray(found.distance) <= epsilon
    np.testing.assert_array_equal(adversarial[near], found.x[near])
    np.testing.assert_array_equal(adversarial[~near], x[~near])


@pytest.mark.parametrize("bias", [[9.0, 0, 0, 0], [np.nan, 0, 0, 0]])
def test_where_nothing_can_be_found(bias):
    _, x, _, _, _ = linear_problem()
    constant = jax.tree_util.Partial(linear, jnp.zeros((6, CLASSES)), jnp.asarray(bias, jnp.float32))
    found = deepfool()(KEY, constant, x, np.zeros(8, np.int32))
    np.testing.assert_array_equal(found.x, x)
    assert np.isinf(found.distance).all()
    assert not found.success.any()


def test_a_tie_is_left():
    model, *_ = linear_problem()
    tied = jax.tree_util.Partial(linear, model.args[0], -model.args[0].sum(0) / 2)
    x = np.full(SHAPE, 0.5, np.float32)
    assert (tied(x).argmax(-1) == tied(x).argmax(-1)[0]).all()
    found = deepfool()(KEY, tied, x, np.asarray(tied(x).argmax(-1), np.int32))
    assert found.success.all()
    assert found.distance.max() < 1e-4


def test_candidates_are_the_classes_ranked_first():
    model, x, labels, gaps, slopes = linear_problem(2)
    ways = distances(gaps, slopes, "l2")
    second = np.argsort(gaps, -1)[:, 1]
    assert (ways.argmin(-1) != second).any()
    found = deepfool(candidates=2)(KEY, model, x, labels)
    np.testing.assert_allclose(found.distance, 1.02 * ways[np.arange(8), second], rtol=2e-5, atol=1e-7)


def test_equal_settings_are_equal():
    assert len({deepfool(norm="linf"), deepfool(norm="linf")}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0."),
        ({"overshoot": 0.0}, "overshoot must be positive and finite, got 0.0."),
        ({"candidates": 1}, "candidates must be an integer of at least 2, got 1."),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        deepfool(**settings)
    assert str(error.value) == message
