import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustjax import data

TRAIN, TEST = 1297, 500
HALVES = [("train[:90%]", "train[90%:]"), ("train[:100]", "train[100:]"), ("train[:-7]", "train[-7:]")]


def test_digits_are_those_of_scikit_learn_in_one_fixed_order():
    import sklearn.datasets  # here, as importing it takes seconds

    bunch = sklearn.datasets.load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for split, chosen in [("train", order[:TRAIN]), ("test", order[TRAIN:])]:
        dataset = data.load("digits", split)
        batch = dataset.arrays()
        np.testing.assert_array_equal(batch.image[..., 0], bunch.images[chosen] / 16)
        np.testing.assert_array_equal(batch.label, bunch.target[chosen])
        np.testing.assert_array_equal(batch.id, np.arange(len(chosen)))
        assert (len(dataset), dataset.image_shape, dataset.num_classes) == (len(chosen), (8, 8, 1), 10)
        assert [field.dtype for field in batch] == [np.float32, np.int32, np.int32]
        assert batch.image.min() == 0
        assert batch.image.max() == 1


@pytest.mark.parametrize(("left", "right"), HALVES)
def test_complementary_slices_of_digits_partition_the_split(left, right):
    whole, parts = data.load("digits", "train").arrays(), [data.load("digits", part).arrays() for part in (left, right)]
    np.testing.assert_array_equal(np.concatenate([part.image for part in parts]), whole.image)
    np.testing.assert_array_equal(np.concatenate([part.label for part in parts]), whole.label)


@pytest.mark.parametrize(
    ("left", "right"), [("train[:90%]", "train[90%:]"), ("train[:11]", "train[11:]"), ("train", "test")]
)
def test_sums_of_splits_are_concatenations(tiny, left, right):
    for name, data_dir in [("digits", None), ("tiny", tiny[0])]:
        parts = [data.load(name, part, data_dir).arrays() for part in (left, right)]
        joined = data.load(name, f"{left}+{right}", data_dir).arrays()
        np.testing.assert_array_equal(joined.image, np.concatenate([part.image for part in parts]))
        np.testing.assert_array_equal(joined.id, np.arange(len(joined.label)))


@given(percent=st.integers(1, 99))
@settings(max_examples=20, deadline=None)
def test_percentages_round_to_the_nearest_image(percent):
    assert len(data.load("digits", f"train[:{percent}%]")) == round(TRAIN * percent / 100)


def test_all_is_every_split():
    assert len(data.load("digits", "all")) == TRAIN + TEST


@pytest.mark.parametrize("name", ["tiny", "tiny:1.0.0", "tiny:1.*.*"])
def test_tfds_images_are_read_exactly(tiny, name):
    data_dir, images = tiny
    for split, stored in images.items():
        dataset = data.load(name, split, data_dir)
        batch = dataset.arrays()
        np.testing.assert_array_equal(batch.image, stored.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(batch.label, np.arange(len(stored)) % 3)
        assert (len(dataset), dataset.image_shape, dataset.num_classes) == (len(stored), (6, 5, 3), 3)
        assert [field.dtype for field in batch] == [np.float32, np.int32, np.int32]


def test_the_newest_version_is_read_unless_one_is_named(tmp_path, write_dataset):
    for version, value in [("1.0.0", 1), ("1.2.0", 2), ("1.10.0", 3)]:
        write_dataset(tmp_path / "mine", {"train": [np.full((2, 2, 1), value, np.uint8)]}, version=version)
    values = {name: round(255 * data.load(name, "train", tmp_path)[0].image.item(0)) for name in ("mine", "mine:1.2.0")}
    assert values == {"mine": 3, "mine:1.2.0": 2}


def test_a_configuration_is_a_part_of_the_name(tmp_path, write_dataset):
    write_dataset(tmp_path / "corrupted" / "fog", {"test": [np.full((2, 2, 1), 51, np.uint8)]})
    info = tmp_path / "corrupted" / "fog" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "fog"', '"name": "corrupted", "configName": "fog"'))
    for path in info.parent.glob("fog-*"):
        path.rename(path.with_name(path.name.replace("fog-", "corrupted-")))
    assert data.load("corrupted/fog", "test", tmp_path)[0].image.item(0) == np.float32(0.2)


def test_plain_integer_labels_name_no_classes(tmp_path, write_dataset):
    write_dataset(tmp_path / "mine", {"train": [np.zeros((2, 2, 1), np.uint8)] * 5}, num_classes=None)
    dataset = data.load("mine", "train", tmp_path)
    assert dataset.num_classes == 0
    assert dataset.arrays().label.tolist() == [0, 1, 2, 0, 1]


def test_data_dir_defaults_to_the_environment_then_to_the_home_folder(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", tiny[0])
    assert len(data.load("tiny", "train")) == 30
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"mnist is not prepared in {tmp_path}/tensorflow_datasets.")):
        data.load("mnist", "train")


