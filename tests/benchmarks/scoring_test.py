import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scoring as benchmark

TINY = benchmark.Config(
    train_rows=60, test_rows=20, dim=6, classes=3, energy_classes=4, scores=40, rounds=2, memory=False
)
NAMES = [f"{detector} {step}" for detector in ("knn", "mahalanobis", "vim", "react") for step in ("fit", "score")]
NAMES += ["energy score", "AUROC and FPR95"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0)
    monkeypatch.setattr(benchmark, "ENOUGH", 0)


@pytest.fixture(scope="module")
def data():
    return benchmark.Data(TINY)


@pytest.fixture
def alone(monkeypatch):
    def missing(data):
        raise ImportError("no such module")

    monkeypatch.setattr(benchmark, "their_functions", missing)


def answers(data, wrong=None):
    """Those of robustjax in place of those of its peer, one of them a tenth too large."""
    ours = {name: np.asarray(f()) for name, f in benchmark.our_functions(data).items() if not name.endswith("fit")}
    return {name: lambda name=name: ours.get(name, 0.0) * (1.1 if name == wrong else 1) for name in NAMES}


def test_every_row_is_timed_without_peers(alone, tmp_path, capsys):
    result = benchmark.run(dataclasses.replace(TINY, json=str(tmp_path / "figures.json")))
    assert [row["name"] for row in result["rows"]] == NAMES
    assert all(len(row["ours"]) == 2 and row["ratio"] is None and not row["theirs"] for row in result["rows"])
    assert result["left_out"][0].startswith("pytorch-ood, which cannot be imported (no such module): pip install")
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "60 training rows" in printed


def test_quick_is_a_tenth(alone):
    settings = benchmark.run(dataclasses.replace(TINY, train_rows=600, quick=True))["settings"]
    assert (settings["train_rows"], settings["test_rows"], settings["scores"], settings["rounds"]) == (60, 2, 4, 1)


def test_peers_are_compared_with_the_bars_in_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "their_functions", answers)
    seconds = iter([2.0, 3.0, 2.0, 5.0, *[1.0] * 100])
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda function: next(seconds))
    result = benchmark.run(TINY)
    assert not result["left_out"]
    first, *others = result["rows"]
    assert (first["ours"], first["theirs"], first["ratio"], first["bar"]) == ([2.0, 2.0], [3.0, 5.0], 2.0, 0.8)
    assert all(row["ratio"] == 1 for row in others)
    lines = {line[:20].strip(): line for line in capsys.readouterr().out.splitlines()}
    met = {name: next(word for word in lines[name].split() if word in ("yes", "no")) for name in NAMES[:2]}
    assert met == {"knn fit": "yes", "knn score": "no"}
    assert all("2 yes" in lines[name][:80] for name in NAMES)


@pytest.mark.parametrize("wrong", [name for name in NAMES if not name.endswith("fit")])
def test_a_peer_that_gives_another_answer_is_refused(monkeypatch, data, wrong):
    monkeypatch.setattr(benchmark, "their_functions", lambda data: answers(data, wrong))
    with pytest.raises(ValueError, match=f"{wrong} must equal that of robustjax, got a relative difference of 0.1"):
        benchmark.peers(data, benchmark.our_functions(data))


def test_pytorch_ood_gives_the_same_answers(data):
    pytest.importorskip("pytorch_ood")
    theirs, left_out = benchmark.peers(data, benchmark.our_functions(data))
    assert (list(theirs), left_out) == (NAMES, [])


def test_short_work_is_timed_more_often_and_long_work_is_not(monkeypatch):
    monkeypatch.setattr(benchmark, "ENOUGH", 1)
    for seconds, times in ((0.001, 20), (0.1, 5), (3.0, 2)):
        monkeypatch.setattr(benchmark, "cpu_seconds", lambda function, seconds=seconds: seconds)
        assert benchmark.measure(int, int, 2) == ([seconds] * times, [seconds] * times)


def test_only_what_is_compiled_counts():
    function = jax.jit(lambda x: jnp.sin(x) * 17)
    x = jnp.ones(3)
    assert benchmark.compile_seconds(lambda: function(x)) > 0
    assert benchmark.compile_seconds(lambda: function(x)) == 0


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads memory as Linux tells it")
def test_memory_is_what_is_used_beyond_the_features():
    large = dataclasses.replace(TINY, dim=64, train_rows=100_000)  # features of 25 MiB, which knn keeps once more
    assert 24 < benchmark.extra_memory("knn", large) < 400  # what compiling takes is in it


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="train_rows must be at least 50"):
        benchmark.run(dataclasses.replace(TINY, train_rows=49))
    with pytest.raises(ValueError, match="test_rows and rounds must be positive"):
        benchmark.run(dataclasses.replace(TINY, rounds=0))
    with pytest.raises(ValueError, match="other numbers at least 2"):
        benchmark.run(dataclasses.replace(TINY, scores=1))
