import copy
import dataclasses
import importlib
import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import tyro

from benchmarks import __main__ as benchmark
from benchmarks import _report

MACHINE = {"cpu": "A CPU", "cores": 2, "device": "cpu", "dtype": "float32", "load": 0.1}
MACHINE["versions"] = {"Python": "3.11.7", "jax": jax.__version__}
SETTINGS = {"quick": False, "json": "figures.json"}


def speed(model, name, *speeds):
    return {"model": model, "name": name, "samples_per_second": list(speeds)}


def cost(name, bar, ours, theirs, compiled):
    return {"name": name, "ours": ours, "theirs": theirs, "bar": bar, "compile_seconds": compiled}


def attack(model, name, bar, ours, theirs, robust, their_robust, compiled):
    entry = {"model": model, "name": name, "peer": "module", "bar": bar, "ours": ours, "theirs": theirs}
    return entry | {"robust": robust, "their_robust": their_robust, "compile": compiled}


def training(name, bar, *speeds):
    return {"model": "lenet", "name": name, "batch_size": 256, "bar": bar, "images_per_second": list(speeds)}


CARD = {"name": "H200", "dtype": "bfloat16", "peak": 989e12, "shares": [0.01, 0.1]}
FIGURES = {  # as the modules write them
    "certify": {
        "rows": [
            speed("cnn 28x28x1", "sample_counts", 900.0, 1000.0, 1100.0),
            speed("cnn 28x28x1", "bare forward pass", 1000.0, 1000.0, 1000.0),
            speed("cnn 28x28x1", "PyTorch default", 400.0, 400.0, 400.0),
            speed("cnn 28x28x1", "sample_counts", 1.0, 1.0, 1.0),  # of a sweep
            speed("resnet20 32x32x3", "sample_counts", 90.0, 100.0, 110.0),
            speed("resnet20 32x32x3", "bare forward pass", 100.0, 100.0, 100.0),
        ],
        "peak_mib": {"10000": 100.0, "1000000": 110.0},
        "left_out": ["ART, for which art is not installed: pip install it"],
    },
    "scoring": {
        "rows": [
            cost("knn fit", 0.8, [1.0, 1.0], [0.5, 0.7], 0.5),
            cost("vim score", None, [1.0, 1.0], [2.0, 4.0], 3.0),
            cost("energy score", 4.0, [0.001], [], 0.1),
        ],
        "extra_mib": {"knn": 400.0, "vim": 600.0},
        "left_out": ["pytorch-ood, which cannot be imported (no symbol in /home/somebody/lib/a.so)"],
    },
    "attacks": {
        "rows": [
            attack("mlp", "PGD-40", 4.0, [1.0, 2.0], [5.0, 9.0], [0.5, 0.5], [0.496, 0.496], 1.0),
            attack("mlp", "AutoAttack", 5.0, [1.0], [], [0.4], [], 11.0),
            attack("cnn", "AutoAttack", None, [1.0], [2.0], [0.4], [0.3], 9.0),
        ],
        "left_out": [],
    },
    "train": {
        "rows": [
            training("robustjax", None, 100.0, 120.0, 140.0) | {"compile_seconds": 4.0},
            training("PyTorch default", 1.0, 100.0, 100.0, 200.0),
            training("PyTorch channels_last", 0.6, 200.0, 240.0, 400.0),
        ],
        "left_out": [],
    },
    "growth": {
        "growth": [
            {
                "quantity": "samples",
                "function": "certify",
                "sizes": [400, 1600],
                "seconds": [[1.0, 1.0, 4.0], [3.0, 4.0, 5.0]],
                "exponent": 1.0,
                "at_the_end": 0.9,
            },
            {"quantity": "devices", "function": "images split", "sizes": [1, 2], "seconds": [[1.0, 2.0], [3.0, 6.0]]},
        ],
        "checks": [
            {
                "model": "cnn",
                "shape": [8, 8, 1],
                "num_images": 8,
                "num_samples": 5000,
                "seconds": [1.0, 1.1],
                "predicted": 1.0,
                "measured": 1.05,
                "error": -0.0476,
            }
        ],
        "predictions": [
            {
                "model": "resnet110",
                "shape": [32, 32, 3],
                "num_images": 500,
                "num_samples": 100_100,
                "flops_per_image": 4.6e8,
                "here": {"batch_size": 200, "block": 4.0, "seconds": 1_000_000.0},
                "cards": [{**CARD, "at_peak": 23.6, "at_bandwidth": 50.0, "fast": 236.0, "slow": 2360.0}],
            }
        ],
    },
}
for part in FIGURES.values():
    part |= {"machine": MACHINE, "settings": SETTINGS | {"num_images": 200}}


