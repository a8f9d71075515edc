"""The table, figure and files of a smoothing run, and the comparison of several."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from etils import epath

from robustjax import _paths, metrics, plotting

from ..common import certificates, files, runtimes, tables

COMPARED_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def summarize(folder: epath.Path, *, norm: str, radii: tuple[float, ...], at_target: bool) -> dict[str, Any]:
    """The numbers of the table, from the certificates on disk; without ACR where only a target radius was decided."""
    _, labels, certificate, num_samples, seconds = certificates.read(folder)
    return {
        "num_images": len(labels),
        "norm": norm,
        "radii": list(radii),
        "certified_accuracy": metrics.certified_accuracy(certificate, labels, radii).tolist(),
        "average_certified_radius": None if at_target else metrics.average_certified_radius(certificate, labels),
        "abstained": float(certificate.abstained.mean()),
        "samples_per_image": float(num_samples.mean()),
        "samples_per_second": float(num_samples.sum()) / max(float(seconds.sum()), 1e-9),
        "seconds_per_image": float(seconds.mean()),
    }


def table_of(summary: dict[str, Any]) -> tables.Table:
    """The table of a run."""
    radii, acr = summary["radii"], summary["average_certified_radius"]
    two_digits = all(math.isclose(round(r, 2), r) for r in radii)  # .375 as 0.38 would claim too much
    form = ".2f" if two_digits and not 0 < max(radii, default=0) < 0.25 else "g"
    rows = [("images", f"{summary['num_images']:,}"), ("standard accuracy", f"{summary['standard_accuracy']:.3f}")]
    for r, accuracy in zip(radii, summary["certified_accuracy"], strict=True):
        rows.append((f"certified accuracy at {summary['norm']} radius {r:{form}}", f"{accuracy:.3f}"))
    if acr is not None:
        rows.append(("average certified radius (ACR)", f"{acr:{'.3f' if acr >= 0.1 else '.3g'}}"))
    rows.append(("abstained", f"{summary['abstained']:.3f}"))
    rows += [(f"samples per {of}", f"{summary[f'samples_per_{of}']:,.0f}") for of in ("image", "second")]
    return tables.Table("Certified accuracy", ("", "value"), rows)


def curve_of(folder: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """Radii and marks for ``plotting.certified_accuracy_curve``."""
    _, labels, certificate, *_ = certificates.read(folder)
    return certificate.radius, (certificate.label == labels) & ~certificate.abstained


def report(
    folder: epath.Path, config: Any, summary: dict[str, Any], stopwatch: runtimes.Stopwatch, *, about: str, noise: str
) -> None:
    """Prints the table; writes metrics.json, report.md and the figure."""
    title = f"{about}, {noise} ({summary['norm']}, [0, 1] pixels)"
    figure = plotting.certified_accuracy_curve({noise: curve_of(folder)}, title=title, norm=summary["norm"])
    promise = f"Each certificate is wrong with probability at most {config.alpha:g}, for each image separately."
    tables.report(
        folder, config, runtimes.console(), stopwatch, title=f"Randomized smoothing: {about}",
        parts=[table_of(summary)._replace(title=title)], details=[promise],
        figures={"certified_accuracy": figure}, figure_format=config.figure_format,
    )  # fmt: skip
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")


def compare(runs: tuple[str, ...], output: epath.Path, radii: tuple[float, ...]) -> None:
    """Prints one table of finished runs, and writes all their curves in one figure."""
    rows, curves, norms = [], {}, []
    for folder in (_paths.path_of(compare=run) for run in runs):
        if not (folder / "metrics.json").exists():
            raise FileNotFoundError(f"{folder} is not a finished run of experiments.smoothing: it has no metrics.json.")
        advice = "finish that run, or leave it out"
        settings = files.read_json(folder / "config.json", "run", advice=advice)
        if settings["run"] != "smoothing":
            raise ValueError(f"compare must name runs of experiments.smoothing, got a run of another one, {folder}.")
        summary = files.read_json(folder / "metrics.json", "norm", advice=advice)
        norms.append(summary["norm"])
        _, labels, certificate, *_ = certificates.read(folder)
        at_target = settings.get("target_radius") is not None
        acr = "-" if at_target else f"{metrics.average_certified_radius(certificate, labels):.3f}"
        accuracy = metrics.certified_accuracy(certificate, labels, radii or COMPARED_RADII)
        name = folder.resolve().name
        rows.append((name, acr, *(f"{value:.2f}".removeprefix("0") for value in accuracy)))
        label = f"{name} (sigma {settings['sigma']:g}, ACR {acr})"
        curves[label if label not in curves else str(folder)] = curve_of(folder)
    if len(set(norms)) > 1:
        raise ValueError(f"compare must have runs with radii in one norm, got {', '.join(norms)}.")
    headers = ("run", "ACR", *(f"{radius:g}" for radius in radii or COMPARED_RADII))
    tables.show(runtimes.console(), tables.Table(f"Certified accuracy at {norms[0]} radius", headers, rows))
    figure = plotting.certified_accuracy_curve(curves, norm=norms[0])
    files.write_whole(output, files.figure_bytes(figure, output.suffix[1:]))
    runtimes.log(f"Figure: {output}")
