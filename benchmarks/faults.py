"""What a run survives: it is hurt in every way a machine knows, started again, and compared with one left in peace.

A smoothing run on digits is killed at random moments while it trains and while it certifies, told to end, deprived of
its disk, and finds its checkpoint cut short and a certificate altered. It has survived where the same command then ends
with the same certificates, each image once.

    python -m benchmarks.faults
    python -m benchmarks.faults --kills 4 --json faults.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import certificates, files

GRACE = 30.0
"""Seconds within which a process that is told to end must have ended, as clouds give before they take a machine."""
FOLDER = pathlib.Path("smoothing") / "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    kills: int = 20
    """Runs that are killed at a random moment, half of them while training."""
    num_epochs: int = 20
    """Of training, on digits."""
    num_images: int = 40
    """Images that are certified."""
    seed: int = 0
    """Of the moments."""
    json: str | None = None
    """File for all figures."""


class Subject:
    """The command that is hurt."""

    def __init__(self, config: Config):
        settings = {"num-epochs": config.num_epochs, "num-images": config.num_images, "num-estimation": 20_000}
        flags = [f"--{name}={value}" for name, value in {**settings, "name": "run"}.items()]
        self.command = [sys.executable, "-m", "experiments.smoothing", *flags, "--mesh", "data=1"]

    def start(self, results: pathlib.Path) -> subprocess.Popen[str]:
        """The run, in a process of its own."""
        command = [*self.command, f"--results-dir={results}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, results: pathlib.Path) -> tuple[int, str]:
        """Starts it and waits: exit status, and what it said."""
        process = self.start(results)
        out, err = process.communicate()
        return process.returncode, out + err


def lines_in(results: pathlib.Path) -> list[str]:
    """Lines of the certificates without their seconds."""
    path = results / FOLDER / "certificates.csv"
    return [line.rsplit(",", 2)[0] for line in path.read_text().splitlines()] if path.exists() else []


def newest_checkpoint(results: pathlib.Path) -> pathlib.Path:
    """Folder of the last checkpoint."""
    return max((results / FOLDER / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def when(process: subprocess.Popen[str], condition: Callable[[], bool], delay: float) -> None:
    """Waits for a condition and a while longer, or for the end of the process."""
    while process.poll() is None and not condition():
        time.sleep(0.01)
    time.sleep(delay)


def killed(subject: Subject, results: pathlib.Path, generator: random.Random, *, training: bool, seconds: float) -> str:
    """SIGKILL at a random moment of training, or of certifying; the complaint, or nothing."""
    process, folder = subject.start(results), results / FOLDER
    begun = (folder / "config.json").exists if training else (lambda: len(lines_in(results)) > 1)
    when(process, begun, generator.uniform(0, seconds))
    process.kill()
    process.communicate()
    return ""


def told_to_end(subject: Subject, results: pathlib.Path, generator: random.Random, *, training: bool) -> str:
    """SIGTERM: it must end by itself, in time and with status 0."""
    process, folder = subject.start(results), results / FOLDER
    begun = (folder / "checkpoints").is_dir if training else (lambda: len(lines_in(results)) > 1)
    when(process, begun, generator.uniform(0, 1))
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"did not end within {GRACE:g} s"
    return "" if process.returncode == 0 else f"ended with {process.returncode}: {err.strip()[-200:]}"


def cut_checkpoint(subject: Subject, results: pathlib.Path, generator: random.Random) -> str:
    """A file of the newest checkpoint loses its second half."""
    process = subject.start(results)
    when(process, lambda: len(list((results / FOLDER / "checkpoints").glob("[0-9]*"))) > 1, 0)
    process.kill()
    process.communicate()
    files = sorted(path for path in newest_checkpoint(results).rglob("*") if path.is_file() and path.stat().st_size)
    path = generator.choice(files)
    os.truncate(path, path.stat().st_size // 2)
    return ""


def altered_certificate(subject: Subject, results: pathlib.Path, generator: random.Random) -> str:
    """A bit of a certificate flips; the run must say so."""
    process, path = subject.start(results), results / FOLDER / "certificates.csv"
    when(process, lambda: len(lines_in(results)) > 5, 0)
    process.kill()
    process.communicate()
    content = bytearray(path.read_bytes())
    first = content.index(b"\n") + 1
    content[generator.randrange(first, first + 40)] ^= 1 << generator.randrange(7)
    path.write_bytes(content)
    _, words = subject.finish(results)
    return "" if "damaged" in words else "said nothing of the altered line"


def full_disk(subject: Subject, results: pathlib.Path, generator: random.Random) -> str:
    """The folder is on a disk that fills up at a random size; it must say so and, with room again, go on."""
    size = generator.randrange(300, 2500)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(results)], check=True)
    try:
        status, words = subject.finish(results)
        complaint = "" if status == 0 or "error: " in words else f"said nothing clear: {words.strip()[-300:]}"
        subprocess.run(["mount", "-o", "remount,size=64m", str(results)], check=True)
        kept = tempfile.mkdtemp()
        subject.finish(results)
        shutil.copytree(results, kept, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(results)], check=True)
    shutil.copytree(kept, results, dirs_exist_ok=True)
    shutil.rmtree(kept)
    return complaint


def can_mount() -> bool:
    """Whether a small disk can be made, which takes the rights of an administrator."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        return mounted.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


