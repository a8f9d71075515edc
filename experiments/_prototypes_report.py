"""What experiments.prototypes prints and draws."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import certificates, files, runtimes
from robustjax import plotting

WITHIN = 1 - 1e-4
"""Share of the radius that attacks get; the rest is for rounding."""
BEYOND = (1.5, 2.0)
"""Multiples of the radius at which attacks should find something, if they and the radius are any good."""
RANDOM_DRAWS = 100
SHOWN = 6
"""Prototypes in a row of the figure."""


def row_of(loss: str, seed: int, arrays: dict[str, np.ndarray], radii: tuple[float, ...]) -> dict[str, Any]:
    """The line of metrics.csv of a network."""
    radius, correct = arrays["radius"], arrays["answer"] == arrays["label"]
    beyond = {f"fooled_at_{factor:g}": float(arrays[f"fooled_pgd_{factor:g}"].mean()) for factor in BEYOND}
    inside = arrays[f"fooled_pgd_{WITHIN:g}"] | arrays["fooled_random"]
    return {
        "loss": loss,
        "seed": seed,
        "accuracy": float(correct.mean()),
        "mean_radius": float(np.maximum(radius, 0).mean()),
        "mean_published_radius": float(np.maximum(arrays["published_radius"], 0).mean()),
        **{f"certified_at_{r:g}": float(((radius >= r) & correct).mean()) for r in radii},
        "scale": float(arrays["scale"].mean()),
        "attacked": inside.size,
        "violations": int(inside.sum()) + int(((radius > 0) & ~correct).sum()),
        **beyond,
        "seconds": float(arrays["seconds"]),
        "certifying_milliseconds_per_image": 1000 * float(arrays["certifying_seconds"]) / radius.size,
    }


def gains_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """What each loss gives above the margin, seed by seed, by the certificate that it was trained for."""
    at = {(row["loss"], row["seed"]): row for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    gains = {}
    for loss, column in (("radius", "mean_radius"), ("published_radius", "mean_published_radius")):
        pairs = [(at[loss, s], at["margin", s]) for s in seeds if (loss, s) in at and ("margin", s) in at]
        if pairs and all(beside[column] > 0 for _, beside in pairs):
            gains[loss] = {
                "radius": [ours[column] / beside[column] - 1 for ours, beside in pairs],
                "accuracy": [ours["accuracy"] - beside["accuracy"] for ours, beside in pairs],
            }
    return gains


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean and standard deviation; of one value, that value."""
    deviation = f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}"


def weights_figure(arrays: dict[str, np.ndarray], image_shape: tuple[int, int, int]) -> Any:
    """The prototypes that weigh most for each reasoning: required ones (+), and in cbc unrequired ones (-)."""
    components = arrays["components"].reshape(-1, *image_shape)
    positive, negative = arrays["positive"], arrays["negative"]
    both = negative.any()
    chosen, titles = [], []
    for c, r in np.ndindex(*positive.shape[:2]):
        parts = [("+", positive[c, r], SHOWN // 2 if both else SHOWN)]
        parts += [("-", negative[c, r], SHOWN - SHOWN // 2)] if both else []
        for sign, weights, count in parts:
            for k in np.argsort(-weights, kind="stable")[:count]:
                titles.append(f"{c}: {sign}{weights[k]:.2g}")
                chosen.append(components[k])
    title = "Prototypes that weigh most for each class: required (+)" + (", unrequired (-)" if both else "")
    columns = min(SHOWN, len(components))
    return plotting.image_grid(np.stack(chosen), titles=titles, columns=columns, title=title, image_inches=0.7)


def report(
    config: Any, results: dict, image_shape: tuple[int, int, int], beside: epath.Path | None, console: Console
) -> list[dict[str, Any]]:
    """Prints the table; writes metrics.csv, metrics.json, report.md and figures; returns the rows of metrics.csv."""
    folder = config.folder()
    rows = [row_of(loss, seed, arrays, config.radii) for (loss, seed), arrays in results.items()]
    files.write_rows(folder / "metrics.csv", list(rows[0]), rows)
    columns = [column for column in rows[0] if column not in ("loss", "seed", "attacked", "violations")]
    lines = {
        loss: [spread([row[column] for row in rows if row["loss"] == loss]) for column in columns]
        for loss in config.losses
    }
    gains = gains_of(rows)
    count, wrong = sum(row["attacked"] for row in rows), sum(row["violations"] for row in rows)
    notes = [f"{count:,} attacks within the radius (PGD and {RANDOM_DRAWS} random points each): {wrong} violations."]
    for loss, gain in gains.items():
        radius, accuracy = ([100 * value for value in gain[name]] for name in ("radius", "accuracy"))
        notes.append(
            f"{loss} above margin, by its own certificate: mean certified radius {spread(radius, '+.1f')} %, accuracy "
            f"{spread(accuracy, '+.1f')} points."
        )
    title = f"{config.dataset}, {config.reasoning}, {config.num_components} components per class, l2"
    caption = "One seed." if len(config.seeds) == 1 else f"Mean ± standard deviation of {len(config.seeds)} seeds."
    table = Table("", *config.losses, title=title, caption=caption)
    for i, column in enumerate(columns):
        table.add_row(column.replace("_", " "), *(lines[loss][i] for loss in config.losses))
    console.print(table)
    curves = {}
    for loss in config.losses:
        chosen = [arrays for (name, _), arrays in results.items() if name == loss]
        radius = np.concatenate([arrays["radius"] for arrays in chosen])
        correct = np.concatenate([arrays["answer"] == arrays["label"] for arrays in chosen])
        curves[f"prototypes, {loss.replace('_', ' ')}"] = (np.maximum(radius, 0), correct & (radius > 0))
    if beside is not None:
        _, label, certificate, *_ = certificates.read(beside)
        right = (certificate.label == label) & ~certificate.abstained
        curves[f"smoothing, {beside.name}"] = (certificate.radius, right)
        certified = ", ".join(f"{(right & (certificate.radius >= r)).mean():.3f} at {r:g}" for r in config.radii)
        acr = np.where(right, certificate.radius, 0).mean()
        notes.append(f"Smoothing ({beside.name}), {len(label):,} images: ACR {acr:.3f}; certified {certified}.")
    figures = {"certified_accuracy": plotting.certified_accuracy_curve(curves, title=title)}
    for loss in config.losses:
        figures[f"prototypes_{loss}"] = weights_figure(results[loss, config.seeds[0]], image_shape)
    for name, figure in figures.items():
        files.write_whole(folder / "figures" / f"{name}.png", files.figure_bytes(figure))
    text = [f"# Prototypes: {title}", "", f"| | {' | '.join(config.losses)} |", f"|{'---|' * (len(lines) + 1)}"]
    text += [f"| {c.replace('_', ' ')} | {' | '.join(lines[x][i] for x in lines)} |" for i, c in enumerate(columns)]
    text += ["", *(f"- {note}" for note in notes), "", *(f"![{name}](figures/{name}.png)" for name in figures)]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    machine = {"machine": runtimes.machine(), "jax": jax.__version__}
    summary = {"rows": rows, "gains": gains, "notes": notes, **machine}
    files.write_whole(folder / "metrics.json", json.dumps(summary, indent=1) + "\n")
    for note in notes:
        console.print(note, highlight=False)
    console.print(f"Run folder: {folder}", soft_wrap=True)
    return rows
