"""Attacks made of attacks, and the accuracy that is left under them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from robustjax import _validate, losses
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
)
from robustjax.typing import AnyArray, LogitsFn


class MinimumNorm(NamedTuple):
    """The nearest adversarial inputs that an attack has found.

    Attributes:
      x: ``(batch, ...)``, the input itself where none is found.
      distance: ``(batch,)``, norm of the change; 0 for an input misclassified as it is, inf where none is found.
      success: ``(batch,)``, whether one is found.
    """

    x: Float[Array, "batch ..."]
    distance: Float[Array, " batch"]
    success: Bool[Array, " batch"]


def unmoved(x: Float[Array, "batch ..."], fooled: Bool[Array, " batch"]) -> MinimumNorm:
    """What is found before any search: the inputs that fool the model as they are."""
    return MinimumNorm(x, jnp.where(fooled, jnp.zeros((), x.dtype), jnp.inf), fooled)


def nearer(found: MinimumNorm, x: Float[Array, "batch ..."], distance: Array, fooled: Array) -> MinimumNorm:
    """What is found, once points at these distances have been tried too."""
    take = fooled & (distance < found.distance)
    return MinimumNorm(rows(take, x, found.x), jnp.where(take, distance, found.distance), found.success | take)


@dataclasses.dataclass(frozen=True)
class WorstOf:
    """Several attacks on the same inputs, of which each input meets the worst.

    Returned is the first result that fools the model, else that of the highest cross-entropy.

    Attributes:
      attacks: in the order in which they are tried.
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self):
        if not self.attacks or not all(callable(attack) for attack in self.attacks):
            raise ValueError(f"attacks must be at least one, each a function, got {self.attacks!r}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs; raises what the attacks raise."""
        logits_fn = _validate.as_pytree(logits_fn=logits_fn)
        check_inputs(key, logits_fn, x, labels)
        if not x.shape[0]:
            return jnp.asarray(x)
        keys, x, labels = placed(sharding_of(x), keys_of(key, x), x, labels)
        best = start_from(x)
        for index, attack in enumerate(self.attacks):
            x_adv = attack(fold_in(keys, index), logits_fn, x, labels)
            check_result(attack, x_adv, x)
            best = _worse(best, logits_fn, x_adv, labels)
        return best.x


@jax.jit
def _worse(best, logits_fn, x, labels):
    logits = logits_fn(x)
    return better(best, x, losses.cross_entropy(logits, labels), is_fooled(logits, labels))


def worst_of(*attacks: Attack) -> WorstOf:
    """Makes one attack of several: each input meets the worst of them.

    Args:
      *attacks: in the order in which they are tried, for deterministic models.

    Returns:
      The attack.

    Raises:
      ValueError: there is none, or one is no function.
    """
    return WorstOf(attacks)


def expectation_over_transformation(attack: Any, *, samples: int = 20) -> Any:
    r"""Makes an attack on a deterministic model one on a random model: it follows the mean over draws.

    .. math:: \frac 1 n \sum_i \nabla_x L(f(\xi_i, x), y)

    with fresh draws at each step. The model is then ``(key, x) -> logits``, called with one key and one input at a
    time. Losses are averaged and probabilities too, which is how the best point is chosen; judge what comes out on
    fresh keys.

    Args:
      attack: one with a field ``samples``, such as :func:`pgd`.
      samples: draws for each gradient, n.

    Returns:
      The attack.

    Raises:
      ValueError: the attack has no such field, or ``samples`` is below 1.

    Reference:
      Athalye et al. 2018, Synthesizing Robust Adversarial Examples, arXiv 1707.07397.
    """
    _validate.at_least(1, samples=samples)
    if not dataclasses.is_dataclass(attack) or isinstance(attack, type) or not hasattr(attack, "samples"):
        raise ValueError(f"attack must be one that can average over draws (a field samples), got {attack!r}.")
    return dataclasses.replace(attack, samples=samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
    """A minimum-norm attack within a ball: what it finds outside counts as not found.

    Attributes:
      attack: gives :class:`MinimumNorm`, such as :func:`fab`.
      epsilon: radius, in units of [0, 1] images and the attack's norm.
    """

    attack: Callable[..., MinimumNorm]
    epsilon: float

    def __post_init__(self):
        check_settings(epsilon=self.epsilon)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs, the inputs themselves where none is near enough."""
        return self._within(self.attack(key, logits_fn, x, labels), x)

    def attempt(self, number, *arguments):
        """One attempt of an attack that makes several, such as :func:`fab`."""
        attack: Any = self.attack
        return self._within(attack.attempt(number, *arguments), arguments[2])

    def _within(self, found, x):
        if not isinstance(found, MinimumNorm):
            raise ValueError(f"attack must give a MinimumNorm, {self.attack!r} gave {type(found).__name__}.")
        return rows(found.distance <= self.epsilon, found.x, jax.device_put(x, sharding_of(x)))


def at_budget(attack: Callable[..., MinimumNorm], epsilon: float) -> AtBudget:
    """Makes an ordinary attack of a minimum-norm one: only what lies within ``epsilon`` counts.

    Args:
      attack: gives :class:`MinimumNorm`.
      epsilon: radius, in units of [0, 1] images and the attack's norm.

    Returns:
      The attack.

    Raises:
      ValueError: ``epsilon`` is negative or not finite.
    """
    return AtBudget(attack=attack, epsilon=epsilon)


def robust_accuracy(
    key: Key[Array, "..."],
    attack: Attack,
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    labels: AnyArray,
    *,
    batch_size: int = 256,
) -> float:
    """Computes the share of inputs that are classified correctly, as they are and under the attack.

    Works through blocks of one size, the last one filled up, so that memory is bounded and nothing compiles twice; the
    blocks do not change what happens to an input, whose key comes from the input itself. Blocks of inputs that are
    spread over the devices of a mesh are spread as these are, blocks of inputs on the host lie on one device.

    Args:
      key: one typed key, or ``(batch,)`` of them; see :func:`robustjax.perturbations.image_keys`.
      attack: ``(key, logits_fn, x, labels) -> x_adv``.
      logits_fn: ``x -> logits``, deterministic.
      x: ``(batch, ...)``, float32 in [0, 1].
      labels: ``(batch,)``, integer.
      batch_size: inputs that are attacked at once, rounded up to a multiple of the devices that x is spread over.

    Returns:
      The accuracy in [0, 1].

    Raises:
      ValueError: inputs of the wrong kind, or none; logits that are not finite, of the inputs or of what the attack
        gave; or the attack gave no inputs in [0, 1].
    """
    _validate.at_least(1, batch_size=batch_size)
    logits_fn = _validate.as_pytree(logits_fn=logits_fn)
    check_inputs(key, logits_fn, x, labels)
    if not x.shape[0]:
        raise ValueError("x must hold at least one input, got none.")
    correct, sharding = [], sharding_of(x)
    batch_size = divisible(batch_size, sharding)
    rows_of_all = keys_on_one_device(keys_of(key, x), sharding), np.asarray(x), np.asarray(labels)
    for rows_of_block in blocks_of(batch_size, *rows_of_all):
        block_keys, block, block_labels = placed(sharding, *rows_of_block)
        adversarial = attack(block_keys, logits_fn, block, block_labels)
        check_result(attack, adversarial, block)
        if not bool(((adversarial >= 0) & (adversarial <= 1)).all()):
            raise ValueError(f"attack must stay in [0, 1], {attack!r} did not.")
        stands = np.ones(batch_size, bool)
        for of, points in (("the inputs", block), ("what the attack gave", adversarial)):
            finite, fooled = (np.asarray(a) for a in _judged(logits_fn, points, block_labels))
            if not finite.all():
                raise ValueError(f"logits_fn must give finite logits, of {of} it does not.")
            stands &= ~fooled
        correct.append(stands)
    return float(np.concatenate(correct)[: x.shape[0]].mean())


@jax.jit
def _judged(logits_fn, x, labels):
    logits = logits_fn(x)
    return jnp.isfinite(logits).all(-1), is_fooled(logits, labels)


def blocks_of(size: int, *arrays: Any) -> Any:
    """Blocks of that many rows of all arrays; the last is filled up with its last row."""
    for start in range(0, len(arrays[0]), size):
        chosen = np.minimum(np.arange(start, start + size), len(arrays[0]) - 1)
        yield tuple(array[chosen] for array in arrays)
