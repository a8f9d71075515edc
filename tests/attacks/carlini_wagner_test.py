import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from robustjax.attacks import at_budget, carlini_wagner

KEY = jax.random.key(0)


def linear(weights, bias, x):
    return x.reshape(x.shape[0], -1) @ weights + bias[None]


def linear_problem(classes=2, seed=0):
    """A linear model, inputs around the middle of the box, and the classes that it gives them."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(6, classes)).astype(np.float32)
    x = np.clip(rng.normal(0.5, 0.05, (8, 2, 3, 1)), 0, 1).astype(np.float32)
    bias = (rng.normal(size=classes) * 0.2 - 0.5 * weights.sum(0)).astype(np.float32)
    model = jax.tree_util.Partial(linear, jnp.asarray(weights), jnp.asarray(bias))
    return model, x, np.asarray(model(x)).argmax(-1).astype(np.int32)


def attack(**settings):
    return carlini_wagner(**{"steps": 300, **settings})


def lead_and_slope(model, x):
    weights, bias = (np.asarray(a, np.float64) for a in model.args)
    logits = x.reshape(8, 6) @ weights + bias
    return np.abs(logits[:, 0] - logits[:, 1]), np.linalg.norm(weights[:, 0] - weights[:, 1])


@pytest.mark.parametrize("confidence", [0.0, 0.3])
def test_distance_to_a_plane(confidence):
    model, x, labels = linear_problem()
    lead, slope = lead_and_slope(model, x)
    found = attack(confidence=confidence)(KEY, model, x, labels)
    want = (lead + confidence) / slope
    assert found.success.all()
    assert (np.asarray(found.distance) >= want * (1 - 1e-5)).all()
    np.testing.assert_allclose(found.distance, want, rtol=0.02)  # Adam circles the boundary


def test_c_is_ten_times_as_large_until_it_is_enough():
    """The distance d to the boundary of slope s pays from c = 2 d / s on: the derivative of d squared is 2 d."""
    model, x, labels = linear_problem()
    lead, slope = lead_and_slope(model, x)
    enough = 2 * lead / slope**2
    initial = float(np.sqrt(enough.min() * enough.max()) / 10)
    found = attack(initial_c=initial, binary_search_steps=2)(KEY, model, x, labels)
    clear = np.abs(np.log(enough / (10 * initial))) > 0.1
    assert {True, False} == set((enough < 10 * initial)[clear].tolist())
    np.testing.assert_array_equal(found.success[clear], (enough < 10 * initial)[clear])


def test_targets_are_reached_by_the_shortest_way():
    model, x, labels = linear_problem(4)
    targets = ((labels + 1) % 4).astype(np.int32)
    targets[0] = labels[0]
    found = attack(targeted=True)(KEY, model, x, targets)
    np.testing.assert_array_equal(model(found.x).argmax(-1), targets)
    assert (found.distance[0], found.success[0]) == (0, True)
    weights, bias = (np.asarray(a, np.float64) for a in model.args)
    for i in range(1, 8):
        ahead = weights[:, [targets[i]]] - weights
        at_x = ahead.T @ x[i].ravel() + bias[targets[i]] - bias
        leads = {"type": "ineq", "fun": lambda d, a=ahead, b=at_x: a.T @ d + b, "jac": lambda d, a=ahead: a.T}
        best = optimize.minimize(
            lambda d: d @ d,
            np.zeros(6),
            jac=lambda d: 2 * d,
            constraints=leads,
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(found.distance[i], np.sqrt(best.fun), rtol=0.02)


def test_results_keep_their_promises():
    model, x, labels = linear_problem()
    labels[0] = 1 - labels[0]
    x[1, 0, :, 0] = [0, 1, 0]  # the inverse of tanh is infinite there
    labels[1] = model(x[1:2]).argmax()
    found = attack()(KEY, model, x, labels)
    assert (found.x.shape, found.x.dtype) == (x.shape, jnp.float32)
    assert ((found.x >= 0) & (found.x <= 1)).all()
    np.testing.assert_allclose(found.distance, np.linalg.norm((found.x - x).reshape(8, -1), axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(model(found.x).argmax(-1) != labels, found.success)
    assert found.success.all()
    np.testing.assert_array_equal(found.x[0], x[0])
    assert found.distance[0] == 0
    jax.tree.map(np.testing.assert_array_equal, found, attack()(jax.random.key(1), model, x, labels))
    others, other_labels = x.copy(), labels.copy()
    others[4:], other_labels[4:] = others[4:][::-1] * 0.9, 1 - labels[4:]
    np.testing.assert_array_equal(attack()(KEY, model, others, other_labels).x[:4], found.x[:4])
    epsilon = float(np.median(found.distance))
    adversarial = at_budget(attack(), epsilon)(KEY, model, x, jnp.asarray(labels))
    near = np.asarray(found.distance) <= epsilon
    np.testing.assert_array_equal(adversarial[near], found.x[near])
    np.testing.assert_array_equal(adversarial[~near], x[~near])


def test_black_and_white_images_are_left_in_as_many_steps_as_others():
    """From the ends of the box, 200 steps would find nothing."""
    model, x, _ = linear_problem()
    x = (x > 0.5).astype(np.float32)
    labels = np.asarray(model(x)).argmax(-1).astype(np.int32)
    found, longer = attack(steps=200)(KEY, model, x, labels), attack()(KEY, model, x, labels)
    np.testing.assert_array_equal(found.success, longer.success)
    assert found.success.any()
    np.testing.assert_allclose(found.distance[found.success], longer.distance[found.success], rtol=0.3)


@pytest.mark.parametrize("bias", [[9.0, 0], [np.nan, 0]])
def test_where_nothing_can_be_found(bias):
    _, x, _ = linear_problem()
    constant = jax.tree_util.Partial(linear, jnp.zeros((6, 2)), jnp.asarray(bias, jnp.float32))
    found = attack()(KEY, constant, x, np.zeros(8, np.int32))
    np.testing.assert_array_equal(found.x, x)
    assert np.isinf(found.distance).all()
    assert not found.success.any()


def test_equal_settings_are_equal():
    assert len({carlini_wagner(confidence=1.0), carlini_wagner(confidence=1.0)}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0."),
        ({"binary_search_steps": 0}, "binary_search_steps must be an integer of at least 1, got 0."),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0."),
        ({"initial_c": -1.0}, "initial_c must be positive and finite, got -1.0."),
        ({"confidence": None}, "confidence must be at least 0 and finite, got None."),
        ({"confidence": -0.5}, "confidence must be at least 0 and finite, got -0.5."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        carlini_wagner(**settings)
    assert str(error.value) == message
