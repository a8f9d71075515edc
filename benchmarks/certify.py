"""Speed and memory of `certification.sample_counts`, beside its limit and its peers, in one run on this machine.

Each row is timed in every round, one after another, so that all meet the same state of the machine. Peers run on the
CPU and need the extra `bench`; before anything is timed they must give the logits, votes and label that robustjax gives.

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

from experiments._run import write_whole
from robustjax import certification, models

SIGMA = 1.0  # the most likely class of the untrained cnn gets some 95 % of the votes: a wrong sampler would show
ALPHA = 0.001
NUM_SELECTION = 100
INSTALL = 'pip install "robustjax[bench]"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    num_samples: int = 10_000
    """Noisy copies of one 28x28x1 image that each row of the cnn draws in each round."""
    num_samples_resnet: int = 2_000
    """The same of one 32x32x3 image, for resnet20."""
    batch_size: int = 100
    """Noisy copies in one call of the model; 100 is the default of sample_counts on a CPU, 1000 on an accelerator."""
    rounds: int = 5
    """How often each row is timed."""
    memory: bool = True
    """Compare the peak memory of 10^4 and 10^6 samples, in processes of their own."""
    sweep: bool = False
    """Also time sample_counts at other batch sizes."""
    quick: bool = False
    """A tenth of all samples and two rounds: shows that it works, and measures little."""
    seed: int = 0
    """Of weights, image and noise."""
    json: str | None = None
    """File for all figures."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What is timed.

    Attributes:
      name: in the table.
      batch_size: noisy copies in one call of the model.
      num_samples: noisy copies that ``run`` makes, or forward passes.
      run: does it once and waits for the result.
      compile_seconds: of tracing, lowering and compiling; None where nothing is compiled.
    """

    name: str
    batch_size: int
    num_samples: int
    run: Callable[[], Any]
    compile_seconds: float | None = None


class Subject:
    """A model with weights, one image, and what can be timed of them in JAX."""

    def __init__(self, name: str, image_shape: tuple[int, int, int], seed: int):
        keys = jax.random.split(jax.random.key(seed), 3)
        model = models.functional(models.create(name, keys[0], image_shape=image_shape))
        self.name, self.state, self.key = f"{name} {'x'.join(map(str, image_shape))}", model.state, keys[1]
        self.x = jax.random.uniform(keys[2], (1, *image_shape))
        self.logits_of = lambda state, x: model.outputs(state, x).logits
        self.logits_fn = jax.tree_util.Partial(self.logits_of, self.state)
        self.measure = certification.gaussian(SIGMA)

    def counts(self, num_samples: int, batch_size: int) -> np.ndarray:
        """Votes by ``sample_counts``."""
        settings = {"num_samples": num_samples, "batch_size": batch_size}
        return np.asarray(certification.sample_counts(self.key, self.logits_fn, self.x, self.measure, **settings)[0])

    def bare(self, num_samples: int, batch_size: int) -> Row:
        """The jitted forward pass by itself, which is the limit."""
        noisy = self.x + SIGMA * jax.random.normal(self.key, (batch_size, *self.x.shape[1:]))
        forward, calls = jax.jit(self.logits_of), -(-num_samples // batch_size)
        seconds = _seconds(lambda: forward.lower(self.state, noisy).compile())
        run = lambda: jax.block_until_ready([forward(self.state, noisy) for _ in range(calls)])
        return Row("bare forward pass", batch_size, calls * batch_size, run, seconds)

    def smoothed(self, num_samples: int, batch_size: int) -> Row:
        """``sample_counts``."""
        num_samples = -(-num_samples // batch_size) * batch_size  # a partial last block costs a whole one
        program = jax.jit(functools.partial(certification.sample_counts, measure=self.measure, batch_size=batch_size))
        args = (self.key, self.logits_fn, self.x)
        seconds = _seconds(lambda: program.lower(*args, num_samples=num_samples).compile())
        run = functools.partial(self.counts, num_samples, batch_size)
        return Row("sample_counts", batch_size, num_samples, run, seconds)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rates(rows: list[Row], rounds: int) -> np.ndarray:
    """Samples per second, ``(rows, rounds)``: A B C, A B C, ... after one call of each that is not timed."""
    for row in rows:
        row.run()
    return np.asarray([[row.num_samples / _seconds(row.run) for row in rows] for _ in range(rounds)]).T


def peers(subject: Subject, config: Config) -> tuple[list[Row], list[str]]:
    """Rows of the peers that are installed, after checking their answers, and what was left out."""
    if jax.default_backend() != "cpu":
        return [], ["peers, which run on the CPU: set JAX_PLATFORMS=cpu to compare"]
    if importlib.util.find_spec("torch") is None:
        return [], [f"PyTorch and ART, which are not installed: {INSTALL}"]
    import torch
    from scipy import stats

    from benchmarks import _peers

    torch.set_num_threads(_num_cores())
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002  ART draws from the global generator
    num_samples, batch_size, x = config.num_samples, config.batch_size, np.asarray(subject.x)
    noisy = np.asarray(x + SIGMA * jax.random.normal(subject.key, (batch_size, *x.shape[1:])))
    expected_logits, expected = subject.logits_fn(noisy), subject.counts(num_samples, batch_size)
    models_ = [_peers.Cnn(subject.state, layout) for layout in (torch.contiguous_format, torch.channels_last)]

    def loop(name: str, model: Any, batch_size: int) -> Row:
        settings = {"sigma": SIGMA, "num_samples": num_samples, "batch_size": batch_size}
        return Row(name, batch_size, num_samples, functools.partial(_peers.sample_counts, model, x[0], **settings))

    rows = [loop("PyTorch, default layout", models_[0], batch_size)]
    sweep = [loop("PyTorch, channels_last", models_[1], size) for size in (25, 50, 100, 200, 400)]
    for row, model in ((rows[0], models_[0]), (sweep[0], models_[1])):
        np.testing.assert_allclose(_peers.logits(model, noisy), expected_logits, atol=1e-4, err_msg=row.name)
        both = np.stack([row.run(), expected])
        p_value = stats.chi2_contingency(both[:, both.any(0)]).pvalue
        if p_value < 1e-6:
            raise ValueError(f"{row.name} must vote as sample_counts does, got {both.tolist()} (p = {p_value:.1e}).")
    rows.append(sweep[int(np.median(rates(sweep, 3), axis=1).argmax())])
    # ART's certify needs statsmodels, and does not say so.
    if missing := [name for name in ("art", "statsmodels") if importlib.util.find_spec(name) is None]:
        return rows, [f"ART, for which {' and '.join(missing)} is not installed: {INSTALL}"]
    settings = {"num_selection": NUM_SELECTION, "num_estimation": num_samples - NUM_SELECTION}
    settings |= {"alpha": ALPHA, "batch_size": batch_size}
    label = certification.certify(subject.key, subject.logits_fn, x, subject.measure, **settings).label[0]
    art = _peers.art_certify(models_[0], x[0], sigma=SIGMA, **settings)
    if label == certification.ABSTAIN or art() != label:
        raise ValueError(f"ART must certify the label that robustjax certifies, got {art()} and {label}.")
    return [*rows, Row("ART, certify", batch_size, num_samples, art)], []


def _draw_and_print_peak(num_samples: int, batch_size: int, seed: int) -> None:
    Subject("cnn", (28, 28, 1), seed).counts(num_samples, batch_size)
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a process on Linux begins at that of its parent
        print(int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 2**10)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # macOS counts bytes


def peak_memory(num_samples: int, batch_size: int, seed: int) -> float:
    """Peak resident memory in MiB of a fresh process that draws so many samples with the cnn."""
    code = f"from benchmarks import certify; certify._draw_and_print_peak({num_samples}, {batch_size}, {seed})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What ran, and how busy it was before."""
    info = pathlib.Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    packages = ("robustjax", "jax", "torch", "adversarial-robustness-toolbox")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": cpu[0] if cpu else platform.processor() or platform.machine(),
        "cores": _num_cores(),
        "device": jax.devices()[0].device_kind,
        "load_before": os.getloadavg()[0],
        "dtype": "float32",
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in packages if name in installed},
    }


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns all figures."""
    if config.quick:
        samples = {"num_samples": config.num_samples // 10, "num_samples_resnet": config.num_samples_resnet // 10}
        config = dataclasses.replace(config, rounds=2, **samples)
    if min(config.num_samples - NUM_SELECTION, config.num_samples_resnet, config.batch_size, config.rounds) < 1:
        raise ValueError(f"num_samples must exceed {NUM_SELECTION} and all numbers be positive, got {config}.")
    console = Console()
    figures: dict[str, Any] = {"machine": machine(), "settings": dataclasses.asdict(config), "rows": [], "bars": []}
    table = Table(
        box=None, pad_edge=False, caption="x: how often sample_counts fits into the row, median of the rounds"
    )
    for column in ("", "batch", "samples/s", "min", "max", "compile s", "x", "bar", ""):
        table.add_column(column, justify="left" if not column else "right")

    def bar(name: str, value: float, text: str, met: bool) -> tuple[str, str]:
        figures["bars"].append({"name": name, "value": value, "bar": text, "met": met})
        return text, "[green]met" if met else "[red]missed"

    bars = {("cnn 28x28x1", "bare forward pass"): 0.85, ("resnet20 32x32x3", "bare forward pass"): 0.9}
    bars |= {("cnn 28x28x1", "PyTorch, default layout"): 3.0, ("cnn 28x28x1", "PyTorch, channels_last"): 1.2}
    cnn, resnet = Subject("cnn", (28, 28, 1), config.seed), Subject("resnet20", (32, 32, 3), config.seed)
    peer_rows, left_out = peers(cnn, config)
    for subject, num_samples, others in ((cnn, config.num_samples, peer_rows), (resnet, config.num_samples_resnet, [])):
        rows = [subject.smoothed(num_samples, config.batch_size), subject.bare(num_samples, config.batch_size), *others]
        if config.sweep:
            rows += [subject.smoothed(num_samples, n) for n in (50, 100, 200, 500, 1000) if n != config.batch_size]
        speeds = rates(rows, config.rounds)
        table.add_row(f"[bold]{subject.name}, {num_samples:,} samples")
        for row, speed in zip(rows, speeds):
            ratio = float(np.median(speeds[0] / speed))
            named = {"model": subject.name, "name": row.name, "batch_size": row.batch_size}
            numbers = {"samples": row.num_samples, "samples_per_second": speed.tolist(), "ratio": ratio}
            figures["rows"].append(named | numbers | {"compile_seconds": row.compile_seconds})
            wanted = bars.get((subject.name, row.name))
            table.add_row(
                f"  {row.name}",
                str(row.batch_size),
                *(f"{f(speed):,.0f}" for f in (np.median, np.min, np.max)),
                "" if row.compile_seconds is None else f"{row.compile_seconds:.2f}",
                f"{ratio:.2f}",
                *(bar(f"{subject.name}: {row.name}", ratio, f">= {wanted}", ratio >= wanted) if wanted else ()),
            )
    if config.memory:
        numbers = (10_000, 100_000 if config.quick else 1_000_000)
        peaks = [peak_memory(n, config.batch_size, config.seed) for n in numbers]
        figures["peak_memory_mib"] = dict(zip(map(str, numbers), peaks))
        growth = peaks[1] / peaks[0] - 1
        table.add_row("[bold]cnn 28x28x1, peak memory")
        table.add_row(f"  {numbers[0]:,} samples", "", f"{peaks[0]:.0f} MiB")
        judged = bar("growth of peak memory", growth, "<= 5 %", abs(growth) <= 0.05)
        table.add_row(f"  {numbers[1]:,} samples", "", f"{peaks[1]:.0f} MiB", "", "", "", f"{growth:+.1%}", *judged)
    figures["left_out"] = left_out
    report(console, figures["machine"], left_out, table)
    if config.json:
        write_whole(pathlib.Path(config.json), json.dumps(figures, indent=1) + "\n")
    return figures


def report(console: Console, machine: dict[str, Any], left_out: list[str], table: Table) -> None:
    """Prints the machine, the table and what is not in it."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"{machine['cpu']}, {machine['cores']} cores; JAX on {machine['device']}; {machine['dtype']}")
    console.print(f"Python {machine['python']}, {versions}")
    if machine["load_before"] > 0.5:
        console.print(f"[yellow]The machine was busy before (load {machine['load_before']:.1f}): do not trust this.")
    console.print(table)
    for reason in left_out:
        console.print(f"Left out: {reason}.", markup=False, soft_wrap=True)


if __name__ == "__main__":
    import tyro

    try:
        run(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
