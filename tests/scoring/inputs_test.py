"""ODIN: its closed form on a linear model, its kinship with msp, and that a row does not see its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.scoring._inputs import IMAGES, descend, of_inputs
from robustjax.typing import Outputs

X = np.random.default_rng(0).uniform(size=(IMAGES + 3, 2, 2, 1)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def linear(kernel, x):
    return jnp.matmul(x.reshape(x.shape[0], -1), kernel, precision="highest")


logits_fn = jax.tree_util.Partial(linear, KERNEL)


def test_without_a_step_and_at_temperature_one_it_is_msp():
    logits = logits_fn(X)
    want = scoring.msp().score((), Outputs(logits, logits))
    np.testing.assert_allclose(scoring.odin(logits_fn, temperature=1.0, epsilon=0.0).score((), X), want, rtol=1e-6)


@pytest.mark.parametrize(("temperature", "epsilon"), [(1.0, 0.05), (1000.0, 0.0014), (0.04, 0.05)])
def test_two_classes_of_a_linear_model(temperature, epsilon):
    # The step moves the gap between the two logits by epsilon times the l1 norm of the difference of their weights.
    kernel = KERNEL[:, :2].astype(np.float64)
    gap = np.abs((X.reshape(-1, 4) @ kernel) @ [1, -1]) + epsilon * np.abs(kernel @ [1, -1]).sum()
    detector = scoring.odin(jax.tree_util.Partial(linear, KERNEL[:, :2]), temperature=temperature, epsilon=epsilon)
    np.testing.assert_allclose(detector.score((), X), -np.logaddexp(0, gap / temperature), rtol=1e-5)


def test_three_classes_of_a_linear_model():
    x, kernel, temperature, epsilon = X.reshape(-1, 4).astype(np.float64), KERNEL.astype(np.float64), 10.0, 0.02

    def probabilities(x):
        odds = np.exp(x @ kernel / temperature)
        return odds / odds.sum(-1, keepdims=True)

    p = probabilities(x)
    gradient = (p @ kernel.T - kernel[:, p.argmax(-1)].T) / temperature
    want = np.log1p(-probabilities(x - epsilon * np.sign(gradient)).max(-1))
    got = scoring.odin(logits_fn, temperature=temperature, epsilon=epsilon).score((), X)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_has_no_gradient_stays_and_rows_move_by_themselves():
    x = {"a": jnp.array([[1.0, 2.0], [-1e-30, 5.0]]), "b": jnp.ones((2, 1))}
    moved = descend(lambda x: jnp.square(x["a"][:, 0]) - 3 * x["b"][:, 0], x, 0.25)
    np.testing.assert_array_equal(moved["a"], np.array([[0.75, 2.0], [0.25, 5.0]], np.float32))
    np.testing.assert_array_equal(moved["b"], [[1.25], [1.25]])


def test_a_row_does_not_see_its_batch():
    detector = scoring.odin(logits_fn, epsilon=0.01)
    scores = detector.score(detector.fit(), X)
    assert scores.shape == (IMAGES + 3,)
    assert len(np.unique(scores)) > IMAGES
    for rows in (slice(0, 5), slice(IMAGES - 2, None), slice(0, 0)):
        np.testing.assert_allclose(detector.score((), X[rows]), scores[rows], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(detector.score)((), X), scores, rtol=1e-6)


def test_sharded_images_are_scored_in_place():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X[:128], jax.NamedSharding(mesh, jax.P("data")))
    detector = scoring.odin(logits_fn)
    np.testing.assert_allclose(detector.score((), x), detector.score((), X[:128]), rtol=1e-6)


def test_gradients_of_coarse_images_are_those_of_float32():
    coarse = X[:9].astype(jnp.bfloat16)
    detector = scoring.odin(logits_fn, epsilon=0.05)
    np.testing.assert_array_equal(detector.score((), coarse), detector.score((), coarse.astype(np.float32)))


def test_models_of_one_architecture_and_all_settings_share_a_program():
    traced = []

    def counted(kernel, x):
        traced.append(x.shape)
        return linear(kernel, x)

    for factor, temperature, epsilon in ((1.0, 1.0, 0.0), (2.0, 10.0, 0.0), (1.0, 10.0, 0.1)):
        model = jax.tree_util.Partial(counted, factor * KERNEL)
        scoring.odin(model, temperature=temperature, epsilon=epsilon).score((), X[:3])
    assert len(traced) == 2  # in one program: for the step, and for the score


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.odin(linear, temperature=0.0), r"temperature must be positive and finite, got 0\.0"),
        (lambda: scoring.odin(linear, epsilon=-0.1), r"epsilon must be at least 0 and finite, got -0\.1"),
        (lambda: scoring.odin(logits_fn).score((), X.astype(np.uint8)), r"x must be floating, got uint8"),
        (lambda: scoring.odin(logits_fn).score((), None), r"x must be floating, got no array"),
        (lambda: scoring.odin(logits_fn).score((), np.float32(1)), r"x must have the batch as first axis, got \(\)"),
        (
            lambda: scoring.odin(logits_fn).score((), np.where(np.arange(4)[:, None] == 2, np.nan, np.ones((4, 4)))),
            r"x must be finite, 1 of 4 rows are not, the first is row 2",
        ),
        (
            lambda: scoring.odin(lambda x: linear(KERNEL, x / (x - 1))).score((), np.ones((5, 4), "f")),
            r"what the model gives for x must be finite, 5 of 5 rows are not, the first is row 0",
        ),
        (lambda: scoring.odin(linear, epsilon="0.1"), r"epsilon must be a number, got '0\.1'"),
        (
            lambda: scoring.odin(lambda x: x[:, 0, 0]).score((), X[:3]),
            r"logits_fn must return shape \(128, classes >= 2\), got \(128, 1\)",
        ),
        (
            lambda: scoring.odin(lambda x: Outputs(linear(KERNEL, x), x)).score((), X[:3]),
            r"logits_fn must return shape \(128, classes >= 2\), got Outputs",
        ),
        (
            lambda: scoring.odin(lambda x: linear(KERNEL, x / x.std(0, keepdims=True))).score((), X),
            r"logits_fn must answer each input by itself, got other answers for the same inputs in another batch",
        ),
        (
            lambda: of_inputs(jax.jit(lambda state, x: x), (), {"a": X, "b": X[:2]}),
            r"x must have the batch as first axis, got \(131, 2, 2, 1\), \(2, 2, 2, 1\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
