"""How many images and noisy copies a budget of minutes allows."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from robustjax import _blocks
from robustjax.typing import AnyArray

from ..common import adversaries, classifiers, files
from ..common.targets import Target

MAX_IMAGES = 10_000
"""Images of each set that are looked at, at most."""
HEAVY = ("certify", "attack")
SHARE = 0.8
"""Of the budget, for the two heavy parts; the rest is for the answers to all images."""
PILOT = 0.05
"""Of the budget, for an attack that shows how many images withstand."""
DRAWS = (100_000, 10_000, 1_000)
"""Largest numbers of noisy copies of an image; the first that leaves enough images is taken."""
SELECTION = 100
"""Noisy copies that choose the label which the others certify."""
ENOUGH, FEW = 100, 4
"""Images that are enough for a table, and the fewest of any."""
GRADIENT = 3.0
"""Cost of a gradient, in forward passes."""
FOOLED_SOON, ALL_STEPS = 100 * GRADIENT, (100 + 9 * 100 + 9 * 100) * GRADIENT + 5000
"""Forward passes of AutoAttack on an image that falls to its first attack, and on one that withstands all."""


class Plan(NamedTuple):
    """Numbers that are kept with the run, so that a resumed evaluation measures the same."""

    seconds_per_image: float  # of a forward pass in a batch
    looked_at: int  # images of each set, at most
    certified: int | None = None  # images to certify; None, here and below: not asked for yet
    draws: int | None = None  # noisy copies of each of them, at most
    certify_share: float | None = None  # seconds
    attacked: int | None = None  # images to attack
    withstood: float | None = None  # share of the pilot's images that PGD-20 did not fool
    attack_share: float | None = None  # seconds


def begin(folder: epath.Path, classifier: classifiers.Classifier, some: AnyArray, *, sets: int, minutes: float) -> Plan:
    """Times the model on some images and limits those of each of ``sets``; a plan in the folder is taken as it is."""
    path = folder / "plan.json"
    if path.exists():
        found = files.read_json(path, *Plan._fields, advice="pass --overwrite to start again")
        return Plan(**{name: found[name] for name in Plan._fields})
    forward = _seconds_per_image(classifier, some)
    allowed = 60 * minutes * (1 - SHARE) / (sets * forward)
    return _kept(path, Plan(forward, int(np.clip(round(allowed), FEW, MAX_IMAGES))))


def complete(
    folder: epath.Path, plan: Plan, target: Target, part: str, *, shares: int, minutes: float, norm: str,
    epsilon: float, most: int | None,
) -> Plan:  # fmt: skip
    """Plans a heavy part with one of so many equal shares of the budget; what is planned already stays."""
    limit = len(target.id) if most is None else min(most, len(target.id))
    share, forward = 60 * minutes * SHARE / shares, plan.seconds_per_image
    if part == "certify" and plan.certified is None:
        draws = next((n for n in DRAWS if share / (n * forward) >= min(ENOUGH, limit)), DRAWS[-1])
        certified = int(np.clip(share / (draws * forward), min(FEW, limit), limit))
        plan = plan._replace(certified=certified, draws=draws, certify_share=share)
    if part == "attack" and plan.attacked is None:
        tried = np.clip(PILOT * 60 * minutes / (20 * GRADIENT * forward), 8, 64)
        few = first(target, min(int(tried), limit))
        found = few.under(jax.random.key(0), adversaries.make("pgd_20", epsilon, norm))
        withstood = float((found["answer"] == few.label).mean())
        passes = FOOLED_SOON + withstood * (ALL_STEPS - FOOLED_SOON)
        attacked = int(np.clip(share / (passes * forward), min(FEW, limit), limit))
        plan = plan._replace(attacked=attacked, withstood=withstood, attack_share=share)
    return _kept(folder / "plan.json", plan)


def _kept(path: epath.Path, plan: Plan) -> Plan:
    files.write_whole(path, json.dumps(plan._asdict(), indent=1) + "\n")
    return plan


def _seconds_per_image(classifier: classifiers.Classifier, some: AnyArray) -> float:
    """Of a batch as certification uses it, the fastest of three."""
    size = 200
    images = some[np.resize(np.arange(len(some)), size)]
    seconds = []
    for _ in range(4):  # the first compiles
        started = time.perf_counter()
        classifiers.outputs_of(classifier, images, size)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / size


def first(target: Target, count: int) -> Target:
    """The first images of a target whose order is random, in blocks that they fill."""
    size = _blocks.evenly(count, target.batch_size)
    return target._replace(
        id=target.id[:count], image=target.image[:count], label=target.label[:count], batch_size=size
    )
