"""One network in several frameworks: what certifying and attacking it costs, and whether the answers are the same.

Trains a small MLP on digits with robustjax, puts its weights into each framework that is installed, and certifies and
attacks it there. Each framework has a process of its own without a cache of programs, so that the seconds to the first
certificate include all compiling, but no import.

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
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from experiments.common.files import write_arrays
from robustjax import attacks, certification, data, losses, models, training

NEEDS = {"robustjax": "flax", "function": "jax", "nnx": "flax", "linen": "flax", "equinox": "equinox",
         "haiku": "haiku", "torch": "torchax"}  # fmt: skip
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
        module = models.functional(models.mlp(jax.random.key(0), hidden=(HIDDEN,), image_shape=(8, 8, 1)))
        state = jax.tree_util.tree_map_with_path(lambda path, a: _weight(path, a, w), module.state)
        return jax.tree_util.Partial(lambda state, x: module.outputs(state, x).logits, state)
    if framework == "function":
        hidden = lambda x: jax.nn.relu(flat(x) @ w["kernel0"] + w["bias0"][None])
        return lambda x: hidden(x) @ w["kernel1"] + w["bias1"][None]
    if framework == "nnx":
        from flax import nnx

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
    names = [str(getattr(part, "key", part)) for part in path]
    return w[f"{names[-1]}{int('head' in names)}"].reshape(array.shape)


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
            here = dict(os.environ, JAX_ENABLE_COMPILATION_CACHE="false")
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.frameworks", *parts], capture_output=True, text=True, env=here
            )
            if done.returncode:
                raise ValueError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table(box=None, title="The same weights in each framework")
    for header in ("framework", "first certificate, s", "forward, ms", "equal certificates", "PGD-20"):
        table.add_column(header, justify="left" if header == "framework" else "right")
    reference = next(iter(found.values()))
    for name, of in found.items():
        equal = np.equal(of["label"], reference["label"]) & np.equal(of["radius"], reference["radius"])
        cells = (f"{of['first']:.2f}", f"{of['forward']:.2f}", f"{equal.sum()} of {equal.size}", f"{of['robust']:.3f}")
        table.add_row(name, *cells)
    Console().print(table)
    return found


if __name__ == "__main__":
    command(Config, run, __doc__)
