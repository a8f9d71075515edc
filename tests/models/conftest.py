"""Models that several tests share: built without initialising them, with states in which no mistake could hide."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models


@pytest.fixture(scope="session")
def build() -> Callable[..., models.Functional]:
    """``build(name, **settings)``: the model with a random state, every scale, bias and statistic off its start."""

    def build(name: str, **settings) -> models.Functional:
        abstract = models.functional(nnx.eval_shape(lambda: models.create(name, jax.random.key(0), **settings)))
        rng = np.random.default_rng(0)

        def random(leaf):
            if len(leaf.shape) > 1:
                value = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
            else:
                value = rng.uniform(0.3, 1.3, leaf.shape)
            return jnp.asarray(value, leaf.dtype)

        return abstract._replace(state=jax.tree.map(random, abstract.state))

    return build
