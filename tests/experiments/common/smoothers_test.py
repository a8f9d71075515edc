import jax
import numpy as np
import pytest

from experiments.common import classifiers, smoothers
from robustjax import certification, data
from robustjax.certification import _counts


def test_each_half_sees_its_own_pixels_alone():
    functional = classifiers.build("mlp", data.load("digits", "test"), dtype="float32", key=jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
    mask = certification.checkerboard(8, 8)[None, :, :, None]
    for half, seen in zip(smoothers.halves_of(functional), (mask, ~mask), strict=True):
        logits = half.outputs(functional.state, x).logits
        np.testing.assert_array_equal(logits, half.outputs(functional.state, jax.numpy.where(seen, x, 7.0)).logits)
        np.testing.assert_array_equal(
            logits, functional.outputs(functional.state, jax.numpy.where(seen, x, 0.0)).logits
        )


def test_a_warm_up_compiles_the_program_of_all_images():
    keys, x = jax.random.split(jax.random.key(0), 2), np.full((2, 4, 4, 1), 0.5, np.float32)
    logits_fn = lambda x: x.reshape(len(x), -1)[:, :3]
    certify = smoothers.procedure(
        (logits_fn,), certification.gaussian(0.5), num_selection=20, num_estimation=480, alpha=0.01, batch_size=None
    )
    before = _counts._votes._cache_size()
    certify(keys, x, warm_up=True)
    assert certify(keys, x)[-1].tolist() == [500, 500]
    assert _counts._votes._cache_size() == before + 1


@pytest.mark.parametrize(
    ("largest", "radii"),
    [
        (0.8, (0, 0.25, 0.5, 0.75)),
        (1.9, (0, 0.5, 1.0, 1.5)),
        (3.8, (0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)),
        (7.6, (0, 1, 2, 3, 4, 5, 6, 7)),
        (38.5, (0, 5, 10, 15, 20, 25, 30, 35)),
        (0.05, (0, 0.01, 0.02, 0.03, 0.04)),
    ],
)
def test_radii_of_a_table_are_round_and_at_most_a_dozen(largest, radii):
    assert smoothers.default_radii(largest) == pytest.approx(radii)
