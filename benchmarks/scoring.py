"""Speed and memory of `scoring` and `metrics` on random features, beside pytorch-ood, in one run on this machine.

Costs are seconds of CPU, of all threads together, and both libraries have as many threads as there are cores. They take
turns in every round, so that both see the same state of the machine. pytorch-ood needs the extra `bench`; before it is
timed, its scores must equal those of robustjax.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --quick
    python -m benchmarks.scoring --rounds 5 --json benchmark.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from benchmarks.certify import INSTALL, machine, num_cores
from experiments.common.files import write_whole
from robustjax import metrics, scoring
from robustjax.typing import Outputs

BARS = {  # required speed of each, relative to pytorch-ood
    "knn fit": 0.8,
    "knn score": 1.4,
    "mahalanobis fit": 0.8,
    "mahalanobis score": 2.5,
    "vim fit": 0.8,
    "react fit": 0.8,
    "energy score": 4.0,
    "AUROC and FPR95": 4.0,
}
COMPILE_BAR = 2.0
MEMORY_BAR = 500
AGREEMENT = {"vim score": 1e-2}  # its subspace ends between directions of nearly equal variance
ENOUGH = 0.5
PAUSE = 0.2
DETECTORS = {
    "knn": scoring.knn(),
    "mahalanobis": scoring.mahalanobis(),
    "vim": scoring.vim(),
    "react": scoring.react(scoring.energy()),
}
Functions = dict[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    train_rows: int = 50_000
    """Rows that detectors are fitted to."""
    test_rows: int = 10_000
    """Rows that are scored."""
    dim: int = 512
    """Features of each row."""
    classes: int = 10
    """Logits of each row."""
    energy_classes: int = 1_000
    """Logits of each row for energy."""
    scores: int = 1_000_000
    """Scores that the metrics are computed from, half of each kind."""
    rounds: int = 3
    """How often each row of the table is timed; rows of milliseconds are timed up to ten times as often."""
    memory: bool = True
    """Measure the memory of each detector in its own process (Linux)."""
    quick: bool = False
    """Take a tenth of all rows and scores and one round: shows that it runs, and measures little."""
    seed: int = 0
    """Of all random numbers."""
    json: str | None = None
    """File for all figures."""


class Data:
    """Random features, their logits under a random head, labels, logits of many classes, and scores."""

    def __init__(self, config: Config):
        rng = np.random.default_rng(config.seed)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
        kernel, bias = normal(config.dim, config.classes), normal(config.classes)
        self.head = scoring.Head(kernel, bias)
        features = (jnp.abs(normal(rows, config.dim)) for rows in (config.train_rows, config.test_rows))
        self.train, self.test = (Outputs(z @ kernel + bias[None], z) for z in features)
        self.labels = jnp.arange(config.train_rows) % config.classes
        self.many = Outputs(normal(config.test_rows, config.energy_classes), jnp.zeros((config.test_rows, 1)))
        self.scores_in, self.scores_out = np.split(rng.standard_normal(config.scores, np.float32), [config.scores // 2])
        self.scores_out += 1


def our_functions(data: Data) -> Functions:
    """The functions of robustjax, by row of the table."""
    functions: Functions = {}
    for name, detector in DETECTORS.items():
        fit = functools.partial(detector.fit, data.train, data.labels, data.head)
        fitted = functools.cache(fit)
        functions[f"{name} fit"] = fit
        functions[f"{name} score"] = lambda detector=detector, fitted=fitted: detector.score(fitted(), data.test)
    functions["energy score"] = lambda: scoring.energy().score((), data.many)
    ranked = (metrics.auroc, metrics.fpr_at_tpr)
    functions["AUROC and FPR95"] = lambda: [f(data.scores_in, data.scores_out) for f in ranked]
    return functions


def their_functions(data: Data) -> Functions:
    """The functions of pytorch-ood for the same rows; each must be fitted before it scores."""
    import torch  # pyrefly: ignore[missing-import]
    from pytorch_ood import detector as peers  # pyrefly: ignore[missing-import]
    from pytorch_ood.metrics import functional  # pyrefly: ignore[missing-import]

    torch.set_num_threads(num_cores())
    arrays = data.train.features, data.test.features, data.many.logits, data.labels, *data.head
    train, test, many, labels, kernel, bias = (torch.tensor(np.asarray(a)) for a in arrays)
    scores = torch.from_numpy(np.concatenate([data.scores_in, data.scores_out]))
    foreign = torch.from_numpy(np.repeat([0, -1], [data.scores_in.size, data.scores_out.size]))
    knn, mahalanobis = peers.KNN(None), peers.Mahalanobis(None)
    vim = peers.ViM(None, train.shape[1] // 2, kernel.T.contiguous(), bias)
    react = peers.ReAct(None, lambda z: z @ kernel + bias)
    return {
        "knn fit": lambda: knn.fit_features(train, labels),
        "knn score": lambda: knn.predict_features(test),
        "mahalanobis fit": lambda: mahalanobis.fit_features(train, labels),
        # Half the distance, under a sum for the covariance.
        "mahalanobis score": lambda: 2 * len(train) * mahalanobis.predict_features(test),
        "vim fit": lambda: vim.fit_features(train, labels),
        "vim score": lambda: vim.predict_features(test),
        "react fit": lambda: react.fit_feature_maps(train, labels),
        "react score": lambda: react.predict_feature_maps(test),
        "energy score": lambda: peers.EnergyBased.score(many),
        "AUROC and FPR95": lambda: [float(f(scores, foreign)) for f in (functional.auroc, functional.fpr_at_tpr)],
    }


def peers(data: Data, ours: Functions) -> tuple[Functions, list[str]]:
    """The functions of pytorch-ood, if it is installed, with checked answers, and what was left out."""
    if jax.default_backend() != "cpu":
        return {}, ["pytorch-ood, which runs on the CPU here: set JAX_PLATFORMS=cpu to compare"]
    try:
        theirs = their_functions(data)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another PyTorch
        return {}, [f"pytorch-ood, which cannot be imported ({error}): {INSTALL}"]
    for name, function in theirs.items():
        answer = function()
        if not name.endswith(" fit"):
            wanted, answer = np.asarray(ours[name]()), np.asarray(answer)
            error = np.linalg.norm(answer - wanted) / np.linalg.norm(wanted)
            if not error < AGREEMENT.get(name, 1e-4):
                raise ValueError(f"{name} must equal that of robustjax, got a relative difference of {error:.3g}.")
    return theirs, []


def compile_seconds(function: Callable[[], Any]) -> float:
    """Seconds that XLA spends compiling in a call of ``function``."""
    durations: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.block_until_ready(function())
    jax.monitoring.unregister_event_duration_listener(listen)
    return sum(durations)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of all threads; after a pause, because idle threads of the other library spin for a while."""
    time.sleep(PAUSE)
    start = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - start


