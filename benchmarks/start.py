"""What a first run costs: programs compiled, seconds spent on compiling, and the import, cold and warm.

Each product runs on digits, with so few epochs, images and draws that compiling dominates, in a process of its own:
once with an empty cache of compiled programs (cold), and again with that cache (warm). With `--against`, another
checkout takes turns with this one, so that both see the same state of the machine.

    python -m benchmarks.start
    python -m benchmarks.start --only ood --rounds 3 --against ../before --json start.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._command import command
from experiments.common.files import write_whole

HERE = pathlib.Path(__file__).parents[1]
RUNS = {
    "smoothing": ("--num-epochs", "2", "--num-images", "20", "--num-estimation", "1000"),
    "ood": ("--num-epochs", "2", "--seeds", "1"),
    "adversarial": ("--num-epochs", "2", "--num-images", "32"),
}
BARS = {"smoothing": (None, 0.7), "ood": (0.5, 0.6), "adversarial": (None, 0.7)}
"""Largest share of the other checkout's programs and seconds of compiling, cold."""
WARM_BAR = 0.6
"""Largest share of the other checkout's wall seconds, warm."""
MEASURED = {"programs": "{:,.0f}", "compiling": "{:.1f}", "cpu": "{:.1f}", "wall": "{:.1f}"}
IMPORT_BAR = 0.6
IMPORT = """
import time, jax
began = time.process_time()
import robustjax
print(time.process_time() - began)
"""
# Events nest: a program is traced while another one is. Only the outermost count.
PRODUCT = """
import json, runpy, sys, time
import jax
began, events, open_, spent = time.perf_counter(), [], [], [0.0]
def enter(event, value, **_):
    if event.startswith("/jax/core/compile/"):
        open_.append(time.process_time())
def leave(event, seconds, **_):
    if event.startswith("/jax/core/compile/"):
        cpu = time.process_time() - open_.pop()
        events.append(event)
        spent[0] += 0.0 if open_ else cpu
jax.monitoring.register_scalar_listener(enter)
jax.monitoring.register_event_duration_secs_listener(leave)
path, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
programs = events.count("/jax/core/compile/backend_compile_duration")
found = {"programs": programs, "compiling": spent[0], "cpu": time.process_time(), "wall": time.perf_counter() - began}
with open(path, "w") as file:
    json.dump(found, file)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    only: tuple[Literal["smoothing", "ood", "adversarial"], ...] = ("smoothing", "ood", "adversarial")
    """Products to run."""
    against: str | None = None
    """Folder of another checkout that takes turns with this one."""
    rounds: int = 1
    """How often each product is run, cold and warm."""
    json: str | None = None
    """File for all figures."""

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}.")
        if self.against is not None and not pathlib.Path(self.against, "robustjax").is_dir():
            raise ValueError(f"against must be a checkout of robustjax, got {self.against!r}.")


def in_process(checkout: pathlib.Path, code: str, *arguments: str, cache: pathlib.Path | None = None) -> str:
    """Runs code in a fresh process in a checkout and returns what it prints; ValueError if the process fails."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        words = (process.stderr.strip() or process.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(f"{' '.join(arguments[1:]) or 'import robustjax'} in {checkout} failed: {words}")
    return process.stdout


def started(checkout: pathlib.Path, product: str) -> dict[str, dict[str, float]]:
    """What one run of a product costs, ``cold`` and ``warm``."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for state in ("cold", "warm"):
            path = pathlib.Path(scratch, f"{state}.json")
            flags = (*RUNS[product], "--results-dir", str(pathlib.Path(scratch, state)), "--name", "run")
            in_process(
                checkout, PRODUCT, str(path), f"experiments.{product}", *flags, cache=pathlib.Path(scratch, "cache")
            )
            found[state] = json.loads(path.read_bytes())
    return found


def median_of(runs: list[dict], state: str, number: str) -> float:
    """The median over rounds."""
    return float(np.median([run[state][number] for run in runs]))


def run(config: Config) -> dict[str, Any]:
    """Runs the products in turns, prints the table and returns all figures."""
    checkouts = {"here": HERE} | ({} if config.against is None else {"against": pathlib.Path(config.against).resolve()})
    figures: dict[str, Any] = {product: {side: [] for side in checkouts} for product in config.only}
    imports: dict[str, list[float]] = {side: [] for side in checkouts}
    for _ in range(max(3, config.rounds)):
        for side, checkout in checkouts.items():
            imports[side].append(float(in_process(checkout, IMPORT)))
    for _ in range(config.rounds):
        for product in config.only:
            for side, checkout in checkouts.items():
                figures[product][side].append(started(checkout, product))
    table = Table("product", "cache", "checkout", *MEASURED, box=None)
    for product, sides in figures.items():
        for state in ("cold", "warm"):
            for side, runs in sides.items():
                cells = [form.format(median_of(runs, state, name)) for name, form in MEASURED.items()]
                table.add_row(product, state, side, *cells)
    console = Console(highlight=False)
    console.print(table)
    console.print("Medians; compiling: CPU seconds of tracing, lowering and compiling; cpu and wall: of the process.")
    for side, seconds in imports.items():
        console.print(f"import robustjax, {side}: {min(seconds):.2f} CPU s beyond jax; at most {IMPORT_BAR} s.")
    if config.against is not None:
        for line in compared(figures):
            console.print(line)
    result = {"settings": dataclasses.asdict(config), "products": figures, "import": imports}
    if config.json:
        write_whole(config.json, json.dumps(result, indent=1) + "\n")
    return result


def compared(figures: dict[str, dict[str, list]]) -> list[str]:
    """Shares of the other checkout's figures, beside their bars."""
    lines = []
    for product, sides in figures.items():
        programs, compiling = BARS[product]
        for state, number, bar in (
            ("cold", "programs", programs),
            ("cold", "compiling", compiling),
            ("warm", "wall", WARM_BAR),
        ):
            share = median_of(sides["here"], state, number) / median_of(sides["against"], state, number)
            met = "" if bar is None else f"; at most {bar}: {'yes' if share <= bar else 'no'}"
            lines.append(f"{product}, {state} {number}: {share:.2f} of the other checkout's{met}")
    return lines


if __name__ == "__main__":
    command(Config, run, __doc__)
