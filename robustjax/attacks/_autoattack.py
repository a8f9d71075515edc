"""AutoAttack: a fixed ensemble of attacks, each on the inputs that are still classified correctly."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _blocks, _summary, _validate, losses
from robustjax.attacks import _ball, _box
from robustjax.attacks._apgd import apgd, apgd_targeted
from robustjax.attacks._attack import (
    Attack,
    Model,
    _logits,
    check_inputs,
    check_settings,
    divisible,
    fold_in,
    keys_of,
    keys_on_one_device,
    placed,
    queries_of,
    sharding_of,
)
from robustjax.attacks._compose import at_budget
from robustjax.attacks._diagnose import Diagnosis, diagnose
from robustjax.attacks._fab import fab
from robustjax.attacks._square import square
from robustjax.typing import AnyArray

_PARTS = 16
_DRAWS = 20
_TARGETS = 9
_SQUARE_GAINS = 0.002  # of the inputs, more than which is suspicious if it is more than one
_TIE = 1e-5  # of the largest logit
_ROUNDING = 1e-6


class Evaluation(NamedTuple):
    """A model's accuracy under AutoAttack, on the host.

    Attributes:
      clean_accuracy: share of inputs that are classified correctly without an attack.
      robust_accuracy: share of inputs that withstand all attacks.
      per_attack: for each attack that has run, by name: the share of all inputs that withstand it and all before it.
      correct: ``(batch,)``, whether an input withstands all attacks.
      x_adv: ``(batch, ...)``, inputs that fool the model; the input itself if no attack succeeds.
      queries: by name, the steps or queries that the attack may spend on one input, over all targets, restarts, draws.
      seconds: by name, the duration including compilation.
      warnings: sentences about signs that the accuracy is not reliable.
    """

    clean_accuracy: float
    robust_accuracy: float
    per_attack: dict[str, float]
    correct: np.ndarray
    x_adv: np.ndarray
    queries: dict[str, int]
    seconds: dict[str, float]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        def words():
            shares = f"{self.clean_accuracy:.2%} clean accuracy, {self.robust_accuracy:.2%} robust accuracy"
            left = [f"\n  after {name}: {share:.2%}" for name, share in self.per_attack.items()]
            signs = [f"\n  warning: {sentence}" for sentence in self.warnings]
            return "".join([f"{_summary.inputs(len(self.correct))}: {shares}", *left, *signs])

        return _summary.of(self, words)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """The standard evaluation of robustness: a fixed sequence of attacks, without parameters to tune.

    ``"standard"`` runs APGD on cross-entropy, APGD on the targeted DLR loss, FAB and Square (100 steps, 9 targets, 5000
    queries; for l1, APGD has 5 starts and 5 targets). ``"rand"``, for random models, runs APGD on cross-entropy and on
    the DLR loss, with gradients averaged over 20 draws. ``"gradient"`` is the standard version without Square, which
    needs images: the one for rows of tables and embeddings, and weaker; the evaluation's warnings say so. For a model
    of 3 classes the DLR loss replaces the targeted DLR loss; for 2 classes the margin replaces both.

    Each attack, and each of its targets, sees only the inputs that no earlier attack has fooled, in blocks of two
    sizes, so that it compiles at most twice. AutoAttack runs on the host and cannot be traced; the blocks are sharded
    over devices as x is.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      version: ``"standard"``, or ``"rand"`` for random models ``(key, x) -> logits``, which are called with one key and
        one input at a time and evaluated by their mean probabilities over 20 fresh draws, or ``"gradient"`` for inputs
        that are not images.
      batch_size: inputs attacked at once, rounded up to a multiple of the devices that x is sharded over; None for
        equal blocks of at most 256 on a CPU and 1000 on an accelerator, fewer for large images.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Reference:
      Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
      attacks, arXiv 2003.01690; for l1: Croce and Hein 2021, Mind the box, arXiv 2103.01208.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    version: Literal["standard", "rand", "gradient"] = "standard"
    batch_size: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, batch_size=self.batch_size)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        if self.version not in ("standard", "rand", "gradient"):
            raise ValueError(f"version must be standard, rand or gradient, got {self.version!r}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns inputs that fool the model, or the inputs themselves; raises as :meth:`evaluate`."""
        x_adv = x if np.shape(x)[:1] == (0,) else self.evaluate(key, logits_fn, x, labels).x_adv
        return jax.device_put(x_adv, sharding_of(x))

    def attacks(self, num_classes: int) -> dict[str, Attack]:
        """The attacks on a model of ``num_classes`` classes, by name, in the order in which they run."""
        _validate.at_least(2, num_classes=num_classes)
        ball, targets = {"epsilon": self.epsilon, "norm": self.norm, "bounds": self.bounds}, num_classes - 1
        ratio = "dlr" if num_classes > 2 else "margin"
        if self.version == "rand":
            return {f"apgd-{loss}": apgd(**ball, loss=loss, samples=_DRAWS) for loss in ("ce", ratio)}
        restarts, most = (5, 5) if self.norm == "l1" else (1, _TARGETS)
        towards = apgd_targeted(**ball, num_targets=min(most, targets))
        return {
            "apgd-ce": apgd(**ball, loss="ce", restarts=restarts),
            **({"apgd-t": towards} if num_classes > 3 else {f"apgd-{ratio}": apgd(**ball, loss=ratio)}),
            "fab-t": at_budget(fab(**ball, num_targets=min(_TARGETS, targets)), self.epsilon),
            **({"square": square(**ball)} if self.version == "standard" else {}),
        }

    def evaluate(
        self,
        key: Key[Array, "..."],
        logits_fn: Callable,
        x: Float[AnyArray, "batch ..."],
        labels: AnyArray,
        on_attack: Callable[[str, Evaluation], Any] | None = None,
        resume: Evaluation | None = None,
    ) -> Evaluation:
        """Runs the attacks and reports the accuracy that is left.

        If the gradients are zero or not finite at all correctly classified inputs, only Square runs, or with a warning
        the others where it cannot. At the end, the answers for all of ``x_adv`` are checked again.

        Args:
          key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
          logits_fn: ``x -> logits``, deterministic; for ``"rand"``, ``(key, x) -> logits``.
          x: ``(batch, ...)``, float32 within ``bounds``; for Square, images ``(batch, height, width, channels)``.
          labels: ``(batch,)``, integer.
          on_attack: called after each attack with its name and the evaluation so far, which can be saved.
          resume: an evaluation from ``on_attack``: its attacks are not run again, and the result is the same.

        Returns:
          The :class:`Evaluation`.

        Raises:
          ValueError: inputs of the wrong kind, traced inputs, or no inputs; logits of the inputs that are not finite;
            a ``resume`` of other inputs or attacks; an attack that left the ball; or a model whose answers change with
            the batch or from call to call.
        """
        logits_fn = _validate.as_pytree(None, logits_fn=logits_fn)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, logits_fn, x, labels))):
            raise ValueError("AutoAttack runs on the host and cannot be traced: call it outside jit, vmap and grad.")
        samples = _DRAWS if self.version == "rand" else None
        check_inputs(key, logits_fn, x, labels, bounds=self.bounds, samples=samples)
        if not x.shape[0]:
            raise ValueError("x must hold at least one input, got none.")
        if self.version == "standard" and x.ndim != 4:
            raise ValueError(
                f"x must be (batch, height, width, channels), got {x.shape}: Square changes squares of pixels; "
                "version='gradient' runs the other attacks, on any inputs."
            )
        num_classes = _logits.eval_shape(logits_fn, key, x, samples).shape[1]
        sharding = sharding_of(x)
        keys = keys_on_one_device(keys_of(key, jnp.asarray(x)), sharding)
        inputs = _Inputs(
            keys, logits_fn, np.asarray(x), np.asarray(labels), samples, self.batch_size, sharding, self.bounds
        )
        logits = inputs.answers(inputs.x)
        if not np.isfinite(logits).all():
            count = int((~np.isfinite(logits)).any(-1).sum())
            raise ValueError(f"logits_fn must return finite logits, got others at {count} of {len(logits)} inputs.")
        clean = ~inputs.fooled(logits)
        accuracy = float(clean.mean())
        evaluation = Evaluation(accuracy, accuracy, {}, clean, inputs.x, {}, {}, ())
        attacks = self.attacks(num_classes)
        if resume is not None:
            if resume.x_adv.shape != x.shape or not set(resume.per_attack) <= {*attacks, "square"}:
                raise ValueError(
                    f"resume must be an evaluation of {x.shape} inputs by {', '.join(attacks)}, got one of "
                    f"{resume.x_adv.shape} by {', '.join(resume.per_attack)}."
                )
            self._check(inputs, resume)
            evaluation = resume

        def warned(evaluation, sentence):
            if sentence in evaluation.warnings:
                return evaluation
            _validate.warn(f"AutoAttack: {sentence}")
            return evaluation._replace(warnings=(*evaluation.warnings, sentence))

        diagnosis = inputs.diagnosis()
        missing = ("Square, which needs no gradients, does not run.",) * (self.version == "gradient")
        for sentence in (*missing, *self._few_classes(num_classes), *diagnosis.warnings):
            evaluation = warned(evaluation, sentence)
        places = {name: place for place, name in enumerate([*attacks, "square"])}  # of their keys
        if clean.any() and diagnosis.no_gradient[clean].all():
            if x.ndim == 4 and self.version != "gradient":
                evaluation = warned(evaluation, "there is no gradient to follow: only Square, which needs none, runs.")
                ball = {"epsilon": self.epsilon, "norm": self.norm, "bounds": self.bounds}
                attacks = {"square": square(**ball, samples=samples)}
            else:
                sentence = "there is no gradient to follow, and Square, which needs none, does not run: "
                evaluation = warned(evaluation, f"{sentence}the accuracy under attack says little.")

        for name, attack in attacks.items():
            if name in evaluation.per_attack:
                continue
            start = time.perf_counter()
            correct, x_adv = inputs.under(attack, places[name], evaluation)
            accuracy, before = float(correct.mean()), evaluation.robust_accuracy
            gained = int(evaluation.correct.sum() - correct.sum())
            if name == "square" and evaluation.per_attack and gained > max(1, _SQUARE_GAINS * len(correct)):
                sentence = (
                    f"Square, which sees no gradients, lowers the accuracy from {before:.2%} to {accuracy:.2%} after "
                    "attacks that follow them: gradients may be masked."
                )
                evaluation = warned(evaluation, sentence)
            evaluation = evaluation._replace(
                robust_accuracy=accuracy,
                per_attack={**evaluation.per_attack, name: accuracy},
                correct=correct,
                x_adv=x_adv,
                queries={**evaluation.queries, name: queries_of(attack)},
                seconds={**evaluation.seconds, name: time.perf_counter() - start},
            )
            if on_attack is not None:
                on_attack(name, evaluation)
        self._check(inputs, evaluation)
        return evaluation

    def _few_classes(self, num_classes):
        wanted = "apgd-dlr" if self.version == "rand" else "apgd-t"
        used = [name for name in self.attacks(num_classes) if name not in ("apgd-ce", "fab-t", "square")]
        if used != [wanted]:
            yield f"a model of {num_classes} classes has no loss for {wanted}: {used[0]} replaces it."

    def _check(self, inputs, evaluation):
        """Checks the distances and the answers of all inputs that an evaluation has found."""
        change = (evaluation.x_adv.astype(np.float64) - inputs.x).reshape(len(inputs.x), -1)
        order = {"linf": np.inf, "l2": 2, "l1": 1}[self.norm]
        farthest = float(np.linalg.norm(change, order, axis=-1).max())
        if not (farthest <= self.epsilon + _ROUNDING * max(1.0, self.epsilon)):
            raise ValueError(f"x_adv must be within epsilon {self.epsilon} of x in {self.norm}, got {farthest}.")
        _box.check_inside(evaluation.x_adv, self.bounds, name="x_adv")
        logits = inputs.answers(evaluation.x_adv)
        right = np.take_along_axis(logits, inputs.labels[:, None], -1)[:, 0]
        wrong = np.where(np.arange(logits.shape[-1]) == inputs.labels[:, None], -np.inf, logits).max(-1)
        tie = abs(wrong - right) <= _TIE * abs(logits).max(-1)  # which rounding in another batch may break
        disagree = int(((inputs.fooled(logits) == evaluation.correct) & ~tie).sum())
        if disagree:
            raise ValueError(
                f"logits_fn must be deterministic, got other answers in another call at {disagree} of {len(logits)} "
                "inputs: turn off dropout, and use running batch statistics."
            )


