"""Compares runs of experiments.smoothing: one table, and all certified-accuracy curves in one figure.

python -m experiments.smoothing_report results/smoothing/digits-cnn-0.25 results/smoothing/digits-cnn-0.5
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import certificates, command_line, files
from experiments.smoothing import _report
from robustjax import metrics, plotting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a comparison."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders."""
    output: str = "results/smoothing/certified_accuracy.png"
    """Where the figure goes."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Radii of the table, in the norm of the runs, in [0, 1] pixels."""


def run(config: Config) -> None:
    """Prints the table and writes the figure."""
    if not config.runs:
        raise ValueError("runs must name at least one run folder.")
    console, curves, norms = Console(), {}, []
    table = Table("run", "ACR", *(f"{radius:g}" for radius in config.radii))
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for folder in map(epath.Path, config.runs):
        if not (folder / "metrics.json").exists():
            raise FileNotFoundError(f"{folder} is no finished run of experiments.smoothing: it has no metrics.json.")
        norms.append(json.loads((folder / "metrics.json").read_text())["norm"])
        _, labels, certificate, *_ = certificates.read(folder)
        settings = json.loads((folder / "config.json").read_text())
        asked = settings.get("target_radius")  # of which alone this run knows
        acr = "-" if asked is not None else f"{metrics.average_certified_radius(certificate, labels):.3f}"
        accuracy = metrics.certified_accuracy(certificate, labels, config.radii)
        name = folder.resolve().name
        table.add_row(name, acr, *(f"{value:.2f}".removeprefix("0") for value in accuracy))
        label = f"{name} (sigma {settings['sigma']:g}, ACR {acr})"
        curves[label if label not in curves else str(folder)] = _report.curve_of(folder)
    if len(set(norms)) > 1:
        raise ValueError(f"runs must have radii in one norm, got {', '.join(norms)}.")
    table.title = f"Certified accuracy at {norms[0]} radius"
    console.print(table)
    files.write_whole(config.output, files.figure_bytes(plotting.certified_accuracy_curve(curves, norm=norms[0])))
    console.print(f"Figure: {config.output}", soft_wrap=True)


if __name__ == "__main__":
    command_line.command_line(Config, run, __doc__)
