"""How many images and noisy copies a budget of minutes allows."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from robustjax import _blocks

from ..common import adversaries, classifiers, files
from ..common.targets import Target

HEAVY = ("certify", "attack")
SHARE = 0.8
"""Of the budget, for the two heavy parts."""
PILOT = 0.05
"""Of the budget, for an attack that shows how many images withstand."""
DRAWS = (100_000, 10_000, 1_000)
"""Largest numbers of noisy copies of an image; the first that leaves enough images is taken."""
ENOUGH, FEW = 100, 4
"""Images that are enough for a table, and the fewest of any."""
GRADIENT = 3.0
"""Cost of a gradient, in forward passes."""
FOOLED_SOON, ALL_STEPS = 100 * GRADIENT, (100 + 9 * 100 + 9 * 100) * GRADIENT + 5000
"""Forward passes of AutoAttack on an image that falls to its first attack, and on one that withstands all."""


class Plan(NamedTuple):
    """Numbers that are kept with the run, so that a resumed evaluation measures the same."""

    seconds_per_image: float  # of a forward pass in a batch
    withstood: float  # share of the pilot's images that PGD-20 did not fool
    certified: int  # images to certify
    draws: int  # noisy copies of each of them, at most
    attacked: int  # images to attack


def plan(
    folder: epath.Path, target: Target, *, parts: tuple[str, ...], minutes: float, norm: str, epsilon: float,
    most: int | None,
) -> Plan:  # fmt: skip
    """Times the model and divides the budget; a plan in the folder is taken as it is."""
    path = folder / "plan.json"
    if path.exists():
        found = files.read_json(path, *Plan._fields, advice="delete it to plan again")
        return Plan(**{name: found[name] for name in Plan._fields})
    limit = len(target.id) if most is None else min(most, len(target.id))
    heavy = [part for part in HEAVY if part in parts]
    share = 60 * minutes * SHARE / max(1, len(heavy))
    forward = _seconds_per_image(target)
    draws = next((n for n in DRAWS if share / (n * forward) >= min(ENOUGH, limit)), DRAWS[-1])
    certified = int(np.clip(share / (draws * forward), min(FEW, limit), limit))
    withstood, attacked = 0.0, limit
    if "attack" in parts:
        tried = np.clip(PILOT * 60 * minutes / (20 * GRADIENT * forward), 8, 64)
        few = first(target, min(int(tried), limit))
        found = few.under(jax.random.key(0), adversaries.make("pgd_20", epsilon, norm))
        withstood = float((found["answer"] == few.label).mean())
        passes = FOOLED_SOON + withstood * (ALL_STEPS - FOOLED_SOON)
        attacked = int(np.clip(share / (passes * forward), min(FEW, limit), limit))
    made = Plan(forward, withstood, certified, draws, attacked)
    files.write_whole(path, json.dumps(made._asdict(), indent=1) + "\n")
    return made


def _seconds_per_image(target: Target) -> float:
    """Of a batch as certification uses it, the fastest of three."""
    size = 200
    images = target.image[np.resize(np.arange(len(target.id)), size)]
    seconds = []
    for _ in range(4):  # the first compiles
        started = time.perf_counter()
        classifiers.outputs_of(target.classifier, images, size)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / size


def first(target: Target, count: int) -> Target:
    """The first images of a target whose order is random, in blocks that they fill."""
    size = _blocks.evenly(count, target.batch_size)
    return target._replace(
        id=target.id[:count], image=target.image[:count], label=target.label[:count], batch_size=size
    )
