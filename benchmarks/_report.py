"""Makes tables and the page docs/performance.md from measured figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks import attacks, certify, scoring
from robustjax import plotting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUSY = 0.5
PEERS = ("row", "ours", "peer", "ratio", "min-max", "bar", "met")
TITLES = {
    "certify": "Certification",
    "scoring": "Scoring",
    "attacks": "Attacks",
    "train": "Training",
    "growth": "How the cost grows, and a model of it",
}
UNITS = {
    "certify": "noisy copies per second",
    "scoring": "CPU seconds",
    "attacks": "images per CPU second",
    "train": "images per second",
}
QUANTITIES = ("samples", "images", "classes", "dimension", "devices")
PAGE = """\
# Performance

What robustjax costs, beside other libraries and by itself. `python -m benchmarks --write` measures it and writes this
page from the figures in [performance.json](performance.json). Each part says when, where and with which versions it was
measured; dates may differ between parts. A ratio says how many times as fast as its peer robustjax is: the median over
rounds in which both take turns, with the smallest and the largest. Bars are what a release has to reach.

{parts}

## Starting

`python -m benchmarks.start` runs each product on digits in a fresh process, with so few epochs and images that
compiling dominates: with an empty cache of compiled programs (cold), and again with that cache (warm). Measured on
30 November 2026 on 2 idle cores of an AMD EPYC with jax 0.10.2, once each, in turns with commit 085855b (before).
Compiling includes tracing and lowering, in CPU seconds of all threads; a run is a whole process, in seconds.

| product | programs | before | compiling, cold | before | run, cold | before | run, warm | before |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| smoothing | 23 | 59 | 13.0 | 16.2 | 15.6 | 17.8 | 8.2 | 14.0 |
| ood | 110 | 223 | 41.6 | 53.1 | 39.2 | 49.6 | 19.5 | 46.3 |
| adversarial | 47 | 120 | 44.0 | 61.7 | 40.2 | 55.1 | 16.4 | 29.7 |

The number of programs halves, and warm runs take 0.4 to 0.6 of the time, but compiling takes 0.7 to 0.8: most of it
goes into a few large programs (the training step, fits and scores of 25 detectors), not into the many small ones.
`import robustjax` takes 0.3 CPU seconds beyond jax, and 1.2 before: Flax and Optax are imported when a model or a
training step is first used.

## What is not covered

{unmeasured}- The speed-up by several devices was not measured: virtual devices share the cores of one machine.
- Weights are untrained, or trained for seconds. Where speed depends on them (attacks that stop early), it differs for
  other weights.
- Peers run in float32 on the CPU, and PyTorch is not compiled (`torch.compile`).
- Data pipelines and the experiments around these functions are not timed.
"""
NO_CARD = "- Nothing was measured on a GPU or a TPU; their times are predictions.\n"
GROWTH = """\
![Seconds against samples, images, classes, dimension and devices, and predicted beside measured seconds](growth.png)

Medians of {seconds}, after a call that compiles. The exponent belongs to a power law through all
points (1 means proportional); the last column has the exponent between the two largest points. `certify` draws 400
noisy copies of an image of 16x16 pixels for a small cnn of 10 classes, `pgd` takes 10 steps on 16 such images,
`mahalanobis` fits and scores 4,000 rows of 256 features; one of these numbers varies. Dimension is the number of pixels
or, for the detector, the number of features. In the plot, dotted lines are proportional, and bars reach from the
smallest to the largest measurement."""
DEVICES = """\
### Several devices

Eight images, 1,600 draws each, on virtual CPU devices, which share the cores of the machine: the ratio to one device
shows the overhead of using several, not a speed-up. Either images are split over the devices, or devices share the
draws of every image."""
MODEL = """\
### A model of the time

Certifying is a loop over images and blocks of noisy copies, so its time follows from the time of one block, from the
noise to the logits (`benchmarks.cost.predicted_seconds`):

    seconds = overhead + ceil(images / (devices / s)) * ceil(ceil(samples / batch) / s) * seconds_per_block

where s devices share the draws of an image. Left out is one block more in each call, which checks that the model
answers each copy by itself; the times below were measured without it. Predicted from one block, beside the measured
time:"""
STANDARD = """\
### The standard runs

The field's standard runs, {num_images} images and {num_samples:,} draws each, **predicted, not measured**. "Here"
follows from a measured block, in the seconds of the tables above. Times of a card follow from the operations of a
forward pass, as XLA counts them (two for a multiply-add), and an assumed share of the card's dense peak. For matrix
units the share is 1 to 10% for resnet110, whose 16 to 64 channels fill only a small part of them, and 5 to 40% for
resnet50; for float32 without matrix units it is 15 to 50% and 30 to 70%. The share includes noise, memory traffic and
compiling. NVIDIA and Google state the peaks and the bandwidths.

