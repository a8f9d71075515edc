"""Speed of certificates, attacks and detectors on the accelerator of this machine, and their shares of its peaks.

Prepared to be run once where there is an accelerator, in a few minutes. Weights are untrained. A share of the peak of
matrix units counts the operations of the model, and a share of the bandwidth the bytes that its compiled program
accesses, both as XLA counts them: columns peak and memory. Noise, votes and steps of attacks count for neither, but
take time.

    python -m benchmarks.accelerator --markdown accelerator.md
    python -m benchmarks.accelerator --tiny
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import _report
from benchmarks._command import command
from benchmarks.certify import machine
from experiments.common.files import write_whole
from robustjax import attacks, certification, models, scoring
from robustjax.typing import Outputs

PEAKS = {  # operations with each type, and bytes of memory, a second, dense, as NVIDIA and Google state them
    "H200": {"float32": 67e12, "bfloat16": 989e12, "bytes": 4.8e12},
    "TPU v5 lite": {"bfloat16": 197e12, "bytes": 819e9},
    "TPU v6 lite": {"bfloat16": 918e12, "bytes": 1.64e12},
}
COLUMNS = ("work", "block", "per second", "min-max", "peak", "memory")
DETECTORS = {
    "energy": scoring.energy(), "knn": scoring.knn(k=50), "mahalanobis": scoring.mahalanobis(), "nac": scoring.nac(),
    "vim": scoring.vim(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    models: tuple[str, ...] = ("resnet20", "resnet110")
    """Models of 32x32x3 images."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types that they compute in."""
    blocks: tuple[int, ...] = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
    """Noisy copies in a block of a certificate."""
    num_images: int = 1_000
    """Images that are attacked."""
    rows: int = 50_000
    """Rows of 512 features, to which detectors are fitted and which they score."""
    rounds: int = 3
    """How often each row of the table is timed, after a call that compiles."""
    tiny: bool = False
    """A small network and few images: shows that it runs, and measures nothing."""
    json: str | None = None
    """File for all figures."""
    markdown: str | None = None
    """File for the table."""


class Subject:
    """A model with untrained weights, and what a pass of it costs."""

    def __init__(self, name: str, dtype: str, image_shape: tuple[int, ...]):
        module = models.create(name, jax.random.key(0), image_shape=image_shape, num_classes=10, dtype=jnp.dtype(dtype))
        functional = models.functional(module)
        self.name, self.dtype, self.image_shape = name, dtype, image_shape
        self.logits_of = lambda state, x: functional.outputs(state, x).logits
        self.state = functional.state
        self.logits_fn = jax.tree_util.Partial(self.logits_of, self.state)

    def images(self, count: int) -> jax.Array:
        """Random images."""
        return jax.random.uniform(jax.random.key(1), (count, *self.image_shape))

    def cost(self, batch: int, backward: bool = False) -> tuple[float, float]:
        """Operations and bytes of an image in a batch of this size, forward or forward and backward."""
        function = self.logits_of
        if backward:
            function = jax.grad(lambda x, state: self.logits_of(state, x).sum())
        shape = jax.ShapeDtypeStruct((batch, *self.image_shape), jnp.float32)
        counted: Any = jax.jit(function).lower(*((shape, self.state) if backward else (self.state, shape))).compile()
        counted = counted.cost_analysis()
        return counted["flops"] / batch, counted["bytes accessed"] / batch


def measured(work: str, of: Subject | None, block: int, count: int, run: Callable[[], Any], rounds: int, cost=None):
    """A row: how many of ``count`` a second, and operations and bytes of each."""
    jax.block_until_ready(run())
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        rates.append(count / (time.perf_counter() - start))
    row = {"work": work, "model": of.name if of else "", "dtype": of.dtype if of else "float32", "block": block}
    return row | {"rates": rates, "flops": cost and cost[0], "bytes": cost and cost[1]}


def certificates(subject: Subject, config: Config) -> list[dict[str, Any]]:
    """Noisy copies a second, by the size of a block."""
    x, measure, cost = subject.images(1), certification.gaussian(0.5), subject.cost(config.blocks[0])
    rows = []
    for block in config.blocks:
        count = max(config.blocks) if config.tiny else 4 * max(config.blocks)
        run = functools.partial(
            certification.sample_counts, jax.random.key(2), subject.logits_fn, x, measure,
            num_samples=count, batch_size=block,
        )  # fmt: skip
        rows.append(measured("certify, copies", subject, block, count, run, config.rounds, cost))
    return rows


