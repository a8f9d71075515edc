"""The unrolled Threefry against JAX's own, and the normal against its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32 as reference
from scipy import stats

from robustjax import perturbations

standard_normal = jax.jit(perturbations.standard_normal, static_argnums=1)


def test_threefry_equals_jaxs():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 50), dtype=np.uint32)
    key = np.array([0x13198A2E, 0x03707344], np.uint32)
    ours = perturbations.threefry_2x32(
        (jnp.uint32(key[0]), jnp.uint32(key[1])), (jnp.asarray(words[0]), jnp.asarray(words[1]))
    )
    np.testing.assert_array_equal(np.concatenate(ours), reference(key, words.reshape(-1)))


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [  # Random123's known answers for threefry2x32 with 20 rounds.
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key, count, expected):
    ours = perturbations.threefry_2x32(tuple(map(jnp.uint32, key)), tuple(map(jnp.uint32, count)))
    assert tuple(map(int, ours)) == expected


def test_normal_is_normal():
    draws = np.asarray(standard_normal(jax.random.key(0), (401, 501)), np.float64)
    assert stats.kstest(draws.ravel(), "norm").pvalue > 0.01
    assert abs(stats.zscore(draws.ravel())).max() < 5.3
    halves = draws.ravel()[:200_900].reshape(2, -1)  # the two words of each block
    assert abs(np.corrcoef(halves)[0, 1]) < 4 / np.sqrt(halves.shape[1])
    assert abs(np.corrcoef(draws.ravel()[:-1], draws.ravel()[1:])[0, 1]) < 4 / np.sqrt(draws.size)


def test_normal_follows_the_key():
    one, two = (np.asarray(standard_normal(jax.random.key(i), (401, 501))) for i in (0, 1))
    assert one.dtype == jnp.float32
    assert np.unique([one[:3, :11], two[:3, :11]]).size == 66
    assert standard_normal(jax.random.key(0), (0, 3)).shape == (0, 3)


def test_another_key_implementation_is_handed_on():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(perturbations.standard_normal(key, (5,)), jax.random.normal(key, (5,)))


def test_keys_that_are_not_one_for_each_input_are_refused(unchecked):
    keys, x = jax.random.split(jax.random.key(0), 3), jnp.ones((4, 2))
    for wrong, got in ((keys, r"shape \(\) or \(4,\), got \(3,\)"), (jax.random.PRNGKey(0), "typed key")):
        with pytest.raises(ValueError, match=f"key must .*{got}"):
            perturbations.image_keys(wrong, x)
    with pytest.raises(ValueError, match=r"key must be .*, of shape \(\), got .* of shape \(3,\)"):
        perturbations.standard_normal(keys, (2,))
