"""The command line of experiments.smoothing."""

from .. import smoothing
from ..common import command_line

if __name__ == "__main__":
    command_line.command_line(smoothing.Config, smoothing.run, smoothing.__doc__)
