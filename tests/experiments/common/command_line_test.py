"""What the command line prints: help that fits the terminal, and errors that say how lists are written."""

import dataclasses
import sys

import pytest

from experiments import adversarial, ood, smoothing
from experiments.common import command_line


@pytest.mark.parametrize("product", [adversarial, ood, smoothing], ids=lambda product: product.__name__)
def test_help_shows_every_setting_in_80_columns(product, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["product", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command_line.command_line(product.Config, product.run, product.__doc__)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert " ".join(product.__doc__.split("\n\n")[0].split()) in " ".join(text.split())
    for field in dataclasses.fields(product.Config):
        assert f"--{field.name.replace('_', '-')} " in text


def test_a_long_command_continues_after_a_backslash():
    text = command_line.wrapped("One line of words.\n\n    python -m a --b 1 --c 2\n    python -m d", 24)
    assert text == "One line of words.\n\n    python -m a --b 1 \\\n        --c 2\n    python -m d"


@dataclasses.dataclass(frozen=True)
class Config:
    names: tuple[str, ...] = ()


def refuse(config):
    raise ValueError(f"names must be known, got {config.names[0]!r}.")


@pytest.mark.parametrize(("given", "hinted"), [(["a,b"], True), (["x", "a=1,b=2"], False), (["x", "b,c"], False)])
def test_a_list_with_commas_gets_a_hint_where_it_is_what_is_refused(given, hinted, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["product", "--names", *given])
    with pytest.raises(SystemExit, match=f"^error: names must be known, got '{given[0]}'") as end:
        command_line.command_line(Config, refuse, "")
    assert ("Lists are separated by spaces" in str(end.value)) == hinted


@pytest.mark.parametrize("flags", [["--radii", "0.25,0.5"], ["--radii=0.25,0.5"]])
def test_numbers_with_commas_get_it_too(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smoothing", *flags])
    with pytest.raises(SystemExit, match="2"):
        command_line.command_line(smoothing.Config, smoothing.run, "")
    assert capsys.readouterr().err.endswith("Lists are separated by spaces, not commas, such as --norms linf l2.\n")
