import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attacks as benchmark

TINY = benchmark.Config(num_images=10, rounds=2, train_steps=2)
NAMES = ["PGD-40", "AutoAttack"]


class Linear(benchmark.Subject):
    """A linear model of two pixels, in place of one that is trained, on inputs of known distance to its boundary."""

    def __init__(self, name, config):
        self.key, self.state = jax.random.key(0), None
        self.x = jnp.asarray([[0.5, 0.4], [0.5, 0.2], [0.1, 0.2]]).reshape(3, 1, 2, 1)
        self.labels = jnp.zeros(3, jnp.int32)
        self.logits_fn = jax.tree_util.Partial(lambda x: x.reshape(-1, 2))


def moved(subject, by):
    """The first pixel down and the second up, in the box."""
    return np.clip(np.asarray(subject.x) + np.float32(by) * np.float32([-1, 1])[None, None, :, None], 0, 1)


@pytest.fixture
def simple(monkeypatch):
    """Attacks in place of the real ones, which take minutes: robustjax moves by epsilon, its peers by a half of it."""
    monkeypatch.setattr(benchmark, "Subject", Linear)
    attack = lambda subject, by: dict.fromkeys(NAMES, lambda: moved(subject, by))
    monkeypatch.setattr(benchmark, "our_attacks", lambda subject, epsilon: attack(subject, epsilon))
    monkeypatch.setattr(
        benchmark, "their_attacks", lambda subject, name, epsilon, seed: (attack(subject, epsilon / 2), [])
    )


@pytest.fixture(scope="module")
def mlp():
    return benchmark.Subject("mlp", TINY)


def clock(monkeypatch, durations):
    durations = iter(durations)

    def cpu_seconds(function):
        function()
        return next(durations)

    monkeypatch.setattr(benchmark, "cpu_seconds", cpu_seconds)


def test_peers_are_compared_with_the_bars_in_80_columns(simple, monkeypatch, capsys, tmp_path):
    first, ours, theirs = 11.0, 1.0, 4.5
    clock(monkeypatch, [first, ours, theirs, ours, theirs] * 3 + [first, ours, theirs])
    result = benchmark.run(dataclasses.replace(TINY, epsilon=0.1, json=str(tmp_path / "figures.json")))
    assert [(row["model"], row["name"]) for row in result["rows"]] == [(m, n) for m in ("mlp", "cnn") for n in NAMES]
    for row in result["rows"]:
        rounds = 1 if row["bar"] is None else 2
        assert (row["ours"], row["theirs"]) == ([1.0] * rounds, [4.5] * rounds)
        assert (row["ratio"], row["compile"]) == (4.5, 10.0)
        assert row["robust"] == pytest.approx([1 / 3] * rounds)  # at 0.1 the first falls
        assert row["their_robust"] == pytest.approx([1 / 3] * rounds)
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[2:])) <= 80
    told = [line.split() for line in lines if line.startswith(tuple(NAMES))]
    verdicts = [[word for word in line if word in ("yes", "no")] for line in told]
    assert verdicts == [["yes", "yes"], ["no", "yes", "no"], ["yes", "yes"], ["yes", "no"]]


def test_a_weaker_attack_is_not_a_faster_one(simple, monkeypatch, capsys):
    ours = benchmark.our_attacks
    monkeypatch.setattr(benchmark, "our_attacks", lambda subject, epsilon: ours(subject, epsilon / 4))
    benchmark.run(dataclasses.replace(TINY, epsilon=0.12))
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("PGD-40"))
    assert row[row.index("66.7%") :][:3] == ["66.7%", "33.3%", "no"]


def test_without_peers_robustjax_is_timed_alone(simple, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "their_attacks", lambda *args: ({}, ["the peers"]))
    result = benchmark.run(TINY)
    assert result["left_out"] == ["the peers"]
    assert [len(row["ours"]) for row in result["rows"]] == [2, 2, 2, 1]  # once without a bar
    assert not any(row["theirs"] or row["ratio"] for row in result["rows"])
    printed = capsys.readouterr().out
    assert "Left out: the peers." in printed
    assert "PGD-40" in printed


def test_quick_is_a_tenth(simple):
    settings = benchmark.run(dataclasses.replace(TINY, num_images=100, quick=True))["settings"]
    assert (settings["num_images"], settings["rounds"]) == (10, 1)


def test_only_what_stays_correct_in_the_ball_is_robust():
    subject = Linear("mlp", TINY)
    assert subject.stands(subject.x).tolist() == [True, True, False]
    assert subject.robust_accuracy(subject.x, 0.1) == pytest.approx(2 / 3)
    assert subject.robust_accuracy(moved(subject, 0.1), 0.1) == pytest.approx(1 / 3)
    assert subject.robust_accuracy(moved(subject, -0.1), 0.1) == pytest.approx(2 / 3)  # the third was wrong as it is
    for far in (moved(subject, 0.11), np.asarray(subject.x) - 0.2):
        with pytest.raises(ValueError, match="must be in .0, 1. and within epsilon 0.1, got a distance of 0.[12]"):
            subject.robust_accuracy(far, 0.1)


def test_attacks_take_turns(monkeypatch):
    order = []
    clock(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    seconds, results = benchmark.measure([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b", "a", "b"]
    assert seconds.tolist() == [[1, 3], [2, 4]]
    assert [len(of_one) for of_one in results] == [2, 2]


def test_ours_are_the_attacks_that_the_rows_name(mlp):
    ours = {name: attack.func for name, attack in benchmark.our_attacks(mlp, 0.06).items()}
    assert (ours["PGD-40"].steps, ours["PGD-40"].norm, ours["PGD-40"].epsilon) == (40, "linf", 0.06)
    assert (ours["AutoAttack"].version, ours["AutoAttack"].norm) == ("standard", "linf")
    assert mlp.x.shape == (10, 28, 28, 1)


def test_what_is_missing_is_told(mlp, monkeypatch):
    pytest.importorskip("torch")
    missing = {name: ("no_such_module", "pip install it") for name in NAMES}
    monkeypatch.setattr(benchmark, "PEERS", missing)
    theirs, left_out = benchmark.their_attacks(mlp, "mlp", 0.06, 0)
    assert theirs == {}
    expected = "no_such_module, which cannot be imported (No module named 'no_such_module'): pip install it"
    assert left_out == [expected] * 2


def test_the_peers_attack_the_same_model(mlp):
    pytest.importorskip("torchattacks")
    pytest.importorskip("autoattack")
    theirs, left_out = benchmark.their_attacks(mlp, "mlp", 0.06, 0)
    assert (list(theirs), left_out) == (NAMES, [])
    assert 0 <= mlp.robust_accuracy(theirs["PGD-40"](), 0.06) <= mlp.stands(mlp.x).mean()
    other, head = copy.copy(mlp), mlp.state.params["head"]
    other.state = mlp.state._replace(params=mlp.state.params | {"head": head | {"bias": head["bias"] + 1}})
    with pytest.raises(ValueError, match="the mlp of PyTorch must be the same function, got logits (1.0|0.9999)"):
        benchmark.their_attacks(other, "mlp", 0.06, 0)


def test_bad_settings_are_refused():
    for wrong in ({"num_images": 501}, {"num_images": 0}, {"rounds": 0}, {"train_steps": 0}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match="num_images must be 1 to 500, epsilon in"):
            benchmark.run(dataclasses.replace(TINY, **wrong))
