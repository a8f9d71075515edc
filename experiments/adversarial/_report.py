"""What experiments.adversarial prints and draws."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.adversarial import _sanity
from experiments.common import adversaries, files, runtimes
from experiments.common.targets import ALPHA, NUM_ESTIMATION, NUM_PREDICTION, Target
from robustjax import certification, metrics, plotting

COLUMNS = (
    "norm", "epsilon", "attack", "num_images", "clean_accuracy", "robust_accuracy", "abstained", "certified_accuracy",
    "queries", "seconds",
)  # fmt: skip
STYLE = {"pass": "green", "WARNING": "bold red", "not checked": "dim"}
COLUMNS_OF_GRID = 8


def tabulate(folder: epath.Path, label: np.ndarray, found: dict, certificate: Any) -> list[dict]:
    """Computes a row for each norm, radius and attack, and for the parts of AutoAttack."""
    clean = files.read_arrays(folder / "adversarial" / "clean.npz")["correct"]
    rows = []
    for (norm, epsilon, name), arrays in found.items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"norm": norm, "epsilon": epsilon, "attack": name}
        row |= {"num_images": clean.size, "clean_accuracy": float(clean.mean())}
        row |= {"robust_accuracy": float(arrays["correct"].mean())}
        row |= {"queries": int(arrays["queries"]), "seconds": float(arrays["seconds"])}
        if certificate is not None:
            row["abstained"] = float((arrays["answer"] == certification.ABSTAIN).mean())
            row["certified_accuracy"] = float(metrics.certified_accuracy(certificate, label, (epsilon,))[0])
        rows.append(row)
        for i, part in enumerate(arrays.get("part", ())):
            of_part = {"attack": f"{name}: {part}", "robust_accuracy": float(arrays["part_accuracy"][i])}
            of_part |= {"queries": int(arrays["part_queries"][i]), "seconds": float(arrays["part_seconds"][i])}
            rows.append(row | of_part)
    return rows


def tables_of(rows: list[dict], found: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers and cells: robust accuracy of each norm, and what is left after each part of AutoAttack."""
    tables = []
    for norm in dict.fromkeys(row["norm"] for row in rows):
        of_norm = [row for row in rows if row["norm"] == norm]
        epsilons = sorted({row["epsilon"] for row in of_norm})
        at = {(row["attack"], row["epsilon"]): row for row in of_norm}
        headers = [adversaries.text_of(epsilon) for epsilon in epsilons]

        def line(name, at=at, epsilons=epsilons):
            cells = [f"{at[name, e]['robust_accuracy']:.3f}" if (name, e) in at else "" for e in epsilons]
            chosen = [at[name, e] for e in epsilons if (name, e) in at]
            queries = max(row["queries"] for row in chosen)
            return [name, *cells, f"{queries:,}", f"{sum(row['seconds'] for row in chosen):.1f}"]

        names = list(dict.fromkeys(row["attack"] for row in of_norm))
        body = [["clean", *[f"{of_norm[0]['clean_accuracy']:.3f}"] * len(epsilons), "", ""]]
        body += [line(name) for name in names if ":" not in name]
        if len(body) > 2:
            left = [
                np.all([arrays["correct"] for (n, r, _), arrays in found.items() if (n, r) == (norm, e)], axis=0)
                for e in epsilons
            ]
            body.append(["all of them", *(f"{correct.mean():.3f}" for correct in left), "", ""])
        if of_norm[0]["certified_accuracy"] != "":
            certified = [f"{at[names[0], e]['certified_accuracy']:.3f}" for e in epsilons]
            body.append(["certified", *certified, "", ""])
        tables.append((f"Robust accuracy, {norm}", ["attack", *headers, "queries", "seconds"], body))
        parts = [name for name in names if ":" in name]
        if parts:
            body = [[name.split(": ")[1], *line(name)[1:]] for name in parts]
            tables.append((f"AutoAttack, {norm}, left after", ["attack", *headers, "queries", "seconds"], body))
    return tables


