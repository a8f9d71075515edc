"""Networks from images to images beside loops over pixels, and the border at which they become functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models
from robustjax.typing import ModelState

KEY = jax.random.key(0)
SHAPE = (6, 4, 2)
TINY = {"width": 5, "depth": 3, "image_shape": SHAPE}
X = np.random.default_rng(0).uniform(-1, 2, (3, *SHAPE)).astype(np.float32)
TIME = jnp.asarray([0, 7, 900])
jitted = functools.cache(jax.jit)


@pytest.fixture(scope="module")
def modules():
    return models.denoiser(KEY, **TINY), models.noise_predictor(KEY, fold=1, **TINY)


def with_random_arrays(module):
    functional, rng = models.image_functional(module), np.random.default_rng(1)
    random = lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, a.dtype)
    return functional._replace(state=jax.tree.map(random, functional.state))


@pytest.fixture(scope="module")
def denoiser(modules):
    return with_random_arrays(modules[0])


@pytest.fixture(scope="module")
def predictor(modules):
    return with_random_arrays(modules[1])


def convolve(x, layer):
    """3x3 with a border of zeros, pixel by pixel."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, out = np.asarray(layer["kernel"], np.float64), np.zeros((*x.shape[:3], layer["kernel"].shape[-1]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", padded[:, i : i + 3, j : j + 3], kernel)
    return out + np.asarray(layer["bias"])


def test_a_denoiser_takes_a_stack_of_convolutions_of_folded_pixels_away(denoiser):
    folded = np.zeros((3, 3, 2, 8))
    for i in range(6):
        for j in range(4):
            channels = slice(4 * (i % 2) + 2 * (j % 2), 4 * (i % 2) + 2 * (j % 2) + 2)
            folded[:, i // 2, j // 2, channels] = X[:, i, j] - 0.5
    layers = denoiser.state.params["body"]["layers"]
    for name in ("0", "1", "2"):
        folded = convolve(folded, layers[name])
        folded = np.maximum(folded, 0) if name != "2" else folded
    expected = X.astype(np.float64)
    for i in range(6):
        for j in range(4):
            channels = slice(4 * (i % 2) + 2 * (j % 2), 4 * (i % 2) + 2 * (j % 2) + 2)
            expected[:, i, j] -= folded[:, i // 2, j // 2, channels]
    found = jitted(denoiser.outputs)(denoiser.state, jnp.asarray(X))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - X).max() > 0.1


def test_a_noise_predictor_hears_the_time_of_each_image(predictor):
    waves = np.outer(TIME, 10_000.0 ** (-np.arange(16) / 16))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), predictor.state.params)
    hidden = np.concatenate([np.sin(waves), np.cos(waves)], -1) @ params["time1"]["kernel"] + params["time1"]["bias"]
    shift = np.maximum(hidden, 0) @ params["time2"]["kernel"] + params["time2"]["bias"]
    x, layers = X, params["body"]["layers"]
    for name in ("0", "1"):
        x = np.maximum(convolve(x, layers[name]) + shift.reshape(3, 2, 5)[:, None, None, int(name)], 0)
    found = jitted(predictor.outputs)(predictor.state, jnp.asarray(X), TIME)
    np.testing.assert_allclose(found, convolve(x, layers["2"]), rtol=1e-3, atol=1e-3)


def test_they_begin_as_the_identity_and_as_no_noise(modules):
    denoiser, predictor = map(models.image_functional, modules)
    np.testing.assert_array_equal(jitted(denoiser.outputs)(denoiser.state, jnp.asarray(X)), X)
    np.testing.assert_array_equal(jitted(predictor.outputs)(predictor.state, jnp.asarray(X), TIME), np.zeros_like(X))
    assert np.std(modules[0].body.layers[0].kernel[...]) > 0.1  # all but the last layer is random
    default = nnx.eval_shape(lambda: models.denoiser(KEY))
    assert models.num_parameters(models.image_functional(default).state.params) == 39_332


def test_the_functions_are_stable_and_the_state_is_ours(modules, denoiser):
    again = models.image_functional(nnx.eval_shape(lambda: models.denoiser(KEY, **TINY)))
    other = nnx.eval_shape(lambda: models.denoiser(KEY, **TINY | {"width": 4}))
    assert (again.apply, again.outputs) == (denoiser.apply, denoiser.outputs)
    assert models.image_functional(other).apply is not denoiser.apply
    models.image_functional(modules[0]).state.params["body"]["layers"]["0"]["kernel"].delete()
    assert not modules[0].body.layers[0].kernel[...].is_deleted()


def test_apply_gives_the_state_back_with_what_else_it_holds(denoiser):
    state = ModelState(denoiser.state.params, {"classifier": {"params": jnp.zeros(2)}})
    found = []

    @jax.jit
    def image_of(state, x):
        image, after = denoiser.apply(state, x, train=True)
        found.append(after is state)
        return image

    image = image_of(state, jnp.asarray(X))
    assert found == [True]
    np.testing.assert_array_equal(image, jitted(denoiser.outputs)(denoiser.state, jnp.asarray(X)))


def test_bfloat16_is_inside_alone(denoiser):
    half = models.image_functional(nnx.eval_shape(lambda: models.denoiser(KEY, dtype=jnp.bfloat16, **TINY)))
    found = jitted(half.outputs)(denoiser.state, jnp.asarray(X))
    assert found.dtype == jnp.float32
    exact = jitted(denoiser.outputs)(denoiser.state, jnp.asarray(X))
    assert 0 < np.abs(found - exact).max() < 0.1


class WithNorm(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def abstract(x):
    return nnx.eval_shape(lambda x: models.denoiser(KEY, **TINY)(x), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.denoiser(KEY, width=0), "width must be an integer of at least 1, got 0"),
        (lambda: models.denoiser(KEY, depth=1), "depth must be an integer of at least 2, got 1"),
        (lambda: models.denoiser(KEY, image_shape=(9, 8, 1)), r"fold must divide .* \(9, 8, 1\), got 2"),
        (lambda: models.noise_predictor(KEY, image_shape=(8, 0, 1)), r"image_shape must be a positive .* \(8, 0, 1\)"),
        (
            lambda: models.denoiser(KEY, **TINY)(jnp.zeros((2, 4, 6, 2))),
            r"shape \(batch, 6, 4, 2\), got float32 \(2, 4",
        ),
        (lambda: abstract(jnp.zeros((2, *SHAPE), int)), r"x must be floating point .* got int32"),
        (lambda: models.image_functional(WithNorm()), "must hold only nnx.Param variables, got batch statistics too"),
    ],
)
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
