"""What a run survives: faults are injected, the run is started again, and compared with an undisturbed one.

A smoothing run on digits is killed at random moments while it trains and while it certifies, is sent SIGTERM, runs out
of disk space, and finds a truncated checkpoint and an altered certificate. It survives a fault if the same command then
ends with the same certificates, each image once.

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

from benchmarks._command import command
from experiments.common import certificates, files

GRACE = 30.0
"""Seconds within which a process must end after SIGTERM; clouds wait as long before they take a machine."""
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
    """Of the random moments."""
    json: str | None = None
    """File for all figures."""


class Subject:
    """The command that faults are injected into."""

    def __init__(self, config: Config):
        settings = {"num-epochs": config.num_epochs, "num-images": config.num_images, "num-estimation": 20_000}
        flags = [f"--{name}={value}" for name, value in {**settings, "name": "run"}.items()]
        self.command = [sys.executable, "-m", "experiments.smoothing", *flags, "--mesh", "data=1"]

    def start(self, results: pathlib.Path) -> subprocess.Popen[str]:
        """Starts the run in its own process."""
        command = [*self.command, f"--results-dir={results}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, results: pathlib.Path) -> tuple[int, str]:
        """Starts the run and waits: its exit status and its output."""
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
    """SIGKILL at a random moment of training or of certifying; returns a complaint, or an empty string."""
    process, folder = subject.start(results), results / FOLDER
    begun = (folder / "config.json").exists if training else (lambda: len(lines_in(results)) > 1)
    when(process, begun, generator.uniform(0, seconds))
    process.kill()
    process.communicate()
    return ""


def told_to_end(subject: Subject, results: pathlib.Path, generator: random.Random, *, training: bool) -> str:
    """SIGTERM: the run must end in time and with status 0."""
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
    """Truncates a file of the newest checkpoint to its first half."""
    process = subject.start(results)
    when(process, lambda: len(list((results / FOLDER / "checkpoints").glob("[0-9]*"))) > 1, 0)
    process.kill()
    process.communicate()
    files = sorted(path for path in newest_checkpoint(results).rglob("*") if path.is_file() and path.stat().st_size)
    path = generator.choice(files)
    os.truncate(path, path.stat().st_size // 2)
    return ""


def altered_certificate(subject: Subject, results: pathlib.Path, generator: random.Random) -> str:
    """Flips a bit of a certificate; the run must report it."""
    process, path = subject.start(results), results / FOLDER / "certificates.csv"
    when(process, lambda: len(lines_in(results)) > 5, 0)
    process.kill()
    process.communicate()
    content = bytearray(path.read_bytes())
    first = content.index(b"\n") + 1
    content[generator.randrange(first, first + 40)] ^= 1 << generator.randrange(7)
    path.write_bytes(content)
    _, words = subject.finish(results)
    return "" if "damaged" in words else "did not report the altered line"


def full_disk(subject: Subject, results: pathlib.Path, generator: random.Random) -> str:
    """Puts the folder on a disk that fills up; the run must report it, and resume once there is room."""
    size = generator.randrange(300, 2500)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(results)], check=True)
    try:
        status, words = subject.finish(results)
        complaint = "" if status == 0 or "error: " in words else f"did not report the full disk: {words.strip()[-300:]}"
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
    """Whether a small disk can be mounted, which needs administrator rights."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        return mounted.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


def run(config: Config) -> list[dict]:
    """Injects the faults, compares the certificates and prints the table.

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
            raise ValueError(f"the undisturbed run must succeed, but it ended with: {words}")
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
                row["complaints"].append("not tried: mounting a small disk is not permitted")
                count = row["runs"] = 0
            for i in range(count):
                results = pathlib.Path(scratch) / f"{name}-{i}"
                results.mkdir()
                complaint = hurt(subject, results, random.Random(f"{config.seed} {name} {i}"), **settings)
                status, words = subject.finish(results)
                if not complaint and status != 0:
                    complaint = f"could not resume: {words.strip()[-300:]}"
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
    found = command(Config, run, __doc__)
    sys.exit(any(row["survived"] < row["runs"] for row in found))