Two bounds stand beside it; plan with the longer one. *Peak* is the time of these operations at the full peak: no
implementation of this arithmetic is faster. *Memory* is the time at the full bandwidth if every convolution and product
reads its input from memory once and writes its output once, two bytes a value in bfloat16 and otherwise four, without
weights, noise and all steps between layers. Only a program that keeps several layers on the chip is faster; one whose
normalisations, ReLUs and sums pass over memory by themselves takes two to four times as long.

For comparison, the certificates that Cohen, Rosenfeld and Kolter published in 2019, with as many draws, took 14 to 17
seconds an image for resnet110 on CIFAR-10 and 150 to 152 for resnet50 on ImageNet (medians of each file of
github.com/locuslab/smoothing). By this count of operations they reached about 3 and 5 TFLOP/s, on a card that they do
not name."""


class Row(NamedTuple):
    """A measurement of robustjax beside a peer, or beside a limit."""

    name: str
    ours: float | None
    peer: float | None
    ratios: Sequence[float] | None = None  # None if there is no peer, empty if it is missing
    bar: str = ""
    met: bool | None = None
    form: str = "{:,.4g}"


class Sheet(NamedTuple):
    """A table: a row of one cell is a heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def _compared(name: str, ours: Any, theirs: Any, bar: float | None, form: str = "{:,.4g}", *, rates: bool) -> Row:
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    ratios = (ours / theirs if rates else theirs / ours).tolist() if theirs.size else []
    met = bool(np.median(ratios) >= bar) if ratios and bar else None
    peer = float(np.median(theirs)) if theirs.size else None
    return Row(name, float(np.median(ours)), peer, ratios, f">= {bar:g}" if bar else "", met, form)


def certify_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Rows by heading; a missing peer has a row without a figure."""
    groups: dict[str, list[Row]] = {}
    for model in dict.fromkeys(entry["model"] for entry in figures["rows"]):
        first, *others = [entry for entry in figures["rows"] if entry["model"] == model]
        speeds = {e["name"]: e["samples_per_second"] for e in others if e["name"] != first["name"]}  # none of a sweep
        names = [name for at, name in certify.BARS if at == model] + ["ART certify"] * (model == certify.CNN)
        bars = [certify.BARS.get((model, name)) for name in names]
        groups[model] = [
            _compared(name, first["samples_per_second"], speeds.get(name, []), bar, "{:,.0f}", rates=True)
            for name, bar in zip(names, bars)
        ]
    if peaks := {int(number): peak for number, peak in figures["peak_mib"].items()}:
        few, many = min(peaks), max(peaks)
        name, ratio = f"{many:,} samples, {few:,}", peaks[many] / peaks[few]
        met = abs(ratio - 1) <= certify.MEMORY_BAR
        bar = f"<= {1 + certify.MEMORY_BAR:g}"
        groups["peak memory, MiB"] = [Row(name, peaks[many], peaks[few], [ratio], bar, met, "{:,.0f}")]
    return groups


def scoring_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By heading."""
    rows, limit = figures["rows"], scoring.COMPILE_BAR
    groups = {
        "beside pytorch-ood": [_compared(r["name"], r["ours"], r["theirs"], r["bar"], rates=False) for r in rows],
        "compiling": [],
    }
    slowest = max(rows, key=lambda row: row["compile_seconds"])
    cost = slowest["compile_seconds"]
    groups["compiling"].append(Row(f"the slowest, {slowest['name']}", cost, None, None, f"<= {limit:g}", cost <= limit))
    for name, peak in figures["extra_mib"].items():
        bar = scoring.MEMORY_BAR if name == "knn" else None
        row = Row(name, peak, None, bar=f"<= {bar}" if bar else "", met=peak <= bar if bar else None)
        groups.setdefault("extra memory, MiB", []).append(row)
    return groups


def attacks_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By heading."""
    groups: dict[str, list[Row]] = {}
    for entry in figures["rows"]:
        name, number = entry["name"], figures["settings"]["num_images"]
        ours, theirs = (number / np.asarray(entry[side], float) for side in ("ours", "theirs"))
        rows = groups.setdefault(entry["model"], [])
        rows.append(_compared(f"{name}, {entry['peer']}", ours, theirs, entry["bar"], rates=True))
        ours = float(np.median(entry["robust"]))
        theirs = float(np.median(entry["their_robust"])) if entry["their_robust"] else None
        met = None if theirs is None else ours <= theirs + attacks.ACCURACY_BAR + 1e-9
        rows.append(Row("  accuracy left", ours, theirs, None, f"+{attacks.ACCURACY_BAR:.1%}", met, "{:.1%}"))
        if name == "AutoAttack":
            bar, cost = attacks.COMPILE_BAR, entry["compile"]
            rows.append(Row("  compiling, seconds", cost, None, None, f"< {bar:g}", cost < bar))
    return groups


def train_rows(figures: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By network."""
    groups: dict[str, list[Row]] = {}
    for model in dict.fromkeys(entry["model"] for entry in figures["rows"]):
        ours, *theirs = [entry for entry in figures["rows"] if entry["model"] == model]
        speed, rows = ours["images_per_second"], groups.setdefault(f"{model}, batches of {ours['batch_size']}", [])
        for e in theirs or [{"name": "PyTorch", "images_per_second": [], "bar": None}]:
            rows.append(_compared(e["name"], speed, e["images_per_second"], e["bar"], "{:,.0f}", rates=True))
        rows.append(Row("  compiling, seconds", ours["compile_seconds"], None))
    return groups


