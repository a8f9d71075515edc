"""The catalogue of methods, docs/methods.md: made of the studies, their records, and what tests verify."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..common import tables
from . import _frame, _verdicts
from ._verified import Verified

ROOMS = (
    "data", "perturbations", "models", "losses", "attacks", "certification", "scoring", "representations", "weights",
    "metrics", "training",
)  # fmt: skip
HEADERS = ("Method", "Paper (arXiv)", "Function", "Command", "Claim", "Measured, or verified by")
INTRODUCTION = f"""\
# Methods

Where each method comes from, the function that computes it, a command that shows it at work, what its paper claims, and
what was measured here, or which test verifies it. `python -m experiments.claims --catalogue docs/methods.md` makes this
page of the [studies](../experiments/claims) and the [records](claims) of their runs; no row is typed by hand. Earlier
measurements, and measurements without a study, are in [measured](measured.md). How a method comes in:
[CONTRIBUTING](../CONTRIBUTING.md). DIR is a folder of prepared TFDS data sets, RUN a run folder. Radii and sigma are
l2, in units of [0, 1] pixels, where nothing else is said. A number is a mean over seeds with the standard deviation in
brackets; a row shows the first bar of its claim and every bar that does not appear.

## Verdicts

{_verdicts.WORDS}
"""


def catalogue(
    studies: Mapping[str, _frame.Study], records: Iterable[Mapping[str, Any]], verified: Sequence[Verified]
) -> str:
    """Makes the page.

    Args:
      studies: by name.
      records: of their runs, at default and other settings.
      verified: methods without a claim.

    Returns:
      Markdown: a section for each room, ordered by name.

    Raises:
      ValueError: a method has two rows.
    """
    of_study: dict[str, list[Mapping[str, Any]]] = {name: [] for name in studies}
    for record in records:
        if record["study"] in of_study:
            of_study[record["study"]].append(record)
    rows: dict[str, list[tuple[str, ...]]] = {room: [] for room in ROOMS}
    methods: set[str] = set()
    for claim, name in [(claim, name) for name, study in studies.items() for claim in study.claims]:
        command = f"`python -m experiments.claims.{name}`"
        rows[claim.functions[0].partition(".")[0]].append(
            (*_source(claim), command, claim.statement, _measured(claim, of_study[name]))
        )
    for entry in verified:
        command = "-" if entry.command is None else f"`python -m {entry.command}`"
        rows[entry.functions[0].partition(".")[0]].append(
            (*_source(entry), command, entry.statement, f"Verified by `{entry.test}`")
        )
    parts = [INTRODUCTION]
    for room, of_room in rows.items():
        for method in (row[0] for row in of_room):
            if method in methods:
                raise ValueError(f"the method {method!r} has two rows.")
            methods.add(method)
        if of_room:
            table = tables.markdown(tables.Table("", HEADERS, sorted(of_room, key=lambda row: row[0].lower())))
            parts += [f"## {room}\n", "\n".join(table) + "\n"]
    return "\n".join(parts)


def _source(entry: _frame.Claim | Verified) -> tuple[str, str, str]:
    """Method, paper and functions."""
    paper, _, others = entry.paper.partition("; ")
    linked = lambda text: re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", text)
    here = " (not on arXiv)" if entry.arxiv is None else f", {linked(f'arXiv:{entry.arxiv}')}"
    functions = ", ".join(f"`{name}`" for name in entry.functions)
    return entry.method, f"{linked(paper)}{here}" + (f"; {linked(others)}" if others else ""), functions


def _measured(claim: _frame.Claim, records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each record, the default settings first: verdict, seeds, settings and the numbers that decide."""
    lines = []
    for record in sorted(records, key=lambda record: (len(record["different"]), str(record["different"]))):
        found = next((found for found in record["claims"] if found["method"] == claim.method), None)
        if found is None or not found["bars"]:
            continue
        first, *others = found["bars"]
        weak = [bar for bar in others if bar["verdict"] != _verdicts.APPEARS]
        told = [
            bar["measured"] + (f" {bar['verdict']}" if bar["verdict"] != found["verdict"] else "")
            for bar in (first, *weak)
        ]
        different = ", ".join(f"{name} {_value(value)}" for name, value in record["different"].items())
        seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}"
        line = f"**{found['verdict']}** ({', '.join(filter(None, (different, seeds)))}): "
        line += "; ".join(told)
        left = len(others) - len(weak)
        lines.append(line + (f"; {left} more bar{'s' * (left > 1)} appear{'s' * (left == 1)}" if left else ""))
    return "<br>".join(lines) if lines else "not recorded; see [measured](measured.md)"


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
