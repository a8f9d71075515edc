"""The rows, tables and figures of an out-of-distribution run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath

from robustjax import data, metrics, plotting

from ..common import files, foreign, images, runtimes, subsets, tables
from ._score import MAX_IMAGES, SECONDS

GROUPS = ("near", "far")
METRICS = metrics.DetectionMetrics._fields
COLUMNS = ("seed", "detector", "set", "group", "num_in", "num_out", *METRICS, *SECONDS)
NUM_ENDS = 16
"""Images at each end of a detector's scores."""

Scores = dict[tuple[int, str], dict[str, np.ndarray]]
"""By seed and detector: scores of each set."""


def tabulate(folder: epath.Path, scores: Scores, sets: dict[str, foreign.Foreign]) -> list[dict[str, Any]]:
    """One row of metrics for each seed, detector and set; writes metrics.csv and the scores of each set."""
    rows: list[dict[str, Any]] = []
    for (seed, name), of in scores.items():
        seconds = {key: float(of[key]) for key in SECONDS}
        for part, (group, _) in sets.items():
            values = metrics.detection_metrics(of["in"], of[part])
            sizes = {"num_in": of["in"].size, "num_out": of[part].size}
            row = {"seed": seed, "detector": name, "set": part, "group": group, **sizes}
            rows.append({**row, **values._asdict(), **seconds})
    files.write_rows(folder / "metrics.csv", COLUMNS, rows)
    for part in ("in", *sets):
        together = {name: np.stack([scores[pair][part] for pair in scores if pair[1] == name]) for _, name in scores}
        files.write_arrays(folder / "scores" / f"{part.translate(images.UNSAFE)}.npz", together)
    return rows


def over_seeds(rows: list[dict], detector: str, metric: str, *, group: str | None = None, part: str | None = None):
    """The metric of each seed; over a group it is the unweighted mean of its sets, as in OpenOOD."""
    chosen = [r for r in rows if r["detector"] == detector and (r["set"] == part if part else r["group"] == group)]
    return np.asarray(
        [np.mean([r[metric] for r in chosen if r["seed"] == s]) for s in sorted({r["seed"] for r in chosen})]
    )


def tables_of(
    rows: list[dict], names: list[str], *, seeds: int, positive: str
) -> tuple[list[tables.Table], list[tables.Table]]:
    """What is printed: AUROC of groups and sets, other metrics of groups, seconds; and all metrics of each set."""
    groups = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    members = {row["set"]: row["group"] for row in rows}
    parts = [part for part, group in members.items() if list(members.values()).count(group) > 1]
    fpr = f"fpr_{positive}_positive"
    columns = {"AUROC": "auroc", "AUPR-in": "aupr_in", "AUPR-out": "aupr_out", "FPR@95TPR": fpr}
    side = {"ood": "out-of-distribution", "id": "in-distribution"}[positive]

    def table(title: str, cells: list[tuple[str, str, dict[str, str]]]) -> tables.Table:
        """Columns are (header, metric, where); the best entry of each is bold."""
        values = {name: [over_seeds(rows, name, metric, **where) for _, metric, where in cells] for name in names}
        means = np.asarray([[v.mean() for v in values[name]] for name in names])
        best = [c.min() if metric == fpr else c.max() for c, (_, metric, _) in zip(means.T, cells, strict=True)]
        body = []
        for name, row in zip(names, means, strict=True):
            texts = zip(map(tables.mean_and_sd, values[name]), row, best, strict=True)
            body.append([name, *(f"**{text}**" if mean == top else text for text, mean, top in texts)])
        return tables.Table(title, ["detector", *(header for header, _, _ in cells)], body)

    over = tables.over_seeds(seeds)
    printed = [table(f"AUROC, {over}", [(group, "auroc", {"group": group}) for group in groups])]
    if parts:
        printed.append(table(f"AUROC of each set, {over}", [(part, "auroc", {"part": part}) for part in parts]))
    for group in groups:
        cells = [(header, metric, {"group": group}) for header, metric in columns.items() if metric != "auroc"]
        printed.append(table(f"{group}; FPR@95TPR with {side} positive", cells))
    seconds = []
    for name in names:
        spent = (over_seeds(rows, name, f"{task}_seconds", group=groups[0]).mean() for task in ("fit", "score"))
        seconds.append([name, *(f"{value:.2f}" for value in spent)])
    printed.append(tables.Table("Seconds, including compilation", ["detector", "fit", "score"], seconds))
    each = []
    for part in parts:
        cells = [(header, metric, {"part": part}) for header, metric in columns.items()]
        each.append(table(f"{part} ({members[part]}); FPR@95TPR with {side} positive", cells))
    return printed, each


