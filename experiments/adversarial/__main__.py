"""The command line of experiments.adversarial."""

from experiments import adversarial
from experiments.common import command_line

if __name__ == "__main__":
    command_line.command_line(adversarial.Config, adversarial.run, adversarial.__doc__)
