"""ImageNet end to end, on a stand-in in TFDS's format: pictures of several sizes, 1000 classes, larger than memory."""

import dataclasses
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from experiments import smoothing
from experiments.common import certificates, classifiers, runtimes
from robustjax import data, training
from robustjax.data import _conventions

ROOT = pathlib.Path(__file__).parents[3]
SHAPES = ((20, 30, 3), (33, 24, 3), (48, 48, 3))
write = runpy.run_path(str(ROOT / "tests" / "data" / "conftest.py"))["write"]


def stand_in(folder: pathlib.Path, *, train: int, validation: int) -> str:
    """Writes that many pictures; returns the data_dir."""
    random = np.random.RandomState(0)
    some = [random.randint(0, 256, shape).astype(np.uint8) for shape in SHAPES]
    splits = {name: [some[i % 3] for i in range(n)] for name, n in [("train", train), ("validation", validation)]}
    return str(write(folder / "imagenet2012", splits, shape=(None, None, 3), num_classes=1000))


def test_its_images_have_the_size_of_its_models(tmp_path):
    dataset = data.load("imagenet2012", "train", stand_in(tmp_path, train=3, validation=1))
    assert dataset.image_shape == (224, 224, 3)
    assert dataset.num_classes == 1000
    assert data.load("imagenet2012:1.*.*", "train", tmp_path, image_size=64).image_shape == (64, 64, 3)


def test_smoothing_goes_all_the_way_and_never_reads_more_than_a_batch(tmp_path, monkeypatch):
    read, real = {"train": [], "validation": []}, data.load

    def load(name, split, data_dir):
        dataset = real(name, split, data_dir)
        noting = lambda ids: read[split].append(len(ids)) or dataset.read(ids)
        return dataclasses.replace(dataset, read=noting)

    monkeypatch.setitem(_conventions._IMAGE_SIZES, "imagenet2012", 16)
    monkeypatch.setitem(
        training.RECIPES, "cohen_imagenet", dataclasses.replace(training.RECIPES["cohen_imagenet"], batch_size=8)
    )
    monkeypatch.setattr(classifiers, "CACHED_BYTES", 0)
    monkeypatch.setattr(classifiers, "BLOCK_BYTES", 2 * 4 * 16 * 16 * 3)
    monkeypatch.setattr(data, "load", load)
    config = smoothing.Config(
        dataset="imagenet2012",
        data_dir=stand_in(tmp_path, train=17, validation=201),
        model="mlp",
        skip=100,
        num_epochs=1,
        num_selection=10,
        num_estimation=20,
        batch_size=10,
        results_dir=str(tmp_path),
    )
    summary = smoothing.run(config, runtimes.Runtime(mesh="data=1"))
    ids, labels, *_ = certificates.read(config.folder())
    assert ids.tolist() == labels.tolist() == [0, 100, 200]
    assert summary["num_images"] == 3
    # To know the images again, one at a time; to train; to certify; for the standard accuracy, at most BLOCK_BYTES.
    assert set(read["train"]) == {1, 8}
    assert read["train"].count(1) == 4
    assert read["validation"] == [*[1] * 4, *[1] * 3, 2, 1]


# Prints the peak of this process's memory, in KiB on Linux, behind whatever the command prints. Training streams one
# picture at a time.
MEASURED = """
import atexit, dataclasses, resource, runpy
from experiments.common import classifiers
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
from robustjax import training
classifiers.CACHED_BYTES, classifiers.BLOCK_BYTES = 0, 8 * 4 * 224 * 224 * 3
training.RECIPES["cohen_imagenet"] = dataclasses.replace(training.RECIPES["cohen_imagenet"], batch_size=1)
runpy.run_module("experiments.smoothing", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """The command itself with ResNet-50 at 224 pixels; 8 certificates after 18 steps, then 32 after 36."""
    peak = {}
    for images, steps in ((8, 18), (32, 36)):
        folder = tmp_path / str(images)
        flags = "--dataset imagenet2012 --model resnet50 --skip 100 --num-epochs 1 --batch-size 8 --num-selection 1 "
        flags += f"--num-estimation 7 --alpha 0.05 --data-dir {stand_in(folder, train=steps, validation=100 * images)} "
        flags += f"--results-dir {folder}"
        command = [sys.executable, "-c", MEASURED, *flags.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(certificates.read(folder / "smoothing" / "imagenet2012-resnet50-0.25")[0]) == images
        peak[images] = int(re.search(r"peak (\d+)", done.stdout)[1]) / 2**20
    assert peak[8] < 8, peak
    assert peak[32] < 1.05 * peak[8] + 0.1, peak
