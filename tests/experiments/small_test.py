"""Small trainings: full-batch descent by its closed form, and trainings that learn, repeat and differ by seed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _small
from experiments.common import classifiers
from robustjax import data, losses, training

RECIPE = training.Recipe(algorithm="adam", learning_rate=1e-2, batch_size=32, num_epochs=15)


def _quadratic(params, target):
    return 0.5 * jnp.square(params - target).sum()


def test_full_batch_descends_a_quadratic_as_its_closed_form_says():
    optimizer, target = optax.sgd(0.5), jnp.array([1.0, -2.0])
    found = _small.full_batch(_quadratic, jnp.zeros(2), optimizer, 5, target)
    np.testing.assert_allclose(found.params, target * (1 - 0.5**5), rtol=1e-6)
    np.testing.assert_allclose(found.losses, 2.5 * 0.25 ** np.arange(5), rtol=1e-6)
    size = _small.full_batch._cache_size()
    _small.full_batch(_quadratic, jnp.ones(2), optimizer, 5, -target)
    assert _small.full_batch._cache_size() == size  # other data, the same program


def test_fit_learns_repeats_and_differs_by_seed():
    some = data.load("digits", "train[:64]").cached()
    found = [_small.fit(losses.standard(), RECIPE, some, seed) for seed in (0, 0, 1)]
    first, again, other = ([np.asarray(leaf) for leaf in jax.tree.leaves(one.state)] for one in found)
    assert found[0].accuracy(some, np.arange(64)) > 0.9
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_fit_joins_outliers():
    some = data.load("digits", "train[:64]").cached()
    noise = data.synthetic("uniform_noise", some.image_shape, 64, seed=0)
    exposed = _small.fit(losses.outliers.outlier_exposure(), RECIPE, some, 0, outliers=noise, num_epochs=3)
    plain = _small.fit(losses.standard(), RECIPE, some, 0, num_epochs=3)
    confidence = lambda one: jax.nn.softmax(classifiers.outputs_of(one, noise[:].image).logits, axis=-1).max(-1).mean()
    assert confidence(exposed) < confidence(plain)
