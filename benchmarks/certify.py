"""Speed and memory of `certification.sample_counts`, beside its limit and its peers, in one run on this machine.

Each row is timed in every round, one after another, so that all see the same state of the machine. Peers run on the
CPU and need the extra `bench`; before they are timed, their logits, votes and label must equal those of robustjax.

    python -m benchmarks.certify
    python -m benchmarks.certify --quick
    python -m benchmarks.certify --sweep --json benchmark.json
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from experiments.common.files import write_whole
from robustjax import certification, models

CNN, RESNET = "cnn 28x28x1", "resnet20 32x32x3"
BARS = {  # required speed of sample_counts, relative to the row
    (CNN, "bare forward pass"): 0.85,
    (CNN, "PyTorch default"): 3.0,
    (CNN, "PyTorch channels_last"): 1.2,
    (RESNET, "bare forward pass"): 0.9,
}
MEMORY_BAR = 0.05
SIGMA = 0.5
INSTALL = 'pip install "robustjax[bench]"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    num_samples: int = 10_000
    """Noisy copies of one 28x28x1 image, for each row of the cnn in each round."""
    num_samples_resnet: int = 2_000
    """Noisy copies of one 32x32x3 image, for each row of resnet20 in each round."""
    batch_size: int = 200
    """Noisy copies in one call of the model; 200 is the default of sample_counts on a CPU, 1000 on an accelerator."""
    rounds: int = 5
    """How often each row is timed."""
    memory: bool = True
    """Compare the peak memory of 10^4 and 10^6 samples, each in its own process."""
    sweep: bool = False
    """Also time sample_counts at batch sizes from 50 to 1000."""
    quick: bool = False
    """Take a tenth of the samples (for memory, of the larger number) and two rounds: shows that it runs."""
    seed: int = 0
    """Of weights, image and noise."""
    json: str | None = None
    """File for all figures."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A timed function: ``run`` makes ``num_samples`` noisy copies and waits for the result."""

    name: str
    batch_size: int
    num_samples: int
    run: Callable[[], Any]
    compile_seconds: float | None = None


