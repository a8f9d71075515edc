"""The rows, tables and figures of an adversarial run."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from robustjax import certification, metrics, plotting

from ..common import adversaries, files, runtimes, sanity, tables
from ..common.targets import ALPHA, NUM_ESTIMATION, NUM_PREDICTION, Target
from ._attack import Found

COLUMNS = (
    "norm", "epsilon", "attack", "num_images", "clean_accuracy", "robust_accuracy", "abstained", "certified_accuracy",
    "queries", "seconds",
)  # fmt: skip
COLUMNS_OF_GRID = 8


class Evaluation(NamedTuple):
    """What a run finds: whether each image is classified correctly without attack, and what the rest of it returns."""

    target: Target
    clean: np.ndarray
    found: Found
    steps: dict[str, dict[str, np.ndarray]]
    certificate: certification.Certificate | None
    findings: list[sanity.Finding]


def tabulate(folder: epath.Path, of: Evaluation) -> list[dict[str, Any]]:
    """A row for each norm, radius and attack, and for the parts of AutoAttack; writes metrics.csv."""
    rows, clean, certificate = [], of.clean, of.certificate
    for (norm, epsilon, name), arrays in of.found.items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"norm": norm, "epsilon": epsilon, "attack": name}
        row |= {"num_images": clean.size, "clean_accuracy": float(clean.mean())}
        row |= {"robust_accuracy": float(arrays["correct"].mean())}
        row |= {"queries": int(arrays["queries"]), "seconds": float(arrays["seconds"])}
        if certificate is not None:
            row["abstained"] = float((arrays["answer"] == certification.ABSTAIN).mean())
            row["certified_accuracy"] = float(metrics.certified_accuracy(certificate, of.target.label, (epsilon,))[0])
        rows.append(row)
        for i, part in enumerate(arrays.get("part", ())):
            of_part = {"attack": f"{name}: {part}", "robust_accuracy": float(arrays["part_accuracy"][i])}
            of_part |= {"queries": int(arrays["part_queries"][i]), "seconds": float(arrays["part_seconds"][i])}
            rows.append(row | of_part)
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    return rows


def tables_of(rows: list[dict], found: Found, about: str) -> list[tables.Table]:
    """Robust accuracy of each norm, and what is left after each part of AutoAttack."""
    made = []
    for norm in dict.fromkeys(row["norm"] for row in rows):
        of_norm = [row for row in rows if row["norm"] == norm]
        epsilons = sorted({row["epsilon"] for row in of_norm})
        at = {(row["attack"], row["epsilon"]): row for row in of_norm}
        headers = ["attack", *map(adversaries.text_of, epsilons), "queries", "seconds"]

        def line(name: str, at=at, epsilons=epsilons) -> list[str]:
            chosen = [at[name, epsilon] for epsilon in epsilons]
            cells = [f"{row['robust_accuracy']:.3f}" for row in chosen]
            spent = f"{max(row['queries'] for row in chosen):,}", f"{sum(row['seconds'] for row in chosen):.1f}"
            return [name.split(": ")[-1], *cells, *spent]

        names = list(dict.fromkeys(row["attack"] for row in of_norm))
        whole, parts = ([name for name in names if (":" in name) == part] for part in (False, True))
        body = [["clean", *[f"{of_norm[0]['clean_accuracy']:.3f}"] * len(epsilons), "", ""], *map(line, whole)]
        if len(whole) > 1:
            left = [np.all([found[norm, e, name]["correct"] for name in whole], axis=0).mean() for e in epsilons]
            body.append(["all of them", *(f"{accuracy:.3f}" for accuracy in left), "", ""])
        if of_norm[0]["certified_accuracy"] != "":
            certified = [f"{at[names[0], e]['certified_accuracy']:.3f}" for e in epsilons]
            body.append(["certified", *certified, "", ""])
        made.append(tables.Table(f"Robust accuracy, {norm}: {about}", headers, body))
        if parts:
            title = f"AutoAttack, {norm}, accuracy left after each part"
            made.append(tables.Table(title, headers, [line(name) for name in parts]))
    return made


def figures_of(folder: epath.Path, of: Evaluation) -> dict[str, Any]:
    """Robust accuracy over the radius, adversarial images, and the loss over the steps of PGD, for each norm."""
    drawn, (target, clean, found, steps, certificate, _) = {}, of
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
    for norm, more in steps.items():
        pairs = zip(more["epsilon"], more["loss"], strict=True)
        curves = {f"{norm} {adversaries.text_of(e)}": (sanity.STEPS, loss) for e, loss in pairs}
        drawn[f"loss_over_steps_{norm}"] = plotting.loss_over_steps(curves, title="PGD without random starts")
    return drawn


def _grid(target: Target, rows: np.ndarray, arrays: dict, title: str) -> Any:
    """Rows of images, perturbations (grey is 0, white the largest change of the image) and adversarial images."""
    image, adversarial = target.image[rows], arrays["x_adv"][rows]
    change = adversarial - image
    largest = np.abs(change).max((1, 2, 3), keepdims=True)
    answers = ["abstains" if answer == certification.ABSTAIN else str(answer) for answer in arrays["answer"][rows]]
    titles = [f"label {label}" for label in target.label[rows]]
    titles += [f"up to {size:.2g}" for size in largest.ravel()]
    titles += [f"predicted {answer}" for answer in answers]
    shown = np.concatenate([image, 0.5 + change / (2 * largest), adversarial])
    return plotting.image_grid(
        shown, titles=titles, columns=len(rows), title=title, row_labels=["image", "change (grey is 0)", "adversarial"]
    )


def report(folder: epath.Path, config: Any, of: Evaluation, stopwatch: runtimes.Stopwatch) -> list[dict[str, Any]]:
    """Prints the tables and findings; writes metrics.csv, metrics.json, report.md and figures; returns the rows."""
    rows, origin = tabulate(folder, of), f", {config.training} training"
    if config.is_trained:
        origin = f" from {config.origin}" if config.checkpoint else ""
    about, count = f"{config.dataset} {config.model}{origin}", len(of.clean)
    notes = [
        f"{count:,} images: two standard errors of an accuracy are at most {1 / np.sqrt(count):.3f}. Queries: the most "
        "gradient steps, or for Square model calls, per image. Seconds: for all radii, including compilation."
    ]
    if config.certify_intervals:
        notes.append("Certified: verified by interval bounds of the network itself at each radius.")
    if config.smoothed:
        abstained = max(row["abstained"] for row in rows)
        notes.append(
            f"Smoothed with sigma {config.sigma:g}: a prediction takes {NUM_PREDICTION:,} draws; abstaining (at most "
            f"{abstained:.3f} of the images) counts as wrong. Certified with {NUM_ESTIMATION:,} draws, alpha {ALPHA:g}."
        )
    lines = [(f"**{f.word}**" if f.passed is False else f.word, f.text) for f in of.findings]
    tables.report(
        folder, config, runtimes.console(), stopwatch, title=f"Robust accuracy: {about}",
        parts=[
            *tables_of(rows, of.found, about), *notes, tables.Table("Sanity checks", ("result", "finding"), lines)
        ],
        figures=figures_of(folder, of), figure_format=config.figure_format,
    )  # fmt: skip
    checks = [{"result": finding.word, "text": finding.text} for finding in of.findings]
    summary = {"checks": checks, "seconds": stopwatch.seconds(), "rows": rows}
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
    return rows
