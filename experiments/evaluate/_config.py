"""The settings of an evaluation."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Literal

from etils import epath

from robustjax import _validate

from ..common import adversaries, checks, folders, settings
from ..common.command_line import Number, number

PARTS = ("calibration", "conformal", "ood", "certify", "attack")
EPSILONS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
"""Radii of attacks where the data set has none of its own: those of CIFAR-10."""
SAME = ("parts", "near", "far")
"""May differ when an evaluation is resumed; what is measured is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; radii and sigma are in units of [0, 1] pixels."""

    parts: tuple[Literal[*PARTS], ...] = PARTS  # pyrefly: ignore
    """Parts to measure."""
    budget: Number = 10.0
    """Minutes that all of it may take, without compiling: sets the numbers of images and of noisy copies."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the attack."""
    epsilon: Number | None = None
    """Radius of the attack, such as 8/255. None: the usual one of the data set, else 8/255 in linf, 0.5 in l2."""
    sigma: Number = 0.25
    """Standard deviation of the noise of randomized smoothing."""
    alpha: Number = 0.001
    """Probability, for each image, that its certificate is wrong."""
    coverage: Number = 0.9
    """Share of the images whose prediction set shall hold the true label."""
    num_images: int | None = None
    """Maximum number of images to certify and to attack. None: as many as the budget allows."""
    seed: int = 0
    """Seed of the order of images, of noise and of attacks."""
    results_dir: str = "results"
    """Parent folder of all runs."""
    name: str | None = None
    """Name of the run folder. None: composed of the data set and the model."""
    overwrite: bool = False
    """Delete the run in the folder and start again."""

    def __post_init__(self):
        _as_on_the_command_line(self)
        checks.distinct(self, "parts")
        if not self.parts:
            raise ValueError(f"parts must be one or more of {', '.join(PARTS)}, got none.")
        for part in self.parts:
            checks.known("parts", part, PARTS)
        checks.known("norm", self.norm, EPSILONS)
        checks.positive(self, "budget", "epsilon", "sigma")
        checks.probability(self, "alpha", "coverage")
        checks.at_least(1, self, "num_images")
        checks.seed(self)

    def radius(self, dataset: str) -> float:
        """The radius of the attack on this data set."""
        usual = adversaries.RADII.get((dataset.split(":")[0], self.norm))
        return self.epsilon or (EPSILONS[self.norm] if usual is None else usual.train_epsilon)

    def folder(self, about: str) -> epath.Path:
        """The run folder, by default named after what is evaluated."""
        return folders.run_folder(self.results_dir, "evaluate", about if self.name is None else self.name)


_TYPES = {
    "Number": ((int, float), "a number"), "int": (int, "an integer"), "str": (str, "text"), "Literal": (str, "text"),
    "bool": (bool, "True or False"), "tuple": (tuple, "names"),
}  # fmt: skip
"""By the name of a field's annotation: the types of its values, and the words for them."""


def _as_on_the_command_line(config: Any) -> None:
    """Takes texts as the command line does, numbers such as 8/255 and one name for a tuple; ValueError for others."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), re.split(r"\W", str(field.type))[0]
        if getattr(value, "shape", None) == ():  # a number of NumPy or JAX, which no JSON file holds
            value = value.item()
        if kind == "Number" and isinstance(value, str):
            with checks.renamed("must", f"{field.name} must"):
                value = number(value)
        if kind == "tuple" and isinstance(value, (str, list)):
            value = (value,) if isinstance(value, str) else tuple(value)
        if kind == "str" and isinstance(value, os.PathLike):
            value = os.fspath(value)
        types, words = _TYPES[kind]
        none = value is None and "None" in str(field.type)
        if not none and (not isinstance(value, types) or isinstance(value, bool) != (kind == "bool")):
            raise ValueError(f"{field.name} must be {words}, got {_validate.short(value)}.")
        object.__setattr__(config, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(settings.Data):
    """A model and its images."""

    model: str | None = None
    """MODULE:FUNCTION, where FUNCTION() returns a function of images, a pair (module, variables), a Flax, Equinox or
    PyTorch module, or a run folder."""
    checkpoint: str | None = None
    """Run folder of another experiment, instead of --model."""
    dataset: str | None = None  # pyrefly: ignore
    image_size: int | None = None
    """Resize images to N x N pixels. None: keep their size."""
    test_split: str | None = None
    """Images to evaluate on, in TFDS syntax. None: the test split of the data set, all images of one without splits."""
    train_split: str | None = None
    """Images of the training, on which detectors are fitted. None: train, if the data set has it beside the images to
    evaluate on; else, and for 'none', half of these."""
    near: tuple[str, ...] = ()
    """Near out-of-distribution sets: NAME or NAME@SPLIT, as of experiments.ood."""
    far: tuple[str, ...] = ()
    """Far sets: textures, uniform_noise, gaussian_noise, permuted_pixels, NAME or NAME@SPLIT.
    Default: textures uniform_noise permuted_pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings, Given):
    """A model, its images, and what is measured."""

    def __post_init__(self):
        super().__post_init__()
        checks.distinct(self, "near", "far")
        checks.at_least(1, self, "image_size")
        if (self.model is None) == (self.checkpoint is None):
            raise ValueError(
                f"model or checkpoint must be given, one of them, got model {self.model!r} and checkpoint "
                f"{self.checkpoint!r}."
            )
        if self.dataset is None and self.checkpoint is None:
            raise ValueError("dataset must be given with model, got None.")
