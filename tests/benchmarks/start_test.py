import json
import pathlib

import pytest

from benchmarks import start as benchmark

PROGRAM = "import jax; jax.jit(lambda x: x + 1)(1.0); jax.jit(lambda x: jax.jit(abs)(x) + 2)(1.0)"


def checkout(folder, program):
    (folder / "experiments").mkdir()
    (folder / "experiments" / "__init__.py").touch()
    (folder / "experiments" / "ood.py").write_text(program)


def test_programs_are_counted_cold_and_warm(tmp_path):
    """A nested program is part of the outer one; the cache shortens compiling, and does not change the count."""
    checkout(tmp_path, PROGRAM)
    found = benchmark.started(tmp_path, "ood")
    assert (found["cold"]["programs"], found["warm"]["programs"]) == (2, 2)
    for state in found.values():
        assert 0 < state["compiling"] < state["cpu"]


def test_a_run_that_fails_is_named(tmp_path):
    checkout(tmp_path, "raise OSError('no room')")
    with pytest.raises(ValueError, match="^experiments.ood .* failed: OSError: no room$"):
        benchmark.started(tmp_path, "ood")


def test_shares_and_bars(monkeypatch, tmp_path, capsys):
    (tmp_path / "robustjax").mkdir()
    cost = lambda scale: {state: dict.fromkeys(benchmark.MEASURED, scale) for state in ("cold", "warm")}
    monkeypatch.setattr(benchmark, "started", lambda checkout, product: cost(1.0 if checkout == tmp_path else 0.55))
    monkeypatch.setattr(benchmark, "in_process", lambda *_: "0.5")
    benchmark.run(benchmark.Config(against=str(tmp_path), json=str(tmp_path / "start.json")))
    printed = capsys.readouterr().out
    assert "ood, cold programs: 0.55 of the other checkout's; at most 0.5: no" in printed
    assert "ood, cold compiling: 0.55 of the other checkout's; at most 0.6: yes" in printed
    assert json.loads(pathlib.Path(tmp_path, "start.json").read_bytes())["import"]["here"] == [0.5] * 3


@pytest.mark.parametrize(("setting", "wrong"), [("rounds", 0), ("against", "nowhere")])
def test_bad_settings(setting, wrong):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        benchmark.Config(**{setting: wrong})
