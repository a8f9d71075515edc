"""The settings of a smoothing run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from etils import epath

from robustjax import certification, losses

from ..common import checks, folders, settings, smoothers
from ..common.command_line import Number

OF_TRAINING = (
    "train_split", "train_sigma", "training", "train_weight", "train_epsilon", "train_steps", "train_draws",
    "train_warmup", "recipe", "num_epochs", "learning_rate",
)  # fmt: skip
"""Without effect on the model of a checkpoint, so refused with one."""
SAME = ("radii", "compare")
"""May differ when a run is resumed: they change no certificate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Product, settings.Splits):
    """Settings of a run; radii and sigma are in units of [0, 1] pixels."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the model computes; parameters, noise and logits are float32."""
    sigma: float = 0.25
    """Standard deviation of the smoothing noise, in [0, 1] pixels."""
    noise: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    """Distribution of the noise of each pixel; radii are l2 for gaussian, l1 for uniform and laplace."""
    norm: Literal["l1", "l2", "linf"] | None = None
    """Report radii in this norm: the largest ball of it inside the certified one. None: the norm of the noise."""
    train_sigma: float | None = None
    """Standard deviation of the training noise, in [0, 1] pixels. None: sigma; 0: no noise."""
    training: Literal["gaussian", "stability", "smoothadv", "macer", "consistency", "smoothmix"] = "gaussian"
    """How the base classifier is trained with noise."""
    train_weight: float | None = None
    """Weight of the term that the training adds to cross-entropy. None, here and below: the objective's default."""
    train_epsilon: float | None = None
    """Radius of the attack in smoothadv training, l2, in [0, 1] pixels."""
    train_steps: int | None = None
    """Steps of the attack in smoothadv and smoothmix training."""
    train_draws: int | None = None
    """Noisy copies of each image in a training step."""
    train_warmup: float | None = None
    """Share of training in which smoothadv's epsilon or smoothmix's weight grows, or macer's weight is 0."""
    grid: int | None = None
    """Round noisy copies to N steps per grey level (1/255), such as 16. None: plain float32 addition."""
    dual: bool = False
    """Smooth and classify the two halves of a checkerboard of pixels separately; they share the draws of an image."""
    learning_rate: float | None = None
    """Initial learning rate. None: as in the recipe."""
    num_selection: int = 100
    """Noisy copies of each image that select its class."""
    num_estimation: int = 10_000
    """Noisy copies of each image that bound the probability of its class; published tables use 100000."""
    sequential: bool = False
    """Stop drawing for an image when its radius is within 5% of the radius of num_estimation copies."""
    target_radius: float | None = None
    """Only decide whether each image is certified at this radius, and stop drawing when that is known."""
    alpha: float = 0.001
    """Probability, for each image, that its certificate is wrong."""
    batch_size: int | None = None
    """Noisy copies per call of the model. None: 200 on a CPU, 1000 on an accelerator."""
    skip: int = 1
    """Certify every N-th image; commonly 20 on CIFAR-10 and 100 on ImageNet."""
    num_images: int | None = None
    """Maximum number of images to certify. None: all."""
    radii: tuple[Number, ...] = ()
    """Radii of the table, in [0, 1] pixels. Default: up to the largest that can be certified."""
    seed: int = 0
    """Seed of initialisation, batch order, training noise and smoothing noise."""
    compare: tuple[str, ...] = ()
    """Compare these finished run folders in one table and one figure; nothing is trained or certified."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "num_selection", "num_estimation", "skip", "num_images", "batch_size", "grid")
        checks.positive(self, "sigma", "learning_rate")
        checks.not_negative(self, "train_sigma", "radii", "target_radius")
        checks.probability(self, "alpha")
        checks.seed(self)
        self.measure(1)
        self.objective(num_steps=1)
        self.without_effect(*OF_TRAINING)
        if self.dual:
            if settings.is_own(self.model):
                raise ValueError(f"model must be one of robustjax's with dual, which trains two, got {self.model}.")
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in ("noise", "norm", "grid", "checkpoint", "sequential", "target_radius"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} must be {defaults[name]} with dual, got {getattr(self, name)}.")
            checks.at_least(2, self, "num_selection", "num_estimation")  # one for each half
        if any(radius > (self.target_radius or float("inf")) for radius in self.radii):
            raise ValueError(
                f"radii must be at most target_radius={self.target_radius:g}, beyond which nothing is certified, got "
                f"{max(self.radii):g}."
            )

    def measure(self, dimension: int) -> certification.Measure:
        """The smoothing measure of images of ``dimension`` numbers."""
        return smoothers.measure_of(self.noise, self.sigma, self.grid, self.norm, dimension)

    def objective(self, *, num_steps: int) -> losses.Objective:
        """The training objective of the base classifier."""
        sigma = self.sigma if self.train_sigma is None else self.train_sigma
        given = {name: getattr(self, name) for name in smoothers.SETTINGS}
        objective = smoothers.objective_of(self.noise, sigma, self.training, **given)
        return smoothers.warmed_up(self.training, objective, self.train_warmup, num_steps)

    def folder(self) -> epath.Path:
        """The run folder."""
        name = f"{self.data_name}-{self.model_name}-{self.sigma:g}"
        name += ("" if self.noise == "gaussian" else f"-{self.noise}") + ("" if self.norm is None else f"-{self.norm}")
        name += "" if self.train_sigma is None else f"-trained-{self.train_sigma:g}"
        name += "" if self.training == "gaussian" else f"-{self.training}"
        name += "" if self.checkpoint is None else f"-of-{self.origin}"
        target = "" if self.target_radius is None else f"-at-{self.target_radius:g}"
        name += target or ("-sequential" if self.sequential else "-dual" if self.dual else "")
        return folders.run_folder(self.results_dir, "smoothing", name if self.name is None else self.name)
