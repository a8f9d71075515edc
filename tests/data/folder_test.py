"""Folders of image files."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from robustjax import data

GREY = np.random.RandomState(0).randint(0, 256, (12, 6, 5)).astype(np.uint8)


def save(path: pathlib.Path, picture, **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(path, format="JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG", **settings)


@pytest.fixture
def pets(tmp_path):
    """Twelve grey images of the classes cat and dog, in turn."""
    for i, picture in enumerate(GREY):
        save(tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i:02}.{'PNG' if i % 3 else 'png'}", picture)
    (tmp_path / "pets" / "dog" / "notes.txt").touch()
    (tmp_path / "pets" / ".hidden").mkdir()
    return tmp_path / "pets"


def test_sub_folders_are_classes_and_files_are_sorted(pets):
    dataset = data.from_folder(pets)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    np.testing.assert_array_equal(dataset[:].image[..., 0], GREY[order] / np.float32(255))
    assert dataset[:].label.tolist() == [0] * 6 + [1] * 6
    assert (dataset.class_names, dataset.num_classes, dataset.image_shape) == (("cat", "dog"), 2, (6, 5, 1))
    assert dataset.name == f"folder:{pets}"
    assert data.select_classes(dataset, [1]).class_names == ("dog",)
    turned = data.from_folder(pets, class_names=["dog", "cow", "cat"])
    assert turned[:].label.tolist() == [0] * 6 + [2] * 6


def test_only_the_images_asked_for_are_decoded(pets, monkeypatch):
    dataset, opened, real = data.from_folder(pets), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real(*args))
    dataset[[3, 1]]
    assert len(opened) == 2


def test_a_folder_is_split_by_one_fixed_permutation(pets):
    whole, order = data.from_folder(pets)[:], np.random.RandomState(0).permutation(12)
    for split, rows in [("train", order[:9]), ("test", order[9:]), ("all", order), ("train[-2:]", order[7:9])]:
        part = data.load(f"folder:{pets}", split)
        np.testing.assert_array_equal(part[:].image, whole.image[rows])
        np.testing.assert_array_equal(part[:].label, whole.label[rows])
        assert part.class_names == ("cat", "dog")


def test_a_folder_with_splits_keeps_them(tmp_path):
    for i, picture in enumerate(GREY):
        save(tmp_path / ("val" if i > 8 else "train") / "abc"[i % 3] / f"{i:02}.png", picture)
    (tmp_path / "val" / "a" / "09.png").unlink()
    (tmp_path / "val" / "a").rmdir()
    name = f"folder:{tmp_path}"
    assert len(data.load(name, "train")) == 9
    validation = data.load(name, "val")
    assert validation[:].label.tolist() == [1, 2]  # as in the training images
    assert validation.class_names == ("a", "b", "c")
    assert data.splits(name).test == "val"
    assert len(data.load(name, "all")) == 11
    with pytest.raises(ValueError, match=r"with the splits train, val: pass '.*train', or data.load\('folder:"):
        data.from_folder(tmp_path)
    save(tmp_path / "val" / "bb" / "1.png", GREY[0])
    with pytest.raises(ValueError, match=r"got .*/val/bb, which is none of the 3 classes a, b, c"):
        data.load(name, "train")


def test_a_class_may_be_called_train(tmp_path):
    for name in ("plane", "train"):
        save(tmp_path / name / "1.png", GREY[0])
    assert data.from_folder(tmp_path).class_names == ("plane", "train")


def test_image_size_crops_as_for_prepared_data_sets(tmp_path, write_dataset):
    images = [np.random.RandomState(i).randint(0, 256, (9 + 4 * i, 12, 3)).astype(np.uint8) for i in range(3)]
    write_dataset(tmp_path / "mine", {"train": images}, shape=(None, None, 3))
    for i, image in enumerate(images):
        save(tmp_path / "own" / "abc"[i] / "1.png", image)
    theirs = data.load("mine", "train", tmp_path, image_size=8)
    np.testing.assert_array_equal(data.from_folder(tmp_path / "own", image_size=8)[:].image, theirs[:].image)
    with pytest.raises(ValueError, match=r"image_size=224: .*b/1.png has 13x12 pixels, .*a/1.png has 9x12"):
        data.from_folder(tmp_path / "own")
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        data.from_folder(tmp_path / "own", image_size=0)


def test_colour_in_one_image_makes_all_colour(tmp_path):
    save(tmp_path / "a" / "1.png", GREY[0])
    save(tmp_path / "a" / "2.png", np.stack([GREY[1], GREY[2], GREY[3]], axis=-1))
    dataset = data.from_folder(tmp_path)
    np.testing.assert_array_equal(np.rint(dataset[0].image * 255), np.repeat(GREY[0][..., None], 3, axis=-1))
    np.testing.assert_array_equal(np.rint(dataset[1].image[..., 2] * 255), GREY[3])
    assert data.from_folder(tmp_path, channels=1).image_shape == (6, 5, 1)
    with pytest.raises(ValueError, match="channels must be 1 or 3"):
        data.from_folder(tmp_path, channels=4)


def test_colour_that_was_not_looked_at_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(data._folder, "_LOOKED_AT", 1)
    save(tmp_path / "a" / "1.png", GREY[0])
    save(tmp_path / "a" / "2.png", np.stack([GREY[1]] * 3, axis=-1))
    dataset = data.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"channels must be given where few images are in colour, as .*2.png is"):
        dataset[1]


def test_palettes_opaque_alpha_and_turned_photos_are_what_they_show(tmp_path):
    colours = np.repeat(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8), 8, 0)
    colours = np.repeat(colours, 8, 1)
    save(tmp_path / "a" / "1.png", Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE))
    save(tmp_path / "a" / "2.png", np.concatenate([colours, np.full((16, 16, 1), 255, np.uint8)], axis=-1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright after 90 degrees clockwise
    save(tmp_path / "a" / "3.JPG", np.rot90(colours), exif=exif, quality=100, subsampling=0)
    for image in data.from_folder(tmp_path)[:].image:
        np.testing.assert_allclose(image * 255, colours, atol=3)


def damaged(path):
    save(path, GREY[0])
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged, "1.png must be an image, but it is damaged: "),
        (lambda path: path.write_text("text"), "1.png must be an image, but Pillow knows none that begins as it does."),
        (lambda path: path.touch(), "1.png must be an image"),
        (lambda path: save(path, GREY[0].astype(np.uint16)), "1.png must have 8 bits per channel, got the mode I;16"),
        (
            lambda path: save(path, np.full((6, 5, 4), 9, np.uint8)),
            "1.png must be opaque, got pixels of alpha 9 of 255",
        ),
        (
            lambda path: save(path, Image.fromarray(np.zeros((6, 5), np.uint8)).convert("P"), transparency=0),
            "1.png must be opaque, got pixels of alpha 0 of 255",
        ),
    ],
)
def test_an_image_that_cannot_be_shown_is_named(tmp_path, write, message):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=re.escape(message)):
        data.from_folder(tmp_path)


def test_an_image_that_is_damaged_later_is_named_when_it_is_read(pets):
    dataset = data.from_folder(pets)
    damaged(pets / "cat" / "02.PNG")
    with pytest.raises(ValueError, match=r"cat/02.PNG must be an image, but it is damaged"):
        dataset.arrays()


def test_a_folder_without_images_says_what_was_found(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="without sub-folders, with nothing in it."):
        data.from_folder(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=re.escape("without sub-folders, with 1 other files or folders (a.png).")):
        data.from_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    for name in ("1.webp", "2.gif"):
        (tmp_path / "cat" / name).touch()
    with pytest.raises(ValueError, match=re.escape("cat with 2 other files or folders (1.webp, 2.gif).")):
        data.from_folder(tmp_path)
    with pytest.raises(ValueError, match="got the file"):
        data.from_folder(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        data.from_folder(tmp_path / "absent")


def test_the_home_folder_is_expanded(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    assert len(data.from_folder("~/pets")) == len(data.load("folder:~/pets", "all")) == 12


def test_unknown_names_suggest_the_data_that_are_there(pets, tmp_path):
    with pytest.raises(ValueError, match=f"{pets}/VERSION/dataset_info.json was looked for. .* pass folder:{pets}."):
        data.load("pets", "train", tmp_path)
    with pytest.raises(ValueError, match="Did you mean pets"):
        data.load("petz", "train", tmp_path)
    with pytest.raises(ValueError, match=f"got '{pets}'. For the images in {pets} pass folder:{pets}."):
        data.load(str(pets), "train", tmp_path)
    np.savez(tmp_path / "mine.npz", images=GREY, labels=np.zeros(12, int))
    with pytest.raises(ValueError, match=f"For that file pass arrays:{tmp_path}/mine.npz."):
        data.load(f"{tmp_path}/mine.npz", "train", tmp_path)


def test_data_that_are_not_of_tfds_import_none_of_it(pets, tmp_path):
    np.savez(tmp_path / "mine.npz", images=GREY, labels=np.zeros(12, int))
    code = (
        "import sys\n"
        "from robustjax import data\n"
        "for name in ['digits', *sys.argv[1:]]:\n"
        "    next(data.batches(data.load(name, 'train[:90%]+test'), 4, seed=0))\n"
        "assert not [name for name in sys.modules if name.startswith(('tensorflow', 'torch', 'sklearn'))]\n"
    )
    names = [f"arrays:{tmp_path}/mine.npz", f"folder:{pets}"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
