"""The command ``robustjax``, which runs the experiments."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import runpy
import sys

COMMANDS = {
    "evaluate": "how far a trained model can be trusted: accuracy, certificates, attacks, foreign inputs",
    "smoothing": "train with noise and certify by randomized smoothing",
    "ood": "train and compare out-of-distribution detectors",
    "adversarial": "train and attack",
    "claims": "measure the claims of papers over several seeds",
}
"""The experiments, and what they do."""


def main() -> None:
    """Runs ``robustjax NAME ...``, which stands for ``python -m experiments.NAME ...`` in a checkout."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        lines = [f"  {name:12} {about}\n" for name, about in COMMANDS.items()]
        more = "robustjax COMMAND --help has more."
        sys.stdout.write(f"usage: robustjax COMMAND [OPTIONS]\n\n{''.join(lines)}\n{more}\n")
        return
    if command == "--version":
        sys.stdout.write(f"robustjax {importlib.metadata.version('robustjax')}\n")
        return
    if command.split(".")[0] not in COMMANDS or command.count(".") > 1:
        sys.exit(_unknown(command))

    try:
        import robustjax.experiments
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    module = f"{robustjax.experiments.__name__}.{command}"  # claims.halfspaces has the settings of one study
    if importlib.util.find_spec(module) is None:
        sys.exit(_unknown(command))
    sys.argv[1:] = rest
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _unknown(command: str) -> str:
    close = difflib.get_close_matches(command.split(".")[0], COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(COMMANDS)}."
    return f"error: there is no command {command!r}; {hint}"
