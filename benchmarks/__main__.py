"""All benchmarks beside their peers, in one table, and the page docs/performance.md.

Each part runs in its own process: certify, scoring, attacks and train beside their peers, and growth. A peer that is
not installed is reported as missing, and nothing fails. `--write` rewrites docs/performance.md, its plot and the
figures behind it; parts that do not run keep their earlier figures, with their own date and machine.

    python -m benchmarks
    python -m benchmarks --quick --only certify attacks
    python -m benchmarks --write --keep-json results/benchmarks
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Literal

import jax
from rich.console import Console

from benchmarks import _report
from experiments.common.files import figure_bytes, write_whole

DOCS = pathlib.Path(__file__).parent.parent / "docs"
MODULES = {"certify": "certify", "scoring": "scoring", "attacks": "attacks", "train": "train", "growth": "cost"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    only: tuple[Literal["certify", "scoring", "attacks", "train", "growth"], ...] = tuple(MODULES)  # pyrefly: ignore
    """Parts to run."""
    quick: bool = False
    """Do a tenth of the work: shows that it runs, and measures little."""
    write: bool = False
    """Rewrite docs/performance.md."""
    keep_json: str | None = None
    """Keep the figures of finished parts in this folder; the same command reuses them. Delete it to measure again."""


def measured(part: str, config: Config, folder: pathlib.Path, load: float) -> dict[str, Any]:
    """The figures of a part and their date, from its own process or from an earlier run of the same command.

    ``load`` is the load of the machine before all parts; the load that a part measures itself includes earlier parts.

    Raises:
      ValueError: the process failed; the message is its last line.
    """
    path = folder / f"{part}.json"
    try:
        known = json.loads(path.read_bytes())
        if known["quick"] == config.quick and known["figures"]["machine"]["versions"]["jax"] == jax.__version__:
            return known
    except (OSError, ValueError, TypeError, KeyError):
        pass
    with tempfile.TemporaryDirectory() as scratch:
        raw = pathlib.Path(scratch, "figures.json")
        command = [sys.executable, "-m", f"benchmarks.{MODULES[part]}", "--json", str(raw)]
        command += ["--quick"] * config.quick
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            words = (process.stderr.strip() or process.stdout.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{part} ended with status {process.returncode}: {words}")
        figures = json.loads(raw.read_bytes())
    figures["settings"].pop("json")  # a path
    figures["machine"]["load"] = load
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    part_of = {"date": date, "quick": config.quick, "figures": figures}
    write_whole(path, json.dumps(part_of) + "\n")
    return part_of


def write_page(parts: dict[str, Any]) -> None:
    """Rewrites the page with these parts and those that it already has."""
    figures = DOCS / "performance.json"
    known = json.loads(figures.read_bytes()) if figures.exists() else {}
    known = {name: (known | parts)[name] for name in MODULES if name in known | parts}
    write_whole(figures, json.dumps(known, indent=None, separators=(",", ":")).replace('{"date"', '\n{"date"') + "\n")
    if "growth" in parts:
        write_whole(DOCS / "growth.png", figure_bytes(_report.growth_figure(parts["growth"]["figures"])))
    write_whole(DOCS / "performance.md", _report.page(known))


def run(config: Config) -> dict[str, Any]:
    """Runs the parts, prints one table, and returns what was measured; ValueError at the end if a part failed."""
    console, failed, parts, load = Console(highlight=False), [], {}, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(config.keep_json or scratch).expanduser()
        for part in (name for name in MODULES if name in config.only):
            console.print(f"{part} ...", soft_wrap=True)
            try:
                parts[part] = measured(part, config, folder, load)
            except ValueError as error:
                failed.append(str(error))
    rows, notes = [], []
    for part, found in parts.items():
        figures = found["figures"]
        notes.append(f"{part}, {found['date']}: {_report.about(figures['machine'])}.")
        if figures["machine"]["load"] > _report.BUSY:
            notes.append(f"The machine was busy (load {figures['machine']['load']:.1f}): idle, it gives others.")
        if part != "growth":
            sheet = _report.peer_sheet(part, figures)
            rows += [[f"{part}, {_report.UNITS[part]}"], *sheet.rows]
            notes += sheet.notes
    if rows:
        console.print(_report.as_table(_report.Sheet(_report.PEERS, rows)))
        console.print("Medians; ratio: how many times as fast as its peer, or as the limit, robustjax is.")
    if "growth" in parts:
        for sheet in _report.growth_sheets(parts["growth"]["figures"]):
            console.print(_report.as_table(sheet))
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if config.write and parts:
        write_page(parts)
    if failed:
        raise ValueError("; ".join(failed))
    return parts


if __name__ == "__main__":
    import tyro

    try:
        run(tyro.cli(Config, description=__doc__, prog="python -m benchmarks"))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; with --keep-json the same command resumes from here.")
