"""One network in several frameworks: what certifying and attacking it costs, and whether the answers are the same.

Trains a small MLP on digits with robustjax, puts its weights into each framework that is installed, and certifies and
attacks it there. Each framework has two new processes, the first with an empty cache of compiled programs (cold), the
second with that cache (warm): the seconds to the first certificate include all compiling, but no import. Then networks
of PyTorch take turns with our own.

    python -m benchmarks.frameworks
    python -m benchmarks.frameworks --only robustjax equinox torch --seed 1
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from experiments.common.files import write_arrays
from robustjax import attacks, certification, data, losses, models, training

NEEDS = {"robustjax": "flax", "function": "jax", "nnx": "flax", "linen": "flax", "equinox": "equinox",
         "haiku": "haiku", "torch": "torchax"}  # fmt: skip
HANDED = {
    "robustjax": "lambda x: module(x).logits", "function": "fn", "nnx": "module",
    "linen": "partial(module.apply, variables)", "equinox": "lambda x: jax.vmap(module)(flat(x))",
    "haiku": "partial(net.apply, params)", "torch": "models.from_torch(module, images)",
}  # fmt: skip
"""What certificates and attacks take: a line where it is more than the name of the model."""
PAIRS = 7
"""Turns of PyTorch's network and our own."""
HIDDEN, SIGMA, EPSILON = 64, 0.25, 0.1
NUM_CERTIFIED, NUM_ATTACKED, DRAWS = 50, 200, 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    only: tuple[Literal[*NEEDS], ...] = tuple(NEEDS)  # pyrefly: ignore
    """Frameworks; one that is not installed is left out."""
    epochs: int = 20
    """Passes over the training images."""
    seed: int = 0
    """Of initial weights, batches and noise."""
    one: str | None = None
    """Measure one framework in this process, with the weights in this file. For the benchmark itself."""


