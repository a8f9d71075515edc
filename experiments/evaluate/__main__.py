"""The command line of experiments.evaluate."""

from .. import evaluate
from ..common import command_line

if __name__ == "__main__":
    command_line.command_line(evaluate.Config, evaluate.from_config, evaluate.__doc__)
