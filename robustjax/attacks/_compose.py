"""Attacks made of other attacks, and the accuracy under an attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from robustjax import _arguments, _blocks, _callables, _validate, losses
from robustjax.attacks import _box
from robustjax.attacks._attack import (
    Attack,
    better,
    check_inputs,
    check_result,
    check_settings,
    divisible,
    fold_in,
    is_fooled,
    keys_of,
    keys_on_one_device,
    placed,
    rows,
    sharding_of,
    start_from,
    warn_of_probabilities,
)
from robustjax.typing import AnyArray, LogitsFn


class MinimumNorm(NamedTuple):
    """The nearest adversarial inputs that an attack has found.

    Attributes:
      x: ``(batch, ...)``, adversarial inputs; the input itself if none is found.
      distance: ``(batch,)``, norm of the change; 0 for a misclassified input, inf if no adversarial input is found.
      success: ``(batch,)``, whether an adversarial input is found.
    """

    x: Float[Array, "batch ..."]
    distance: Float[Array, " batch"]
    success: Bool[Array, " batch"]


def unmoved(x: Float[Array, "batch ..."], fooled: Bool[Array, " batch"]) -> MinimumNorm:
    """The result before any search: inputs that are already misclassified."""
    return MinimumNorm(x, jnp.where(fooled, jnp.zeros((), x.dtype), jnp.inf), fooled)


def nearer(found: MinimumNorm, x: Float[Array, "batch ..."], distance: Array, fooled: Array) -> MinimumNorm:
    """The result after also trying points at these distances."""
    take = fooled & (distance < found.distance)
    return MinimumNorm(rows(take, x, found.x), jnp.where(take, distance, found.distance), found.success | take)


@dataclasses.dataclass(frozen=True)
class WorstOf:
    """Several attacks on the same inputs: for each input, the result of the worst attack.

    The result is the first one that fools the model, else the one with the highest cross-entropy.

    Attributes:
      attacks: the attacks, in the order in which they are tried.
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self):
        if not self.attacks or not all(callable(attack) for attack in self.attacks):
            raise ValueError(f"attacks must be one or more functions, got {self.attacks!r}.")
        _validate.untargeted(self)
        if len(found := self._found()) > 1:
            raise ValueError(f"attacks must have the same bounds, got {' and '.join(map(str, found))}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs; raises what the attacks raise."""
        called_by_user = not _callables.is_separated(logits_fn)
        logits_fn = _validate.as_pytree(None, logits_fn=logits_fn)
        check_inputs(key, logits_fn, x, labels, bounds=self.bounds)
        if not x.shape[0]:
            return jnp.asarray(x)
        if called_by_user:
            warn_of_probabilities(key, logits_fn, x)
        keys, x, labels = placed(sharding_of(x), keys_of(key, x), x, labels)
        best = start_from(x)
        for index, attack in enumerate(self.attacks):
            x_adv = attack(fold_in(keys, index), logits_fn, x, labels)
            check_result(attack, x_adv, x)
            best = _worse(best, logits_fn, x_adv, labels)
        return best.x

    @property
    def bounds(self) -> _box.Bounds | None:
        """The bounds of all attacks; an attack that does not say takes those of the others."""
        return next(iter(self._found()), _box.IMAGES)

    def _found(self):
        return dict.fromkeys(_box.bounds_of(attack) for attack in self.attacks if hasattr(attack, "bounds"))


@jax.jit
def _worse(best, logits_fn, x, labels):
    logits = logits_fn(x)
    return better(best, x, losses.cross_entropy(logits, labels), is_fooled(logits, labels))


@_arguments.checked
def worst_of(*attacks: Attack) -> WorstOf:
    """Combines several attacks into one, which returns the worst result for each input.

    Args:
      *attacks: attacks on deterministic models, in the order in which they are tried.

    Returns:
      The attack.

    Raises:
      ValueError: there are no attacks, or one is not a function, or is targeted; or their ``bounds`` differ.

    Example:
      >>> attack = attacks.worst_of(attacks.fgsm(epsilon=0.15), attacks.pgd(epsilon=0.15, steps=3))
      >>> x_adv = attack(key, logits_fn, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]
    """
    return WorstOf(attacks)


@_arguments.checked
def expectation_over_transformation(attack: Any, *, samples: int = 20) -> Any:
    r"""Turns an attack on a deterministic model into an attack on a random model, by averaging gradients over draws.

    .. math:: \frac 1 n \sum_i \nabla_x L(f(\xi_i, x), y)

    with fresh draws at each step. The model is then ``(key, x) -> logits``, called with one key and one input at a
    time. The best point is chosen by losses and probabilities that are averaged over the same draws: evaluate the
    result on fresh keys.

    Args:
      attack: an attack with a field ``samples``, such as :func:`pgd`.
      samples: n, number of draws for each gradient.

    Returns:
      The attack.

    Raises:
      ValueError: the attack has no field ``samples``, or ``samples`` is below 1.

    Example:
      >>> noisy = lambda key, x: logits_fn(x + 0.1 * jax.random.normal(key, x.shape))
      >>> attack = attacks.expectation_over_transformation(attacks.fgsm(epsilon=0.15), samples=20)
      >>> x_adv = attack(key, noisy, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]

    Reference:
      Athalye et al. 2018, Synthesizing Robust Adversarial Examples, arXiv 1707.07397.
    """
    _validate.at_least(1, samples=samples)
    if not dataclasses.is_dataclass(attack) or isinstance(attack, type) or not hasattr(attack, "samples"):
        raise ValueError(f"attack must have a field samples, to average over draws, got {_validate.short(attack)}.")
    return dataclasses.replace(attack, samples=samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
    """A minimum-norm attack within a ball: points outside count as not found.

    Attributes:
      attack: returns :class:`MinimumNorm`, such as :func:`fab`.
      epsilon: radius, in units of the inputs and the attack's norm.
    """

    attack: Callable[..., MinimumNorm]
    epsilon: float

    def __post_init__(self):
        check_settings(epsilon=self.epsilon)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs, or the inputs themselves where none is near enough."""
        bounds = _box.bounds_of(self.attack)
        _box.check_epsilon(self.epsilon, getattr(self.attack, "norm", None), bounds, np.shape(x)[1:])
        return self._within(self.attack(key, logits_fn, x, labels), x)

    def attempt(self, number, *arguments):
        """One attempt of an attack that makes several, such as :func:`fab`."""
        attack: Any = self.attack
        return self._within(attack.attempt(number, *arguments), arguments[2])

    @property
    def bounds(self) -> _box.Bounds | None:
        """The bounds of the attack inside."""
        attack: Any = self.attack
        return attack.bounds

    def _within(self, found, x):
        if not isinstance(found, MinimumNorm):
            raise ValueError(f"attack must return a MinimumNorm, {self.attack!r} returned {type(found).__name__}.")
        return rows(found.distance <= self.epsilon, found.x, jax.device_put(x, sharding_of(x)))


@_arguments.checked
def at_budget(attack: Callable[..., MinimumNorm], epsilon: float) -> AtBudget:
    """Turns a minimum-norm attack into an ordinary one: only points within ``epsilon`` count.

    Args:
      attack: returns :class:`MinimumNorm`, such as :func:`fab`.
      epsilon: radius, in units of the inputs and the attack's norm.

    Returns:
      The attack.

    Raises:
      ValueError: ``epsilon`` is negative or not finite.

    Example:
      >>> attack = attacks.at_budget(attacks.deepfool(norm="linf"), epsilon=0.15)
      >>> x_adv = attack(key, logits_fn, x, labels)
      >>> print(jnp.abs(x_adv - x).max((1, 2, 3)))  # the second image needs more than 0.15
      [0.1 0. ]
    """
    return AtBudget(attack=attack, epsilon=epsilon)


@_arguments.checked
def robust_accuracy(
    key: Key[Array, "..."],
    attack: Attack,
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    labels: Int[AnyArray, " batch"],
    *,
    batch_size: int | None = None,
) -> float:
    """Computes the share of inputs that are classified correctly both without and under the attack.

    Works in blocks of one size, with the last block padded, so that memory is bounded and nothing compiles twice. The
    block size does not change the result for an input, whose key comes from the input itself. Blocks have the sharding
    of x; blocks of inputs on the host are on one device.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      attack: ``(key, logits_fn, x, labels) -> x_adv``, not targeted, because labels are the true classes.
      logits_fn: ``x -> logits``, deterministic, and each row independently: checked on the first block.
      x: ``(batch, ...)``, float32 within the ``bounds`` of the attack, [0, 1] for an attack that has none.
      labels: ``(batch,)``, integer.
      batch_size: inputs attacked at once, rounded up to a multiple of the devices that x is sharded over; None for
        equal blocks of at most 256 on a CPU and 1000 on an accelerator, fewer for large images.

    Returns:
      The accuracy in [0, 1].

    Raises:
      ValueError: inputs of the wrong kind, or no inputs; a targeted attack; logits that are not finite, for the inputs
        or for the adversarial inputs; logits that change with the other inputs of a block, as in training mode; or
        adversarial inputs out of bounds.

    Example:
      >>> attack = attacks.fgsm(epsilon=0.15)
      >>> attacks.robust_accuracy(key, attack, logits_fn, x, labels, batch_size=2)
      0.5
    """
    if batch_size is not None:
        _validate.at_least(1, batch_size=batch_size)
    _validate.untargeted(attack)
    logits_fn = _validate.as_pytree(None, logits_fn=logits_fn)
    bounds = _box.bounds_of(attack)
    check_inputs(key, logits_fn, x, labels, bounds=bounds)
    if not x.shape[0]:
        raise ValueError("x must hold at least one input, got none.")
    correct, sharding, box = [], sharding_of(x), _box.of(bounds, x)
    if batch_size is None:
        batch_size = _blocks.evenly(x.shape[0], _blocks.at_once(x.shape[1:], backward=True))
    batch_size = divisible(batch_size, sharding)
    rows_of_all = keys_on_one_device(keys_of(key, x), sharding), np.asarray(x), np.asarray(labels)
    for rows_of_block in blocks_of(batch_size, *rows_of_all):
        block_keys, block, block_labels = placed(sharding, *rows_of_block)
        adversarial = attack(block_keys, logits_fn, block, block_labels)
        check_result(attack, adversarial, block)
        if not bool(((adversarial >= box.low) & (adversarial <= box.high)).all()):
            within = "in [0, 1]" if bounds == _box.IMAGES else "within its bounds"
            raise ValueError(f"attack must return inputs {within}, {attack!r} did not.")
        stands = np.ones(batch_size, bool)
        for kind, points in (("inputs", block), ("adversarial inputs", adversarial)):
            finite, fooled, logits = _judged(logits_fn, points, block_labels)
            finite, fooled = np.asarray(finite), np.asarray(fooled)
            if not finite.all():
                raise ValueError(f"logits_fn must return finite logits, got NaN or infinity for {kind}.")
            stands &= ~fooled
            if not correct and points is block:
                _check_each_row(logits_fn, np.asarray(logits), sharding, box, *rows_of_block)
                _validate.not_probabilities(logits_fn=logits)
        correct.append(stands)
    return float(np.concatenate(correct)[: x.shape[0]].mean())


@jax.jit
def _judged(logits_fn, x, labels):
    logits = logits_fn(x)
    return jnp.isfinite(logits).all(-1), is_fooled(logits, labels), logits


def _check_each_row(logits_fn, logits, sharding, box, keys, x, labels):
    """Raises ValueError if the first half of a block has other logits beside other inputs: one more call."""
    half = -(-len(x) // 2)
    others = _box.unlike(x[half:], box)
    _, beside_others, labels = placed(sharding, keys, np.concatenate([x[:half], others]), labels)
    others = np.asarray(_judged(logits_fn, beside_others, labels)[2])
    if not _validate.same_rows(logits[:half], others[:half]).all():
        raise _validate.depends_on_batch()


def blocks_of(size: int, *arrays: Any) -> Any:
    """Blocks of ``size`` rows of all arrays; the last block is padded with its last row."""
    for start in range(0, len(arrays[0]), size):
        chosen = np.minimum(np.arange(start, start + size), len(arrays[0]) - 1)
        yield tuple(array[chosen] for array in arrays)
