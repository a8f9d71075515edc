"""The command ``robustjax``, and the experiments as a part of the package."""

import importlib.metadata
import sys

import pytest

import experiments.evaluate
import robustjax.experiments
from experiments.common import command_line


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["robustjax", *arguments])
    robustjax.experiments.main()


def test_experiments_are_found_by_name():
    assert robustjax.experiments.evaluate is experiments.evaluate
    with pytest.raises(AttributeError, match="robustjax has no experiment 'evaluation'; it has evaluate, smoothing, "):
        robustjax.experiments.evaluation  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from robustjax.experiments import nothing")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert "usage: robustjax COMMAND" in shown
    for name in robustjax.experiments.COMMANDS:
        assert f"\n  {name} " in shown


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.strip() == importlib.metadata.version("robustjax") == robustjax.__version__


def test_a_command_runs_under_its_own_name(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "PROG", None)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "smoothing", "--help")
    assert end.value.code in (None, 0)
    assert "usage: robustjax smoothing [-h]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("smooting", "error: there is no command 'smooting'; did you mean smoothing?"),
        ("xyz", "error: there is no command 'xyz'; it must be one of evaluate, smoothing, ood, adversarial, claims."),
    ],
)
def test_an_unknown_command_is_named(monkeypatch, command, message):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, command)
    assert end.value.code == message