@pytest.fixture
def processes(monkeypatch):
    """Processes that write the figures above, and their command lines."""
    commands, figures = [], copy.deepcopy(FIGURES)

    def run(command, **kwargs):
        commands.append(command)
        name = {module: part for part, module in benchmark.MODULES.items()}[command[2].removeprefix("benchmarks.")]
        if name not in figures:
            return subprocess.CompletedProcess(command, 3, "", "a trace\nit broke\n")
        path = pathlib.Path(command[command.index("--json") + 1])
        path.write_text(json.dumps(figures[name]))
        return subprocess.CompletedProcess(command, 0, "its own table", "")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark.os, "getloadavg", lambda: (0.1, 2.0, 2.0))
    return commands, figures


@pytest.fixture
def docs(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "DOCS", tmp_path / "docs")
    return tmp_path / "docs"


def rows(part, figures=None):
    """Of the table, by name; without headings."""
    return {row[0].strip(): row[1:] for row in _report.peer_sheet(part, figures or FIGURES[part]).rows if len(row) > 1}


def test_certification_beside_its_peers():
    table = _report.peer_sheet("certify", FIGURES["certify"])
    assert [row[0] for row in table.rows if len(row) == 1] == ["cnn 28x28x1", "resnet20 32x32x3", "peak memory, MiB"]
    found = rows("certify")
    assert table.rows[1] == ["bare forward pass", "1,000", "1,000", "1.00", "0.90-1.10", ">= 0.85", "yes"]
    assert found["PyTorch default"] == ["1,000", "400", "2.50", "2.25-2.75", ">= 3", "no"]
    assert found["PyTorch channels_last"] == ["1,000", "missing", "", "", ">= 1.2", ""]
    assert found["ART certify"] == ["1,000", "missing", "", "", "", ""]
    assert found["1,000,000 samples, 10,000"] == ["110", "100", "1.10", "", "<= 1.05", "no"]


def test_scoring_beside_its_peer():
    found = rows("scoring")
    assert found["knn fit"] == ["1", "0.6", "0.60", "0.50-0.70", ">= 0.8", "no"]
    assert found["vim score"] == ["1", "3", "3.00", "2.00-4.00", "", ""]
    assert found["energy score"] == ["0.001", "missing", "", "", ">= 4", ""]
    assert found["the slowest, vim score"] == ["3", "", "", "", "<= 2", "no"]
    assert (found["knn"], found["vim"]) == (["400", "", "", "", "<= 500", "yes"], ["600", "", "", "", "", ""])


def test_training_beside_pytorch():
    found = rows("train")
    assert found["PyTorch default"] == ["120", "100", "1.00", "0.70-1.20", ">= 1", "yes"]
    assert found["PyTorch channels_last"] == ["120", "240", "0.50", "0.35-0.50", ">= 0.6", "no"]
    assert found["compiling, seconds"][:2] == ["4", ""]


def test_attacks_beside_their_peers():
    table = [row for row in _report.peer_sheet("attacks", FIGURES["attacks"]).rows if len(row) > 1]
    assert table[0] == ["PGD-40, module", "150", "31.11", "4.75", "4.50-5.00", ">= 4", "yes"]
    assert table[1] == ["  accuracy left", "50.0%", "49.6%", "", "", "+0.5%", "yes"]
    assert table[2] == ["AutoAttack, module", "200", "missing", "", "", ">= 5", ""]
    assert table[3][-1] == ""
    assert table[4] == ["  compiling, seconds", "11", "", "", "", "< 10", "no"]
    assert (table[6][-1], table[7][-1]) == ("no", "yes")


def test_one_table_in_80_columns(processes, capsys):
    benchmark.run(benchmark.Config())
    commands, _ = processes
    assert [command[1:3] for command in commands] == [["-m", f"benchmarks.{m}"] for m in benchmark.MODULES.values()]
    assert all("--quick" not in command for command in commands)
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if "Python 3.11.7" not in line and not line.startswith("Left out")]
    assert max(map(len, tables)) <= 80
    assert not any("…" in line for line in tables)
    assert sum(line.startswith("row ") for line in lines) == 1
    assert next(line.split()[2:] for line in lines if line.startswith("images split") and " 2 " in line)[1:3] == [
        "4.500",
        "3.00",
    ]
    assert any("Left out: ART, for which art is not installed" in line for line in lines)


@pytest.mark.parametrize("module", benchmark.MODULES.values())
def test_each_part_knows_its_flags(module):
    config = importlib.import_module(f"benchmarks.{module}").Config
    parsed = tyro.cli(config, args=["--json", "figures.json", "--quick"])
    assert (parsed.json, parsed.quick) == ("figures.json", True)