class Subject:
    """A model with untrained weights, one image, and the functions that are timed in JAX."""

    def __init__(self, name: str, seed: int):
        model, shape = name.split()
        keys = jax.random.split(jax.random.key(seed), 3)
        image_shape = tuple(map(int, shape.split("x")))
        functional = models.functional(models.create(model, keys[0], image_shape=image_shape))
        self.state, self.key, self.x = functional.state, keys[1], jax.random.uniform(keys[2], (1, *image_shape))
        # Class 0 should win about 80 % of the votes, so that it can be certified and wrong noise shows in the counts.
        logits = np.asarray(jax.jit(functional.outputs)(self.state, self.noisy(100)).logits)
        bias = np.zeros(logits.shape[1], np.float32)
        bias[0] = np.quantile(logits[:, 1:].max(1) - logits[:, 0], 0.8)
        self.state.params["head"]["bias"] += bias
        self.logits_of = lambda state, x: functional.outputs(state, x).logits
        self.logits_fn = jax.tree_util.Partial(self.logits_of, self.state)
        self.measure = certification.gaussian(SIGMA)

    def noisy(self, batch_size: int) -> jax.Array:
        """Noisy copies of the image."""
        return self.x + SIGMA * jax.random.normal(self.key, (batch_size, *self.x.shape[1:]))

    def counts(self, num_samples: int, batch_size: int) -> np.ndarray:
        """Votes by ``sample_counts``."""
        sizes = {"num_samples": num_samples, "batch_size": batch_size}
        return np.asarray(certification.sample_counts(self.key, self.logits_fn, self.x, self.measure, **sizes)[0])

    def bare(self, num_samples: int, batch_size: int) -> Row:
        """Only the jitted forward pass, which is the limit."""
        noisy, forward, calls = self.noisy(batch_size), jax.jit(self.logits_of), -(-num_samples // batch_size)
        compile_seconds = seconds(lambda: forward.lower(self.state, noisy).compile())
        run = lambda: jax.block_until_ready([forward(self.state, noisy) for _ in range(calls)])
        return Row("bare forward pass", batch_size, calls * batch_size, run, compile_seconds)

    def smoothed(self, num_samples: int, batch_size: int) -> Row:
        """``sample_counts``, in whole blocks, because a partial block costs as much."""
        num_samples = -(-num_samples // batch_size) * batch_size
        program = jax.jit(functools.partial(certification.sample_counts, measure=self.measure, batch_size=batch_size))
        lower = functools.partial(program.lower, self.key, self.logits_fn, self.x, num_samples=num_samples)
        compile_seconds = seconds(lambda: lower().compile())
        run = functools.partial(self.counts, num_samples, batch_size)
        return Row("sample_counts", batch_size, num_samples, run, compile_seconds)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rates(rows: list[Row], rounds: int) -> np.ndarray:
    """Samples per second, ``(rows, rounds)``: A B C, A B C, ... after one call of each that is not timed."""
    for row in rows:
        row.run()
    return np.asarray([[row.num_samples / seconds(row.run) for row in rows] for _ in range(rounds)]).T


def peers(subject: Subject, config: Config) -> tuple[list[Row], list[str]]:
    """Rows of the installed peers, whose answers are checked, and the peers that were left out."""
    if jax.default_backend() != "cpu":
        return [], ["the peers, which run on the CPU: set JAX_PLATFORMS=cpu to compare"]
    if importlib.util.find_spec("torch") is None:
        return [], [f"PyTorch and ART, which are not installed: {INSTALL}"]
    import torch  # pyrefly: ignore[missing-import]
    from scipy import stats

    from benchmarks import _peers

    torch.set_num_threads(num_cores())
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 (ART draws from the global generator)
    num_samples, batch_size, x = config.num_samples, config.batch_size, np.asarray(subject.x)
    noisy, counts = np.asarray(subject.noisy(batch_size)), subject.counts(num_samples, batch_size)

    def loop(name: str, model: Any, size: int) -> Row:
        run = functools.partial(
            _peers.sample_counts, model, x[0], sigma=SIGMA, num_samples=num_samples, batch_size=size
        )
        return Row(name, size, num_samples, run)

    default, channels_last = (_peers.Cnn(subject.state, f) for f in (torch.contiguous_format, torch.channels_last))
    rows = [loop("PyTorch default", default, batch_size)]
    sweep = [loop("PyTorch channels_last", channels_last, size) for size in (25, 50, 100, 200, 400)]
    for row, model in ((rows[0], default), (sweep[0], channels_last)):
        error = np.abs(_peers.logits(model, noisy) - subject.logits_fn(noisy)).max()
        both = np.stack([row.run(), counts])
        p_value = stats.chi2_contingency(both[:, both.any(0)]).pvalue
        if error > 1e-4 or p_value < 1e-6:
            raise ValueError(f"{row.name} must be the same function, got logits {error} off, counts {both.tolist()}.")
    rows.append(sweep[int(np.median(rates(sweep, 3), axis=1).argmax())])
    # ART certifies with statsmodels, which it does not depend on.
    if missing := [name for name in ("art", "statsmodels") if importlib.util.find_spec(name) is None]:
        return rows, [f"ART, for which {' and '.join(missing)} is not installed: {INSTALL}"]
    settings: dict[str, Any] = {"num_selection": 100, "num_estimation": num_samples - 100, "batch_size": batch_size}
    art = _peers.art_certify(default, x[0], sigma=SIGMA, alpha=0.001, **settings)
    label = certification.certify(subject.key, subject.logits_fn, x, subject.measure, alpha=0.001, **settings).label[0]
    if label == certification.ABSTAIN or (theirs := art()) != label:
        raise ValueError(f"ART must certify the label that robustjax certifies, got {theirs} and {label}.")
    return [*rows, Row("ART certify", batch_size, num_samples, art)], []


def peak_memory(num_samples: int, config: Config) -> float:
    """Peak resident memory in MiB of a fresh process that draws ``num_samples`` samples with the cnn."""
    arguments = f"{num_samples}, {config.batch_size}, {config.seed}"
    code = f"from benchmarks import certify; certify.draw_and_print_peak({arguments})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)


def draw_and_print_peak(num_samples: int, batch_size: int, seed: int) -> None:
    Subject(CNN, seed).counts(num_samples, batch_size)
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # because on Linux the ru_maxrss of a process starts at its parent's
        print(int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 2**10)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # macOS counts bytes


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Machine and versions, and how busy the machine is."""
    info = pathlib.Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = ("robustjax", "jax", "torch", "adversarial-robustness-toolbox", "pytorch-ood")
    return {
        "cpu": cpu[0] if cpu else platform.processor() or platform.machine(),
        "cores": num_cores(),
        "device": jax.devices()[0].device_kind,
        "dtype": "float32",
        "load": os.getloadavg()[0],
        "versions": {"Python": platform.python_version()} | {n: versions[n] for n in packages if n in versions},
    }


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns all figures."""
    numbers, larger = {CNN: config.num_samples, RESNET: config.num_samples_resnet}, 1_000_000
    if config.quick:
        numbers, larger = {name: n // 10 for name, n in numbers.items()}, larger // 10
        config = dataclasses.replace(config, rounds=2, num_samples=numbers[CNN], num_samples_resnet=numbers[RESNET])
    if config.num_samples < 200 or min(config.num_samples_resnet, config.batch_size, config.rounds) < 1:
        raise ValueError(f"num_samples must be at least 200 and all numbers positive, got {config}.")
    here = machine()
    subjects = {name: Subject(name, config.seed) for name in numbers}
    others, left_out = peers(subjects[CNN], config)

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("", "batch", "samples/s", "min", "max", "compile", "ratio", "bar", "met"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    verdict = lambda met: "[green]yes" if met else "[red]no"
    figures: list[dict[str, Any]] = []
    for name, subject in subjects.items():
        rows = [subject.smoothed(numbers[name], config.batch_size), subject.bare(numbers[name], config.batch_size)]
        rows += others if name == CNN else []
        rows += [subject.smoothed(numbers[name], n) for n in (50, 100, 200, 500, 1000) if config.sweep]
        speeds = rates(rows, config.rounds)
        table.add_row(f"[bold]{name}")
        for row, speed in zip(rows, speeds):
            ratio, bar = float(np.median(speeds[0] / speed)), BARS.get((name, row.name))
            compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.2f} s"
            cells = [f"{f(speed):,.0f}" for f in (np.median, np.min, np.max)] + [compiled, f"{ratio:.2f}"]
            cells += [] if bar is None else [f">= {bar}", verdict(ratio >= bar)]
            table.add_row(row.name, str(row.batch_size), *cells)
            entry = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "run"}
            figures.append({"model": name, **entry, "samples_per_second": speed.tolist(), "ratio": ratio, "bar": bar})
    peaks = {n: peak_memory(n, config) for n in (10_000, larger) if config.memory}
    if config.memory:
        growth = peaks[larger] / peaks[10_000] - 1
        table.add_row(f"[bold]{CNN}, MiB")
        table.add_row("peak, 10,000 samples", "", f"{peaks[10_000]:.0f}")
        cells = [f"{growth:+.1%}", f"<= {MEMORY_BAR:.0%}", verdict(abs(growth) <= MEMORY_BAR)]
        table.add_row(f"peak, {larger:,}", "", f"{peaks[larger]:.0f}", "", "", "", *cells)

    console = Console(highlight=False)
    console.print(f"{here['cpu']}, {here['cores']} cores; JAX on {here['device']}; {here['dtype']}")
    console.print(", ".join(f"{package} {version}" for package, version in here["versions"].items()))
    if here["load"] > 0.5:
        console.print(f"[yellow]The machine was busy (load {here['load']:.1f}): idle, it gives others.")
    console.print(table)
    console.print("Medians; ratio: speed of sample_counts (first row) relative to the row.")
    for reason in left_out:
        console.print(f"Left out: {reason}.", markup=False, soft_wrap=True)
    settings = dataclasses.asdict(config)
    result = {"machine": here, "settings": settings, "rows": figures, "peak_mib": peaks, "left_out": left_out}
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command(Config, run, __doc__)
