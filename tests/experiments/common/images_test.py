"""A user's own files and folders as data sets of the experiments."""

import pathlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from experiments import adversarial, ood, smoothing
from experiments.common import classifiers, foreign, images, settings
from robustjax import data


@pytest.fixture
def mine(tmp_path) -> pathlib.Path:
    pixels = np.arange(640).reshape(10, 8, 8).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=pixels, labels=np.arange(10) % 2)
    for i in range(4):
        path = tmp_path / "my pets" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6 + i, 9), 60 * i, np.uint8)).save(path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("mnist:3.0.1", "mnist-3.0.1"),
        ("cifar10_corrupted/fog_1", "cifar10_corrupted-fog_1"),
        ("arrays:/a/b c/mine.npz", "arrays-mine"),
        ("folder:gs://bucket/pets/", "folder-pets"),
        ("folder:a/../pets [1]", "folder-pets_1"),
    ],
)
def test_a_run_folder_is_named_after_the_end_of_a_path(name, short, tmp_path):
    assert images.short(name) == short
    for config, suffix in (
        (smoothing.Config, "-cnn-0.25"),
        (adversarial.Config, "-cnn-standard"),
        (ood.Config, "-cnn"),
    ):
        given = {"training": "standard", "epsilons": (0.1,)} if config is adversarial.Config else {}
        folder = config(dataset=name, results_dir=str(tmp_path), image_size=16, **given).folder()
        assert folder.name == f"{short}-16px{suffix}"


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("arrays:/x/a.npz", "arrays:/x/y/../a.npz", True),
        ("arrays:/x/a.npz@train", "arrays:/x/a.npz@test", False),
        ("arrays:/x/a.npz", "arrays:/x/b.npz", False),
        ("folder:/x@y/a@all", "folder:/x@y/a@train[:5]", True),
        ("folder:/x", "arrays:/x", False),
    ],
)
def test_which_files_and_folders_share_images(one, other, share, monkeypatch):
    monkeypatch.setattr(data, "splits", lambda name: data.Splits("train", "train", "test"))
    pair = [foreign.parsed(name) for name in (one, other)]
    assert foreign.overlap(*pair) == foreign.overlap(*pair[::-1]) == share


def test_the_split_follows_the_last_at_of_a_path():
    assert foreign.parsed("folder:/x@y/a@train[:5]") == ("folder:/x@y/a", "train[:5]")
    with pytest.raises(ValueError, match="must be NAME or NAME@SPLIT"):
        foreign.parsed("folder:/x@")


def test_images_of_a_folder_are_cropped_and_others_resized(mine):
    config = smoothing.Config(dataset=f"folder:{mine}/my pets", image_size=7)
    train, test = config.images()
    assert (len(train), len(test), train.image_shape) == (3, 1, (7, 7, 1))
    train, test = smoothing.Config(dataset=f"arrays:{mine}/mine.npz", image_size=4).images()
    assert (len(train), len(test), train.image_shape) == (8, 2, (4, 4, 1))
    with pytest.raises(ValueError, match="^image_size must be given where images differ in size"):
        settings.Splits(dataset=f"folder:{mine}/my pets").images()
    with pytest.raises(ValueError, match="^dataset must look like mnist.* pass arrays:"):
        settings.Splits(dataset=f"{mine}/mine.npz").images()


def test_own_sets_are_foreign_to_each_other(mine):
    sets = foreign.open_sets(
        f"arrays:{mine}/mine.npz", None, classes=(), near=(f"folder:{mine}/my pets@all",), far=("textures",),
        outliers=None, max_images=5, seed=0, image_size=6,
    )  # fmt: skip
    [of] = [found for name, found in sets.foreign.items() if name.startswith("folder")]
    assert (of.group, len(of.dataset), of.dataset.image_shape) == ("near", 4, (6, 6, 1))
    assert [len(part) for part in sets[:3]] == [7, 1, 2]


def test_a_run_is_bound_to_the_file_that_it_began_with(mine, tmp_path):
    folder, weights = epath.Path(tmp_path), [np.ones(3)]
    parts = lambda: [data.load(f"arrays:{mine}/mine.npz", split) for split in ("train", "test")]
    classifiers.keep_to(folder, weights, parts())
    classifiers.keep_to(folder, weights, parts())
    stored = dict(np.load(mine / "mine.npz"))
    np.savez(mine / "mine.npz", **stored | {"images": 255 - stored["images"]})
    with pytest.raises(ValueError, match="^dataset must hold the images that the run in .* began with"):
        classifiers.keep_to(folder, weights, parts())
