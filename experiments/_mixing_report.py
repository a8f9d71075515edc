"""What experiments.mixing prints, writes and draws."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from experiments.common import adversaries, files, runtimes
from robustjax import certification, metrics, plotting

RADII = (0.0, 0.25, 0.5, 0.75)
COLUMNS = ("seed", "mixture", "alpha", "clean", "apgd", "gamma", "detached", "attached", "autoattack", "all")
CLEAN_LOST, CERTIFIED_KEPT = 0.005, 0.6
"""What a mixture may lose of the better clean accuracy, and must keep of the certified accuracy."""
SeedResults = tuple[list[dict], dict[str, np.ndarray]]


def spread(values: Any) -> str:
    """Mean and standard deviation over seeds."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.3f}" + (f" +- {values.std(ddof=1):.3f}" if values.size > 1 else "")


def at_its_accuracy(rows: list[dict]) -> float:
    """Robust accuracy of the fixed mixture that is as accurate as that by network: interpolated, 0 beyond the curve."""
    fixed = sorted((row["clean"], row["apgd"]) for row in rows if row["mixture"] == "fixed")
    clean = rows[-1]["clean"]
    best = [max(apgd for other, apgd in fixed if other >= at) for at, _ in fixed]  # what a more accurate one has too
    return float(np.interp(clean, [at for at, _ in fixed], best, right=0.0))


