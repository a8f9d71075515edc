"""The command line of experiments.adversarial."""

from .. import adversarial
from ..common import command_line

if __name__ == "__main__":
    command_line.command_line(adversarial.Config, adversarial.run, adversarial.__doc__)
