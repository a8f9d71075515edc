"""Tables on a narrow terminal, and the one notation for mean and spread."""

import io

import numpy as np
from rich.console import Console

from experiments.common import tables


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    tables.show(console, table)
    return console.export_text().splitlines()


def test_numbers_that_do_not_fit_follow_below():
    headers, body = ["detector", *(f"a_far_set_{i}" for i in range(6))], [["d" * 24, *["**0.912 (0.004)**"] * 6]]
    lines = shown(tables.Table("AUROC", headers, body))
    assert max(map(len, lines)) <= 80
    assert [sum(header in line.split() for line in lines) for header in headers] == [2, *[1] * 6]
    assert sum(line.count("0.912 (0.004)") for line in lines) == 6
    assert sum("AUROC, continued" in line for line in lines) == 1


def test_texts_are_wrapped_beside_their_name():
    lines = shown(tables.Table("Checks", ["result", "finding"], [["**WARNING**", "word " * 30], ["pass", "[near]"]]))
    assert max(map(len, lines)) <= 80
    assert sum(line.count("word") for line in lines) == 30
    assert any(line.split() == ["pass", "[near]"] for line in lines)
    assert not any("*" in line for line in lines)


def test_mean_and_spread_have_one_notation():
    assert tables.mean_and_sd(np.array([0.908, 0.912, 0.916])) == "0.912 (0.004)"
    assert tables.mean_and_sd([1234.5], ",.0f") == "1,234"
    assert tables.mean_and_sd([0.5, np.nan]) == "-"