class _Inputs(NamedTuple):
    """A model and its inputs, on the host; the model answers in blocks."""

    keys: Key[Array, " batch"]
    logits_fn: Callable
    x: np.ndarray
    labels: np.ndarray
    samples: int | None
    batch_size: int | None
    sharding: NamedSharding | None = None
    bounds: _box.Bounds | None = _box.IMAGES

    def at(self, places, keys, x):
        """A block on the devices: the keys, x and labels at these places."""
        return placed(self.sharding, _picked(keys, places), x[places], self.labels[places])

    def answers(self, x, places=None):
        """Logits at these places, or mean probabilities of a random model; always in blocks of one size."""
        places = np.arange(len(x)) if places is None else places
        keys, parts = _fold_in(self.keys, 0), []
        for i in self.blocks(places):
            parts.append(np.asarray(_answers(self.logits_fn, *self.at(i, keys, x), self.samples)))
        return np.concatenate(parts)[: len(places)]

    def fooled(self, logits, places=slice(None)):
        """Whether answers at these places are wrong; logits that are not finite never count as fooled."""
        return np.isfinite(logits).all(-1) & (logits.argmax(-1) != self.labels[places])

    def diagnosis(self):
        """The diagnosis of all inputs; a random model is not reported as random."""
        keys, of_block = _fold_in(self.keys, 1), []
        for i in self.blocks(np.arange(len(self.x))):
            block_keys, x, labels = self.at(i, keys, self.x)
            found = diagnose(block_keys, self.logits_fn, x, labels, samples=self.samples, bounds=self.bounds)
            of_block.append([np.asarray(field) for field in found])
        zero, not_finite, randomised, probabilities = (np.stack(field) for field in zip(*of_block))
        flat = lambda field: field.reshape(-1)[: len(self.x)]
        is_random = np.asarray(self.samples is None and randomised.any())
        return Diagnosis(flat(zero), flat(not_finite), is_random, np.asarray(probabilities.all()))

    def under(self, attack, place, evaluation):
        """Attacks the inputs that are still correct: which are correct afterwards, and the adversarial inputs."""
        correct, x_adv = evaluation.correct.copy(), evaluation.x_adv.copy()
        keys, part = _fold_in(self.keys, 2 + place), divisible(-(-self.size // _PARTS), self.sharding)
        size = min(self.size, -(-int(correct.sum()) // part) * part)
        for once in _attempts_of(attack):
            standing = np.flatnonzero(correct)
            if not standing.size:
                break
            found = self.x.copy()
            for i in self.blocks(standing, size, part):
                block_keys, x, labels = self.at(i, keys, self.x)
                found[i] = once(block_keys, self.logits_fn, x, labels)
            fooled = standing[self.fooled(self.answers(found, standing), standing)]
            correct[fooled], x_adv[fooled] = False, found[fooled]
        return correct, x_adv

    @property
    def size(self):
        """The largest size of a block."""
        most = self.batch_size or _blocks.at_once(self.x.shape[1:], backward=True)
        size = min(most, len(self.x)) if self.batch_size else _blocks.evenly(len(self.x), most)
        return divisible(size, self.sharding)

    def blocks(self, places, size=None, part=None):
        """Places in blocks of one size, padded with the last place; a small rest is cut into smaller parts instead."""
        size = size or self.size
        part, full = part or size, len(places) // size * size
        if 2 * part * -(-(len(places) - full) // part) > size:
            part = size
        ends = [*range(0, full, size), *range(full, len(places), part)]
        for start in ends:
            width = size if start < full else part
            yield places[np.minimum(np.arange(start, start + width), len(places) - 1)]


_fold_in = jax.jit(fold_in)
_picked = jax.jit(lambda keys, places: keys[places])  # one program instead of several for each size of a block


@jax.jit(static_argnames="samples")
def _answers(logits_fn, keys, x, labels, samples):
    return Model(logits_fn, losses.margin, labels, samples).answer(keys, x)


def _attempts_of(attack):
    """The attack, or one call for each of its targets, so that an input that one target fools skips the others."""
    inner = getattr(attack, "attack", attack)
    if not hasattr(inner, "num_targets"):
        return [attack]
    return [functools.partial(attack.attempt, np.int32(i)) for i in range(inner.num_targets * inner.restarts)]


autoattack = AutoAttack
