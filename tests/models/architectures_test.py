"""The architectures: published parameter counts, NumPy twins of their blocks, initialisation, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models
from robustjax.models import _layers

SIZES = {
    "mlp": ({}, 784 * 128 + 128 + 128 * 128 + 128 + 1290),
    "lenet": ({}, 431_080),
    "cnn": ({}, 320 + 18_496 + 3136 * 128 + 128 + 1290),
    "strided_cnn": ({}, 272 + 8224 + 3200 * 100 + 100 + 1010),
    "resnet20": ({}, 272_474),
    "resnet56": ({}, 855_770),
    "resnet110": ({}, 1_730_714),
    "wide_resnet": ({}, 36_479_194),
    "resnet18": ({"num_classes": 1000}, 11_689_512),
    "resnet50": ({"num_classes": 1000}, 25_557_032),
}


@functools.cache
def abstract(name, **settings):
    """The pure functions of a model, of which no array is made."""
    return models.functional(nnx.eval_shape(lambda: models.create(name, jax.random.key(0), **settings)))


def test_every_model_is_counted():
    assert SIZES.keys() == models.MODELS.keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("resnet56", "resnet110") else n
        for n in SIZES
        if n != "resnet50"
    ],
)
def test_parameter_count_is_the_published_one(name):
    settings, count = SIZES[name]
    model = abstract(name, **settings)
    assert models.num_parameters(model.state.params) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(model.state)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "settings", "shape", "features"),
    [
        ("mlp", {"image_shape": (8, 8, 1), "hidden": (32, 16)}, (8, 8, 1), 16),
        ("mlp", {"image_shape": (8, 8, 1), "hidden": ()}, (8, 8, 1), 64),
        ("lenet", {"image_shape": (16, 17, 3)}, (16, 17, 3), 500),
        ("cnn", {"image_shape": (8, 9, 1)}, (8, 9, 1), 128),
        ("strided_cnn", {"image_shape": (10, 13, 3)}, (10, 13, 3), 100),
        ("resnet20", {}, (32, 32, 3), 64),
        ("wide_resnet", {}, (32, 32, 3), 640),
        ("resnet18", {"num_classes": 1000}, (224, 224, 3), 512),
    ],
)
def test_output_shapes(name, settings, shape, features):
    settings = settings if "resnet" in name else {"num_classes": 7, **settings}
    model, num_classes = abstract(name, **settings), settings.get("num_classes", 10)
    for batch in (3,) if name in ("wide_resnet", "resnet18") else (0, 3):
        outputs = jax.eval_shape(model.outputs, model.state, jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
        assert outputs.logits.shape == (batch, num_classes)
        assert outputs.features.shape == (batch, features)


def numpy_conv(x, kernel, stride, padding):
    """Cross-correlation written as its definition, in float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            y[:, i, j] = np.tensordot(window, np.asarray(kernel, np.float64), 3)
    return y


