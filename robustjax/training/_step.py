"""The train state and the compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from robustjax import _arguments, _validate
from robustjax.losses import Objective, at_step
from robustjax.typing import Apply, Batch, ModelState


class TrainState(NamedTuple):
    """Everything that training carries from one step to the next.

    Attributes:
      step: number of steps taken, int32.
      key: typed PRNG key of the run; a step uses ``fold_in(key, step)``.
      model: parameters and batch statistics.
      opt_state: state of the optimizer.
    """

    step: Int[Array, ""]
    key: Key[Array, ""]
    model: ModelState
    opt_state: Any


Step = Callable[[Apply, TrainState, Batch], tuple[TrainState, dict[str, Array]]]


@_arguments.checked
def init(key: Array, model: ModelState, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the train state at step 0.

    Args:
      key: typed PRNG key of the run.
      model: initial parameters and batch statistics; copied, so that steps that donate their state do not touch them.
      optimizer: Optax gradient transformation.

    Returns:
      The train state.

    Raises:
      ValueError: ``key`` is not one typed key.

    Example:
      >>> state = training.init(jax.random.key(1), model.state, optimizer)
      >>> int(state.step)
      0
    """
    _validate.key(key)
    state = TrainState(jnp.asarray(np.int32(0)), key, model, jax.jit(optimizer.init)(model.params))
    return jax.device_put(state, may_alias=False)


@_arguments.checked
@functools.lru_cache(maxsize=64)
def make_step(objective: Objective, optimizer: optax.GradientTransformation) -> Step:
    """Compiles one step of training.

    The step differentiates the objective only with respect to the parameters, takes the updated batch statistics from
    it, and is data-parallel by the placement of its arguments: with the state replicated and the batch split over a
    mesh (:func:`replicate`, :func:`shard_batch`), gradients and batch statistics are those of the whole batch. Equal
    arguments give the same step, hence one trace.

    Args:
      objective: from :mod:`robustjax.losses`; one with schedules is asked for its settings at each step.
      optimizer: Optax gradient transformation, the one that :func:`init` was given.

    Returns:
      ``step(apply, state, batch) -> (state, metrics)``, jitted, with ``apply`` static. The buffers of ``state`` are
      donated: the argument is gone after the call.

    Example:
      >>> step = training.make_step(losses.standard(), optimizer)
      >>> state = training.init(jax.random.key(1), model.state, optimizer)
      >>> state, values = step(model.apply, state, next(data.batches(digits, 32, seed=0)))
      >>> f"loss {values['loss']:.2f}"
      'loss 2.33'
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(apply: Apply, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        params = state.model.params
        now = at_step(objective, state.step)
        loss = lambda params: now(key, apply, state.model._replace(params=params), batch)
        gradients, aux = jax.grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to its integer count
            updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        model = ModelState(optax.apply_updates(params, updates), aux.state.batch_stats)
        return TrainState(state.step + 1, state.key, model, opt_state), aux.metrics

    return step
