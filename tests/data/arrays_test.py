"""Images in memory and in npz files."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import data

LEVELS = np.random.RandomState(0).randint(0, 256, (12, 6, 5, 3)).astype(np.uint8)
UNIT = LEVELS.astype(np.float32) / np.float32(255)
LABELS = np.arange(12) % 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_floating_images_are_taken_as_they_are(dtype):
    dataset = data.from_arrays(UNIT.astype(dtype), LABELS)
    np.testing.assert_array_equal(dataset[:].image, UNIT.astype(dtype).astype(np.float32))
    assert dataset[0].image.dtype == dataset.cached()[:].image.dtype == np.float32
    np.testing.assert_array_equal(dataset.cached()[:].image, dataset[:].image)


def test_levels_are_divided_by_255_and_arrays_of_jax_are_taken():
    dataset = data.from_arrays(jnp.asarray(LEVELS), jnp.asarray(LABELS), name="mine", split="train")
    np.testing.assert_array_equal(dataset[:].image, UNIT)
    assert (dataset.name, dataset.split, dataset.num_classes, len(dataset)) == ("mine", "train", 3, 12)
    assert dataset[3].label == 0


def test_grey_images_get_a_channel_and_a_column_of_labels_is_read():
    dataset = data.from_arrays(LEVELS[..., 0], LABELS[:, None].astype(np.uint8), num_classes=7)
    np.testing.assert_array_equal(dataset[:].image, UNIT[..., :1])
    assert dataset.num_classes == 7
    assert dataset[:].label.tolist() == LABELS.tolist()


def test_everything_made_of_floating_images_equals_that_of_their_levels():
    """Views, statistics and batches of the same images, stored in both ways."""
    levels, unit = data.from_arrays(LEVELS, LABELS), data.from_arrays(UNIT, LABELS)
    for view in (
        lambda d: data.select_classes(d, [2, 0]),
        lambda d: data.permute_pixels(d, seed=1),
        lambda d: data.match_images(d, (6, 5, 3), invert=True),
    ):
        np.testing.assert_allclose(view(unit)[:].image, view(levels)[:].image, atol=1e-6)
        np.testing.assert_array_equal(view(unit)[:].label, view(levels)[:].label)
    for shape in ((3, 5, 3), (6, 5, 1), (9, 10, 3), (4, 4, 1)):  # levels are rounded after each of two steps
        one, other = (data.match_images(d, shape)[:].image for d in (unit, levels))
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1.6 / 255)
    grey = data.match_images(data.from_arrays(UNIT[..., :1], LABELS), (6, 5, 3))[:].image
    np.testing.assert_array_equal(grey, np.repeat(UNIT[..., :1], 3, axis=-1))
    batches = [next(data.batches(d, 4, seed=0)) for d in (unit, levels)]
    np.testing.assert_array_equal(batches[0].image, batches[1].image)
    joined = next(data.with_outliers(data.batches(unit, 4, seed=0), data.batches(levels, 4, seed=0)))
    np.testing.assert_array_equal(joined.image[:4], joined.image[4:])
    statistics = data.channel_statistics(unit)
    np.testing.assert_allclose(statistics, data.channel_statistics(levels), rtol=1e-6)
    np.testing.assert_allclose(statistics.mean, UNIT.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(statistics.std, UNIT.std((0, 1, 2)), rtol=1e-5)


def test_a_data_set_of_ones_own_reader_is_not_divided_when_it_is_floating():
    dataset = data.Dataset("mine", "all", 3, (6, 5, 3), 12, lambda ids: (UNIT[ids], LABELS[ids]))
    np.testing.assert_array_equal(dataset[:].image, UNIT)


def with_nan():
    images = UNIT.copy()
    images[[4, 7], 0, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (UNIT * 255, "images must lie in [0, 1] where they are floating, got values from 0 to 255: divide by 255."),
        (UNIT * 2 - 1, "got values from -1 to 1: undo the normalisation"),
        (with_nan(), "images must be finite, got NaN or infinite values in 2 images, the first at 4."),
        (np.moveaxis(LEVELS, -1, 1), "got (12, 3, 6, 5), whose channels come first: pass np.moveaxis(images, 1, -1)."),
        (LEVELS.astype(np.int64), "got int64 with values from 0 to 255: pass images.astype(np.uint8)."),
        (LEVELS.astype(np.uint16) * 257, "got uint16 with values from 0 to 65535: divide by the value of white."),
        (LEVELS > 128, "got bool: pass images.astype(np.float32)."),
        (LEVELS // 128, "images must reach 255 where they are white if they are uint8, got values from 0 to 1"),
        (LEVELS.reshape(12, -1), "got rows of shape (12, 90): a Dataset is of images"),
        (LEVELS[0, 0, 0], "got (3,)."),
        (LEVELS[:0], "images must hold at least one image of at least one pixel, got shape (0, 6, 5, 3)."),
        (LEVELS.astype(str), "floating in [0, 1], got <U3."),
    ],
)
def test_images_of_another_kind_are_refused(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.from_arrays(images, LABELS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3)[LABELS], "got shape (12, 3): if they are one-hot or probabilities, pass labels.argmax(-1)."),
        (LABELS[:5], "labels must be as many as images, got 5 labels and 12 images."),
        (LABELS - 1, "labels must be integers from 0, got -1."),
        (LABELS / 2, "labels must be integers, got float64"),
        (np.zeros((12, 2, 2), int), "labels must be integers (n,), got shape (12, 2, 2)."),
        (LABELS + 2, "labels must be 0 to 2 with num_classes=3, got 4."),
    ],
)
def test_labels_of_another_kind_are_refused(labels, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.from_arrays(LEVELS, labels, num_classes=3)


def test_a_file_of_one_set_is_split_by_one_fixed_permutation(tmp_path):
    np.savez(tmp_path / "mine.npz", images=LEVELS, labels=LABELS)
    name, order = f"arrays:{tmp_path}/mine.npz", np.random.RandomState(0).permutation(12)
    for split, rows in [("train", order[:9]), ("test", order[9:]), ("all", order), ("test[1:]+train[:50%]", None)]:
        rows = np.concatenate([order[10:], order[:4]]) if rows is None else rows
        dataset = data.load(name, split)
        np.testing.assert_array_equal(dataset[:].image, UNIT[rows])
        np.testing.assert_array_equal(dataset[:].label, LABELS[rows])
        assert (dataset.name, dataset.split, dataset.num_classes) == (name, split, 3)
    assert data.splits(name) == ("train[:90%]", "train[90%:]", "test")


@pytest.mark.parametrize("keys", ["{0}_{1}", "{2}_{0}"])
def test_a_file_with_splits_keeps_them(tmp_path, keys):
    arrays = {}
    for split, part in (("train", slice(0, 9)), ("test", slice(9, 11))):
        arrays[keys.format(split, "images", "x")] = UNIT[part, ..., 0]
        arrays[keys.format(split, "labels", "y")] = LABELS[part]
    np.savez_compressed(tmp_path / "mine.npz", **arrays)
    name = f"arrays:{tmp_path}/mine.npz"
    np.testing.assert_array_equal(data.load(name, "train")[:].image, UNIT[:9, ..., :1])
    np.testing.assert_array_equal(data.load(name, "all")[:].label, LABELS[:11])
    test = data.load(name, "test")
    assert (len(test), test.num_classes) == (2, 3)  # the classes of all splits


def test_a_validation_split_stands_in_for_a_missing_test_split(tmp_path):
    part = {"images": LEVELS, "labels": LABELS}
    np.savez(
        tmp_path / "mine.npz", **{f"{split}_{key}": array for split in ("train", "val") for key, array in part.items()}
    )
    assert data.splits(f"arrays:{tmp_path}/mine.npz").test == "val"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": LEVELS, "labels": LABELS}, "must hold the arrays images and labels, .*got pictures, labels"),
        ({"images": LEVELS, "labels": LABELS[:3]}, "mine.npz is not a data set: labels must be as many as images"),
        (
            {"images": LEVELS, "labels": LABELS.astype(object)},
            "must hold labels as numbers, but it cannot be read: Object",
        ),
        ({"images": UNIT * 255, "labels": LABELS}, "mine.npz is not a data set: images must lie in .* divide by 255"),
    ],
)
def test_a_file_without_a_data_set_says_what_it_holds(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(f"arrays:{tmp_path}/mine.npz", "train")


def test_what_is_no_npz_file_is_named(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", LEVELS)
    for name, error, message in [
        ("text.npz", ValueError, "text.npz must be an npz file"),
        ("one.npy", ValueError, "one.npy must be an npz file, as np.savez writes it, got a single array."),
        ("absent.npz", FileNotFoundError, "absent.npz does not exist"),
        ("", ValueError, "must be an npz file, as np.savez writes it, got a folder: folder:"),
    ]:
        with pytest.raises(error, match=message):
            data.load(f"arrays:{tmp_path}/{name}", "train")
    with pytest.raises(ValueError, match="name must be arrays:FILE.npz, got 'arrays:'."):
        data.load("arrays:", "train")
    np.savez(tmp_path / "mine.npz", images=LEVELS, labels=LABELS)
    with pytest.raises(ValueError, match="image_size must be None for arrays, got 4: data.match_images"):
        data.load(f"arrays:{tmp_path}/mine.npz", "train", image_size=4)
