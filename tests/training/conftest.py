"""A problem small enough to check by hand: a linear model with running means, and batches drawn from their position."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.typing import Batch, ModelState, Outputs


def linear(state, x, *, train=False):
    flat = x.reshape(x.shape[0], -1)
    stats = state.batch_stats
    if train:
        stats = {"mean": 0.9 * stats["mean"] + 0.1 * flat.mean(0)}
    logits = (flat - stats["mean"][None]) @ state.params["w"] + state.params["b"][None]
    return Outputs(logits, flat), state._replace(batch_stats=stats)


class Stream:
    """Endless batches; the position alone decides what comes."""

    def __init__(self, batch_size=8, length=None):
        self.position, self.batch_size, self.length = 0, batch_size, length

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.length:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        self.position += 1
        image = rng.uniform(size=(self.batch_size, 2, 2, 1)).astype(np.float32)
        label = (image.mean((1, 2, 3)) * 3).astype(np.int32)
        return Batch(image, label, np.arange(self.batch_size, dtype=np.int32))

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@pytest.fixture
def problem():
    params = {"w": jax.random.normal(jax.random.key(1), (4, 3)), "b": jnp.zeros(3)}
    return types.SimpleNamespace(apply=linear, model=ModelState(params, {"mean": jnp.zeros(4)}), Stream=Stream)