def measure(ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both in each round."""
    times: tuple[list[float], list[float]] = [], []
    while len(times[0]) < rounds or (sum(map(sum, times)) < ENOUGH and len(times[0]) < 10 * rounds):
        times[0].append(cpu_seconds(ours))
        if theirs is not None:
            times[1].append(cpu_seconds(theirs))
    return times


def extra_memory(name: str, config: Config) -> float:
    """Peak MiB of fitting and scoring beyond the features, in a fresh process."""
    settings = {**dataclasses.asdict(config), "json": None}
    code = f"from benchmarks import scoring as s; s.print_extra_memory({name!r}, s.Config(**{settings!r}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_extra_memory(name: str, config: Config) -> None:
    status = pathlib.Path("/proc/self/status")
    read = lambda field: int(re.findall(rf"{field}:\s*(\d+) kB", status.read_text())[0]) / 2**10
    functions = our_functions(Data(dataclasses.replace(config, energy_classes=1, scores=2)))
    before = read("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for step in ("fit", "score"):
        jax.block_until_ready(functions[f"{name} {step}"]())
    print(read("VmHWM") - before)


def run(config: Config) -> dict[str, Any]:
    """Runs the benchmark, prints its table, and returns all figures."""
    if config.quick:
        fewer = {name: getattr(config, name) // 10 for name in ("train_rows", "test_rows", "scores")}
        config = dataclasses.replace(config, rounds=1, **fewer)
    if config.train_rows < max(50, config.classes):
        raise ValueError(f"train_rows must be at least 50, and as many as classes, got {config}.")
    at_least_two = config.dim, config.classes, config.energy_classes, config.scores
    if min(config.test_rows, config.rounds) < 1 or min(at_least_two) < 2:
        raise ValueError(f"test_rows and rounds must be positive, other numbers at least 2, got {config}.")
    here, data = machine(), Data(config)
    ours = our_functions(data)
    compiled = {name: compile_seconds(function) for name, function in ours.items()}
    theirs, left_out = peers(data, ours)

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for column in ("", "robustjax", "pytorch-ood", "ratio", "bar", "met", "compile", "bar", "met"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    verdict = lambda met: "[green]yes" if met else "[red]no"
    figures: list[dict[str, Any]] = []
    for name, function in ours.items():
        times, bar = measure(function, theirs.get(name), config.rounds), BARS.get(name)
        ratio = float(np.median(np.divide(times[1], times[0]))) if theirs else None
        cells = [f"{np.median(seconds):.4f}" if seconds else "" for seconds in times]
        cells += ["" if ratio is None else f"{ratio:.2f}", f">= {bar}" if bar else ""]
        cells += [verdict(ratio >= bar) if ratio is not None and bar else "", f"{compiled[name]:.2f}"]
        table.add_row(name, *cells, f"<= {COMPILE_BAR:g}", verdict(compiled[name] <= COMPILE_BAR))
        entry = {"name": name, "ours": times[0], "theirs": times[1], "ratio": ratio, "bar": bar}
        figures.append({**entry, "compile_seconds": compiled[name]})
    measured = config.memory and pathlib.Path("/proc/self/clear_refs").exists()
    memory = {name: extra_memory(name, config) for name in DETECTORS} if measured else {}

    console = Console(highlight=False)
    console.print(f"{here['cpu']}, {here['cores']} cores; JAX on {here['device']}; {here['dtype']}")
    console.print(", ".join(f"{package} {version}" for package, version in here["versions"].items()))
    if here["load"] > 0.5:
        console.print(f"[yellow]The machine was busy (load {here['load']:.1f}): idle, it gives others.")
    console.print(
        f"{config.train_rows:,} training rows, {config.test_rows:,} test rows, {config.dim} features, {config.classes} "
        f"classes; energy of {config.energy_classes:,} classes; metrics of {config.scores:,} scores."
    )
    console.print(table)
    console.print("Medians of CPU seconds; ratio: how much faster robustjax is.")
    for name, peak in memory.items():
        judged = f", bar <= {MEMORY_BAR}: {verdict(peak <= MEMORY_BAR)}" if name == "knn" else ""
        console.print(f"Peak memory beyond the features, {name}: {peak:.0f} MiB{judged}")
    for reason in left_out:
        console.print(f"Left out: {reason}.", markup=False, soft_wrap=True)
    settings = dataclasses.asdict(config)
    result = {"machine": here, "settings": settings, "rows": figures, "extra_mib": memory, "left_out": left_out}
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command(Config, run, __doc__)
