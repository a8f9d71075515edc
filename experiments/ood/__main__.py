"""The command line of experiments.ood."""

from .. import ood
from ..common import command_line

if __name__ == "__main__":
    command_line.command_line(ood.Config, ood.run, ood.__doc__)
