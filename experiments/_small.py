"""Trainings of studies: in memory, as one program, and in the folder of a seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float

from robustjax import data, losses, models, training

from .common import classifiers, runtimes


def fit(
    objective: losses.Objective,
    recipe: training.Recipe,
    dataset: data.Dataset,
    seed: int,
    *,
    model: str | models.Functional = "mlp",
    num_epochs: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    key: jax.Array | None = None,
    outliers: data.Dataset | None = None,
) -> classifiers.Classifier:
    """Trains a model by a recipe.

    Args:
      objective: what is minimised; trainings with an equal objective, architecture and recipe share a compiled step.
      recipe: optimizer, batch size and length, and whether images are augmented.
      dataset: training images; ``dataset.cached()`` is quicker.
      seed: of initialisation, training noise and order of batches.
      model: a name that :func:`robustjax.models.create` knows, or a model as it is before training.
      num_epochs: passes over the images; None: as the recipe.
      optimizer: in place of the recipe's; make it once and use it for all seeds, so that they share a compiled step.
      key: of training, in place of the one that is made of ``seed``.
      outliers: joined with each batch, as many as it has images if there are enough.

    Returns:
      The trained classifier.
    """
    model_key, train_key = jax.random.split(jax.random.key(seed))
    functional = classifiers.build(model, dataset, dtype="float32", key=model_key) if isinstance(model, str) else model
    return classifiers.train(
        None, functional, dataset, key=train_key if key is None else key, objective=objective, recipe=recipe,
        num_epochs=num_epochs, seed=seed, outliers=outliers, optimizer=optimizer,
        runtime=runtimes.Runtime(mesh="data=1"),
    )[0]  # fmt: skip


def train(
    place: Any,
    seed: int,
    dataset: data.Dataset,
    name: str,
    functional: models.Functional,
    objective: losses.Objective,
    recipe: training.Recipe,
    key: jax.Array,
    num_epochs: int | None = None,
) -> classifiers.Classifier:
    """Trains a model of a long study in the folder ``name`` of a seed's place, or resumes its training."""
    return classifiers.train(
        place.folder / name, functional, dataset, key=key, objective=objective, recipe=recipe, num_epochs=num_epochs,
        seed=seed, log=place.log, runtime=place.runtime, watch=functools.partial(place.watch, f"{name}, seed {seed}"),
    )[0]  # fmt: skip


class Fitted(NamedTuple):
    """What :func:`full_batch` gives.

    Attributes:
      params: after the last step.
      losses: before each step, ``(steps,)``.
    """

    params: Any
    losses: Float[Array, " steps"]


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer", "steps"))
def full_batch(
    loss_fn: Callable[..., Array], params: Any, optimizer: optax.GradientTransformation, steps: int, *arrays: Any
) -> Fitted:
    """Minimises a loss of all data at once, as one compiled program.

    Args:
      loss_fn: ``(params, *arrays) -> scalar``; a function that lives as long as the module, so that calls share the
        program.
      params: before the first step.
      optimizer: Optax gradient transformation, made once.
      steps: how many.
      *arrays: whatever the loss needs, such as inputs and labels.

    Returns:
      The last parameters, and the losses on the way.
    """

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, *arrays)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses_ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return Fitted(params, losses_)
