"""The command ``robustjax``."""

import importlib.metadata
import re
import sys

import pytest

import robustjax
from robustjax import _command


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["robustjax", *arguments])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # runpy would keep what jaxtyping's hook makes for the tests
    _command.main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    assert "usage: robustjax COMMAND" in shown
    for name, about in _command.COMMANDS.items():
        assert f"\n  {name} " in shown
        assert about in shown


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    run(monkeypatch, "--version")
    version = importlib.metadata.version("robustjax")
    assert capsys.readouterr().out == f"robustjax {version}\n"
    assert version == robustjax.__version__


@pytest.mark.parametrize("command", ["smoothing", "claims.halfspaces"])
def test_a_command_and_its_examples_have_the_name_that_it_is_called_by(monkeypatch, capsys, command):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, command, "--help")
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: robustjax {command} [-h]")
    assert re.search(rf"^ *robustjax {command}$", shown, re.MULTILINE)
    assert "python -m" not in shown


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("smooting", "error: there is no command 'smooting'; did you mean smoothing?"),
        ("smoothing.sequentail", "error: there is no command 'smoothing.sequentail'; did you mean smoothing?"),
        ("claims._frame.run", "error: there is no command 'claims._frame.run'; did you mean claims?"),
        ("xyz", "error: there is no command 'xyz'; it must be one of evaluate, smoothing, ood, adversarial, claims."),
        ("common.files", "error: there is no command 'common.files'; it must be one of evaluate, smoothing, "),
    ],
)
def test_an_unknown_command_is_named(monkeypatch, command, message):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, command)
    assert str(end.value.code).startswith(message)


def test_missing_dependencies_are_named_with_the_extra_that_has_them(monkeypatch):
    monkeypatch.delitem(sys.modules, "robustjax.experiments", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "evaluate", "--help")
    assert end.value.code == 'error: robustjax.experiments needs tyro: pip install "robustjax[experiments]"'
