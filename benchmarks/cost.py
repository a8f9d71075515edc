"""How cost grows with samples, images, classes, dimension and devices, and a model that predicts it, on this machine.

Costs are seconds of CPU, of all threads together (wall-clock seconds on an accelerator), after a call that compiles.
Virtual CPU devices share the cores of the machine: they show the overhead of using several, not a speed-up. The model
of a certification has one measured input, the time of a block of noisy copies. Where no block can be measured, the
operations in it and an assumed share of a card's peak replace it, and the result is a prediction, not a measurement.

    python -m benchmarks.cost
    python -m benchmarks.cost --quick
    python -m benchmarks.cost --repeats 9 --json benchmark.json
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from benchmarks import _report
from benchmarks._command import command
from benchmarks.certify import machine
from experiments.common.files import write_whole
from robustjax import attacks, certification, models, scoring
from robustjax.typing import Outputs

SIGMA, BATCH, SELECTION = 0.5, 200, 100
BLOCKS = 6  # measured in one program: a program of a single block allocates its memory each time
ENOUGH = 0.05  # seconds that are measured at a time
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {  # dimension: pixels of an image, features of a detector
    "samples": {"certify": (400, 1_600, 6_400, 25_600)},
    "images": {
        "certify": (1, 4, 16, 64),
        "pgd": (8, 32, 128, 512),
        "mahalanobis": (1_000, 4_000, 16_000, 64_000),
    },
    "classes": {name: (10, 30, 100, 300, 1_000) for name in ("certify", "pgd", "mahalanobis")},
    "dimension": {
        "certify": (64, 256, 1_024, 4_096),
        "pgd": (64, 256, 1_024, 4_096),
        "mahalanobis": (64, 128, 256, 512),
    },
}
CHECKS = {  # where the model is compared with a measurement: images, draws
    ("cnn", (8, 8, 1)): (8, 5_000),
    ("lenet", (28, 28, 1)): (4, 4_000),
    ("resnet20", (32, 32, 3)): (2, 1_000),
}
RUNS = {  # the field's standard certifications: classes, and noisy copies in a block on this machine
    ("resnet110", (32, 32, 3)): (10, 100),
    ("resnet50", (224, 224, 3)): (1_000, 5),
}
NUM_IMAGES, NUM_SAMPLES, CARD_BATCH = 500, 100_100, 1_000


class Card(NamedTuple):
    """An accelerator, its peak, dense, and its bytes per second, as its maker states them."""

    name: str
    dtype: str
    peak: float
    bandwidth: float


CARDS = (
    Card("H200", "bfloat16", 989e12, 4.8e12),
    Card("H200", "TF32", 494e12, 4.8e12),
    Card("H200", "float32", 67e12, 4.8e12),
    Card("TPU v5e", "bfloat16", 197e12, 0.819e12),
    Card("TPU v6e", "bfloat16", 918e12, 1.64e12),
)
SHARES = {  # of the peak, assumed: 16 to 64 channels fill little of a matrix unit; float32 on a GPU does not use one
    ("resnet110", True): (0.01, 0.10),
    ("resnet50", True): (0.05, 0.40),
    ("resnet110", False): (0.15, 0.50),
    ("resnet50", False): (0.30, 0.70),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    repeats: int = 5
    """How often each point is timed."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of virtual CPU devices, which divide 8."""
    quick: bool = False
    """Take small sizes, one repeat and no standard runs: shows that it runs, and measures little."""
    seed: int = 0
    """Of weights, images and noise."""
    json: str | None = None
    """File for all figures."""


