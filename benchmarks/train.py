"""Speed of a training step with Gaussian noise, beside PyTorch, in one run on this machine.

A step draws the noise, computes the loss and its gradient, and updates the weights by SGD with momentum, as
`training.make_step` and `losses.smoothing.gaussian_augmentation` do. PyTorch, from the extra `bench`, trains the same
network from the same weights, in its default layout and in channels_last. Each row is timed in every round, one after
another, so that all see the same state of the machine.

    python -m benchmarks.train
    python -m benchmarks.train --quick
    python -m benchmarks.train --models lenet --rounds 15 --json benchmark.json
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax
from rich.console import Console

from benchmarks import _report
from benchmarks._command import command
from benchmarks.certify import INSTALL, machine, num_cores, seconds
from experiments.common.files import write_whole
from robustjax import losses, models, training
from robustjax.typing import Batch

BATCHES = {"lenet": 256, "cnn": 256, "resnet20": 128}
SHAPES = {"lenet": (28, 28, 1), "cnn": (28, 28, 1), "resnet20": (32, 32, 3)}
STEPS = {"lenet": 8, "cnn": 4, "resnet20": 2}  # in one round
FORMATS = {"PyTorch default": "contiguous_format", "PyTorch channels_last": "channels_last"}
BARS = {  # required speed, relative to the row
    **{(model, name): bar for model in ("lenet", "cnn") for name, bar in zip(FORMATS, (1.0, 0.6))},
    **{("resnet20", name): bar for name, bar in zip(FORMATS, (0.65, 0.5))},
}
SIGMA, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.25, 0.01, 0.9, 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    models: tuple[Literal["lenet", "cnn", "resnet20"], ...] = ("lenet", "cnn", "resnet20")
    """Networks to train, in batches of 256, 256 and 128 images."""
    rounds: int = 9
    """How often each row is timed."""
    quick: bool = False
    """Take one round of one step: shows that it runs, and measures little."""
    seed: int = 0
    """Of weights, images and noise."""
    json: str | None = None
    """File for all figures."""


class Subject:
    """A network with untrained weights, a batch of random images, and its compiled step."""

    def __init__(self, name: str, seed: int, batch_size: int | None = None):
        batch_size = BATCHES[name] if batch_size is None else batch_size
        keys = jax.random.split(jax.random.key(seed), 4)
        functional = models.functional(models.create(name, keys[0], image_shape=SHAPES[name]))
        self.apply, self.model = functional.apply, functional.state
        x = jax.random.uniform(keys[1], (batch_size, *SHAPES[name]))
        labels = jax.random.randint(keys[2], (batch_size,), 0, 10)
        self.batch = Batch(x, labels, jax.numpy.arange(batch_size))
        optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM))
        step = training.make_step(losses.smoothing.gaussian_augmentation(sigma=SIGMA), optimizer)
        self.state = training.init(keys[3], self.model, optimizer)
        lowered = step.lower(self.apply, self.state, self.batch)  # pyrefly: ignore[missing-attribute]
        compiled: list[Any] = []
        self.compile_seconds = seconds(lambda: compiled.append(lowered.compile()))
        self._step = compiled[0]

    def step(self) -> float:
        """Takes one step and returns its loss."""
        self.state, metrics = self._step(self.state, self.batch)
        return float(metrics["loss"])

    def loss(self) -> float:
        """Loss without noise of the first weights, in training mode."""
        objective = losses.standard()
        return float(jax.jit(objective, static_argnums=1)(self.state.key, self.apply, self.model, self.batch)[0])


Step = Callable[[], float]


def peers(subject: Subject, name: str, seed: int) -> tuple[dict[str, Step], list[str]]:
    """Steps of PyTorch, whose loss is checked, and why they are left out."""
    if jax.default_backend() != "cpu":
        return {}, ["PyTorch, which runs on the CPU: set JAX_PLATFORMS=cpu to compare"]
    if importlib.util.find_spec("torch") is None:
        return {}, [f"PyTorch, which is not installed: {INSTALL}"]
    import torch  # pyrefly: ignore[missing-import]

    from benchmarks import _peers

    torch.set_num_threads(num_cores())
    torch.manual_seed(seed)
    x, labels, steps = np.asarray(subject.batch.image), np.asarray(subject.batch.label), {}
    for row, layout in FORMATS.items():
        memory_format = getattr(torch, layout)
        model = _peers.NETWORKS[name](subject.model, memory_format)
        settings = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        steps[row], loss = _peers.training_step(model, x, labels, memory_format, sigma=SIGMA, **settings)
        if not abs(loss - subject.loss()) < 1e-4:
            raise ValueError(f"{row} must be the same {name}, got a loss of {loss} instead of {subject.loss()}.")
    return steps, []


def _repeat(step: Step, number: int) -> None:
    for _ in range(number):
        step()


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns all figures."""
    if config.rounds < 1 or not config.models:
        raise ValueError(f"rounds must be positive and models at least one, got {config}.")
    config = dataclasses.replace(config, rounds=1) if config.quick else config
    here, left_out, figures = machine(), [], []
    for name in config.models:
        subject = Subject(name, config.seed)
        theirs, left_out = peers(subject, name, config.seed)
        steps = {"robustjax": subject.step} | theirs
        number = 1 if config.quick else STEPS[name]
        for step in steps.values():
            step()
        times = [
            [seconds(functools.partial(_repeat, step, number)) for step in steps.values()] for _ in range(config.rounds)
        ]
        for row, of_one in zip(steps, np.transpose(times)):
            entry = {"model": name, "name": row, "batch_size": BATCHES[name], "bar": BARS.get((name, row))}
            entry |= {"images_per_second": (number * BATCHES[name] / of_one).tolist()}
            figures.append(entry | ({"compile_seconds": subject.compile_seconds} if row == "robustjax" else {}))
    settings = dataclasses.asdict(config)
    result = {"machine": here, "settings": settings, "rows": figures, "left_out": left_out}
    result = json.loads(json.dumps(result))  # as it will be read
    console = Console(highlight=False)
    console.print(_report.about(here), soft_wrap=True, markup=False)
    if here["load"] > _report.BUSY:
        console.print(f"[yellow]The machine was busy (load {here['load']:.1f}): idle, it gives others.")
    sheet = _report.peer_sheet("train", result)
    console.print(_report.as_table(sheet))
    console.print("Images per second, medians; ratio: how many times as fast as its peer robustjax is.")
    for note in sheet.notes:
        console.print(note, markup=False, soft_wrap=True)
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command(Config, run, __doc__)
