"""Published optimizer settings, by name of the data set or table."""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax

from robustjax import _arguments, _validate


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimizer, schedule, batch size and length of a training run.

    Attributes:
      learning_rate: at the start.
      batch_size: images per step, over all devices.
      num_epochs: passes over the training set.
      algorithm: ``sgd`` or ``adam``.
      momentum: of SGD.
      nesterov: whether SGD uses Nesterov's momentum.
      weight_decay: L2 penalty on all parameters, added to the gradient before momentum, as PyTorch's optimizers do.
      schedule: ``step`` multiplies the learning rate by ``decay`` every ``step_size`` epochs; ``cosine`` lowers it
        to zero along half a cosine, step by step.
      step_size: in epochs.
      decay: factor, per ``step_size``.
      augment: whether training images are cropped and flipped at random.
    """

    learning_rate: float
    batch_size: int
    num_epochs: int
    algorithm: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Literal["step", "cosine"] = "step"
    step_size: int = 30
    decay: float = 0.1
    augment: bool = False

    def __post_init__(self):
        _validate.positive(learning_rate=self.learning_rate, decay=self.decay)
        _validate.not_negative(momentum=self.momentum, weight_decay=self.weight_decay)
        _validate.at_least(1, batch_size=self.batch_size, num_epochs=self.num_epochs, step_size=self.step_size)
        for name, choices in (("algorithm", ("sgd", "adam")), ("schedule", ("step", "cosine"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def learning_rate_schedule(self, steps_per_epoch: int, num_epochs: int | None = None) -> optax.Schedule:
        """Makes the learning rate as a function of the step.

        Args:
          steps_per_epoch: steps that one pass over the training set takes.
          num_epochs: length of the run; None: as the recipe. Milestones move in proportion.

        Returns:
          ``step -> learning rate``.

        Raises:
          ValueError: a length is not positive.
        """
        num_epochs = self.num_epochs if num_epochs is None else num_epochs
        _validate.at_least(1, steps_per_epoch=steps_per_epoch, num_epochs=num_epochs)
        num_steps = steps_per_epoch * num_epochs
        if self.schedule == "cosine":
            return optax.schedules.cosine_decay_schedule(self.learning_rate, num_steps)
        epochs = range(self.step_size, self.num_epochs, self.step_size)
        rates = [self.learning_rate * self.decay**k for k in range(len(epochs) + 1)]
        return optax.schedules.join_schedules(
            [optax.schedules.constant_schedule(rate) for rate in rates],
            [round(epoch * num_steps / self.num_epochs) for epoch in epochs],
        )

    def optimizer(self, steps_per_epoch: int, num_epochs: int | None = None) -> optax.GradientTransformation:
        """Makes the optimizer.

        Args:
          steps_per_epoch: steps that one pass over the training set takes.
          num_epochs: length of the run; None: as the recipe. Milestones move in proportion.

        Returns:
          Optax gradient transformation.
        """
        schedule = self.learning_rate_schedule(steps_per_epoch, num_epochs)
        if self.algorithm == "adam":
            descend = optax.adam(schedule)
        else:
            descend = optax.sgd(schedule, momentum=self.momentum, nesterov=self.nesterov)
        return optax.chain(optax.add_decayed_weights(self.weight_decay), descend)


RECIPES = {
    # The small-scale reference of this library, on scikit-learn's 8x8 digits. Its epochs were chosen on the last tenth
    # of the training images: at sigma 0.5 the ACR is 0.387 after 40 and 0.417 after 80, means of three seeds.
    "digits": Recipe(algorithm="adam", learning_rate=2e-3, schedule="cosine", batch_size=128, num_epochs=80),
    # Jeong and Shin 2020, arXiv 2006.04062: the MNIST tables, all methods.
    "mnist": Recipe(learning_rate=0.01, weight_decay=1e-4, batch_size=256, num_epochs=90),
    # About the same sum of learning rates in less than a quarter of the epochs, for a CPU.
    "mnist_short": Recipe(learning_rate=0.03, weight_decay=1e-4, schedule="cosine", batch_size=256, num_epochs=20),
    # Cohen, Rosenfeld and Kolter 2019, arXiv 1902.02918. Batches are those of the paper; the script's default is 256.
    "cohen_cifar10": Recipe(learning_rate=0.1, weight_decay=1e-4, batch_size=400, num_epochs=90, augment=True),
    # The paper's random crop resizes pictures of any size; that belongs to the data pipeline.
    "cohen_imagenet": Recipe(learning_rate=0.1, weight_decay=1e-4, batch_size=400, num_epochs=90, augment=True),
}
"""Recipes by name."""