def predicted_seconds(
    seconds_per_block: float,
    *,
    num_images: int,
    num_samples: int,
    batch_size: int,
    num_devices: int = 1,
    sharing: int = 1,
    overhead: float = 0.0,
) -> float:
    r"""Predicts how long it takes to certify images.

    .. math:: t = t_0 + \left\lceil \frac{images}{devices / s} \right\rceil
              \left\lceil \frac{\lceil samples / batch \rceil}{s} \right\rceil t_{block}

    Args:
      seconds_per_block: for one block of noisy copies, from the noise to the logits, on one device.
      num_images: images to certify.
      num_samples: draws for each image, for selection and estimation together.
      batch_size: noisy copies in a block.
      num_devices: devices, over which images are split.
      sharing: s, how many devices share the draws of an image; it divides ``num_devices``.
      overhead: t_0, seconds spent once, such as for compiling.

    Returns:
      Seconds.

    Raises:
      ValueError: if a number is not positive, or ``sharing`` does not divide ``num_devices``.
    """
    counts = {
        "num_images": num_images,
        "num_samples": num_samples,
        "batch_size": batch_size,
        "num_devices": num_devices,
    }
    for name, value in {**counts, "seconds_per_block": seconds_per_block, "sharing": sharing}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")
    if num_devices % sharing:
        raise ValueError(f"sharing must divide num_devices={num_devices}, got {sharing}.")
    groups, blocks = num_devices // sharing, -(-num_samples // batch_size)
    return overhead + -(-num_images // groups) * -(-blocks // sharing) * seconds_per_block


def flops_per_image(logits_of: Callable[[Any, Any], Any], state: Any, image_shape: Sequence[int]) -> float:
    """Floating-point operations of a forward pass as XLA counts them, two for a multiply-add; nothing is computed."""
    x = jax.ShapeDtypeStruct((8, *image_shape), jnp.float32)
    counted: Any = jax.jit(logits_of).lower(state, x).cost_analysis()
    return float(counted["flops"]) / 8


def values_per_image(logits_of: Callable[[Any, Any], Any], state: Any, image_shape: Sequence[int]) -> float:
    """Values that the convolutions and products of a forward pass read and write, without weights."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("conv_general_dilated", "dot_general"):
                total += equation.invars[0].aval.size + equation.outvars[0].aval.size
            inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
            total += sum(count(value) for value in inner if hasattr(value, "eqns"))
        return total

    x = jax.ShapeDtypeStruct((8, *image_shape), jnp.float32)
    return count(jax.make_jaxpr(logits_of)(state, x).jaxpr) / 8


def card_seconds(amount: float, speed: float) -> float:
    """Seconds of a standard run on one card, from the operations or bytes of a forward pass, and those per second."""
    sizes = {"num_images": NUM_IMAGES, "num_samples": NUM_SAMPLES, "batch_size": CARD_BATCH}
    return predicted_seconds(amount * CARD_BATCH / speed, **sizes)


class Subject:
    """A model with untrained weights, and images."""

    def __init__(self, name: str, image_shape: tuple[int, ...], seed: int, *, num_images: int = 1, classes: int = 10):
        keys = jax.random.split(jax.random.key(seed), 3)
        module = models.create(name, keys[0], image_shape=image_shape, num_classes=classes)
        functional = models.functional(module)
        self.key, self.state, self.measure = keys[1], functional.state, certification.gaussian(SIGMA)
        self.logits_of = lambda state, x: functional.outputs(state, x).logits
        self.logits_fn = jax.tree_util.Partial(self.logits_of, self.state)
        self.x = jax.random.uniform(keys[2], (num_images, *image_shape))

    def certify(self, num_samples: int, batch_size: int = BATCH) -> certification.Certificate:
        """Certificates of all images, with ``num_samples`` draws each, including those that select the class."""
        sizes = {"num_selection": SELECTION, "num_estimation": num_samples - SELECTION, "batch_size": batch_size}
        return certification.certify(self.key, self.logits_fn, self.x, self.measure, **sizes)

    def blocks(self, batch_size: int = BATCH) -> Callable[[], Any]:
        """Logits of ``BLOCKS`` blocks of noisy copies of the first image: the measured input of the model."""

        @jax.jit
        def logits(key, logits_fn, image):
            def of_block(i, total):
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, i * batch_size + jnp.arange(batch_size))
                return total + logits_fn(jax.vmap(self.measure.sample, (0, None))(keys, image))

            shape = jax.eval_shape(logits_fn, jax.ShapeDtypeStruct((batch_size, *image.shape), jnp.float32))
            return jax.lax.fori_loop(0, BLOCKS, of_block, jnp.zeros(shape.shape))

        return functools.partial(logits, self.key, self.logits_fn, self.x[0])


def work(name: str, seed: int, *, samples: int = 400, images: int = 0, classes: int = 10, dimension: int = 256):
    """What is timed: a call of ``certify``, ``pgd`` or a detector at these sizes, images 0 being one to try others."""
    if name == "mahalanobis":
        rng, rows = np.random.default_rng(seed), images or 4_000
        features = jnp.asarray(rng.standard_normal((rows, dimension), np.float32))
        outputs = Outputs(jnp.asarray(rng.standard_normal((rows, classes), np.float32)), features)
        labels, detector = jnp.arange(rows) % classes, scoring.mahalanobis()
        return lambda: detector.score(detector.fit(outputs, labels, None), outputs)
    side = math.isqrt(dimension)
    if name == "certify":
        subject = Subject("cnn", (side, side, 1), seed, num_images=images or 1, classes=classes)
        return lambda: subject.certify(samples)
    subject = Subject("cnn", (side, side, 1), seed, num_images=images or 16, classes=classes)
    attack, labels = attacks.pgd(epsilon=0.1, steps=10, keep="last"), jnp.arange(images or 16) % classes
    return lambda: attack(subject.key, subject.logits_fn, subject.x, labels)


def seconds(function: Callable[[], Any], calls: int = 1) -> float:
    """Seconds of one call, as the mean of several in a row."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    start = clock()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (clock() - start) / calls


def measure(functions: Sequence[Callable[[], Any]], repeats: int) -> np.ndarray:
    """Seconds of each function, ``(functions, repeats)``: A B C, A B C, ...; short ones are called several times."""
    for function in functions:
        jax.block_until_ready(function())
    calls = [math.ceil(ENOUGH / max(seconds(function), ENOUGH / 100)) for function in functions]
    return np.asarray([[seconds(f, n) for f, n in zip(functions, calls)] for _ in range(repeats)]).T


def exponent(sizes: Sequence[float], times: np.ndarray) -> float:
    """Exponent of a power law through the medians of ``times (sizes, repeats)``: least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.median(times, axis=1)), 1)[0])


def growth(config: Config) -> list[dict[str, Any]]:
    """How the cost of each function grows with each quantity."""
    curves = []
    for quantity, functions in SWEEPS.items():
        for name, sizes in functions.items():
            sizes = sizes[:2] if config.quick else sizes
            times = measure([work(name, config.seed, **{quantity: size}) for size in sizes], config.repeats)
            curve = {"quantity": quantity, "function": name, "sizes": list(sizes), "seconds": times.tolist()}
            curves.append(curve | {"exponent": exponent(sizes, times), "at_the_end": exponent(sizes[-2:], times[-2:])})
    return curves


def print_device_seconds(numbers: Sequence[int], num_samples: int, repeats: int, seed: int) -> None:
    """Prints the seconds of eight images on some virtual devices, in a process that has used no device yet."""
    jax.config.update("jax_num_cpu_devices", max(numbers))
    subject = Subject("cnn", (16, 16, 1), seed, num_images=8)
    functions = []
    for axis in ("devices", None):
        for n in numbers:
            mesh = jax.make_mesh((n,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
            placed = copy.copy(subject)
            placed.x = jax.device_put(subject.x, NamedSharding(mesh, PartitionSpec(axis)))
            functions.append(functools.partial(placed.certify, num_samples))
    print(json.dumps(measure(functions, repeats).reshape(2, len(numbers), repeats).tolist()))


def devices(config: Config) -> list[dict[str, Any]]:
    """Seconds of the same certificates on one and on several virtual devices."""
    numbers = [n for n in config.devices if n <= 2] if config.quick else list(config.devices)
    arguments = f"{numbers}, {200 if config.quick else 1_600}, {config.repeats}, {config.seed}"
    command = [sys.executable, "-c", f"from benchmarks import cost; cost.print_device_seconds({arguments})"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    names = ("images split", "draws shared")
    return [
        {"quantity": "devices", "function": name, "sizes": numbers, "seconds": seconds}
        for name, seconds in zip(names, json.loads(printed.splitlines()[-1]))
    ]


def checks(config: Config) -> list[dict[str, Any]]:
    """Predicted and measured seconds of small certifications."""
    figures = []
    for (name, shape), (num_images, num_samples) in CHECKS.items():
        num_samples = num_samples // 5 if config.quick else num_samples
        subject = Subject(name, shape, config.seed, num_images=num_images)
        functions = [subject.blocks(), functools.partial(subject.certify, num_samples)]
        block, whole = measure(functions, config.repeats) / np.asarray([[BLOCKS], [1]])
        sizes = {"num_images": num_images, "num_samples": num_samples, "batch_size": BATCH}
        predicted, measured = predicted_seconds(float(np.median(block)), **sizes), float(np.median(whole))
        entry = {"model": name, "shape": list(shape), **sizes, "block": block.tolist(), "seconds": whole.tolist()}
        figures.append(entry | {"predicted": predicted, "measured": measured, "error": predicted / measured - 1})
    return figures


def predictions(config: Config) -> list[dict[str, Any]]:
    """Predicted seconds of the standard runs: here from a measured block, on cards from its operations."""
    figures = []
    for (name, shape), (classes, batch_size) in RUNS.items():
        subject = Subject(name, shape, config.seed, classes=classes)
        flops = flops_per_image(subject.logits_of, subject.state, shape)
        values = values_per_image(subject.logits_of, subject.state, shape)
        sizes = {"num_images": NUM_IMAGES, "num_samples": NUM_SAMPLES}
        block = float(np.median(measure([subject.blocks(batch_size)], min(config.repeats, 3)))) / BLOCKS
        here = {"batch_size": batch_size, "block": block}
        here |= {"seconds": predicted_seconds(block, **sizes, batch_size=batch_size)}
        cards = []
        for card in CARDS:
            shares = SHARES[name, card.dtype != "float32"]
            slow, fast, peak = (card_seconds(flops, card.peak * share) for share in (*shares, 1.0))
            moved = card_seconds(values * (2 if card.dtype == "bfloat16" else 4), card.bandwidth)
            bounds = {"at_peak": peak, "at_bandwidth": moved, "fast": fast, "slow": slow}
            cards.append({**card._asdict(), "shares": list(shares), **bounds})
        entry = {"model": name, "shape": list(shape), **sizes, "flops_per_image": flops, "values_per_image": values}
        figures.append({**entry, "here": here, "cards": cards})
    return figures


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its tables, and returns all figures."""
    config = dataclasses.replace(config, repeats=1) if config.quick else config
    if config.repeats < 1 or not config.devices or any(n < 1 or 8 % n for n in config.devices):
        raise ValueError(f"repeats must be positive and devices divide 8, got {config}.")
    here = machine()
    curves = growth(config) + devices(config)
    result = {"machine": here, "settings": dataclasses.asdict(config), "growth": curves, "checks": checks(config)}
    result["predictions"] = [] if config.quick else predictions(config)
    result = json.loads(json.dumps(result))  # as it will be read
    console = Console(highlight=False)
    console.print(_report.about(here), soft_wrap=True, markup=False)
    for sheet in _report.growth_sheets(result):
        console.print(_report.as_table(sheet))
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command(Config, run, __doc__)
