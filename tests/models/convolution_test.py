import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from robustjax import training
from robustjax.models import _convolution

NUMBERS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
XLA = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NUMBERS)
OURS = functools.partial(_convolution.conv_general_dilated, dimension_numbers=NUMBERS)


@pytest.fixture
def patches(monkeypatch):
    """Small batches are differentiated as large ones are."""
    monkeypatch.setattr(_convolution, "_PIXELS", 1)


def loss(convolve, x, kernel, strides=(1, 1), padding="SAME"):
    return jnp.square(jnp.tanh(convolve(x, kernel, strides, padding))).sum()


@pytest.mark.parametrize(
    ("size", "stride", "padding", "least"),
    [
        (3, 1, "VALID", 1),  # the output is smaller
        (3, 2, [(1, 1), (1, 1)], 1),
        (1, 2, "SAME", 10**9),  # a 1x1 kernel has one patch, in any batch
        (3, 1, [(1, 1), (1, 1)], 10**9),
    ],
)
def test_all_derivatives_of_the_convolution_are_those_of_lax(size, stride, padding, least, monkeypatch):
    monkeypatch.setattr(_convolution, "_PIXELS", least)
    keys = jax.random.split(jax.random.key(0))
    x, dx = jax.random.normal(keys[0], (2, 5, 6, 7, 3))  # two blocks, the last one not full
    kernel, dkernel = 0.3 * jax.random.normal(keys[1], (2, size, size, 3, 4))

    def derivatives(convolve):
        value = functools.partial(loss, convolve, strides=(stride, stride), padding=padding)
        return {
            "both": jax.grad(value, (0, 1))(x, kernel),
            "forward": jax.jvp(lambda x, k: convolve(x, k, (stride, stride), padding), (x, kernel), (dx, dkernel)),
            "forward over reverse": jax.jvp(jax.grad(value, (0, 1)), (x, kernel), (dx, dkernel)),
            "reverse over reverse": jax.grad(lambda x: jnp.vdot(jax.grad(value, 1)(x, kernel), dkernel))(x),
            "of each kernel": jax.vmap(jax.grad(value, (0, 1)), (None, 0))(x, jnp.stack([kernel, dkernel])),
            "of each example": jax.vmap(jax.grad(value, 1), (0, None))(x[:, None], kernel),
        }

    got, want = (jax.jit(derivatives, static_argnums=0)(convolve) for convolve in (OURS, XLA))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), got, want)


def test_devices_that_share_a_batch_keep_their_examples(patches):
    mesh = training.make_mesh({"batch": 8})
    x = jax.random.normal(jax.random.key(0), (64, 6, 6, 3))
    kernel = 0.3 * jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    want = jax.jit(jax.grad(functools.partial(loss, XLA), 1))(x, kernel)
    step = jax.jit(jax.grad(functools.partial(loss, OURS), 1))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
    program = step.lower(jax.device_put(x, split), jax.device_put(kernel, whole)).compile()
    got = program(jax.device_put(x, split), jax.device_put(kernel, whole))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
    text = program.as_text()
    assert "while(" in text
    assert not any(f"{name}(" in text for name in ("all-gather", "all-to-all", "collective-permute"))

    def on_one(x, kernel):
        return jax.lax.psum(step(x, jax.lax.pcast(kernel, "batch", to="varying")), "batch")

    specs = {"in_specs": (PartitionSpec("batch"), PartitionSpec()), "out_specs": PartitionSpec()}
    got = jax.jit(jax.shard_map(on_one, mesh=mesh, **specs))(x, kernel)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_patches_are_for_the_cpu_and_keep_the_dtype(patches):
    x, kernel = jnp.zeros((4, 6, 6, 3), jnp.bfloat16), jnp.zeros((3, 3, 3, 4), jnp.bfloat16)
    gradient = jax.jit(jax.grad(functools.partial(loss, OURS), (0, 1)))
    traced = gradient.trace(x, kernel)
    loops = {name: "stablehlo.while" in traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert loops == {"cpu": True, "tpu": False}
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(gradient, x, kernel), (x, kernel))
