import dataclasses
import json
import pathlib

import numpy as np
import pytest

from benchmarks import scoring as benchmark

TINY = benchmark.Config(
    train_rows=60, test_rows=20, dim=6, classes=3, energy_classes=4, scores=40, rounds=2, memory=False
)
NAMES = [
    *(
        "knn fit",
        "knn score",
        "mahalanobis fit",
        "mahalanobis score",
        "vim fit",
        "vim score",
        "react fit",
        "react score",
    ),
    *("energy score", "AUROC and FPR95"),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)


def alone(monkeypatch):
    def missing(data):
        raise ImportError("no such module")

    monkeypatch.setattr(benchmark, "their_functions", missing)


def test_every_row_is_timed_without_peers(monkeypatch, tmp_path, capsys):
    alone(monkeypatch)
    result = benchmark.run(dataclasses.replace(TINY, json=str(tmp_path / "figures.json")))
    assert [row["name"] for row in result["rows"]] == NAMES
    assert all(len(row["ours"]) == 2 and row["ratio"] is None and not row["theirs"] for row in result["rows"])
    assert result["left_out"][0].startswith("pytorch-ood, which cannot be imported (no such module): pip install")
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "60 training rows" in printed


def test_quick_is_a_tenth(monkeypatch):
    alone(monkeypatch)
    settings = benchmark.run(dataclasses.replace(TINY, train_rows=600, quick=True))["settings"]
    assert (settings["train_rows"], settings["test_rows"], settings["scores"], settings["rounds"]) == (60, 2, 4, 1)


def peers(data, wrong=None):
    """Answers of robustjax itself in place of those of the peer."""
    rows = {row.name: np.asarray(row.ours()) for row in benchmark.our_rows(data) if not row.name.endswith("fit")}
    return {name: lambda name=name: rows.get(name, 0.0) * (1.1 if name == wrong else 1) for name in NAMES}


def test_peers_are_compared_with_the_bars(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "their_functions", peers)
    seconds = iter([2.0, 3.0, 2.0, 5.0, *[1.0] * 100])
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda function: next(seconds))
    result = benchmark.run(TINY)
    assert not result["left_out"]
    first, *others = result["rows"]
    assert (first["ours"], first["theirs"], first["ratio"], first["bar"]) == ([2.0, 2.0], [3.0, 5.0], 2.0, 0.8)
    assert all(row["ratio"] == 1 for row in others)
    lines = {line[:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert [word for word in lines["knn fit"].split() if word in ("yes", "no")][0] == "yes"
    assert [word for word in lines["knn score"].split() if word in ("yes", "no")][0] == "no"


def test_a_peer_that_gives_another_answer_is_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "their_functions", lambda data: peers(data, wrong="vim score"))
    with pytest.raises(ValueError, match="vim score must be the same, got a relative difference of 0.0909"):
        benchmark.run(TINY)


def test_compilations_are_counted_once():
    import jax
    import jax.numpy as jnp

    function = jax.jit(lambda x: jnp.sin(x) * 17)
    with benchmark.compilations() as durations:
        function(jnp.ones(3))
        count = len(durations)
        function(jnp.ones(3))
    assert len(durations) == count >= 1
    jax.jit(lambda x: jnp.cos(x) * 17)(jnp.ones(3))
    assert len(durations) == count


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
def test_memory_is_what_is_used_beyond_the_features(capsys):
    benchmark.print_extra_memory("react", dataclasses.replace(TINY, dim=64, train_rows=20_000))
    printed = float(capsys.readouterr().out)
    assert 0 <= printed < 300  # features of 5 MiB, and room for a program that is compiled


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="train_rows must be at least 50"):
        benchmark.run(dataclasses.replace(TINY, train_rows=49))
    with pytest.raises(ValueError, match="test_rows and rounds must be positive"):
        benchmark.run(dataclasses.replace(TINY, rounds=0))
