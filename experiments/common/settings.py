"""Settings that many experiments share, once: a ``Config`` inherits them; on the command line they are flat.

To change a default, a ``Config`` repeats the field without its docstring; its place and help stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from robustjax import _paths, data

from . import checks, folders, images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """A data set."""

    dataset: str = "digits"
    """digits, a prepared TFDS data set, arrays:FILE.npz (images, labels) or folder:PATH (a folder for each class)."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. None: $TFDS_DATA_DIR, else TFDS's default folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits(Data):
    """Its images for training and for testing."""

    train_split: str = "train"
    """Images to train on, in TFDS syntax. To choose settings: 'train[:80%]' here, 'train[80%:]' in --test-split."""
    test_split: str | None = None
    """Images to test on, in TFDS syntax. None: the test split of the data set."""

    def images(self) -> tuple[data.Dataset, data.Dataset]:
        """Images to train on and images to test on, of an ``image_size``; as a ``checkpoint`` knows them, if given.

        Raises:
          ValueError: the checkpoint belongs to another data set or model, or one of these cannot be opened.
        """
        checkpoint, size = getattr(self, "checkpoint", None), getattr(self, "image_size", None)
        theirs: dict[str, Any] = {}
        if checkpoint is not None:
            theirs = folders.settings_of(checkpoint, dataset=self.dataset, model=getattr(self, "model", None))
        # A model normalises by the statistics of the images on which it was trained.
        with checks.renamed("name", "dataset"):
            splits = theirs.get("train_split", self.train_split), self.test_split or data.splits(self.dataset).test
            train, test = (images.opened(self.dataset, split, self.data_dir, size) for split in splits)
        if theirs.get("classes"):
            train, test = (data.select_classes(part, theirs["classes"]) for part in (train, test))
        return train, test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Data):
    """A classifier of its images."""

    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50.
    MODULE:FUNCTION: a trained model of yours, which FUNCTION() returns; see experiments.evaluate."""
    num_epochs: int | None = None
    """Passes over the training images. None: as in the recipe."""

    def __post_init__(self):
        checks.at_least(1, self, "num_epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Model):
    """The same, trained by a recipe."""

    recipe: str | None = None
    """Training recipe: digits, mnist, mnist_short, cohen_cifar10 or cohen_imagenet. None: the data set's recipe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product(Training):
    """The same, or a model of another run; and the run folder."""

    checkpoint: str | None = None
    """Run folder of another experiment on the same data set. Its model is used; nothing is trained."""
    results_dir: str = "results"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run folder. None: composed of the data set, the model and other settings."""
    overwrite: bool = False
    """Delete the run in the folder and start again."""
    image_size: int | None = None
    """Resize images to N x N pixels; those of folder:PATH to 256/224 of it, then crop the centre. None: keep their
    size."""
    figure_format: Literal["png", "pdf"] = "png"
    """File format of figures."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "image_size")
        if self.checkpoint is not None and is_own(self.model):
            raise ValueError(f"checkpoint cannot be combined with a model of your own, got {self.model}.")

    def without_effect(self, *names: str) -> None:
        """Raises ValueError for settings of a training that are given with a model that is trained already."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        if self.is_trained and given:
            raise ValueError(
                f"{', '.join(given)} cannot be combined with checkpoint or a model of your own, which is trained."
            )

    @property
    def data_name(self) -> str:
        """The data set and the size of its images, for the name of a run folder."""
        return images.short(self.dataset) + ("" if self.image_size is None else f"-{self.image_size}px")

    @property
    def model_name(self) -> str:
        """The model in the name of a folder."""
        return self.model.translate(images.UNSAFE)

    @property
    def is_trained(self) -> bool:
        """Whether the model comes from another run or from the user, so that nothing is trained."""
        return self.checkpoint is not None or is_own(self.model)

    @property
    def origin(self) -> str:
        """The name of the run folder of the checkpoint."""
        return _paths.path_of(checkpoint=self.checkpoint).resolve().name


def is_own(model: str) -> bool:
    """Whether the name of a model is MODULE:FUNCTION, a user's own."""
    return ":" in model


def shared(config: Any, other: type) -> dict[str, Any]:
    """The settings of ``config`` that another ``Config`` has, too, by name."""
    names = {field.name for field in dataclasses.fields(other)}
    return {name: value for name, value in vars(config).items() if name in names}
