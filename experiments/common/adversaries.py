"""Attacks and adversarial trainings by name, and their radii."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from robustjax import attacks, losses

from . import checks, tables

NORMS = ("linf", "l2", "l1")
ADVERSARIAL = ("pgd", "trades", "mart", "awp", "logit_pairing")
WITHIN = (*ADVERSARIAL, "intervals")
"""Trainings for a ball, which need a radius."""
TRAINING = ("standard", *WITHIN, "entropy", "gaussian")
DEFAULT = ("fgsm", "pgd_20", "pgd_40", "autoattack")
DEFAULT_SMOOTHED = ("fgsm", "pgd_20")


class Named(NamedTuple):
    """An attack that can be named."""

    make: Callable[..., Any]  # of ``epsilon`` and ``norm``
    reference: str  # first author, or both of two, and arXiv id
    about: str = ""  # its settings
    norms: tuple[str, ...] = NORMS  # for which it is defined
    averages: bool = False  # whether its gradients can be averaged over draws of a random model


ATTACKS = {
    "fgsm": Named(attacks.fgsm, "Goodfellow 1412.6572", averages=True),
    "momentum_iterative": Named(
        attacks.momentum_iterative, "Dong 1710.06081", "10 steps", norms=("linf", "l2"), averages=True
    ),
    "pgd_20": Named(partial(attacks.pgd, steps=20), "Madry 1706.06083", "20 steps", averages=True),
    "pgd_40": Named(partial(attacks.pgd, steps=40, restarts=5), "Madry 1706.06083", "5 x 40 steps", averages=True),
    "apgd_ce": Named(partial(attacks.apgd, loss="ce"), "Croce, Hein 2003.01690", "100 steps", averages=True),
    "apgd_dlr": Named(partial(attacks.apgd, loss="dlr"), "Croce, Hein 2003.01690", "100 steps", averages=True),
    "apgd_targeted": Named(attacks.apgd_targeted, "Croce, Hein 2003.01690", "9 x 100 steps", averages=True),
    "fab": Named(
        lambda epsilon, norm: attacks.at_budget(attacks.fab(norm=norm, epsilon=epsilon), epsilon),
        "Croce, Hein 1907.02044", "9 x 100 steps",
    ),
    "deepfool": Named(
        lambda epsilon, norm: attacks.at_budget(attacks.deepfool(norm=norm), epsilon),
        "Moosavi-Dezfooli 1511.04599", "50 steps", norms=("linf", "l2"),
    ),
    "carlini_wagner": Named(
        lambda epsilon, norm: attacks.at_budget(attacks.carlini_wagner(), epsilon),
        "Carlini, Wagner 1608.04644", "9 x 1000 steps", norms=("l2",),
    ),
    "square": Named(attacks.square, "Andriushchenko 1912.00049", "5000 queries"),
    "autoattack": Named(attacks.autoattack, "Croce, Hein 2003.01690", "4 attacks"),
}  # fmt: skip


class Radii(NamedTuple):
    """Radii by default, of a data set and a norm."""

    epsilons: tuple[float, ...]  # of the table
    train_epsilon: float  # of adversarial training


RADII = {
    ("digits", "linf"): Radii((0.1, 0.2, 0.3), 0.15),
    ("digits", "l2"): Radii((0.25, 0.5, 1.0), 0.75),
    ("digits", "l1"): Radii((0.5, 1.0, 2.0), 2.0),
    ("mnist", "linf"): Radii((0.1, 0.2, 0.3), 0.3),
    ("mnist", "l2"): Radii((1.0, 1.5, 2.0), 2.0),
    ("mnist", "l1"): Radii((5.0, 10.0), 10.0),
    ("cifar10", "linf"): Radii((2 / 255, 4 / 255, 8 / 255), 8 / 255),
    ("cifar10", "l2"): Radii((0.25, 0.5, 1.0), 0.5),
    ("cifar10", "l1"): Radii((4.0, 8.0, 12.0), 12.0),
}


def default(setting: str, given: Any, dataset: str, norm: str) -> Any:
    """``given`` or, where it is None or empty, the ``epsilons`` or ``train_epsilon`` of the data set."""
    found = given or getattr(RADII.get((dataset.split(":")[0], norm)), setting, None)
    if found is None:
        raise ValueError(f"{setting} must be given for the data set {dataset!r} in {norm}.")
    return found


def check(names: tuple[str, ...], norms: tuple[str, ...], *, smoothed: bool) -> None:
    """Raises ValueError for a name of no attack, or of one that is not defined for the norms or a smoothed model."""
    for name in names:
        checks.known("attacks", name, ATTACKS)
        if not set(ATTACKS[name].norms) & set(norms):
            raise ValueError(
                f"attacks must be defined for {' or '.join(norms)}, got {name!r}, which is for "
                f"{' and '.join(ATTACKS[name].norms)}."
            )
        if smoothed and not ATTACKS[name].averages:
            able = ", ".join(other for other, attack in ATTACKS.items() if attack.averages)
            raise ValueError(f"attacks on a smoothed model must be among {able}, got {name!r}.")


def text_of(epsilon: float) -> str:
    """A radius as papers write it: 0.15 or 8/255."""
    levels = round(epsilon * 255)
    return f"{levels}/255" if len(f"{epsilon:g}") > 5 and abs(epsilon - levels / 255) < 1e-9 else f"{epsilon:g}"


def make(name: str, epsilon: float, norm: str, *, samples: int | None = None) -> Any:
    """The attack of that name; with ``samples``, on a random model, with gradients averaged over as many draws."""
    attack = ATTACKS[name].make(epsilon=epsilon, norm=norm)
    if samples is None:
        return attack
    if isinstance(attack, attacks.pgd):  # the best point of these draws may not be the best of others
        attack = dataclasses.replace(attack, keep="last")
    return attacks.expectation_over_transformation(attack, samples=samples)


def listed() -> tables.Table:
    """Every name with its reference."""
    rows = [
        (name, "all" if attack.norms == NORMS else " ".join(attack.norms), attack.about, attack.reference)
        for name, attack in ATTACKS.items()
    ]
    return tables.Table("Attacks", ("attack", "norms", "settings", "first authors, arXiv"), rows)


def objective_of(
    training: str,
    *,
    norm: Any = "linf",
    epsilon: float | None = None,
    steps: int = 10,
    beta: float = 6.0,
    sigma: float = 0.5,
    num_steps: int,
) -> losses.Objective:
    """The objective of a training by name; ``num_steps`` are those of the training, for schedules."""
    if training == "standard":
        return losses.standard()
    if training == "gaussian":
        return losses.smoothing.gaussian_augmentation(sigma=sigma)
    if training == "entropy":
        return losses.adversarial.entropy_regularization()
    assert epsilon is not None
    if training == "intervals":  # the schedule of the paper on MNIST: of 60,000 steps 2,000 and 10,000
        begin, grow = num_steps // 30, num_steps // 6
        ball = losses.ramp(end=epsilon, begin=begin, steps=grow)
        share = losses.ramp(start=1.0, end=0.5, begin=begin, steps=grow)
        return losses.scheduled(losses.interval_training(epsilon=epsilon), epsilon=ball, kappa=share)
    attack = attacks.pgd(epsilon=epsilon, norm=norm, steps=steps, keep="last")
    beside = dataclasses.replace(attack, random_start=0.001)  # where the papers of TRADES and MART start
    if training == "trades":
        beside = dataclasses.replace(beside, loss=losses.kl_divergence)
        return losses.adversarial.trades(attack=beside, beta=beta)
    if training == "mart":
        return losses.adversarial.mart(attack=beside, beta=beta)
    if training == "logit_pairing":
        return losses.adversarial.logit_pairing(attack=attack)
    objective = losses.adversarial.adversarial_training(attack=attack)
    return losses.adversarial.awp(objective=objective) if training == "awp" else objective