def certified(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Accuracies of one seed, and certified ones at ``RADII``, of the smoothed classifier and of the mixture."""
    label, row = found["label"], {}
    for name in ("standard", "smoothed", "mixture"):
        row[f"clean_{name}"] = float((found[f"answered_{name}"] == found["answered_label"]).mean())
    for name in ("smoothed", "mixture"):
        predicted, radius = found[f"{name}_label"], found[f"{name}_radius"]
        abstained = predicted == certification.ABSTAIN
        certificate = certification.Certificate(predicted, radius, np.full(len(label), np.nan), abstained)
        row[f"certified_{name}"] = metrics.certified_accuracy(certificate, label, RADII).tolist()
    row |= {"attacked": len(found["changed"]), "changed": int(found["changed"].sum())}
    return row | {"least_excess": float(found["excess"].min(initial=np.inf)) if len(found["excess"]) else None}


def tables_of(config: Any, of_seeds: dict[int, SeedResults]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headers and cells: the trade-off, what attacks see of the network, and certified accuracy."""
    runs = [rows for rows, _ in of_seeds.values()]
    column = lambda index, name: spread([rows[index][name] for rows in runs])
    shown = "autoattack" if config.autoattack else "apgd"
    body = []
    for index, alpha in enumerate(config.alphas):
        strongest = column(index, "autoattack") if "autoattack" in runs[0][index] else ""
        name = {0.0: "accurate alone", 1.0: "robust alone"}.get(alpha, f"alpha {alpha:g}")
        body.append([name, column(index, "clean"), column(index, "apgd"), strongest])
    strongest = column(-1, shown) if config.autoattack else ""
    body.append(["by network", column(-1, "clean"), column(-1, "apgd"), strongest])
    where = f"linf {adversaries.text_of(adversaries.epsilons_of(config.epsilon)[0])}"
    tables = [(f"Accuracy, clean and at {where}", ["mixture", "clean", "APGD", "AutoAttack"], body)]
    names = {
        "detached": "cross-entropy, alpha held constant",
        "attached": "cross-entropy",
        "gamma": "cross-entropy and gamma",
        "apgd": "cross-entropy, targeted DLR",
        "autoattack": "AutoAttack",
        "all": "all of them",
    }
    body = [[text, column(-1, name)] for name, text in names.items() if name in runs[0][-1]]
    tables.append(("Mixture by network, robust accuracy", ["attack", "left"], body))
    rows = [certified(found) for _, found in of_seeds.values()]
    body = [["accurate alone", spread([row["clean_standard"] for row in rows]), *[""] * len(RADII)]]
    for name, text in (("smoothed", "smoothed alone"), ("mixture", f"alpha {config.certified_alpha:g}")):
        cells = [spread([row[f"certified_{name}"][i] for row in rows]) for i in range(len(RADII))]
        body.append([text, spread([row[f"clean_{name}"] for row in rows]), *cells])
    headers = ["classifier", "clean", *(f"r {radius:g}" for radius in RADII)]
    return [*tables, (f"Certified accuracy, l2, sigma {config.sigma:g}", headers, body)]


def findings_of(config: Any, of_seeds: dict[int, SeedResults]) -> list[str]:
    """What the numbers say about the claims, in sentences."""
    runs, rows = [rows for rows, _ in of_seeds.values()], [certified(found) for _, found in of_seeds.values()]
    of_network, as_accurate = np.array([[run[-1]["apgd"], at_its_accuracy(run)] for run in runs]).T
    texts = [
        f"Robust accuracy (APGD) of the mixture by network is {spread(of_network)}; that of a fixed mixture which is "
        f"as accurate on clean images is {spread(as_accurate)}, a difference of {spread(of_network - as_accurate)}."
    ]
    if 1.0 in config.alphas:
        place = config.alphas.index(1.0)
        gained, lost = (
            spread([sign * (run[-1][name] - run[place][name]) for run in runs])
            for name, sign in (("clean", 1), ("autoattack" if config.autoattack else "apgd", -1))
        )
        texts.append(f"Beside the robust classifier alone it gains {gained} clean accuracy and loses {lost} robust.")
    clean = np.array([[row[f"clean_{name}"] for name in ("mixture", "standard", "smoothed")] for row in rows]).mean(0)
    held = clean[0] >= max(clean[1:]) - CLEAN_LOST
    texts.append(
        f"{'pass' if held else 'FAIL'}: clean accuracy of the certified mixture {clean[0]:.3f}, of the better of both "
        f"{max(clean[1:]):.3f}; at most {CLEAN_LOST} may be lost."
    )
    place = RADII.index(0.25)
    mixture, smoothed = (np.mean([row[f"certified_{name}"][place] for row in rows]) for name in ("mixture", "smoothed"))
    held = mixture >= CERTIFIED_KEPT * smoothed
    texts.append(
        f"{'pass' if held else 'FAIL'}: certified accuracy at 0.25 of the mixture {mixture:.3f}, of the smoothed "
        f"classifier {smoothed:.3f}; at least {CERTIFIED_KEPT:.0%} must be kept."
    )
    changed, attacked = (sum(row[name] for row in rows) for name in ("changed", "attacked"))
    held = "FAIL" if changed else "pass"
    return [*texts, f"{held}: attacks within the certified radii change {changed} of {attacked} answers."]


def figures(config: Any, folder: epath.Path, of_seeds: dict[int, SeedResults]) -> list[str]:
    """Draws robust accuracy against clean accuracy, and certified accuracy against the radius.

    Returns:
      The names of the files.
    """
    runs = [rows for rows, _ in of_seeds.values()]
    points = lambda index: [np.mean([rows[index][name] for rows in runs]) for name in ("clean", "apgd")]
    count = len(config.alphas)
    curve, network = np.array([points(index) for index in range(count)]), np.array(points(count))
    drawn = {"trade_off": _trade_off(config, curve, network)}
    curves = {}
    for name, text in (("smoothed", "smoothed alone"), ("mixture", f"mixture, alpha {config.certified_alpha:g}")):
        radius = np.concatenate([found[f"{name}_radius"] for _, found in of_seeds.values()])
        right = [found[f"{name}_label"] == found["label"] for _, found in of_seeds.values()]
        curves[text] = radius, np.concatenate(right)
    drawn["certified_accuracy"] = plotting.certified_accuracy_curve(curves)
    for name, figure in drawn.items():
        files.write_whole(folder / "figures" / f"{name}.png", files.figure_bytes(figure))
    return [f"{name}.png" for name in drawn]


def _trade_off(config: Any, curve: np.ndarray, network: np.ndarray) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curve.T, marker=".", color="#0072B2", linewidth=1.4, label="fixed share")
    for alpha, point in zip(config.alphas, curve):
        axes.annotate(f"{alpha:g}", point, textcoords="offset points", xytext=(4, 3), fontsize="x-small")
    axes.plot(*network, marker="*", markersize=11, color="#D55E00", linestyle="none", label="by network")
    axes.set(xlabel="clean accuracy", ylabel=f"robust accuracy (APGD, linf {config.epsilon})")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def report(
    config: Any,
    folder: epath.Path,
    of_seeds: dict[int, SeedResults],
    stopwatch: runtimes.Stopwatch,
    console: Console,
) -> dict:
    """Prints the tables and findings; writes metrics.csv, metrics.json, report.md and figures.

    Returns:
      The content of metrics.json.
    """
    content = {
        "seeds": [
            {"seed": seed, "trade_off": rows, "as_accurate": at_its_accuracy(rows), "certified": certified(found)}
            for seed, (rows, found) in of_seeds.items()
        ],
        "radii": list(RADII),
        "findings": findings_of(config, of_seeds),
        "seconds": stopwatch.seconds(),
    }
    files.write_whole(folder / "metrics.json", json.dumps(content, indent=1) + "\n")
    all_rows = [{"seed": seed, **row} for seed, (rows, _) in of_seeds.items() for row in rows]
    files.write_rows(folder / "metrics.csv", COLUMNS, all_rows)
    about = f"{config.dataset} {config.model}, {len(of_seeds)} seeds"
    text = [f"# Mixtures of classifiers: {about}"]
    for title, headers, body in tables_of(config, of_seeds):
        table = Table(*headers, title=f"{title}: {about}", title_justify="left")
        for cells in body:
            table.add_row(*cells)
        console.print(table)
        text += ["", f"## {title}", "", f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
        text += [f"| {' | '.join(cells)} |" for cells in body]
    text.append("")
    for finding in content["findings"]:
        console.print(finding, highlight=False)
        text.append(f"- {finding}")
    console.print(f"\nRun folder: {folder}", soft_wrap=True)
    pictures = figures(config, folder, of_seeds)
    settings = [f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items()]
    text += ["", *(f"![{name}](figures/{name})" for name in pictures), "", stopwatch.told()]
    text += ["", "| setting | value |", "|---|---|", *settings]
    files.write_whole(folder / "report.md", "\n".join(text) + "\n")
    return content