ROWS = {"certify": certify_rows, "scoring": scoring_rows, "attacks": attacks_rows, "train": train_rows}


def peer_sheet(part: str, figures: Mapping[str, Any]) -> Sheet:
    """One part beside its peers, and the peers that were left out."""
    table: list[list[str]] = []
    for heading, rows in ROWS[part](figures).items():
        table.append([heading])
        for row in rows:
            told = lambda value, form=row.form: "" if value is None else form.format(value)
            missing = row.ratios is not None and not row.ratios
            ratio = f"{np.median(row.ratios):.2f}" if row.ratios else ""
            spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}" if row.ratios and len(row.ratios) > 1 else ""
            met = "" if row.met is None else "yes" if row.met else "no"
            cells = [row.name, told(row.ours), "missing" if missing else told(row.peer), ratio, spread, row.bar, met]
            table.append(cells)
    return Sheet(PEERS, table, [f"Left out: {_without_paths(reason)}." for reason in figures["left_out"]])


def growth_sheets(figures: Mapping[str, Any]) -> list[Sheet]:
    """Growth, devices, the model of the time beside measurements, and its predictions."""
    form = lambda value: f"{value:,.3g}"
    curves, split = [], []
    for curve in figures["growth"]:
        medians = [float(np.median(times)) for times in curve["seconds"]]
        if curve["quantity"] == "devices":
            ratios = [f"{value / medians[0]:.2f}" for value in medians]
            split += [
                [curve["function"], str(n), f"{value:.3f}", ratio, f"{min(times):.3f}-{max(times):.3f}"]
                for n, value, ratio, times in zip(curve["sizes"], medians, ratios, curve["seconds"])
            ]
            continue
        ends = [f"{curve['sizes'][i]:,}: {form(medians[i])} s" for i in (0, -1)]
        exponents = [f"{curve[name]:.2f}" for name in ("exponent", "at_the_end")]
        curves.append([curve["function"], curve["quantity"], *ends, *exponents])
    checked = []
    for c in figures["checks"]:
        shape, spread = "x".join(map(str, c["shape"])), f"{min(c['seconds']):.3f}-{max(c['seconds']):.3f}"
        work = f"{c['num_images']} x {c['num_samples']:,}"
        name = f"{c['model']} {shape}"
        checked.append([name, work, f"{c['predicted']:.3f}", f"{c['measured']:.3f}", spread, f"{c['error']:+.1%}"])
    predicted = []
    for p in figures["predictions"]:
        name, speed = f"{p['model']} {'x'.join(map(str, p['shape']))}", p["here"]["batch_size"] / p["here"]["block"]
        predicted.append([f"{name}, {p['flops_per_image'] / 1e9:.3g} GFLOP"])
        predicted.append(["here", f"{speed:,.3g} copies/s", "", duration(p["here"]["seconds"]), "", ""])
        for card in p["cards"]:
            low, high = (f"{100 * share:.0f}" for share in card["shares"])
            span = f"{duration(card['fast'])} to {duration(card['slow'])}"
            cells = [f"{card['name']} {card['dtype']}", f"{card['peak'] / 1e12:g} TFLOP/s", f"{low}-{high}%", span]
            predicted.append([*cells, duration(card["at_peak"]), duration(card["at_bandwidth"])])
    return [
        Sheet(("function", "over", "from", "to", "exponent", "at the end"), curves),
        Sheet(("", "devices", "seconds", "ratio", "min-max"), split),
        Sheet(("model", "images x draws", "predicted", "measured", "min-max", "error"), checked),
        Sheet(("predicted", "speed", "share", "time", "peak", "memory"), predicted),
    ]


def duration(seconds: float) -> str:
    """A duration in a suitable unit."""
    sizes = ((86_400, "days"), (3_600, "h"), (60, "min"), (1, "s"))
    size, unit = next((of for of in sizes if seconds >= 2 * of[0]), sizes[-1])
    return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"


def _without_paths(text: str) -> str:
    return re.sub(r"\s*(?<![\w.:/])/[\w.+-]+(/[\w.+-]*)+", "", text).replace(" ()", "")


