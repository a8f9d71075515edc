"""Norms of convolutions against their matrices, and radii that are reached and not passed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import certification
from robustjax.certification import convolution_norm, lipschitz_radius

RNG = np.random.default_rng(0)


def matrix_of(kernel, size, padding, stride=1):
    def convolve(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=numbers)

    rows = jax.jit(jax.jacobian(convolve))(jnp.zeros((size, size, kernel.shape[2])))
    return np.asarray(rows, np.float64).reshape(-1, size * size * kernel.shape[2])


@pytest.mark.parametrize(
    ("height", "width", "size", "kinds"),
    [(3, 3, 6, [("SAME", 1), ("VALID", 1), ("SAME", 2)]), (2, 4, 5, [("SAME", 1)])],
)
def test_a_convolution_is_no_longer_than_its_norm(height, width, size, kinds):
    kernel = RNG.normal(size=(height, width, 2, 3)).astype(np.float32)
    bound = float(convolution_norm(kernel, size))
    assert np.linalg.norm(kernel.reshape(-1, 3), 2) < 0.8 * bound  # the norm of the kernel as a matrix is none
    for padding, stride in kinds:
        exact = np.linalg.norm(matrix_of(kernel, size, padding, stride), 2)
        assert exact <= bound * (1 + 1e-5)
        assert stride == 2 or bound < 1.3 * exact


@pytest.mark.parametrize(("height", "width", "size"), [(3, 3, 6), (2, 4, 5)])  # the shapes of the test above
def test_the_bound_is_the_norm_of_the_periodic_convolution_that_holds_image_and_padding(height, width, size):
    kernel = RNG.normal(size=(height, width, 2, 3)).astype(np.float32)
    places, torus = np.indices((height, width)), (size + height - 1, size + width - 1)
    norms = []
    for frequency in np.ndindex(torus):
        wave = np.exp(-2j * np.pi * sum(p * f / n for p, f, n in zip(places, frequency, torus)))
        norms.append(np.linalg.norm((kernel * wave[:, :, None, None]).sum((0, 1)), 2))
    assert float(convolution_norm(kernel, size)) == pytest.approx(max(norms), rel=1e-5)


def test_a_kernel_of_one_pixel_is_a_matrix():
    kernel = RNG.normal(size=(1, 1, 4, 3)).astype(np.float32)
    assert float(convolution_norm(kernel, 5)) == pytest.approx(np.linalg.norm(kernel[0, 0], 2), rel=1e-5)


def test_the_radius_of_a_linear_model_is_its_distance_to_the_boundary():
    weights = RNG.normal(size=(6, 4)).astype(np.float32)
    x = RNG.normal(size=(20, 6)).astype(np.float32)
    constants = np.linalg.norm(weights.T[:, None] - weights.T[None], axis=-1)
    logits = x @ weights
    radii = np.asarray(lipschitz_radius(jnp.asarray(logits), constants))
    answer = logits.argmax(-1)
    for i, y in enumerate(answer):
        distances = [
            (logits[i, y] - logits[i, j]) / np.linalg.norm(weights[:, y] - weights[:, j]) for j in range(4) if j != y
        ]
        assert radii[i] == pytest.approx(float(min(distances)), rel=1e-4)
    np.testing.assert_array_equal(lipschitz_radius(jnp.asarray(logits), constants, jnp.asarray((answer + 1) % 4)), 0)
    uniform = lipschitz_radius(jnp.asarray(logits), float(constants.max()))
    assert (uniform <= radii).all()
    assert (uniform > 0).all()


def test_what_ignores_its_input_keeps_its_answer_everywhere():
    logits = jnp.array([[0.5, 0.2], [0.1, 0.1]])
    np.testing.assert_array_equal(lipschitz_radius(logits, 0.0), [np.inf, 0])  # an answer that ties is none


def test_bad_input_is_named(unchecked):
    with pytest.raises(ValueError, match=r"kernel must be .* outputs\), got float32 of shape \(3, 3\)"):
        certification.convolution_norm(np.zeros((3, 3), np.float32), 4)
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        certification.convolution_norm(np.zeros((3, 3, 1, 1), np.float32), 0)
    with pytest.raises(ValueError, match="kernel must be finite, got 9 that are not"):
        certification.convolution_norm(np.full((3, 3, 1, 1), np.nan, np.float32), 4)
    logits = jnp.array([[0.0, 10.0]])
    for bad in (logits.astype(int), logits[0], [[0.0, 10.0]]):
        with pytest.raises(ValueError, match="logits must be a floating array .batch, classes., got"):
            certification.lipschitz_radius(bad, 0.5)
    with pytest.raises(ValueError, match="labels must be 0 to 1, got values from 7 to 7"):
        certification.lipschitz_radius(logits, 0.5, jnp.array([7]))
    with pytest.raises(ValueError, match=r"constants must be .* or a number, got float64 of shape \(2,\)"):
        certification.lipschitz_radius(logits, np.ones(2))
    with pytest.raises(ValueError, match=r"labels must be \(1,\) integers, got int32 of shape \(2,\)"):
        certification.lipschitz_radius(logits, 0.5, jnp.array([0, 1]))


def test_constants_are_not_rounded_to_narrow_logits():
    radius = certification.lipschitz_radius(jnp.array([[0, 10]], jnp.bfloat16), 1.0039)
    np.testing.assert_allclose(radius, 10 / 1.0039, rtol=1e-6)


@pytest.mark.parametrize("constants", [-1.0, float("nan"), np.array([[0, 1], [-1, 0]], np.float32)])
def test_constants_that_bound_nothing_are_named(constants):
    with pytest.raises(ValueError, match="constants must be at least 0, got"):
        certification.lipschitz_radius(jnp.array([[1.0, 0.0]]), constants)
