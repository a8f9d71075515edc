"""Attacks by the name that a command line gives them, and the classifiers that they attack."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from experiments.common import folders
from robustjax import attacks, data, losses

NORMS = ("linf", "l2", "l1")
ADVERSARIAL = ("pgd", "trades", "mart", "awp", "logit_pairing")
WITHIN = (*ADVERSARIAL, "intervals")
"""Trainings for a ball."""
TRAINING = ("standard", *WITHIN, "entropy", "gaussian")
DEFAULT = ("fgsm", "pgd_20", "pgd_40", "autoattack")
DEFAULT_SMOOTHED = ("fgsm", "pgd_20")


class Named(NamedTuple):
    """An attack that can be named.

    Attributes:
      make: ``(epsilon, norm) -> attack``.
      reference: first author, or both of two, and arXiv id.
      about: settings that the name does not say.
      norms: in which it is defined.
      averages: whether it can follow the mean over draws of a random model.
    """

    make: Callable[[float, Any], Any]
    reference: str
    about: str = ""
    norms: tuple[str, ...] = NORMS
    averages: bool = False


def _pgd(steps: int, restarts: int = 1) -> Callable[[float, Any], Any]:
    return lambda epsilon, norm: attacks.pgd(epsilon=epsilon, norm=norm, steps=steps, restarts=restarts)


ATTACKS = {
    "fgsm": Named(
        lambda epsilon, norm: attacks.fgsm(epsilon=epsilon, norm=norm),
        "Goodfellow 1412.6572", averages=True,
    ),
    "momentum_iterative": Named(
        lambda epsilon, norm: attacks.momentum_iterative(epsilon=epsilon, norm=norm),
        "Dong 1710.06081", "10 steps", norms=("linf", "l2"), averages=True,
    ),
    "pgd_20": Named(_pgd(20), "Madry 1706.06083", "20 steps", averages=True),
    "pgd_40": Named(_pgd(40, 5), "Madry 1706.06083", "5 x 40 steps", averages=True),
    "apgd_ce": Named(
        lambda epsilon, norm: attacks.apgd(epsilon=epsilon, norm=norm, loss="ce"),
        "Croce, Hein 2003.01690", "100 steps", averages=True,
    ),
    "apgd_dlr": Named(
        lambda epsilon, norm: attacks.apgd(epsilon=epsilon, norm=norm, loss="dlr"),
        "Croce, Hein 2003.01690", "100 steps", averages=True,
    ),
    "apgd_targeted": Named(
        lambda epsilon, norm: attacks.apgd_targeted(epsilon=epsilon, norm=norm),
        "Croce, Hein 2003.01690", "9 x 100 steps", averages=True,
    ),
    "fab": Named(
        lambda epsilon, norm: attacks.at_budget(attacks.fab(norm=norm, epsilon=epsilon), epsilon),
        "Croce, Hein 1907.02044", "9 x 100 steps",
    ),
    "deepfool": Named(
        lambda epsilon, norm: attacks.at_budget(attacks.deepfool(norm=norm), epsilon),
        "Moosavi-Dezfooli 1511.04599", "50 steps", norms=("linf", "l2"),
    ),
    "carlini_wagner": Named(
        lambda epsilon, _: attacks.at_budget(attacks.carlini_wagner(), epsilon),
        "Carlini, Wagner 1608.04644", "9 x 1000 steps", norms=("l2",),
    ),
    "square": Named(
        lambda epsilon, norm: attacks.square(epsilon=epsilon, norm=norm),
        "Andriushchenko 1912.00049", "5000 queries",
    ),
    "autoattack": Named(
        lambda epsilon, norm: attacks.autoattack(epsilon=epsilon, norm=norm),
        "Croce, Hein 2003.01690", "4 attacks",
    ),
}  # fmt: skip

# Radii by the name of a data set: of the table, and of adversarial training.
EPSILONS = {
    ("digits", "linf"): "0.1,0.2,0.3",
    ("digits", "l2"): "0.25,0.5,1",
    ("digits", "l1"): "0.5,1,2",
    ("mnist", "linf"): "0.1,0.2,0.3",
    ("mnist", "l2"): "1,1.5,2",
    ("mnist", "l1"): "5,10",
    ("cifar10", "linf"): "2/255,4/255,8/255",
    ("cifar10", "l2"): "0.25,0.5,1",
    ("cifar10", "l1"): "4,8,12",
}
TRAIN_EPSILON = {
    ("digits", "linf"): "0.15",
    ("digits", "l2"): "0.75",
    ("digits", "l1"): "2",
    ("mnist", "linf"): "0.3",
    ("mnist", "l2"): "2",
    ("mnist", "l1"): "10",
    ("cifar10", "linf"): "8/255",
    ("cifar10", "l2"): "0.5",
    ("cifar10", "l1"): "12",
}


def default(setting: str, text: str | None, dataset: str, norm: str) -> str:
    """The text that is given for ``epsilons`` or ``train_epsilon``, or that of the data set; one that can be read."""
    table = {"epsilons": EPSILONS, "train_epsilon": TRAIN_EPSILON}[setting]
    found = text or table.get((dataset.split(":")[0], norm))
    if found is None:
        raise ValueError(f"{setting} must be given for the data set {dataset!r} in {norm}.")
    if len(epsilons_of(found, name=setting)) > 1 and setting == "train_epsilon":
        raise ValueError(f"train_epsilon must be one number, got {found!r}.")
    return found


def names_of(texts: str, norms: tuple[str, ...], *, smoothed: bool) -> list[str]:
    """The names in a comma-separated text, the default ones for an empty one; each can be used."""
    default = DEFAULT_SMOOTHED if smoothed else DEFAULT
    names = [name.strip() for name in texts.split(",") if name.strip()] or list(default)
    if len(set(names)) < len(names):
        raise ValueError(f"attacks must name each one once, got {texts!r}.")
    for name in names:
        if name not in ATTACKS:
            close = difflib.get_close_matches(name, ATTACKS)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(ATTACKS)}."
            raise ValueError(f"attacks must be known names, got {name!r}. {hint}")
        if not set(ATTACKS[name].norms) & set(norms):
            raise ValueError(
                f"attacks must be defined for {' or '.join(norms)}, got {name!r}, which is for "
                f"{' and '.join(ATTACKS[name].norms)}."
            )
        if smoothed and not ATTACKS[name].averages:
            able = ", ".join(other for other, attack in ATTACKS.items() if attack.averages)
            raise ValueError(f"attacks must follow a mean over noise for a smoothed model ({able}), got {name!r}.")
    return names


def epsilons_of(texts: str, *, name: str = "epsilons") -> tuple[float, ...]:
    """The radii in a comma-separated text, such as 0.1,8/255, in rising order."""
    try:
        epsilons = sorted(float(Fraction(text.strip())) for text in texts.split(","))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{name} must be numbers or fractions, such as 0.1 or 8/255, got {texts!r}.") from error
    if not epsilons[0] > 0:
        raise ValueError(f"{name} must be positive, got {texts!r}.")
    if len({f"{epsilon:g}" for epsilon in epsilons}) < len(epsilons):
        raise ValueError(f"{name} must differ, got {texts!r}.")
    return tuple(epsilons)


def text_of(epsilon: float) -> str:
    """A radius as people write it: 0.15, or 8/255."""
    levels = round(epsilon * 255)
    return f"{levels}/255" if len(f"{epsilon:g}") > 5 and abs(epsilon - levels / 255) < 1e-9 else f"{epsilon:g}"


def make(name: str, epsilon: float, norm: str, *, samples: int | None = None) -> Any:
    """The attack of that name; with samples, one on a random model that follows the mean over so many draws."""
    attack = ATTACKS[name].make(epsilon, norm)
    if samples is None:
        return attack
    if isinstance(attack, attacks.pgd):  # what fools the mean over these draws may not fool that over others
        attack = dataclasses.replace(attack, keep="last")
    return attacks.expectation_over_transformation(attack, samples=samples)


def print_list(console: Console) -> None:
    """Prints every name with its reference."""
    table = Table("attack", "norms", "settings", "first authors, arXiv", title="Attacks", title_justify="left")
    for name, attack in ATTACKS.items():
        table.add_row(name, "all" if attack.norms == NORMS else " ".join(attack.norms), attack.about, attack.reference)
    console.print(table)


def objective_of(config: Any, *, num_steps: int) -> losses.Objective:
    """What ``config.training`` minimises, in so many steps."""
    if config.training == "standard":
        return losses.standard()
    if config.training == "gaussian":
        return losses.smoothing.gaussian_augmentation(sigma=config.sigma)
    if config.training == "entropy":
        return losses.adversarial.entropy_regularization()
    (epsilon,) = epsilons_of(config.train_epsilon)
    if config.training == "intervals":  # the schedule of the paper on MNIST: of 60,000 steps 2,000 and 10,000
        begin, steps = num_steps // 30, num_steps // 6
        ball = losses.ramp(end=epsilon, begin=begin, steps=steps)
        share = losses.ramp(start=1.0, end=0.5, begin=begin, steps=steps)
        return losses.scheduled(losses.interval_training(epsilon=epsilon), epsilon=ball, kappa=share)
    attack = attacks.pgd(epsilon=epsilon, norm=config.train_norm, steps=config.train_steps, keep="last")
    beside = dataclasses.replace(attack, random_start=0.001)  # where the papers of TRADES and MART start
    if config.training == "trades":
        beside = dataclasses.replace(beside, loss=losses.kl_divergence)
        return losses.adversarial.trades(attack=beside, beta=config.beta)
    if config.training == "mart":
        return losses.adversarial.mart(attack=beside, beta=config.beta)
    if config.training == "logit_pairing":
        return losses.adversarial.logit_pairing(attack=attack)
    objective = losses.adversarial.adversarial_training(attack=attack)
    return losses.adversarial.awp(objective=objective) if config.training == "awp" else objective


def parts_of(config: Any) -> tuple[data.Dataset, data.Dataset]:
    """Images to train on and to attack, of the classes that the model of ``config.checkpoint`` knows.

    Raises:
      ValueError: the checkpoint is of another data set or model than the config says, or cannot be opened.
    """
    test_split = config.test_split or data.splits(config.dataset).test
    parts = [data.load(config.dataset, split, config.data_dir) for split in (config.train_split, test_split)]
    if config.checkpoint is not None:
        theirs = folders.settings_of(config.checkpoint, dataset=config.dataset, model=config.model)
        if theirs.get("classes"):
            parts = [data.select_classes(part, theirs["classes"]) for part in parts]
    return parts[0], parts[1]
