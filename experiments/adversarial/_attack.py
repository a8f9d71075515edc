"""Attacks and certificates of a run, each kept on disk."""

from __future__ import annotations

import zlib

import jax
import numpy as np
from etils import epath

from robustjax import certification

from ..common import adversaries, files, runtimes, sanity
from ..common.targets import ALPHA, NUM_ESTIMATION, Target

INTERVAL_BATCH = 250
KEPT = ("answer", "correct", "queries", "seconds")

Found = dict[tuple[str, float, str], dict[str, np.ndarray]]
"""By norm, radius and attack: what the attack left."""


def attack(
    folder: epath.Path, target: Target, jobs: list[tuple[str, float, str]], key: jax.Array, watch: runtimes.Watch
) -> tuple[np.ndarray, Found]:
    """Runs the attacks that are not on disk; each is there before the next one begins.

    Returns:
      Which images are classified correctly without an attack; the arrays of each attack, without its images.
    """
    found: Found = {}
    if not (folder / "clean.npz").exists():
        answers = target.answers(jax.random.fold_in(key, zlib.crc32(b"clean")), target.image)
        arrays = {"id": target.id, "label": target.label, "answer": answers, "correct": answers == target.label}
        files.write_arrays(folder / "clean.npz", arrays)
    clean = files.read_arrays(folder / "clean.npz", "correct")["correct"]
    for number, (norm, epsilon, name) in enumerate(jobs, 1):
        path = folder / f"{norm}-{epsilon:g}-{name}.npz"
        if not path.exists():
            attack_key = jax.random.fold_in(key, zlib.crc32(f"{norm} {name}".encode()))
            where = f"{norm} {adversaries.text_of(epsilon)}"
            try:
                arrays = target.attacked(
                    attack_key, adversaries.make(name, epsilon, norm, samples=target.samples), path
                )
            except ValueError as error:
                raise ValueError(f"{name} at {where}: {error} Earlier attacks are kept.") from error
            correct = clean & (arrays["answer"] == target.label)
            files.write_arrays(path, {**arrays, "epsilon": epsilon, "correct": correct})
            runtimes.log(f"{where}: {name}, robust accuracy {correct.mean():.3f}, {arrays['seconds']:.1f} s")
            watch("attacking", len(jobs), number, {"robust accuracy": float(correct.mean())})
        found[norm, epsilon, name] = arrays = files.read_arrays(path, *KEPT, "epsilon", leave_out=("x_adv",))
        if arrays["epsilon"] != epsilon:  # its name has six digits
            there = arrays["epsilon"].item()
            raise ValueError(f"{path} is of epsilon {there}, not {epsilon}; give that one, or delete the file.")
    return clean, found


def steps_of(
    folder: epath.Path, target: Target, radii: dict[str, tuple[float, ...]], key: jax.Array
) -> dict[str, dict[str, np.ndarray]]:
    """PGD with more and more steps, for each norm; what is on disk is not computed again."""
    found = {}
    for norm, epsilons in radii.items():
        path = folder / f"steps-{norm}.npz"
        if not path.exists() or files.read_arrays(path, "epsilon")["epsilon"].tolist() != list(epsilons):
            files.write_arrays(path, sanity.over_steps(target, key, norm, epsilons))
        found[norm] = files.read_arrays(path, "loss", "correct")
    return found


def certificate_of(
    path: epath.Path, target: Target, measure: certification.Measure, key: jax.Array
) -> certification.Certificate:
    """Certificates of the smoothed model; what is on disk is not computed again."""
    if not path.exists():
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, target.id)
        settings = {"num_estimation": NUM_ESTIMATION, "alpha": ALPHA}
        image, logits_fn = target.classifier.place(target.image), target.classifier.logits_fn()
        certificate = certification.certify(keys, logits_fn, image, measure, **settings)
        files.write_arrays(path, certificate._asdict())
    return certification.Certificate(**files.read_arrays(path, *certification.Certificate._fields))


def verified_of(target: Target, epsilons: tuple[float, ...]) -> certification.Certificate:
    """What interval bounds verify; the radius is the largest of ``epsilons`` at which an image is verified, or 0."""
    logits_fn, image = target.classifier.logits_fn(), target.image
    radius, label = np.zeros(len(image)), np.zeros(len(image), np.int32)
    for epsilon in epsilons:
        found = certification.intervals.certify(logits_fn, image, epsilon=epsilon, batch_size=INTERVAL_BATCH)
        radius, label = np.where(found.verified, epsilon, radius), np.asarray(found.label)
    return certification.Certificate(label, radius, np.where(radius > 0, 1.0, 0.0), np.zeros(len(image), bool))