def trained(config: Config) -> dict[str, np.ndarray]:
    """The weights of an MLP that was trained with noise."""
    train, recipe = data.load("digits", "train").cached(), training.RECIPES["digits"]
    model = models.functional(models.mlp(jax.random.key(config.seed), hidden=(HIDDEN,), image_shape=(8, 8, 1)))
    steps = len(train) // recipe.batch_size * config.epochs
    optimizer = recipe.optimizer(len(train) // recipe.batch_size, config.epochs)
    result = training.fit(
        model.apply, training.init(jax.random.key(config.seed), model.state, optimizer),
        data.batches(train, recipe.batch_size, seed=config.seed), optimizer=optimizer, num_steps=steps,
        objective=losses.smoothing.gaussian_augmentation(sigma=SIGMA), log=lambda _: None,
    )  # fmt: skip
    params: Any = result.state.model.params
    layers = [params["body"]["dense"]["0"], params["head"]]
    return {f"{name}{i}": np.asarray(layer[name]) for i, layer in enumerate(layers) for name in ("kernel", "bias")}


def model_of(framework: str, w: dict[str, np.ndarray]) -> Any:
    """The network in a framework, as a user hands it over."""
    flat = lambda x: x.reshape(len(x), -1)
    if framework == "robustjax":
        module = models.mlp(jax.random.key(0), hidden=(HIDDEN,), image_shape=(8, 8, 1))
        state = jax.tree_util.tree_map_with_path(lambda path, a: _weight(path, a, w), nnx.state(module))
        nnx.update(module, state)
        return lambda x: module(x).logits
    if framework == "function":
        hidden = lambda x: jax.nn.relu(flat(x) @ w["kernel0"] + w["bias0"][None])
        return lambda x: hidden(x) @ w["kernel1"] + w["bias1"][None]
    if framework == "nnx":

        class Net(nnx.Module):
            def __init__(self):
                self.hidden, self.head = (nnx.Linear(*w[k].shape, rngs=nnx.Rngs(0)) for k in ("kernel0", "kernel1"))
                for i, layer in enumerate((self.hidden, self.head)):
                    layer.kernel, layer.bias = (nnx.Param(jnp.asarray(w[f"{name}{i}"])) for name in ("kernel", "bias"))

            def __call__(self, x):
                return self.head(jax.nn.relu(self.hidden(flat(x))))

        return Net()
    if framework == "linen":
        from flax import linen

        module = linen.Sequential([flat, linen.Dense(HIDDEN), jax.nn.relu, linen.Dense(10)])
        params = {f"layers_{2 * i + 1}": {"kernel": w[f"kernel{i}"], "bias": w[f"bias{i}"]} for i in (0, 1)}
        return functools.partial(module.apply, {"params": params})
    if framework == "equinox":
        import equinox as eqx

        mlp = eqx.nn.MLP(64, 10, HIDDEN, 1, key=jax.random.key(0))
        arrays = [jnp.asarray(w["kernel0"].T), jnp.asarray(w["bias0"]), jnp.asarray(w["kernel1"].T)]
        where = lambda m: (m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias)
        mlp = eqx.tree_at(where, mlp, (*arrays, jnp.asarray(w["bias1"])))
        return lambda x: jax.vmap(mlp)(flat(x))
    if framework == "haiku":
        import haiku as hk

        net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([HIDDEN, 10])(flat(x))))
        params = {f"mlp/~/linear_{i}": {"w": w[f"kernel{i}"], "b": w[f"bias{i}"]} for i in (0, 1)}
        return functools.partial(net.apply, jax.tree.map(jnp.asarray, params))
    import torch  # pyrefly: ignore[missing-import]

    layers = [torch.nn.Linear(64, HIDDEN), torch.nn.Linear(HIDDEN, 10)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({"weight": torch.tensor(w[f"kernel{i}"].T), "bias": torch.tensor(w[f"bias{i}"])})
    module = torch.nn.Sequential(torch.nn.Flatten(), layers[0], torch.nn.ReLU(), layers[1])
    return models.from_torch(module, np.zeros((2, 8, 8, 1), np.float32))


def _weight(path: Any, array: Any, w: dict[str, np.ndarray]) -> np.ndarray:
    names = [str(part.key) for part in path if hasattr(part, "key")]
    name = "kernel" if "kernel" in names else "bias"
    return w[f"{name}{int('head' in names)}"].reshape(array.shape)


def measured(framework: str, w: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Seconds to the first certificate, milliseconds of a forward pass, certificates, and accuracy under attack."""
    model, test, key = model_of(framework, w), data.load("digits", f"test[:{NUM_ATTACKED}]")[:], jax.random.key(seed)
    certify = functools.partial(
        certification.certify, key, model, measure=certification.gaussian(SIGMA), num_estimation=DRAWS
    )
    started = time.perf_counter()
    certify(test.image[:1])
    first = time.perf_counter() - started
    certificate = certify(test.image[:NUM_CERTIFIED])
    attack = attacks.pgd(epsilon=EPSILON, steps=20)
    robust = attacks.robust_accuracy(key, attack, model, test.image, test.label)
    forward, seconds = jax.jit(model if framework != "torch" else lambda x: model(x)), []
    for _ in range(20):
        started = time.perf_counter()
        jax.block_until_ready(forward(test.image))
        seconds.append(time.perf_counter() - started)
    return {
        "first": first, "robust": robust, "forward": 1e3 * float(np.median(seconds[5:])),
        "label": certificate.label.tolist(), "radius": certificate.radius.tolist(),
    }  # fmt: skip


def paired(name: str) -> dict[str, list[float]]:
    """Times of a PyTorch network through torchax, in those of our own of equal weights, which take turns."""
    import torch  # pyrefly: ignore[missing-import]

    ours: Any = getattr(models, name)(jax.random.key(0))
    body, pools = ours.body, ours.body.pools
    layers: list[Any] = []
    for conv in (body.conv1, body.conv2):
        kernel = np.moveaxis(np.asarray(conv.kernel[...]), (3, 2), (0, 1))
        stride = conv.strides if isinstance(conv.strides, int) else conv.strides[0]
        outputs, inputs, size, _ = kernel.shape
        layer = torch.nn.Conv2d(inputs, outputs, size, stride, "same" if pools else 0)
        layer.load_state_dict({"weight": torch.tensor(kernel), "bias": torch.tensor(np.asarray(conv.bias[...]))})
        layers += [layer, *([torch.nn.MaxPool2d(2)] if pools else []), torch.nn.ReLU()]
    channels = body.conv2.out_features
    side = int(np.sqrt(body.dense.in_features // channels))
    for dense in (body.dense, ours.head):
        kernel = np.asarray(dense.kernel[...]).T
        if dense is body.dense:  # its inputs are NHWC
            kernel = np.moveaxis(kernel.reshape(-1, side, side, channels), 3, 1).reshape(len(kernel), -1)
        layer = torch.nn.Linear(kernel.shape[1], kernel.shape[0])
        layer.load_state_dict({"weight": torch.tensor(kernel), "bias": torch.tensor(np.asarray(dense.bias[...]))})
        layers += [*([torch.nn.Flatten(), layer, torch.nn.ReLU()] if dense is body.dense else [layer])]
    images = np.random.default_rng(0).random((200, 28, 28, 1), np.float32)
    theirs = models.from_torch(torch.nn.Sequential(*layers), images)
    own = lambda x: ours(x).logits
    np.testing.assert_allclose(theirs(images), own(images), atol=1e-4)
    found = {}
    for what, made in (("forward", lambda fn: fn), ("gradient", lambda fn: jax.grad(lambda x: fn(x).max(1).sum()))):
        compiled = [jax.jit(made(fn)) for fn in (lambda x: theirs(x), own)]
        jax.block_until_ready([fn(images) for fn in compiled])
        ratios = []
        for _ in range(PAIRS):
            seconds = []
            for fn in compiled:
                started = time.perf_counter()
                for _ in range(3):
                    jax.block_until_ready(fn(images))
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
        found[what] = ratios
    return found


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Measures each framework in its own process and prints the table."""
    if config.one is not None:
        with np.load(config.one) as arrays:
            print(json.dumps(measured(config.only[0], dict(arrays), config.seed)))
        return {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.npz"
        write_arrays(path, trained(config))
        for name in config.only:
            if importlib.util.find_spec(NEEDS[name]) is None:
                Console().print(f"{name} is left out: {NEEDS[name]} is not installed.")
                continue
            parts = ["--only", name, "--one", str(path), "--seed", str(config.seed)]
            # Programs are small: without the last setting JAX would keep few of them.
            kept = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/{name}", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            for state in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.frameworks", *parts], capture_output=True, text=True,
                    env=os.environ | kept,
                )  # fmt: skip
                if done.returncode:
                    raise ValueError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
                of = json.loads(done.stdout.splitlines()[-1])
                found.setdefault(name, of)[state] = of["first"]
    table = Table(box=None, title="The same weights in each framework")
    for header in ("framework", "cold, s", "warm, s", "forward, ms", "equal", "PGD-20"):
        table.add_column(header, justify="left" if header == "framework" else "right")
    reference = next(iter(found.values()))
    for name, of in found.items():
        equal = np.equal(of["label"], reference["label"]) & np.equal(of["radius"], reference["radius"])
        times = (f"{of['cold']:.2f}", f"{of['warm']:.2f}", f"{of['forward']:.2f}")
        table.add_row(name, *times, f"{equal.sum()} of {equal.size}", f"{of['robust']:.3f}")
    console = Console(highlight=False)
    console.print(table)
    for name in found:
        console.print(f"{name} hands over {HANDED[name]}", markup=False)
    for name in ("cnn", "strided_cnn") if "torch" in found else ():
        for what, ratios in paired(name).items():
            low, middle, high = np.quantile(ratios, (0, 0.5, 1))
            console.print(f"{name} through torchax, {what}: {middle:.2f} ({low:.2f} to {high:.2f}) times our own")
    return found


if __name__ == "__main__":
    command(Config, run, __doc__)
