"""The settings of an out-of-distribution run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from etils import epath

from ..common import checks, detectors, folders, foreign, settings

TRAINING = ("standard", "logit_norm", "mixup", "cutmix", "outlier_exposure", "energy_bounded")
NEED_OUTLIERS = ("outlier_exposure", "energy_bounded")
SAME = ("detectors", "seeds", "positive", "figure_detectors")
"""May differ when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Product):
    """Settings of a run."""

    classes: tuple[int, ...] = ()
    """In-distribution labels; the other classes are the set held_out. Default: 0 to 5 for digits, else all."""
    open_set: int | None = None
    """Published open-set split 0 to 4 of mnist or cifar10, with six in-distribution classes, instead of --classes."""
    near: tuple[str, ...] = ()
    """Near out-of-distribution sets: held_out or names as in --dataset. Default: held_out if classes are left out.
    NAME is the test split; NAME@SPLIT another part in TFDS syntax, such as omniglot@small1 or mnist@train[:50%]."""
    far: tuple[str, ...] = ()
    """Far sets: textures, uniform_noise, gaussian_noise, permuted_pixels, NAME or NAME@SPLIT.
    Default: textures uniform_noise permuted_pixels."""
    detectors: tuple[str, ...] = ()
    """Detectors, combined with +, such as energy knn react+energy. Default: all of --list."""
    training: Literal[*TRAINING] = "standard"  # pyrefly: ignore
    """Training objective; outlier_exposure and energy_bounded need --outliers."""
    outliers: str | None = None
    """Outliers to train on: a synthetic set, NAME or NAME@SPLIT; never from a stored split that is tested."""
    seeds: int = 3
    """Number of repetitions, with seeds 0, 1, ..., each with its own model."""
    positive: Literal["ood", "id"] = "ood"
    """Positive class of the FPR@95TPR in the tables; metrics.csv has both."""
    figure_detectors: int | None = 8
    """Number of detectors in histograms and ROC curves, the best by AUROC. None: all."""
    list: bool = False
    """List all detectors with their references, and exit."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "seeds", "figure_detectors")
        checks.distinct(self, "classes", "near", "far", "detectors")
        detectors.check(self.detectors)
        if (self.training in NEED_OUTLIERS) != (self.outliers is not None):
            raise ValueError(f"outliers must be given for {' and '.join(NEED_OUTLIERS)} only, got {self.outliers!r}.")
        self.without_effect("training", "outliers", "num_epochs", "recipe")
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
        if settings.is_own(self.model):
            return dataclasses.replace(self, seeds=1)
        if not self.classes and self.dataset == "digits" and not self.near:
            return dataclasses.replace(self, classes=tuple(range(6)))
        return self

    def folder(self) -> epath.Path:
        """The run folder."""
        config = self.resolved()
        name = config.data_name
        name += f"-{''.join(map(str, config.classes))}" if config.classes else ""
        name += f"-{config.model_name}" + ("" if config.training == "standard" else f"-{config.training}")
        name += "" if config.checkpoint is None else f"-of-{config.origin}"
        return folders.run_folder(config.results_dir, "ood", name if config.name is None else config.name)
