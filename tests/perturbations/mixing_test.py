import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import perturbations

HEIGHT, WIDTH, N, K = 7, 10, 6, 4
LABELS = jnp.arange(N) % K


def constant_images(n=N):
    """Image i is i everywhere, so that a pixel tells where it comes from."""
    return jnp.asarray(np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, HEIGHT, WIDTH, 2)))


@functools.cache
def jitted(name):
    return jax.jit(functools.partial(getattr(perturbations, name), num_classes=K))


@functools.cache
def mapped(name):
    mix = functools.partial(getattr(perturbations, name), num_classes=N)
    return jax.jit(jax.vmap(lambda key, alpha: mix(key, constant_images(), jnp.arange(N), alpha=alpha), (0, None)))


def draws(name, alpha=1.0):
    """500 mixtures of constant images whose label is their number: probabilities tell the partner and the share."""
    return jax.tree.map(np.asarray, mapped(name)(jax.random.split(jax.random.key(0), 500), jnp.float32(alpha)))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_contract(name):
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(N, HEIGHT, WIDTH, 3)), jnp.float32)
    mixed, other = (jitted(name)(jax.random.key(seed), images, LABELS) for seed in (3, 4))
    chex.assert_equal_shape([mixed.image, images])
    chex.assert_shape(mixed.label_probabilities, (N, K))
    chex.assert_type([*mixed], jnp.float32)
    image = np.asarray(mixed.image)
    assert (image >= 0).all()
    assert (image <= 1).all()
    assert (np.asarray(other.image) != image).any()
    half = jax.ShapeDtypeStruct(images.shape, jnp.bfloat16)
    half = jax.eval_shape(jitted(name), jax.random.key(3), half, LABELS)
    assert (half.image.dtype, half.label_probabilities.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_images_are(name):
    image, probabilities = draws(name)
    numbers = np.arange(N)
    # The mean pixel is kept * i + (1 - kept) * partner, which is the expectation of the label.
    np.testing.assert_allclose(image.mean((2, 3, 4)), probabilities @ numbers.astype(np.float32), atol=2e-6)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
    assert (probabilities >= 0).all()
    assert ((probabilities > 0).sum(-1) <= 2).all()
    # Every image takes part in just as much of the batch: once as the first and once as the second.
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    # One share for the whole batch: rows agree on it, but for images that are their own partners.
    own = probabilities[:, numbers, numbers]
    alone = own > 1 - 1e-6
    np.testing.assert_allclose(np.where(alone, own.min(-1, keepdims=True), own), own.min(-1)[:, None] + 0 * own)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_shares_follow_the_beta_distribution(alpha):
    from scipy import stats

    own = draws("mixup", alpha).label_probabilities[:, np.arange(N), np.arange(N)].min(-1)
    # One permutation in 720 moves nothing and counts as a share of 1: too few of 500 draws for the test to see.
    assert stats.kstest(np.minimum(own, 1), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_a_small_alpha_hardly_mixes():
    own = draws("mixup", 1e-3).label_probabilities.max(-1)
    assert np.isfinite(own).all()
    assert (own > 0.999).mean() > 0.97


def box_by_hand(height, width, lam, row, column):
    """The authors' box, in integers as Python cuts them."""
    side = np.float32(np.sqrt(np.float32(1) - np.float32(lam)))
    rows, columns = int(np.float32(height) * side) // 2, int(np.float32(width) * side) // 2
    box = np.zeros((height, width), bool)
    box[max(row - rows, 0) : min(row + rows, height), max(column - columns, 0) : min(column + columns, width)] = True
    return box


def test_cutmix_pastes_the_box_of_the_reference_at_a_uniform_place(monkeypatch):
    image = constant_images()

    @jax.jit
    def mix(lam, row, column):
        places = iter((row, column))
        monkeypatch.setattr(jax.random, "permutation", lambda key, n: (jnp.arange(n) + 1) % n)
        monkeypatch.setattr(jax.random, "beta", lambda key, a, b, dtype: lam.astype(dtype))
        monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: next(places))
        return perturbations.cutmix(jax.random.key(0), image, jnp.arange(N), num_classes=N)

    for lam in (0.0, 0.03, 0.3, 0.5, 0.77, 0.99, 1.0):
        for row, column in ((0, 0), (3, 4), (HEIGHT - 1, WIDTH - 1), (0, 9)):
            mixed = jax.tree.map(np.asarray, mix(np.float32(lam), np.int32(row), np.int32(column)))
            box = box_by_hand(HEIGHT, WIDTH, lam, row, column)
            np.testing.assert_array_equal(mixed.image[0], np.stack([box] * 2, -1))
            kept = np.float32(np.count_nonzero(~box)) / np.float32(box.size)
            want = np.zeros(N, np.float32)
            want[:2] = kept, 1 - kept
            np.testing.assert_allclose(mixed.label_probabilities[0], want, atol=1e-7)


def test_cutmix_boxes_are_rectangles_whose_place_and_size_vary():
    image, _ = draws("cutmix")
    pasted = (image[..., 0] != np.arange(N)[None, :, None, None]).any(1)  # where some image of the batch was replaced
    sizes = set()
    for mask in pasted:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, rows[:, None] & columns[None])
        for side in (rows, columns):
            assert np.count_nonzero(np.diff(side.astype(int))) <= 2
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert len(sizes) > 20
    assert (0, 0) in sizes
    corners = pasted[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    assert (corners > 0.02).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_batch_of_one_mixes_with_itself(name, monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b, dtype: jnp.asarray(0.3, dtype))
    image = np.random.default_rng(5).uniform(size=(1, HEIGHT, WIDTH, 1)).astype(np.float32)
    mix = jax.jit(functools.partial(getattr(perturbations, name), num_classes=3))
    mixed = mix(jax.random.key(0), image, np.asarray([2], np.int32))
    np.testing.assert_allclose(mixed.image, image, atol=1e-6)
    np.testing.assert_allclose(mixed.label_probabilities, [[0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_label_outside_is_no_row_of_zeros(name):
    labels = jnp.asarray([-1, K, *LABELS[2:]])
    mixed = jitted(name)(jax.random.key(0), jnp.zeros((N, HEIGHT, WIDTH, 3)), labels)
    sums = np.asarray(mixed.label_probabilities).sum(-1)
    assert np.isnan(sums[:2]).all()
    np.testing.assert_allclose(sums[~np.isnan(sums)], 1, atol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize(
    ("images", "labels", "settings", "message"),
    [
        ((N, 3, 3), (N,), {}, r"images must be .* \(batch, height, width, channels\), got .* \(6, 3, 3\)"),
        ((N, 3, 3, 1), (5,), {}, r"labels must be \(6,\) integers to match the images, got int32 of shape \(5,\)"),
        ((N, 3, 3, 1), (N,), {"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
        ((N, 3, 3, 1), (N,), {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ((N, 3, 3, 1), (N,), {"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
    ],
)
def test_bad_arguments(unchecked, name, images, labels, settings, message):
    mix = getattr(perturbations, name)
    with pytest.raises(ValueError, match=message):
        mix(jax.random.key(0), jnp.zeros(images), jnp.zeros(labels, jnp.int32), **({"num_classes": 3} | settings))


def test_labels_that_are_no_integers(unchecked):
    with pytest.raises(ValueError, match=r"labels must be an array of integers \(batch,\), got float32"):
        perturbations.mixup(jax.random.key(0), constant_images(), jnp.zeros(N), num_classes=3)