def attacked(subject: Subject, config: Config) -> list[dict[str, Any]]:
    """Images a second of PGD with 40 steps, and of AutoAttack."""
    x, steps, rows = subject.images(config.num_images), 2 if config.tiny else 40, []
    labels, key = subject.logits_fn(x).argmax(-1), jax.random.key(3)
    pgd = attacks.pgd(epsilon=8 / 255, steps=steps, keep="last")
    flops, size = subject.cost(len(x), backward=True)
    run = lambda: pgd(key, subject.logits_fn, x, labels)
    rows.append(measured(f"PGD-{steps}", subject, len(x), len(x), run, config.rounds, (steps * flops, steps * size)))
    if not config.tiny:
        run = lambda: attacks.autoattack(epsilon=8 / 255).evaluate(key, subject.logits_fn, x, labels).x_adv
        rows.append(measured("AutoAttack", subject, len(x), len(x), run, 1))
    return rows


def detected(config: Config) -> list[dict[str, Any]]:
    """Rows a second of fitting and of scoring."""
    rng, rows = np.random.default_rng(0), []
    kernel = jnp.asarray(rng.standard_normal((512, 10), np.float32))
    features = jnp.asarray(np.abs(rng.standard_normal((config.rows, 512), np.float32)))
    outputs, labels = Outputs(features @ kernel, features), jnp.arange(config.rows) % 10
    for name, detector in DETECTORS.items():
        fit = functools.partial(detector.fit, outputs, labels, scoring.Head(kernel, jnp.zeros(10)))
        state = fit()
        if name != "energy":
            rows.append(measured(f"{name} fit", None, config.rows, config.rows, fit, config.rounds))
        score = functools.partial(detector.score, state, outputs)
        rows.append(measured(f"{name} score", None, config.rows, config.rows, score, config.rounds))
    return rows


def sheet(rows: list[dict[str, Any]], kind: str) -> _report.Sheet:
    """The table; shares are empty where the peak of the device, or the cost of the work, is not known."""
    peaks = next((peaks for name, peaks in PEAKS.items() if name in kind), {})
    cells = []
    for row in rows:
        rate, spread = float(np.median(row["rates"])), f"{min(row['rates']):,.0f}-{max(row['rates']):,.0f}"
        shares = [
            f"{rate * row[what] / peaks[peak]:.1%}" if row[what] and peak in peaks else ""
            for what, peak in (("flops", row["dtype"]), ("bytes", "bytes"))
        ]
        work = " ".join(filter(None, (row["work"], row["model"], row["dtype"] if row["model"] else "")))
        cells.append([work, f"{row['block']:,}", f"{rate:,.0f}", spread, *shares])
    return _report.Sheet(COLUMNS, cells)


def run(config: Config) -> dict[str, Any]:
    """Measures, prints the table, and returns all figures."""
    image_shape = (32, 32, 3)
    if config.tiny:
        config = dataclasses.replace(
            config, models=("mlp",), dtypes=config.dtypes[:1], blocks=(40, 80), num_images=4, rows=1_000, rounds=1
        )
        image_shape = (8, 8, 1)
    if min(*config.blocks, config.num_images, config.rounds) < 1 or config.rows < 1_000:
        raise ValueError(f"blocks, num_images and rounds must be positive, and rows at least 1,000, got {config}.")
    console, rows, kind = Console(highlight=False), [], jax.devices()[0].device_kind
    for name in config.models:
        for dtype in config.dtypes:
            subject = Subject(name, dtype, image_shape)
            console.print(f"{name} {dtype} ...")
            rows += certificates(subject, config) + attacked(subject, config)
    rows += detected(config)
    table = sheet(rows, kind)
    console.print(_report.as_table(table))
    result = {"machine": machine(), "kind": kind, "settings": dataclasses.asdict(config), "rows": rows}
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    if config.markdown:
        text = f"Measured on {kind}: {_report.about(result['machine'])}.\n\n{_report.as_markdown(table)}\n"
        write_whole(config.markdown, text)
    return result


if __name__ == "__main__":
    command(Config, run, __doc__)
