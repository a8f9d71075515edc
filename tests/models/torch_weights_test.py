"""Weights of PyTorch checkpoints, given as NumPy arrays: names, axes and errors. PyTorch itself is in torch_test.py."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models

WIDE = {
    "conv1": "stem", "bn1": "norm",
    "block1.layer.0.bn1": "blocks/0/norm1", "block1.layer.0.conv1": "blocks/0/conv1",
    "block1.layer.0.bn2": "blocks/0/norm2", "block1.layer.0.conv2": "blocks/0/conv2",
    "block2.layer.0.bn1": "blocks/1/norm1", "block2.layer.0.conv1": "blocks/1/conv1",
    "block2.layer.0.bn2": "blocks/1/norm2", "block2.layer.0.conv2": "blocks/1/conv2",
    "block2.layer.0.convShortcut": "blocks/1/shortcut",
    "block3.layer.0.bn1": "blocks/2/norm1", "block3.layer.0.conv1": "blocks/2/conv1",
    "block3.layer.0.bn2": "blocks/2/norm2", "block3.layer.0.conv2": "blocks/2/conv2",
    "block3.layer.0.convShortcut": "blocks/2/shortcut",
}  # fmt: skip
"""Of depth 10 and width 1: the names of TRADES, and the places in our body."""


def abstract(name="wide_resnet", **settings):
    settings = {"depth": 10, "width": 1, **settings} if name == "wide_resnet" else settings
    return nnx.eval_shape(lambda: models.create(name, jax.random.key(0), **settings))


@pytest.fixture
def checkpoint(build):
    """PyTorch's tensors of a wide network, and the state that they make."""
    state = build("wide_resnet", depth=10, width=1).state
    tensors = {}
    for name, place in WIDE.items():
        params, stats = state.params["body"], state.batch_stats["body"]
        for part in place.split("/"):
            params, stats = params[part], stats.get(part, {})
        if "kernel" in params:
            tensors[f"{name}.weight"] = np.transpose(params["kernel"], (3, 2, 0, 1))
        else:
            tensors |= {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}
            tensors |= {f"{name}.running_mean": stats["mean"], f"{name}.running_var": stats["var"]}
            tensors |= {f"{name}.num_batches_tracked": np.array(7)}
    head = state.params["head"]
    return {**tensors, "fc.weight": np.transpose(head["kernel"]), "fc.bias": head["bias"]}, state


def assert_same(module, state):
    jax.tree.map(np.testing.assert_array_equal, models.functional(module).state, state)


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def test_each_tensor_finds_its_place(checkpoint):
    tensors, state = checkpoint
    model = abstract()
    loaded = models.load_torch_weights(model, tensors)
    assert_same(loaded, state)
    assert {type(leaf) for leaf in jax.tree.leaves(nnx.state(model))} == {jax.ShapeDtypeStruct}  # it is not changed
    assert models.functional(loaded).outputs is models.functional(model).outputs


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module."])
def test_a_prefix_and_a_container_are_taken_off(checkpoint, prefix):
    tensors, state = checkpoint
    weights = {"arch": "wide", "epoch": 90, "state_dict": prefixed(tensors, prefix)}
    assert_same(models.load_torch_weights(abstract(), weights), state)


def test_half_precision_becomes_float32(checkpoint):
    tensors, state = checkpoint
    half = {name: jnp.asarray(value, jnp.bfloat16) for name, value in tensors.items()}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), state)
    assert_same(models.load_torch_weights(abstract(), half), rounded)


def test_what_trades_saves_and_does_not_use_is_left_out(checkpoint):
    tensors, state = checkpoint
    unused = {"module.sub_block1.layer.0.conv1.weight": np.zeros((16, 16, 3, 3))}
    assert_same(models.load_torch_weights(abstract(), prefixed(tensors, "module.") | unused), state)


def test_a_last_layer_without_bias_has_zeros(checkpoint):
    tensors, state = checkpoint
    del tensors["fc.bias"]
    head = {"kernel": state.params["head"]["kernel"], "bias": np.zeros(10, np.float32)}
    assert_same(models.load_torch_weights(abstract(), tensors), state._replace(params={**state.params, "head": head}))


def test_a_residual_network_has_the_names_of_torchvision():
    model = abstract("resnet20")
    tensors = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    norms = {"bn1": 16}
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            place, first = f"layer{stage}.{block}", stage > 1 and block == 0
            tensors[f"{place}.conv1.weight"] = (width, width // 2 if first else width, 3, 3)
            tensors[f"{place}.conv2.weight"] = (width, width, 3, 3)
            norms |= {f"{place}.bn1": width, f"{place}.bn2": width}
            if first:
                tensors[f"{place}.shortcut.0.weight"] = (width, width // 2, 1, 1)
                norms[f"{place}.shortcut.1"] = width
    parts = ("weight", "bias", "running_mean", "running_var")
    tensors |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in parts}
    tensors = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(tensors.items())}
    state = models.functional(models.load_torch_weights(model, tensors)).state

    def number(tree, *path):
        for part in ("body", *path):
            tree = tree[part]
        [value] = np.unique(tree)
        return list(tensors)[int(value)]

    params, stats = state
    assert number(params, "blocks", "4", "convs", "1", "kernel") == "layer2.1.conv2.weight"
    assert number(params, "blocks", "4", "norms", "1", "scale") == "layer2.1.bn2.weight"
    assert number(params, "blocks", "6", "shortcut", "conv", "kernel") == "layer3.0.shortcut.0.weight"
    assert number(stats, "blocks", "6", "shortcut", "norm", "var") == "layer3.0.shortcut.1.running_var"
    assert number(params, "blocks", "8", "norms", "0", "bias") == "layer3.2.bn1.bias"
    assert number(stats, "norm", "mean") == "bn1.running_mean"


