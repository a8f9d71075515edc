"""What experiments.smoothing prints, writes and draws."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import certificates, files, runtimes
from robustjax import certification, metrics, plotting


def summarize(
    config: Any,
    measure: certification.Measure,
    standard_accuracy: float,
    training: dict[str, float],
    stopwatch: runtimes.Stopwatch,
) -> dict:
    """Computes the numbers of the table from the certificates on disk."""
    _, labels, certificate, num_samples, seconds = certificates.read(config.folder())
    radii = config.radii or default_radii(config, measure)
    acr = metrics.average_certified_radius(certificate, labels)
    return {
        "num_images": len(labels),
        "norm": measure.norm,
        "standard_accuracy": standard_accuracy,
        "radii": list(radii),
        "certified_accuracy": metrics.certified_accuracy(certificate, labels, radii).tolist(),
        "average_certified_radius": acr if config.target_radius is None else None,
        "abstained": float(certificate.abstained.mean()),
        "samples_per_image": float(num_samples.mean()),
        "samples_per_second": float(num_samples.sum()) / max(float(seconds.sum()), 1e-9),
        "seconds_per_image": float(seconds.mean()),
        "training": training,
        "seconds": stopwatch.seconds(),
        "machine": runtimes.machine(),
        "jax": jax.__version__,
    }


def default_radii(config: Any, measure: certification.Measure) -> tuple[float, ...]:
    """The target; or multiples of a round number, 0.25 where that suits, up to what these draws can certify."""
    if config.target_radius is not None:
        return (config.target_radius,)
    largest = largest_radius(config, measure)
    steps = [0.25, 0.5] if largest > 0.5 else [a * 10.0**b for b in range(-6, 0) for a in (1, 2, 5)]
    step = next((step for step in steps if largest <= 6 * step), steps[-1])
    return tuple((step * np.arange(math.ceil(largest / step))).tolist())


def largest_radius(config: Any, measure: Any) -> float:
    """What is certified where all draws agree."""
    if config.dual:  # each half has its share of the draws and of alpha
        n = config.num_estimation // 2
        bounds = np.repeat(certification.binomial_lower_bound(n, n, config.alpha / 2), 2)
        return float(certification.dual_radius(bounds, measure))
    n = config.num_estimation
    return float(measure.radius(certification.binomial_lower_bound(n, n, config.alpha)))


def rows_of(summary: dict) -> list[tuple[str, str]]:
    """The table of a run as pairs of texts."""
    certified = zip(summary["radii"], summary["certified_accuracy"], strict=True)
    acr = summary["average_certified_radius"]
    radii = summary["radii"]
    two_digits = all(math.isclose(round(r, 2), r) for r in radii)  # .375 as 0.38 would tell too much
    form = ".2f" if two_digits and not 0 < max(radii, default=0) < 0.25 else "g"
    return [
        ("images", f"{summary['num_images']:,}"),
        ("standard accuracy", f"{summary['standard_accuracy']:.3f}"),
        *(
            (f"certified accuracy at {summary['norm']} radius {r:{form}}", f"{accuracy:.3f}")
            for r, accuracy in certified
        ),
        *([] if acr is None else [("average certified radius (ACR)", f"{acr:{'.3f' if acr >= 0.1 else '.3g'}}")]),
        ("abstained", f"{summary['abstained']:.3f}"),
        ("samples per image", f"{summary['samples_per_image']:,.0f}"),
        ("samples per second", f"{summary['samples_per_second']:,.0f}"),
    ]


def curve_of(folder: epath.Path) -> tuple[np.ndarray, np.ndarray]:
    """Radii and marks for ``plotting.certified_accuracy_curve``."""
    _, labels, certificate, *_ = certificates.read(folder)
    return certificate.radius, (certificate.label == labels) & ~certificate.abstained


def report(config: Any, summary: dict, stopwatch: runtimes.Stopwatch, console: Console) -> None:
    """Prints the table; writes metrics.json, report.md and the figure."""
    folder = config.folder()
    norm, noise = summary["norm"], "" if config.noise == "gaussian" else f"{config.noise} "
    sigma = f"{'dual, ' if config.dual else ''}{noise}sigma {config.sigma:g}"
    title = f"{config.dataset} {config.model}, {sigma} ({norm}, [0, 1] pixels)"
    table = Table("", "value", title=title)
    table.columns[1].justify = "right"
    for row in rows_of(summary):
        table.add_row(*row)
    console.print(table)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    lines = [f"| {name} | {value} |" for name, value in rows_of(summary)]
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text = [
        f"# {title}",
        "",
        f"Each certificate is wrong with probability at most {config.alpha:g}, image by image; radii in {norm} norm.",
        "",
        *("| | value |", "|---|---|", *lines),
        "",
        "![certified accuracy](figures/certified_accuracy.png)",
        "",
        stopwatch.told(),
        "",
        *("| setting | value |", "|---|---|", *settings),
    ]
    figure = plotting.certified_accuracy_curve({sigma: curve_of(folder)}, title=title, norm=norm)
    files.write_whole(folder / "figures" / "certified_accuracy.png", files.figure_bytes(figure))
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