def test_indexing_follows_numpy(tiny):
    for dataset in (data.load("tiny", "train", tiny[0]), data.load("digits", "test")):
        whole = dataset.arrays()
        mask = np.arange(len(dataset)) % 7 == 3
        for index in [3, -1, np.int64(5), slice(2, 20, 3), [4, 4, -2], np.array([[1, 2]])[0], mask, slice(0, 0)]:
            got = dataset[index]
            for mine, theirs in zip(got, whole, strict=True):
                np.testing.assert_array_equal(mine, theirs[index])
        with pytest.raises(IndexError, match=f"index {len(dataset)} is out of bounds"):
            dataset[len(dataset)]


def test_only_the_images_asked_for_are_decoded(tiny, monkeypatch):
    from PIL import Image

    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real(*args))
    dataset = data.load("tiny", "train", tiny[0])
    assert len(opened) == 0
    dataset[[3, 1, 4]]
    assert len(opened) == 3
    cached = dataset.cached()
    assert len(opened) == 33
    cached.arrays()
    assert len(opened) == 33


def test_cached_is_identical_and_needs_no_file(tiny, tmp_path):
    shutil.copytree(tiny[0], tmp_path / "copy")
    dataset = data.load("tiny", "train[5:]", tmp_path / "copy")
    whole, cached = dataset.arrays(), dataset.cached()
    shutil.rmtree(tmp_path / "copy")
    for index in (slice(None), [3, 9], 7):
        for mine, theirs in zip(cached[index], whole, strict=True):
            np.testing.assert_array_equal(mine, theirs[index])
    assert (cached.name, cached.split, len(cached)) == (dataset.name, dataset.split, len(dataset))


def test_image_size_crops_the_centre_of_the_resized_image(tmp_path, write_dataset):
    random = np.random.RandomState(0)
    wide = random.randint(0, 256, (256, 512, 3)).astype(np.uint8)  # shorter side 256 already: the crop alone remains
    flat = np.full((70, 50, 3), 93, np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 101).astype(np.uint8)[:, None, None], (101, 60, 3))
    write_dataset(tmp_path / "mine", {"train": [wide, flat, np.ascontiguousarray(ramp)]}, shape=(None, None, 3))
    dataset = data.load("mine", "train", tmp_path, image_size=224)
    image = np.round(dataset.arrays().image * 255)
    assert dataset.image_shape == (224, 224, 3)
    np.testing.assert_array_equal(image[0], wide[16:240, 144:368])
    assert (image[1] == 93).all()
    # 101 rows become 256 * 101 // 60 = 430, of which the middle 224 stay; a ramp stays a ramp.
    expected = (np.arange(224) + 103 + 0.5) / 430 * 101 - 0.5
    np.testing.assert_allclose(image[2].mean((1, 2)), expected * 2.55, atol=1.5)  # rounded to integers twice


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_image_size_holds_for_every_size(tmp_path, write_dataset, size):
    images = [np.zeros((3, 50, 1), np.uint8), np.zeros((9, 8, 1), np.uint8)]
    write_dataset(tmp_path / "mine", {"train": images}, shape=(None, None, 1))
    assert data.load("mine", "train", tmp_path, image_size=size).arrays().image.shape == (2, size, size, 1)