def numpy_norm(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def numpy_relu(x):
    return np.maximum(x, 0)


def test_resnet20_equals_its_numpy_twin(build):
    model = build("resnet20", image_shape=(6, 7, 3))
    x = jax.random.uniform(jax.random.key(2), (2, 6, 7, 3))  # an odd width: strided layers pad on both sides
    params, stats = (part["body"] for part in jax.tree.map(np.asarray, model.state))

    y = numpy_relu(numpy_norm(numpy_conv(x, params["stem"]["kernel"], 1, 1), params["norm"], stats["norm"]))
    for index in map(str, range(9)):
        p, s, stride = params["blocks"][index], stats["blocks"][index], 2 if index in "36" else 1
        z = numpy_conv(y, p["convs"]["0"]["kernel"], stride, 1)
        z = numpy_relu(numpy_norm(z, p["norms"]["0"], s["norms"]["0"]))
        z = numpy_norm(numpy_conv(z, p["convs"]["1"]["kernel"], 1, 1), p["norms"]["1"], s["norms"]["1"])
        assert ("shortcut" in p) == (stride == 2)
        if stride == 2:
            y = numpy_conv(y, p["shortcut"]["conv"]["kernel"], 2, 0)
            y = numpy_norm(y, p["shortcut"]["norm"], s["shortcut"]["norm"])
        y = numpy_relu(y + z)

    features = jax.jit(model.outputs)(model.state, x).features
    np.testing.assert_allclose(features, y.mean((1, 2)), rtol=1e-3)  # twenty float32 layers


def test_wide_resnet_equals_its_numpy_twin(build):
    model = build("wide_resnet", depth=10, width=1, image_shape=(5, 4, 3))
    x = jax.random.uniform(jax.random.key(2), (2, 5, 4, 3))
    params, stats = (part["body"] for part in jax.tree.map(np.asarray, model.state))

    y = numpy_conv(x, params["stem"]["kernel"], 1, 1)
    for index in map(str, range(3)):
        p, s, stride = params["blocks"][index], stats["blocks"][index], 1 if index == "0" else 2
        active = numpy_relu(numpy_norm(y, p["norm1"], s["norm1"]))
        z = numpy_relu(numpy_norm(numpy_conv(active, p["conv1"]["kernel"], stride, 1), p["norm2"], s["norm2"]))
        z = numpy_conv(z, p["conv2"]["kernel"], 1, 1)
        assert ("shortcut" in p) == (stride == 2)  # width 1 keeps the 16 channels of the stem
        y = z + (numpy_conv(active, p["shortcut"]["kernel"], stride, 0) if stride == 2 else y)
    want = numpy_relu(numpy_norm(y, params["norm"], stats["norm"])).mean((1, 2))

    np.testing.assert_allclose(jax.jit(model.outputs)(model.state, x).features, want, rtol=1e-4)


@pytest.mark.parametrize(("name", "padding", "hw"), [("lenet", 0, 17), ("cnn", 1, 7)])
def test_small_convolutional_models_equal_their_numpy_twin(build, name, padding, hw):
    model = build(name, image_shape=(hw, hw, 1))
    y = x = jax.random.uniform(jax.random.key(2), (3, hw, hw, 1))
    params = jax.tree.map(np.asarray, model.state.params)["body"]
    for layer in ("conv1", "conv2"):
        y = numpy_relu(numpy_conv(y, params[layer]["kernel"], 1, padding) + params[layer]["bias"])
        half = y.shape[1] // 2
        y = y[:, : 2 * half, : 2 * half].reshape(3, half, 2, half, 2, -1).max((2, 4))
    want = numpy_relu(y.reshape(3, -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    np.testing.assert_allclose(jax.jit(model.outputs)(model.state, x).features, want, rtol=1e-4)


def test_the_strided_cnn_equals_its_numpy_twin(build):
    model = build("strided_cnn", image_shape=(12, 12, 1))
    y = x = jax.random.uniform(jax.random.key(2), (3, 12, 12, 1))
    params = jax.tree.map(np.asarray, model.state.params)["body"]
    for layer, stride in (("conv1", 2), ("conv2", 1)):
        y = numpy_relu(numpy_conv(y, params[layer]["kernel"], stride, 0) + params[layer]["bias"])
    want = numpy_relu(y.reshape(3, -1) @ params["dense"]["kernel"] + params["dense"]["bias"])
    np.testing.assert_allclose(jax.jit(model.outputs)(model.state, x).features, want, rtol=1e-4, atol=1e-6)


def test_pooling_passes_the_gradient_to_the_maximum():
    rng = np.random.default_rng(0)
    values, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 6, 3), (2, 2, 3, 3)))
    gradient = jax.jit(jax.grad(lambda x: (weights * _layers.max_pool(x)).sum()))(values)
    want = np.zeros(values.shape, np.float32)
    for b, i, j, c in np.ndindex(*weights.shape):
        window = values[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        row, column = np.unravel_index(window.argmax(), (2, 2))
        want[b, 2 * i + row, 2 * j + column, c] = weights[b, i, j, c]
    np.testing.assert_array_equal(gradient, want)


def test_pooling_shares_the_gradient_of_equal_maxima():
    x = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 0.0, 0.0], [3.0, 3.0, 1.0, 0.0, 0.0, 0.0]])[None, :, :, None]
    want = [[1 / 3, 0, 0.5, 0.5, 0.25, 0.25], [1 / 3, 1 / 3, 0, 0, 0.25, 0.25]]
    gradient = jax.jit(jax.grad(lambda x: _layers.max_pool(x).sum()))(x)
    np.testing.assert_allclose(gradient[0, :, :, 0], want, rtol=1e-6)


