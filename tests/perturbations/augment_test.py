import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import perturbations

random_crop = jax.jit(perturbations.random_crop, static_argnames="padding")
random_horizontal_flip = jax.jit(perturbations.random_horizontal_flip)


def images(n, size=6):
    return jnp.asarray(np.arange(1, n * size * size * 2 + 1, dtype=np.float32).reshape(n, size, size, 2))


def test_crops_are_windows_of_the_padded_image_and_all_of_them_occur():
    x = images(400)
    padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = np.zeros((5, 5), int)
    for crop, image in zip(np.asarray(random_crop(jax.random.key(0), x, padding=2)), padded):
        matches = [(i, j) for i in range(5) for j in range(5) if (image[i : i + 6, j : j + 6] == crop).all()]
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert (np.abs(seen - 16) < 5 * 4).all()  # 400 draws on 25 places: mean 16, standard deviation 3.9
    assert (seen > 0).all()


def test_crop_without_padding_is_the_identity_outside_a_program_too():
    np.testing.assert_array_equal(perturbations.random_crop(jax.random.key(0), images(5), padding=0), images(5))


def test_negative_padding():
    with pytest.raises(ValueError, match="padding must be an integer of at least 0, got -1"):
        perturbations.random_crop(jax.random.key(0), images(1), padding=-1)


def test_each_image_is_mirrored_or_not_half_of_them():
    x = images(1000)
    flipped = np.asarray(random_horizontal_flip(jax.random.key(0), x))
    same = (flipped == np.asarray(x)).all((1, 2, 3))
    mirrored = (flipped == np.asarray(x)[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(int(same.sum()) - 500) < 4 * np.sqrt(250)


def test_composition_gives_each_function_its_own_key():
    both = perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip)
    first, second = jax.random.split(jax.random.key(5), 2)
    want = random_horizontal_flip(second, random_crop(first, images(5)))
    np.testing.assert_array_equal(jax.jit(both)(jax.random.key(5), images(5)), want)


def test_equal_compositions_are_equal():
    make = lambda: perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip)
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != perturbations.compose(perturbations.random_crop)


@pytest.mark.usefixtures("unchecked")
def test_only_functions_are_composed():
    with pytest.raises(ValueError, match=r"functions must be a function, got 'crop'"):
        perturbations.compose(perturbations.random_crop, "crop")


@pytest.mark.parametrize(
    "function",
    [
        perturbations.random_crop,
        perturbations.random_horizontal_flip,
        perturbations.compose(perturbations.random_crop, perturbations.random_horizontal_flip),
        functools.partial(perturbations.gaussian_noise, sigma=0.5),
    ],
    ids=["crop", "flip", "compose", "noise"],
)
def test_contract(function):
    key, x = jax.random.key(7), images(5)
    compiled, keys = jax.jit(function), jax.random.split(key, 3)
    first = compiled(key, x)
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert (compiled(jax.random.key(8), x) != first).any()
    mapped = jax.jit(jax.vmap(function, (0, None)))(keys, x)
    np.testing.assert_allclose(mapped[1], compiled(keys[1], x), rtol=1e-6)


@pytest.mark.parametrize("name", ["random_crop", "random_horizontal_flip"])
def test_images_without_channels_are_refused(name, unchecked):
    augment = getattr(perturbations, name)
    with pytest.raises(ValueError, match=r"x must be .* \(batch, height, width, channels\), got .* \(6, 8, 8\)"):
        augment(jax.random.key(0), jnp.ones((6, 8, 8)))