def test_finished_parts_are_taken_up_again(processes, tmp_path):
    commands, figures = processes
    config = benchmark.Config(only=("scoring", "certify"), keep_json=str(tmp_path))
    del figures["scoring"]
    with pytest.raises(ValueError, match="^scoring ended with status 3: it broke$"):
        benchmark.run(config)
    assert len(commands) == 2
    figures["scoring"] = FIGURES["scoring"]
    first = benchmark.run(config)
    assert [command[2] for command in commands[2:]] == ["benchmarks.scoring"]
    assert benchmark.run(config) == first
    assert len(commands) == 3
    benchmark.run(dataclasses.replace(config, quick=True, only=("certify",)))
    assert len(commands) == 4
    assert "--quick" in commands[-1]
    (tmp_path / "scoring.json").write_text("{")
    assert benchmark.run(dataclasses.replace(config, only=("scoring",)))["scoring"] == first["scoring"]
    assert len(commands) == 5


def test_other_versions_are_measured_anew(processes, tmp_path, monkeypatch):
    config = benchmark.Config(only=("certify",), keep_json=str(tmp_path))
    benchmark.run(config)
    monkeypatch.setattr(benchmark.jax, "__version__", "0.0.0")
    benchmark.run(config)
    assert len(processes[0]) == 2


def test_the_page_keeps_parts_of_other_days(processes, docs, capsys):
    benchmark.run(benchmark.Config(only=("scoring",), write=True))
    page = (docs / "performance.md").read_text()
    assert "Not measured yet: `python -m benchmarks --only certify --write`" in page
    assert "knn fit" in page
    assert not (docs / "growth.png").exists()
    stored = json.loads((docs / "performance.json").read_text())
    stored["scoring"]["date"] = "2001-02-03"
    (docs / "performance.json").write_text(json.dumps(stored))
    benchmark.run(benchmark.Config(only=("growth", "certify"), write=True))
    page, stored = (docs / "performance.md").read_text(), json.loads((docs / "performance.json").read_text())
    assert list(stored) == ["certify", "scoring", "growth"]
    assert page == _report.page(stored)
    assert page.index("## Certification") < page.index("2001-02-03") < page.index("## Attacks")
    assert page.count(stored["growth"]["date"]) == 2
    assert (docs / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert "| knn fit | 1 | 0.6 | 0.60 | 0.50-0.70 | >= 0.8 | no |" in page


def test_a_part_that_fails_takes_none_with_it(processes, docs):
    del processes[1]["certify"]
    with pytest.raises(ValueError, match="certify ended with status 3: it broke"):
        benchmark.run(benchmark.Config(write=True))
    assert list(json.loads((docs / "performance.json").read_text())) == ["scoring", "attacks", "train", "growth"]


def test_the_page_tells_machine_load_and_haste_and_no_paths():
    parts = {name: {"date": "2001-02-03", "figures": copy.deepcopy(FIGURES[name])} for name in FIGURES}
    assert "Measured on 2001-02-03: A CPU, 2 cores; JAX on cpu, float32; Python 3.11.7" in _report.page(parts)
    assert "The load was" not in _report.page(parts)
    assert "quick run" not in _report.page(parts)
    parts["attacks"]["figures"]["machine"]["load"] = 2.13
    parts["attacks"]["figures"]["settings"]["quick"] = True
    page = _report.page(parts)
    assert page.count("The load was 2.1 when it began") == page.count("This was a quick run") == 1
    assert "Left out: pytorch-ood, which cannot be imported (no symbol in)." in page
    assert "/home" not in page
    assert "predicted, not measured" in page
    assert "| H200 bfloat16 | 989 TFLOP/s | 1-10% | 3.9 min to 39 min | 24 s | 50 s |" in page


def test_durations_are_told_in_the_unit_that_suits():
    seconds = (0.12, 5.0, 119.0, 150.0, 6_000.0, 7_500.0, 200_000.0, 3e8)
    expected = ["0.1 s", "5.0 s", "119 s", "2.5 min", "100 min", "2.1 h", "2.3 days", "3,472 days"]
    assert [*map(_report.duration, seconds)] == expected


def test_the_plot_shows_the_medians():
    figure = _report.growth_figure(FIGURES["growth"])
    samples, *_, devices, model = figure.axes
    assert len(figure.axes) == 6
    assert np.array_equal(samples.lines[0].get_xydata(), [[400, 1], [1600, 4]])
    assert np.array_equal(devices.lines[0].get_xydata(), [[1, 1.5], [2, 4.5]])
    assert np.array_equal(model.lines[0].get_xydata(), [[1.05, 1.0]])
    assert samples.get_legend().get_texts()[0].get_text() == "certify, 1.00"


def test_the_page_is_that_of_its_figures():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    parts = json.loads((docs / "performance.json").read_text())
    assert (docs / "performance.md").read_text() == _report.page(parts)
    assert (docs / "growth.png").exists() == ("growth" in parts)
    assert not any("json" in part["figures"]["settings"] for part in parts.values())
