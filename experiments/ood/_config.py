"""The settings of an out-of-distribution run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from etils import epath

from experiments.common import checks, detectors, folders, foreign

TRAINING = ("standard", "logit_norm", "mixup", "cutmix", "outlier_exposure", "energy_bounded")
NEED_OUTLIERS = ("outlier_exposure", "energy_bounded")
SAME = ("detectors", "seeds", "positive", "figure_detectors")
"""May differ when a run is resumed."""
# In names of files; the slices [:5], [5:], [:-5] and [:5%] keep four different names.
UNSAFE = str.maketrans({"/": "-", ":": "-", "[": "_", "]": "", "%": "pct", " ": ""})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run."""

    dataset: str = "digits"
    """In-distribution data: digits (embedded), or any prepared TFDS data set with images and labels."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets. None: $TFDS_DATA_DIR, else TFDS's default folder."""
    classes: tuple[int, ...] = ()
    """In-distribution labels; the other classes are the set held_out. Default: 0 to 5 for digits, else all."""
    open_set: int | None = None
    """Published open-set split 0 to 4 of mnist or cifar10, with six in-distribution classes, instead of --classes."""
    near: tuple[str, ...] = ()
    """Near out-of-distribution sets: held_out or TFDS names. Default: held_out if classes are left out.
    NAME is the test split; NAME@SPLIT another part in TFDS syntax, such as omniglot@small1 or mnist@train[:50%]."""
    far: tuple[str, ...] = ()
    """Far sets: textures, uniform_noise, gaussian_noise, permuted_pixels, NAME or NAME@SPLIT.
    Default: textures uniform_noise permuted_pixels."""
    detectors: tuple[str, ...] = ()
    """Detectors, combined with +, such as energy knn react+energy. Default: all of --list."""
    model: str = "cnn"
    """mlp, lenet, cnn, strided_cnn, resnet20, resnet56, resnet110, wide_resnet, resnet18 or resnet50."""
    recipe: str | None = None
    """Training recipe: digits, mnist, mnist_short, cohen_cifar10 or cohen_imagenet. None: the data set's recipe."""
    num_epochs: int | None = None
    """Passes over the training images. None: as in the recipe."""
    training: Literal[*TRAINING] = "standard"  # pyrefly: ignore
    """Training objective; outlier_exposure and energy_bounded need --outliers."""
    outliers: str | None = None
    """Outliers to train on: a synthetic set, NAME or NAME@SPLIT; never from a stored split that is tested."""
    checkpoint: str | None = None
    """Run folder of another experiment on the same data set. Its model is scored; nothing is trained."""
    seeds: int = 3
    """Number of repetitions, with seeds 0, 1, ..., each with its own model."""
    positive: Literal["ood", "id"] = "ood"
    """Positive class of the FPR@95TPR in the tables; metrics.csv has both."""
    results_dir: str = "results"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run folder. None: composed of data set, model and training."""
    overwrite: bool = False
    """Delete the run in the folder and start again."""
    figure_format: Literal["png", "pdf"] = "png"
    """File format of figures."""
    figure_detectors: int | None = 8
    """Number of detectors in histograms and ROC curves, the best by AUROC. None: all."""
    list: bool = False
    """List all detectors with their references, and exit."""

    def __post_init__(self):
        checks.at_least(1, self, "num_epochs", "seeds", "figure_detectors")
        checks.distinct(self, "classes", "near", "far", "detectors")
        detectors.check(self.detectors)
        if (self.training in NEED_OUTLIERS) != (self.outliers is not None):
            raise ValueError(f"outliers must be given for {' and '.join(NEED_OUTLIERS)} only, got {self.outliers!r}.")
        if len(self.classes) == 1:
            raise ValueError(f"classes must be at least two, got {self.classes}.")
        if self.open_set is not None:
            splits = foreign.OPEN_SET_CLASSES.get(self.dataset.split(":")[0], ())
            known = splits[self.open_set] if 0 <= self.open_set < len(splits) else None
            if known is None or self.classes not in ((), known):
                raise ValueError(
                    f"open_set must be 0 to 4, of mnist or cifar10 and without classes, got {self.open_set} for "
                    f"{self.dataset} with classes {self.classes}."
                )

    def resolved(self) -> Config:
        """The same settings with the classes and seeds that their defaults stand for; reads a checkpoint's config."""
        if self.open_set is not None:
            splits = foreign.OPEN_SET_CLASSES[self.dataset.split(":")[0]]
            return dataclasses.replace(self, classes=splits[self.open_set])
        if self.checkpoint is not None:
            theirs = folders.settings_of(self.checkpoint, dataset=self.dataset, model=self.model)
            known = tuple(theirs.get("classes") or ())
            if self.classes not in ((), known):
                raise ValueError(
                    f"classes must be the classes of checkpoint {self.checkpoint}, {known}, got {self.classes}."
                )
            return dataclasses.replace(self, classes=known, seeds=1)
        if not self.classes and self.dataset == "digits" and not self.near:
            return dataclasses.replace(self, classes=tuple(range(6)))
        return self

    def folder(self) -> epath.Path:
        """The run folder."""
        config = self.resolved()
        name = config.dataset.translate(UNSAFE)
        name += f"-{''.join(map(str, config.classes))}" if config.classes else ""
        name += f"-{config.model}" + ("" if config.training == "standard" else f"-{config.training}")
        name += "" if config.checkpoint is None else f"-of-{epath.Path(config.checkpoint).resolve().name}"
        return folders.run_folder(config.results_dir, "ood", name if config.name is None else config.name)
