"""What experiments.conformal prints, writes and draws."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common import files, runtimes
from robustjax import plotting

COLUMNS = (
    "seed", "training", "score", "method", "images", "coverage", "coverage_error", "size", "size_error",
)  # fmt: skip


def over_seeds(rows: list[dict], column: str, **where: Any) -> np.ndarray:
    """A number of the rows that are as asked, one for each seed."""
    return np.asarray([row[column] for row in rows if all(row[key] == value for key, value in where.items())])


def table_of(rows: list[dict], *, spread: bool) -> list[tuple[str, ...]]:
    """Training, score, method, coverage and size on clean and on attacked images, means over seeds, perhaps with sd."""
    lines, several = [], spread and len({row["seed"] for row in rows}) > 1
    for training, score, method in dict.fromkeys((r["training"], r["score"], r["method"]) for r in rows):
        cells = []
        for column in ("coverage", "size"):
            for images in ("clean", "attacked"):
                at = {"training": training, "score": score, "method": method, "images": images}
                values = over_seeds(rows, column, **at)
                digits = 3 if column == "coverage" else 2
                deviation = f" ({values.std(ddof=1):.{digits}f})" if several else ""
                cells.append(f"{values.mean():.{digits}f}{deviation}")
        lines.append((training, score, method, *cells))
    return lines


def findings_of(rows: list[dict], alpha: float) -> list[str]:
    """Whether RSCP+ held its guarantee, and what PTT and RCT did to the size of its sets."""
    robust = [row for row in rows if row["method"].startswith("rscp+")]
    worst = min(robust, key=lambda row: row["coverage"] - 2 * row["coverage_error"])
    low = worst["coverage"] - 2 * worst["coverage_error"]
    where = f"{worst['score']}, {worst['training']} training, seed {worst['seed']}, {worst['images']} images"
    word = "held" if low >= 1 - alpha else "VIOLATED"
    found = [
        f"The guarantee of RSCP+, {1 - alpha:g}, is {word}: at worst {worst['coverage']:.3f}, "
        f"{low:.3f} less two standard errors ({where})."
    ]
    trainings = list(dict.fromkeys(row["training"] for row in rows))
    for score in dict.fromkeys(row["score"].removesuffix("+ptt") for row in rows):
        size = lambda name, training: over_seeds(
            rows, "size", score=name, training=training, method="rscp+", images="clean"
        ).mean()
        plain = size(score, trainings[0])
        parts = [f"with PTT {size(f'{score}+ptt', trainings[0]):.2f}"]
        if "rct" in trainings:
            parts += [f"with RCT {size(score, 'rct'):.2f}", f"with both {size(f'{score}+ptt', 'rct'):.2f}"]
        found.append(f"Mean size of RSCP+ sets with {score}, clean images: {plain:.2f}, {', '.join(parts)}.")
    return found


def report(config: Any, rows: list[dict], pool: int, stopwatch: runtimes.Stopwatch, console: Console) -> None:
    """Prints the table and what it says; writes metrics.csv, metrics.json, report.md and the figure."""
    folder = config.folder()
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    title = f"{config.dataset} {config.model}: sets for l2 attacks of {config.epsilon:g}, sigma {config.sigma:g}"
    findings = findings_of(rows, config.alpha)
    table = Table("score", "method", "clean", "attacked", "clean", "attacked", title=title, caption_justify="left")
    table.caption = "Coverage, then mean size of the sets; report.md has standard deviations over seeds."
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    several = len({row["training"] for row in rows}) > 1
    before = None
    for training, score, *cells in table_of(rows, spread=False):
        name = f"{training} {score}" if several else score
        if before not in (None, name):
            table.add_section()
        table.add_row(name if name != before else "", *cells)
        before = name
    console.print(table)
    for finding in findings:
        console.print(finding, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    note = (
        f"{config.splits} random halves of {pool:,} images to calibrate and to test; alpha {config.alpha:g}, beta "
        f"{config.beta:g}, {config.num_samples:,} noisy copies behind a score. Numbers in brackets are standard "
        "deviations over seeds."
    )
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text = [
        f"# {title}",
        "",
        note,
        "",
        "| training | score | method | coverage, clean | attacked | size, clean | attacked |",
    ]
    text += ["|---|---|---|---|---|---|---|", *(f"| {' | '.join(line)} |" for line in table_of(rows, spread=True)), ""]
    text += [
        *(f"- {finding}" for finding in findings),
        "",
        "![mean sizes](figures/sizes.png)",
        "",
        stopwatch.told(),
        "",
    ]
    text += ["| setting | value |", "|---|---|", *settings]
    bars = {f"{row['training']} {row['score']}" if several else row["score"]: {} for row in rows}
    for name in bars:
        training, _, score = name.rpartition(" ") if several else (rows[0]["training"], "", name)
        for method in ("conformal", "rscp", "rscp+ hoeffding", "rscp+"):
            at = {"training": training, "score": score, "method": method, "images": "clean"}
            bars[name][method] = over_seeds(rows, "size", **at)
    figure = plotting.bar_chart(bars, label="mean size of the sets, clean images")
    files.write_whole(folder / "figures" / "sizes.png", files.figure_bytes(figure))
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    told = {"findings": findings, "seconds": stopwatch.seconds(), "rows": rows}
    files.write_whole(folder / "metrics.json", json.dumps(told, indent=1) + "\n")