def figures_of(
    scores: Scores, rows: list[dict], names: list[str], known: str, test: data.Dataset,
    sets: dict[str, foreign.Foreign], *, most: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Histograms and ROC curves of seed 0, AUROC of all seeds, and the images at both ends of a detector."""
    of_seed = {name: scores[0, name] for name in names}
    shown = {name: {known: s["in"], **{part: s[part] for part in sets}} for name, s in of_seed.items()}
    drawn = {
        "score_histograms": plotting.score_histograms(
            shown, most=most, title="Scores of seed 0, higher = more out-of-distribution"
        )
    }
    groups = [group for group in GROUPS if any(group == of for of, _ in sets.values())]
    for group in groups:
        members = [part for part, (of, _) in sets.items() if of == group]
        pairs = {name: (s["in"], np.concatenate([s[part] for part in members])) for name, s in of_seed.items()}
        title = f"{group}: {', '.join(members)}; against {known}, seed 0"
        drawn[f"roc_{group}"] = plotting.roc_curves(pairs, most=most, title=title)
    values = {name: {group: over_seeds(rows, name, "auroc", group=group) for group in groups} for name in names}
    drawn["auroc"] = plotting.bar_chart(values, label="AUROC", start=0.5)
    parts = {known: test} | {part: dataset for part, (_, dataset) in sets.items()}
    images = [part[subsets.evenly(len(part), MAX_IMAGES)].image for part in parts.values()]
    labels = np.concatenate([[part] * len(block) for part, block in zip(parts, images, strict=True)])
    images, ranked = np.concatenate(images), np.concatenate([shown[names[0]][part] for part in parts])
    order = np.argsort(ranked, kind="stable")
    ends = np.concatenate([order[:NUM_ENDS], order[-NUM_ENDS:]])
    drawn["images"] = plotting.image_grid(
        images[ends], titles=labels[ends].tolist(), columns=8, row_labels=["lowest"] * 2 + ["highest"] * 2,
        title=f"Images with the lowest and the highest scores of {names[0]}, seed 0",
    )  # fmt: skip
    return drawn


def report(
    folder: epath.Path,
    config: Any,
    scores: Scores,
    rows: list[dict],
    names: list[str],
    sets: foreign.Sets,
    known: list[dict[str, float]],
    stopwatch: runtimes.Stopwatch,
) -> None:
    """Prints the tables; writes metrics.json, report.md and figures."""
    summary: dict[str, Any] = {name: [entry[name] for entry in known] for name in known[0]}
    accuracy, error = (tables.mean_and_sd(summary[name]) for name in ("accuracy", "expected_calibration_error"))
    line = f"In-distribution accuracy {accuracy}, expected calibration error (15 bins) {error}."
    label = config.dataset + (f" {','.join(map(str, config.classes))}" if config.classes else "")
    printed, each = tables_of(rows, names, seeds=config.seeds, positive=config.positive)
    trained = "" if config.is_trained else f", {config.training} training"
    sizes = [f"- {part} ({group}): {len(dataset):,} images" for part, (group, dataset) in sets.foreign.items()]
    about = [f"In-distribution: {len(sets.test):,} test images; at most {MAX_IMAGES:,} of each set are scored."]
    tables.report(
        folder, config, runtimes.console(), stopwatch,
        title=f"Out-of-distribution detection: {label}, {config.model}{trained}",
        parts=[*printed, line], details=[*each, *about, "\n".join(sizes)],
        figures=figures_of(scores, rows, names, label, sets.test, sets.foreign, most=config.figure_detectors),
        figure_format=config.figure_format,
    )  # fmt: skip
    summary |= {"seconds": stopwatch.seconds(), "rows": rows}
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