def test_normalisation_in_the_checkpoint_must_be_the_models(checkpoint):
    tensors, state = checkpoint
    means, sds = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2023, 0.1994, 0.2010])
    weights = prefixed(tensors, "1.module.") | {"0.means": means, "0.sds": sds}
    same = abstract(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    assert_same(models.load_torch_weights(same, weights), state)
    with pytest.raises(ValueError, match=re.escape("the mean of 0.means, (0.4914, 0.4822, 0.4465), got (0.0,")):
        models.load_torch_weights(abstract(), weights)
    other = abstract(mean=(0.4914, 0.4822, 0.4465))
    with pytest.raises(ValueError, match=re.escape("with the std of 0.sds, (0.2023, 0.1994, 0.201), got (1.0, 1.0")):
        models.load_torch_weights(other, weights)
    with pytest.raises(ValueError, match="with the mean of mu"):  # normalised inside, as RobustBench's buffers
        models.load_torch_weights(abstract(), tensors | {"mu": means.reshape(1, 3, 1, 1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bn1.weight": None}, "weights must have the tensors of the model, got no bn1.weight; left over: none."),
        ({"bn1.weight": None, "bn9.weight": np.ones(2)}, "got no bn1.weight; left over: module.bn9.weight."),
        ({"bn9.weight": np.ones(64)}, "weights must have the tensors of the model alone, got also module.bn9.weight."),
        ({"bn1.bias": np.ones(3)}, "weights must have module.bn1.bias of shape (64,), got (3,)."),
        ({"fc.weight": np.ones((64, 10))}, "weights must have module.fc.weight of shape (10, 64), got (64, 10)."),
        ({"fc.weight": "text"}, "weights must have module.fc.weight of shape (10, 64), got ()."),
        ({"bn1.bias": np.full(64, np.nan)}, "weights must be finite, got 64 numbers of module.bn1.bias that are not."),
        ({"conv1.weight": np.ones((16, 1, 3, 3))}, "module.conv1.weight of shape (16, 3, 3, 3), got (16, 1, 3, 3)."),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, change, message):
    tensors, _ = checkpoint
    tensors = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        models.load_torch_weights(abstract(), prefixed(tensors, "module."))


def test_a_tensor_beside_the_prefix_is_left_over(checkpoint):
    weights = prefixed(checkpoint[0], "1.module.") | {"0.fc.weight": np.ones((10, 64)), "fc.weight": np.ones((10, 64))}
    with pytest.raises(ValueError, match=re.escape("alone, got also 0.fc.weight, fc.weight.")):
        models.load_torch_weights(abstract(), weights)


def test_other_models_and_other_weights_are_refused(checkpoint):
    with pytest.raises(ValueError, match="model must be a resnet or a wide_resnet of robustjax.models, got"):
        models.load_torch_weights(models.mlp(jax.random.key(0), hidden=(), image_shape=(2, 2, 1)), checkpoint[0])
    with pytest.raises(ValueError, match="weights must have conv1.weight, also after a prefix, got a, b and 1"):
        models.load_torch_weights(abstract(), {"a": 1, "b": 2, "c": 3})
    with pytest.raises(ValueError, match="weights must be a file .safetensors, .pt, .pth or .tar, got 'x.npz'"):
        models.load_torch_weights(abstract(), "x.npz")


def test_safetensors_files_are_read(checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors, state = checkpoint
    safetensors.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "a.safetensors")
    assert_same(models.load_torch_weights(abstract(), tmp_path / "a.safetensors"), state)
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="weights must be a file of tensors, got .*b.safetensors"):
        models.load_torch_weights(abstract(), str(tmp_path / "b.safetensors"))
    with pytest.raises(FileNotFoundError, match="c.safetensors"):
        models.load_torch_weights(abstract(), tmp_path / "c.safetensors")


@pytest.mark.parametrize(("package", "file"), [("torch", "a.pth"), ("safetensors", "a.safetensors")])
def test_a_missing_package_is_named(package, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / file).touch()
    with pytest.raises(ImportError, match=rf'{package} must be importable, .*pip install "robustjax\[torch\]"'):
        models.load_torch_weights(abstract(), tmp_path / file)
