import dataclasses
import json

import pytest

from benchmarks import train as benchmark

SHAPES = benchmark.SHAPES  # before a fixture takes others
TINY = benchmark.Config(models=("mlp",), quick=True)


@pytest.fixture(scope="module")
def small():
    """A network that compiles quickly, and four small images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "BATCHES", {"mlp": 4})
        patch.setattr(benchmark, "SHAPES", {"mlp": (8, 8, 1)})
        patch.setattr(benchmark, "BARS", {("mlp", "PyTorch default"): 1.0, ("mlp", "PyTorch channels_last"): 0.6})
        yield


@pytest.fixture(scope="module")
def subject(small):
    return benchmark.Subject("mlp", 0)


def test_a_step_learns_the_batch(subject):
    losses = [subject.step() for _ in range(300)]
    assert losses[-1] < losses[0] / 2
    assert subject.loss() == pytest.approx(losses[0], rel=0.2)  # of the first weights


def test_the_table_compares_with_bars(small, subject, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "Subject", lambda name, seed: subject)
    monkeypatch.setattr(benchmark, "peers", lambda *_: (dict.fromkeys(benchmark.FORMATS, float), ["nothing"]))
    ticks = iter([1.0, 1.1, 0.5])
    monkeypatch.setattr(benchmark, "seconds", lambda function: next(ticks))
    result = benchmark.run(dataclasses.replace(TINY, json=str(tmp_path / "figures.json")))
    assert [row["images_per_second"] for row in result["rows"]] == [[4.0], [pytest.approx(4 / 1.1)], [8.0]]
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    lines = {line[:21].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["PyTorch default"][2:] == ["4", "4", "1.10", ">=", "1", "yes"]
    assert lines["PyTorch channels_last"][2:] == ["4", "8", "0.50", ">=", "0.6", "no"]


def test_without_pytorch_the_row_says_so(subject, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    steps, left_out = benchmark.peers(subject, "mlp", 0)
    assert not steps
    assert left_out[0].startswith("PyTorch, which is not installed: pip install")


@pytest.mark.parametrize("name", ["lenet", "cnn", "resnet20"])
def test_pytorch_trains_the_same_network(name, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(benchmark, "BATCHES", {name: 2})
    monkeypatch.setattr(benchmark, "SHAPES", SHAPES)
    steps, left_out = benchmark.peers(benchmark.Subject(name, 0), name, 0)
    assert (list(steps), left_out) == (list(benchmark.FORMATS), [])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rounds must be positive and models at least one"):
        benchmark.run(dataclasses.replace(TINY, rounds=0))