def figures(folder: epath.Path, target: Target, found: dict, steps: dict, certificate: Any) -> list[str]:
    """Draws robust accuracy over the radius, adversarial images, and the loss over the steps of PGD, for each norm.

    Returns:
      The names of the files.
    """
    drawn = {}
    clean = files.read_arrays(folder / "adversarial" / "clean.npz")["correct"]
    for norm in dict.fromkeys(norm for norm, _, _ in found):
        epsilons = sorted({epsilon for n, epsilon, _ in found if n == norm})
        names = list(dict.fromkeys(name for n, _, name in found if n == norm))
        accuracy = {name: [found[norm, e, name]["correct"].mean() for e in epsilons] for name in names}
        curves: dict[str, Any] = {name: (epsilons, values) for name, values in accuracy.items()}
        if certificate is not None:
            curves["certified"] = (epsilons, metrics.certified_accuracy(certificate, target.label, epsilons))
        drawn[f"robust_accuracy_{norm}"] = plotting.robust_accuracy_curve(curves, norm=norm, clean=clean.mean())
        strongest, epsilon = min(names, key=lambda name: sum(accuracy[name])), epsilons[len(epsilons) // 2]
        arrays = files.read_arrays(folder / "adversarial" / f"{norm}-{epsilon:g}-{strongest}.npz")
        fooled = np.flatnonzero(clean & ~arrays["correct"])[:COLUMNS_OF_GRID]
        if fooled.size:
            title = f"{strongest}, {norm} epsilon {adversaries.text_of(epsilon)}"
            drawn[f"images_{norm}"] = _grid(target, fooled, arrays, title)
    for norm, of in steps.items():
        curves = {
            f"{norm} {adversaries.text_of(e)}": (_sanity.STEPS, loss) for e, loss in zip(of["epsilon"], of["loss"])
        }
        drawn[f"loss_over_steps_{norm}"] = plotting.loss_over_steps(curves)
    for name, figure in drawn.items():
        files.write_whole(folder / "figures" / f"{name}.png", files.figure_bytes(figure))
    return [f"{name}.png" for name in drawn]


def _grid(target: Target, rows: np.ndarray, arrays: dict, title: str) -> Any:
    """Rows of images, perturbations (grey is 0, white the largest change of the image) and adversarial images."""
    image, adversarial = target.image[rows], arrays["x_adv"][rows]
    change = adversarial - image
    largest = np.abs(change).max((1, 2, 3), keepdims=True)
    titles = [f"is {label}" for label in target.label[rows]]
    titles += [f"up to {size:.2g}" for size in largest.ravel()]
    titles += [f"read as {answer}" for answer in arrays["answer"][rows]]
    shown = np.concatenate([image, 0.5 + change / (2 * largest), adversarial])
    row_labels = ("image", "change (grey is 0)", "adversarial image")
    return plotting.image_grid(shown, titles=titles, row_labels=row_labels, columns=len(rows), title=title)


def report(
    config: Any,
    folder: epath.Path,
    target: Target,
    found: dict[tuple[str, float, str], dict],
    steps: dict[str, dict[str, np.ndarray]],
    certificate: certification.Certificate | None,
    findings: list[_sanity.Finding],
    stopwatch: runtimes.Stopwatch,
    console: Console,
) -> list[dict]:
    """Prints the tables and findings; writes metrics.csv, metrics.json, report.md and figures.

    Returns:
      The rows of metrics.csv.
    """
    rows = tabulate(folder, target.label, found, certificate)
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    origin = f", {config.training} training"
    if config.checkpoint:
        origin = f" from {epath.Path(config.checkpoint).resolve().name}"
    about = f"{config.dataset} {config.model}{origin}"
    count = len(target.id)
    notes = [
        f"{count:,} images: two standard errors of an accuracy are at most {1 / np.sqrt(count):.3f}. "
        "Queries: steps, or for Square points, that may be spent on an image. Seconds: of all radii, with compilation."
    ]
    if config.certify_intervals:
        notes.append("Certified: verified by interval bounds, of the network itself, at each of these radii.")
    if config.smoothed:
        abstained = max(row["abstained"] for row in rows)
        notes.append(
            f"Smoothed with sigma {config.sigma:g}: answers are of {NUM_PREDICTION:,} draws; to abstain, at most "
            f"{abstained:.3f}, counts as wrong. Certified with {NUM_ESTIMATION:,} draws, alpha {ALPHA:g}."
        )
    text = [f"# Robust accuracy: {about}"]
    for title, headers, body in tables_of(rows, found):
        table = Table(*headers, title=f"{title}: {about}", title_justify="left")
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for cells in body:
            table.add_row(*cells)
        console.print(table)
        text += ["", f"## {title}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        text += [f"| {' | '.join(cells)} |" for cells in body]
    for note in notes:
        console.print(note, highlight=False)
        text += ["", note]
    grid = Table.grid(padding=(0, 2))
    for finding in findings:
        grid.add_row(Text(finding.word, STYLE[finding.word], no_wrap=True), finding.text)
    console.print("\nSanity checks", style="italic")
    console.print(grid)
    console.print(f"\nRun folder: {folder}", soft_wrap=True)
    pictures = figures(folder, target, found, steps, certificate)
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text += ["", "## Sanity checks", "", *(f"- {finding.word}: {finding.text}" for finding in findings), ""]
    text += [*(f"![{name}](figures/{name})" for name in pictures), "", stopwatch.told()]
    text += ["", "| setting | value |", "|---|---|", *settings]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    checks = [{"result": finding.word, "text": finding.text} for finding in findings]
    files.write_whole(
        folder / "metrics.json",
        json.dumps({"checks": checks, "seconds": stopwatch.seconds(), "rows": rows}, indent=1) + "\n",
    )
    return rows
