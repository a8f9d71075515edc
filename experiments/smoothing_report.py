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

from experiments import _certificates, _run, smoothing
from robustjax import metrics, plotting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a comparison."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders."""
    output: str = "results/smoothing/certified_accuracy.png"
    """Where the figure goes."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """Radii of the table, l2, in [0, 1] pixels."""


def run(config: Config) -> None:
    """Prints the table and writes the figure."""
    if not config.runs:
        raise ValueError("runs must name at least one run folder.")
    console, curves = Console(), {}
    table = Table("run", "ACR", *(f"{radius:g}" for radius in config.radii), title="Certified accuracy at l2 radius")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for folder in map(epath.Path, config.runs):
        if not (folder / "metrics.json").exists():
            raise FileNotFoundError(f"{folder} is no finished run of experiments.smoothing: it has no metrics.json.")
        _, labels, certificate, _ = _certificates.read(folder)
        radius = metrics.average_certified_radius(certificate, labels)
        accuracy = metrics.certified_accuracy(certificate, labels, config.radii)
        name = folder.resolve().name
        table.add_row(name, f"{radius:.3f}", *(f"{value:.2f}".removeprefix("0") for value in accuracy))
        settings = json.loads((folder / "config.json").read_text())
        label = f"{name} (sigma {settings['sigma']:g}, ACR {radius:.3f})"
        curves[label if label not in curves else str(folder)] = smoothing.curve_of(folder)
    console.print(table)
    _run.write_whole(config.output, _run.png_of(plotting.certified_accuracy_curve(curves)))
    console.print(f"Figure: {config.output}", soft_wrap=True)


if __name__ == "__main__":
    _run.command_line(Config, run, __doc__)
