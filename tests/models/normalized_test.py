"""Normalisation inside a model: its equation, and that mean and std are arguments of programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import certification, models

X = np.random.default_rng(0).uniform(size=(2, 4, 4, 3)).astype(np.float32)
MEAN, STD = np.array([0.1, 0.5, 0.9]), np.array([0.5, 1.0, 0.25])


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), (0.5, STD), (list(MEAN), 0.25), (0.5, 0.25), (jnp.ones(3), 2)])
def test_it_is_the_equation(mean, std):
    got = models.normalized(lambda x: x, mean, std)(X)
    np.testing.assert_allclose(got, (X - np.asarray(mean)) / np.asarray(std), rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_it_keeps_the_precision_of_the_images():
    assert models.normalized(lambda x: x, MEAN, STD)(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_another_mean_does_not_trace_again():
    traced = []

    def logits_fn(x):
        traced.append(x.shape)
        return x.reshape(len(x), -1)[:, :2]

    for mean in (0.4, 0.6):
        certification.sample_counts(
            jax.random.key(0), models.normalized(logits_fn, mean, STD), X, certification.gaussian(0.1),
            num_samples=4, batch_size=4,
        )  # fmt: skip
        first = len(traced) if mean == 0.4 else first  # noqa: F821
    assert len(traced) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((None, 0.5, 0.5), "fn must be a function"),
        ((lambda: 0, 0.5, 0.5), "fn must be a function of 1 argument"),
        ((abs, [[0.5]], 0.5), r"mean must be one number or \(channels,\), got \[\[0.5\]\]"),
        ((abs, [], 0.5), r"mean must be one number or \(channels,\), got \[\]"),
        ((abs, 0.5, 0.0), "std must be positive and finite, got 0.0"),
        ((abs, 0.5, [0.5, -1.0]), r"std must be positive and finite, got \[0.5, -1.0\]"),
        ((abs, float("inf"), 0.5), "mean must be finite, got inf"),
        ((abs, [0.5, 0.5], [0.5] * 3), "std must have one number for each channel of mean, got 3 for 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        models.normalized(*settings)


def test_bad_images_are_named():
    with pytest.raises(ValueError, match="x must be floating images"):
        models.normalized(lambda x: x, 0.5, 0.5)(X.astype(np.uint8))