@pytest.mark.parametrize(("name", "height"), [("imagenet2012", 224), ("dtd", 224), ("imagenet_a", 9)])
def test_a_size_that_is_agreed_on_is_the_default_where_images_differ_in_size(tmp_path, write_dataset, name, height):
    same = name == "imagenet_a"  # which are left as they are
    write_dataset(tmp_path / name, {"train": [np.zeros((9, 8, 3), np.uint8)]}, shape=None if same else (None, None, 3))
    for asked, wanted in ((None, height), (6, 6)):
        dataset = data.load(name, "train", tmp_path, image_size=asked)
        assert dataset.image_shape[0] == dataset.arrays().image.shape[1] == wanted


def test_reading_says_nothing_and_imports_no_tensorflow(tiny):
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from robustjax import data\n"
        "for dataset in (data.load('tiny', 'train', sys.argv[1]), data.load('digits', 'train')):\n"
        "    next(data.batches(dataset, 8, seed=0))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'tensorflow']\n"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, tiny[0]], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unknown_name_is_refused_with_the_nearest_ones(tiny):
    with pytest.raises(ValueError, match=r"Unknown data set 'mnits': .* Did you mean mnist"):
        data.load("mnits", "train", tiny[0])
    with pytest.raises(ValueError, match="Did you mean digits"):
        data.load("digit", "train", tiny[0])


@given(name=st.text(max_size=12).filter(lambda name: not name.isidentifier()))
@settings(max_examples=25, deadline=None)
def test_every_malformed_name_is_one_clear_error(tiny, name):
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"^(name must look like|Unknown data set|.* is not prep)"
    ):
        data.load(name, "train", tiny[0])


@pytest.mark.parametrize("name", ["mnist", "mnist:9.9.9", "cifar10_corrupted/fog_1", "tiny:9.9.9"])
def test_a_data_set_that_is_not_prepared_says_how_to_prepare_it(tiny, name):
    if name == "tiny:9.9.9":
        with pytest.raises(
            ValueError, match=re.escape(f"{tiny[0]}/tiny/9.9.9/dataset_info.json was looked for and 1.0.0 found.")
        ):
            data.load(name, "train", tiny[0])
        return
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, "train", tiny[0])
    assert f"{name} is not prepared in {tiny[0]}" in str(error.value)
    assert f"`python -m robustjax.data.prepare {name} --data-dir {tiny[0]}`" in str(error.value)
    assert '`pip install "robustjax[tfds]"`' in str(error.value)


def test_a_data_dir_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ValueError, match=re.escape(f"data_dir must be a folder, got '{path}'.")):
            data.load("mnist", "train", path)


@pytest.mark.parametrize("name", ["digits", "tiny"])
@pytest.mark.parametrize(
    "split", ["val", "train[", "train[5]", "train[:101%]", "train[:5000]", "", "+", "all[:3]", "train[a:]"]
)
def test_a_bad_split_is_refused_with_the_splits_there_are(tiny, name, split):
    with pytest.raises(ValueError) as error:
        data.load(name, split, tiny[0])
    has = {"digits": "digits has train (1,297 images), test (500 images)."}.get(
        name, "tiny has train (30 images), test (10 images)."
    )
    assert f"got {split!r}: " in str(error.value)
    assert str(error.value).endswith(has)


@given(split=st.one_of(st.text(max_size=12), st.from_regex(r"train\[[-0-9%:._a-z]{0,8}\](\+test)?", fullmatch=True)))
@settings(max_examples=200, deadline=None)
def test_every_split_is_read_or_refused_with_one_clear_error(split):
    try:
        dataset = data.load("digits", split)
    except ValueError as error:
        assert str(error).startswith("split must ")  # noqa: PT017
        assert str(error).endswith("digits has train (1,297 images), test (500 images).")  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert len(dataset.arrays().label) == len(dataset) > 0


