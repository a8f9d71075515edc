import numpy as np
import pytest

from robustjax import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "test[:200]")


def test_select_classes_keeps_and_renumbers(digits):
    everything, chosen = digits.arrays(), data.select_classes(digits, (7, 2))
    kept = np.flatnonzero(np.isin(everything.label, (7, 2)))
    assert chosen.num_classes == 2
    assert len(chosen) == len(kept)
    np.testing.assert_array_equal(chosen.arrays().image, everything.image[kept])
    np.testing.assert_array_equal(chosen.arrays().label, np.where(everything.label[kept] == 7, 0, 1))
    np.testing.assert_array_equal(chosen[[3, 1]].image, everything.image[kept[[3, 1]]])


def test_classes_and_the_rest_are_a_partition(digits):
    parts = [data.select_classes(digits, classes) for classes in (range(6), range(6, 10))]
    assert sum(map(len, parts)) == len(digits)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "one or more distinct labels"),
        ((1, 1), "distinct"),
        ((3, 10), r"0, \.\.\., 9"),
        ((-1,), r"0, \.\.\., 9"),
        ((0.7,), "each an integer"),
    ],
)
def test_select_classes_refuses(digits, classes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        data.select_classes(digits, classes)


def test_a_class_without_images_is_named():
    few = data.load("digits", "test[:3]")
    absent = sorted(set(range(10)) - set(few.arrays().label.tolist()))
    with pytest.raises(ValueError, match=rf"\[{absent[0]}\] have none"):
        data.select_classes(few, [absent[0]])


def test_match_images_shrinks_by_averages():
    noise = data.synthetic("uniform_noise", (8, 6, 1), 3)
    small = data.match_images(noise, (4, 3, 1)).arrays().image
    blocks = noise.arrays().image.reshape(3, 4, 2, 3, 2, 1).mean((2, 4))
    np.testing.assert_allclose(small, blocks, atol=1.01 / 255)  # Pillow rounds once for each axis


def test_match_images_grey_colour_and_inverted():
    colour = data.synthetic("uniform_noise", (5, 5, 3), 2)
    grey = data.match_images(colour, (5, 5, 1)).arrays().image
    luma = colour.arrays().image @ np.float32([0.299, 0.587, 0.114])
    np.testing.assert_allclose(grey[..., 0], luma, atol=1.01 / 255)
    again = data.match_images(data.match_images(colour, (5, 5, 1)), (5, 5, 3)).arrays().image
    np.testing.assert_array_equal(again, np.repeat(grey, 3, -1))
    inverted = data.match_images(colour, (5, 5, 3), invert=True).arrays().image
    np.testing.assert_allclose(inverted, 1 - colour.arrays().image, atol=1e-6)
    assert data.match_images(colour, (5, 5, 3)) is colour


def test_match_images_scales_other_whites(digits):
    assert digits.white == 16
    large = data.match_images(digits, (16, 16, 1))
    assert large.arrays().image.shape == (200, 16, 16, 1)
    np.testing.assert_allclose(large.arrays().image.mean(), digits.arrays().image.mean(), atol=0.01)


def test_match_images_refuses(digits):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        data.match_images(digits, (8, 8, 2))
    with pytest.raises(ValueError, match="each at least 1, got .0, 8, 1"):
        data.match_images(digits, (0, 8, 1))


def test_permuted_pixels_are_the_same_pixels(digits):
    permuted = data.permute_pixels(digits, seed=1)
    images, originals = permuted.arrays().image, digits.arrays().image
    assert not np.array_equal(images, originals)
    np.testing.assert_array_equal(np.sort(images.reshape(200, -1)), np.sort(originals.reshape(200, -1)))
    np.testing.assert_array_equal(permuted[[17, 3]].image, images[[17, 3]])  # whatever is read with them
    places = np.argsort(images[:2].reshape(2, -1), kind="stable")
    assert not np.array_equal(*places)
    assert not np.array_equal(data.permute_pixels(digits, seed=2).arrays().image, images)


@pytest.mark.parametrize("name", ["uniform_noise", "gaussian_noise", "textures"])
def test_synthetic_images_depend_on_seed_and_position_alone(name):
    made = data.synthetic(name, (8, 8, 3), 50)
    images = made.arrays().image
    assert images.shape == (50, 8, 8, 3)
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(made[[40, 2]].image, images[[40, 2]])
    np.testing.assert_array_equal(data.synthetic(name, (8, 8, 3), 60)[:50].image, images)
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    assert not np.array_equal(data.synthetic(name, (8, 8, 3), 50, seed=1).arrays().image, images)


def test_synthetic_moments():
    uniform = data.synthetic("uniform_noise", (16, 16, 1), 100).arrays().image
    np.testing.assert_allclose([uniform.mean(), uniform.std()], [0.5, 12**-0.5], atol=0.01)
    normal = data.synthetic("gaussian_noise", (16, 16, 1), 100).arrays().image
    np.testing.assert_allclose([normal.mean(), normal.std()], [0.5, 0.245], atol=0.01)


def test_textures_are_smooth():
    images = data.synthetic("textures", (64, 64, 1), 20).arrays().image
    steps = np.abs(np.diff(images, axis=2))
    assert steps.max() < 0.5 * 2 * np.pi * 8 / 64 + 1 / 255  # the steepest wave: 8 periods over 64 pixels


def test_synthetic_refuses():
    with pytest.raises(ValueError, match="name must be one of uniform_noise, gaussian_noise, textures, got 'stripes'"):
        data.synthetic("stripes", (8, 8, 1), 5)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        data.synthetic("textures", (8, 8, 1), 0)