def run(config: Config) -> list[dict]:
    """Hurts, compares and prints the table.

    Returns:
      One row for each fault: how often it was tried and survived, and the complaints.
    """
    if config.kills < 2:
        raise ValueError(f"kills must be at least 2, got {config.kills}.")
    console, subject, rows = Console(highlight=False), Subject(config), []
    with tempfile.TemporaryDirectory() as scratch:
        peace = pathlib.Path(scratch) / "peace"
        status, words = subject.finish(peace)
        if status != 0:
            raise ValueError(f"the run must end well when it is left in peace, it said: {words}")
        whole = lines_in(peace)
        seconds = json.loads((peace / FOLDER / "metrics.json").read_text())
        training = seconds["training"]["seconds"]
        certifying = float(np.sum(certificates.read(epath.Path(peace / FOLDER)).seconds))
        faults: list[tuple[str, int, Callable[..., str], dict]] = [
            ("SIGKILL while training", config.kills // 2, killed, {"training": True, "seconds": training}),
            (
                "SIGKILL while certifying",
                config.kills - config.kills // 2,
                killed,
                {"training": False, "seconds": certifying},
            ),
            ("SIGTERM while training", 2, told_to_end, {"training": True}),
            ("SIGTERM while certifying", 2, told_to_end, {"training": False}),
            ("checkpoint cut short", 2, cut_checkpoint, {}),
            ("certificate altered", 2, altered_certificate, {}),
            ("disk full", 3, full_disk, {}),
        ]
        for name, count, hurt, settings in faults:
            row = {"fault": name, "runs": count, "survived": 0, "complaints": []}
            if hurt is full_disk and not can_mount():
                row["complaints"].append("not tried: no right to mount a small disk")
                count = row["runs"] = 0
            for i in range(count):
                results = pathlib.Path(scratch) / f"{name}-{i}"
                results.mkdir()
                complaint = hurt(subject, results, random.Random(f"{config.seed} {name} {i}"), **settings)
                status, words = subject.finish(results)
                if not complaint and status != 0:
                    complaint = f"could not go on: {words.strip()[-300:]}"
                if not complaint and lines_in(results) != whole:
                    complaint = "ended with other certificates"
                row["survived"] += not complaint
                row["complaints"] += [complaint] if complaint else []
                shutil.rmtree(results)
            rows.append(row)
            console.print(f"{name}: {row['survived']} of {row['runs']}", *row["complaints"], sep="\n  ", markup=False)
    table = Table("fault", "runs", "survived", title="Survived", title_justify="left")
    for row in rows:
        table.add_row(row["fault"], str(row["runs"]), str(row["survived"]))
    console.print(table)
    if config.json:
        files.write_whole(
            config.json, json.dumps({"settings": dataclasses.asdict(config), "rows": rows}, indent=1) + "\n"
        )
    return rows


if __name__ == "__main__":
    import tyro

    try:
        found = run(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(any(row["survived"] < row["runs"] for row in found))