@pytest.mark.parametrize("split", ["train[:0]", "train[20:10]", "train[:0]+test", "train[30:]"])
def test_an_empty_split_is_refused(tiny, split):
    with pytest.raises(ValueError, match=re.escape(f"must hold at least one image, got {split!r}, which is empty")):
        data.load("tiny", split, tiny[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keys": ("picture", "label")},
            "features image (Image) and label (an integer), got label (ClassLabel), picture (Image).",
        ),
        (
            {"keys": ("image", "target")},
            "features image (Image) and label (an integer), got image (Image), target (ClassLabel).",
        ),
        ({"dtype": "uint16"}, "The images of mine must be uint8 with 1, 3 or 4 channels, got Image(shape=(4, 4, 1)"),
        ({"shape": (None, None, 1)}, "The images of mine differ in size: pass image_size"),
        ({"file_format": "tfrecord"}, "as tfrecord, which has no random access: delete that folder"),
    ],
)
def test_data_sets_of_another_kind_are_refused(tmp_path, write_dataset, settings, message):
    write_dataset(tmp_path / "mine", {"train": [np.zeros((4, 4, 1), np.uint8)]}, **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load("mine", "train", tmp_path)


def test_an_image_that_is_stored_as_numbers_is_refused(tmp_path, write_dataset):
    write_dataset(tmp_path / "mine", {"train": [np.zeros((4, 4, 1), np.uint8)]})
    path = tmp_path / "mine" / "1.0.0" / "features.json"
    path.write_text(
        re.sub(
            r'"image": {"image".*?image_feature.Image"}',
            '"image": {"tensor": {"dtype": "uint8", '
            '"encoding": "none", "shape": {"dimensions": ["4"]}}, '
            '"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor"}',
            path.read_text(),
        )
    )
    with pytest.raises(ValueError, match=re.escape("got image (Tensor), label (ClassLabel).")):
        data.load("mine", "train", tmp_path)


def test_a_missing_file_is_named(tmp_path, write_dataset):
    write_dataset(tmp_path / "mine", {"train": [np.zeros((4, 4, 1), np.uint8)]})
    path = next((tmp_path / "mine" / "1.0.0").glob("mine-train*"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path} is missing: prepare mine again with ")):
        data.load("mine", "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("tiny", 0, "image_size must be at least 1, got 0."),
        ("digits", 32, "image_size must be None for digits, whose images are 8x8, got 32."),
    ],
)
def test_a_bad_image_size_is_refused(tiny, name, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        data.load(name, "train", tiny[0], image_size=size)


@pytest.mark.slow
@pytest.mark.data
def test_real_mnist_has_its_published_counts(data_dir):
    counts = np.bincount(data.load("mnist", "train", data_dir).arrays().label)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert len(data.load("mnist", "test", data_dir)) == 10_000


@pytest.mark.slow
@pytest.mark.data
def test_real_cifar10_has_its_published_counts(data_dir):
    train, test = data.load("cifar10", "train", data_dir), data.load("cifar10", "test", data_dir)
    assert (len(train), train.image_shape, train.num_classes) == (50_000, (32, 32, 3), 10)
    assert np.bincount(test.arrays().label).tolist() == [1000] * 10
    measured = np.mean(train[::50].image, axis=(0, 1, 2))
    np.testing.assert_allclose(measured, data.channel_statistics(train).mean, atol=0.015)  # 1,000 images, sd 0.25


@pytest.mark.data
@pytest.mark.parametrize("split", ["train[:5%]", pytest.param("train", marks=pytest.mark.slow)])
def test_streaming_keeps_neither_epochs_nor_the_data_set_in_memory(data_dir, split):
    code = (
        "import resource, sys\n"
        "from robustjax import data\n"
        "dataset = data.load('cifar10', sys.argv[2], sys.argv[1])\n"
        "batches = data.batches(dataset, 100, seed=0, num_epochs=2)\n"
        "def read(n):\n"
        "    for _ in range(n): next(batches)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "per_epoch = len(dataset) // 100\n"
        "print(read(1), read(per_epoch - 1), read(per_epoch))\n"
    )
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, data_dir, split], cwd=root, capture_output=True, text=True, check=True
    )
    start, first, second = map(float, done.stdout.split())  # peak MiB after one batch, one epoch, two epochs
    decoded = {"train": 586, "train[:5%]": 29.3}[split]
    assert second - first < 4
    assert second - start < max(0.1 * decoded, 30)