def about(here: Mapping[str, Any]) -> str:
    """Machine and versions in words."""
    versions = ", ".join(f"{package} {version}" for package, version in here["versions"].items())
    cores = f"{here['cores']} core{'s' if here['cores'] != 1 else ''}"
    return f"{here['cpu']}, {cores}; JAX on {here['device']}, {here['dtype']}; {versions}"


def as_table(sheet: Sheet) -> Table:
    """For a terminal."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    colours = {"yes": "[green]yes", "no": "[red]no"}
    for row in sheet.rows:
        table.add_row(f"[bold]{row[0]}") if len(row) == 1 else table.add_row(*(colours.get(cell, cell) for cell in row))
    return table


def as_markdown(sheet: Sheet) -> str:
    """For the page."""
    lines = [sheet.columns, ["---", *["---:"] * (len(sheet.columns) - 1)]]
    for row in sheet.rows:
        lines.append([f"**{row[0]}**", *[""] * (len(sheet.columns) - 1)] if len(row) == 1 else row)
    table = "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)
    return "\n".join([table, *(f"\n{note}" for note in sheet.notes)])


def page(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page, from the figures of each part."""
    sections = []
    for name, title in TITLES.items():
        section = [f"## {title}"]
        if name not in parts:
            sections.append(f"## {title}\n\nNot measured yet: `python -m benchmarks --only {name} --write`.")
            continue
        figures, date = parts[name]["figures"], parts[name]["date"]
        load = figures["machine"]["load"]
        busy = f"The load was {load:.1f} when it began: the machine was shared, and on an idle one figures may differ. "
        quick = "This was a quick run, which measures little. "
        how = (
            f"{about(figures['machine'])}. {busy if load > BUSY else ''}{quick if figures['settings']['quick'] else ''}"
        )
        section.append(f"Measured on {date}: {how}".strip())
        if name != "growth":
            table = as_markdown(peer_sheet(name, figures))
            sections.append("\n\n".join([*section, f"In {UNITS[name]}, medians.", table]))
            continue
        curves, split, checked, predicted = map(as_markdown, growth_sheets(figures))
        clock = "CPU seconds of all threads" if figures["machine"]["device"] == "cpu" else "seconds"
        section += [GROWTH.format(seconds=clock), curves, DEVICES, split, MODEL, checked]
        if figures["predictions"]:
            section += [STANDARD.format(**figures["predictions"][0]), predicted]
        sections.append("\n\n".join(section))
    on_cpu = all(part["figures"]["machine"]["device"] == "cpu" for part in parts.values())
    return PAGE.format(parts="\n\n".join(sections), unmeasured=NO_CARD if on_cpu else "")


def growth_figure(figures: Mapping[str, Any]) -> Figure:
    """Seconds against each quantity, and predicted beside measured seconds; log-log, bars from smallest to largest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    names = list(dict.fromkeys(curve["function"] for curve in figures["growth"]))
    for axis, quantity in zip(axes, QUANTITIES):
        for curve in (c for c in figures["growth"] if c["quantity"] == quantity):
            colour = plotting.COLOURS[names.index(curve["function"])]
            sizes, times = np.asarray(curve["sizes"], float), np.asarray(curve["seconds"])
            medians = np.median(times, axis=1)
            spread = [medians - times.min(1), times.max(1) - medians]
            label = curve["function"] + (f", {curve['exponent']:.2f}" if "exponent" in curve else "")
            axis.errorbar(sizes, medians, spread, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
        axis.set(xscale="log", yscale="log", xlabel=quantity, ylabel="seconds")
        limits = axis.get_ylim()
        for line in axis.get_lines() if quantity != "devices" else ():
            sizes, medians = line.get_data()
            axis.plot(sizes, medians[-1] * sizes / sizes[-1], color="0.75", linestyle=":", zorder=0)
        axis.set_ylim(limits[0] / (4 if quantity in ("images", "classes") else 1), limits[1])  # room for the legend
    axes[4].set(xscale="linear", yscale="linear", ylim=(0, None), xlabel="virtual devices on the same cores")
    for check, marker in zip(figures["checks"], "os^D"):
        axes[5].plot(check["measured"], check["predicted"], marker, color=plotting.COLOURS[0], label=check["model"])
    ends = [f(c["measured"] for c in figures["checks"]) for f in (min, max)]
    axes[5].plot(ends, ends, color="0.75", linestyle=":", zorder=0)
    axes[5].set(xscale="log", yscale="log", xlabel="measured seconds", ylabel="predicted seconds")
    places = ("upper left", "lower left", "lower left", "upper left", "lower right", "upper left")
    for axis, place in zip(axes, places):
        if axis.lines:
            axis.legend(frameon=False, fontsize="x-small", loc=place)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    return figure