def test_pooling_hides_no_nan():
    x = np.asarray([[0, np.nan], [0, 0]], np.float32)[None, :, :, None]
    pooled, gradient = jax.jit(jax.value_and_grad(lambda x: _layers.max_pool(x).sum()))(x)
    assert np.isnan(pooled)
    assert np.asarray(gradient)[0, 0, 1, 0] != 0


def test_resnet50_has_the_published_parameters_large_stem_and_bottlenecks():
    settings, count = SIZES["resnet50"]
    module = nnx.eval_shape(lambda: models.resnet50(jax.random.key(0), image_shape=(65, 64, 3), **settings))
    assert models.num_parameters(models.functional(module).state.params) == count
    outputs = nnx.eval_shape(lambda module, x: module(x), module, jax.ShapeDtypeStruct((2, 65, 64, 3), jnp.float32))
    assert outputs.features.shape == (2, 2048)
    assert module.body.stem.kernel_size == (7, 7)
    strides = [[conv.strides for conv in block.convs] for block in module.body.blocks]
    assert len(strides) == 3 + 4 + 6 + 3
    assert [i for i, s in enumerate(strides) if s == [1, 2, 1]] == [3, 7, 13]  # the 3x3 convolution strides
    assert sum(s == [1, 1, 1] for s in strides) == 13


def test_residual_convolutions_start_with_the_variance_of_he():
    kernel = np.asarray(_layers.conv(32, 64, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)).kernel)
    variance = 2 / (3 * 3 * 64)  # fan-out, though there are 32 input channels
    # The relative standard error of a variance over N normal numbers is sqrt(2 / N).
    assert abs(kernel.var() / variance - 1) < 5 * np.sqrt(2 / kernel.size)
    assert abs(kernel.mean()) < 5 * np.sqrt(variance / kernel.size)
    assert np.abs(kernel).max() > 3 * np.sqrt(variance)  # not truncated


def test_small_models_start_where_pytorch_does():
    module = models.mlp(jax.random.key(0), image_shape=(10, 10, 2), hidden=(100,))
    conv = models.lenet(jax.random.key(0)).body.conv2
    for layer, fan_in in ((module.body.dense[0], 200), (module.head, 100), (conv, 500)):
        kernel = np.asarray(layer.kernel)
        assert 0.95 < np.abs(kernel).max() * np.sqrt(fan_in) <= 1  # uniform in +-1 / sqrt(fan_in)
        assert abs(kernel.var() * 3 * fan_in - 1) < 5 / np.sqrt(kernel.size)
        assert not np.any(layer.bias)


def test_same_key_same_parameters_and_another_key_others():
    def kernel(seed):
        return np.asarray(models.mlp(jax.random.key(seed), image_shape=(2, 2, 1), hidden=()).head.kernel)

    assert (kernel(0) == kernel(0)).all()
    assert (kernel(0) != kernel(1)).any()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mlp", {"num_classes": 0}, "num_classes must be an integer of at least 1, got 0."),
        ("mlp", {"std": 0.0}, "std must be positive and finite, got 0.0."),
        ("resnet20", {"std": (0.2, -0.2, 0.2)}, "std must be positive and finite, got -0.2."),
        ("mlp", {"std": float("nan")}, "std must be a finite number, or one for each of 1 channels, got nan"),
        ("mlp", {"mean": (0.5, 0.5)}, "mean must be a finite number, or one for each of 1 channels, got (0.5, 0.5)"),
        ("mlp", {"dtype": jnp.int32}, "dtype must be floating point, got int32"),
        ("mlp", {"hidden": (8, 0)}, "hidden must be positive widths, got (8, 0)"),
        ("mlp", {"image_shape": (28, 28)}, "image_shape must be a positive (height, width, channels), got (28, 28)"),
        ("cnn", {"image_shape": (8, 3, 1)}, "image_shape must be at least 4 pixels high and wide, got (8, 3, 1)"),
        (
            "lenet",
            {"image_shape": (15, 28, 1)},
            "image_shape must be at least 16 pixels high and wide, got (15, 28, 1)",
        ),
        ("wide_resnet", {"depth": 27}, "depth must be 6n + 4 with n at least 1, got 27"),
        ("wide_resnet", {"width": 0}, "width must be an integer of at least 1, got 0."),
        ("resnet19", {}, f"name must be one of {', '.join(models.MODELS)}, got 'resnet19'"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        models.create(name, jax.random.key(0), **settings)
