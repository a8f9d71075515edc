"""Gradient steps of fixed size: FGSM, projected gradient descent, and momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.attacks import _ball, _box
from robustjax.attacks._attack import LossFn, Model, better, check_settings, fold_in, loss_of, run, start_from
from robustjax.typing import AnyArray


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD:
    r"""Projected gradient descent: steps of one size along the steepest direction, each projected into the ball.

    .. math:: x_{t+1} = \Pi_{B(x, \epsilon) \cap \text{box}}\bigl(x_t + \eta\, v(\nabla_x L(x_t, y))\bigr)

    with :math:`v(g) = \mathrm{sign}(g)` for linf, :math:`g / \lVert g \rVert_2` for l2, and for l1 the signs of the
    largest share ``1 - quantile`` of coordinates, scaled to norm 1 (SLIDE). Each input stops at the first point that
    fools the model. A model with batch normalisation must use its running statistics.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      steps: number of gradients for each restart.
      step_size: eta; None is ``2.5 * epsilon / steps``.
      random_start: True starts at a uniform draw from the ball, False at x itself; a number is the standard deviation
        of the Gaussian noise that is added to x, 0.001 in TRADES and MART.
      restarts: number of starts; the best point of all starts is returned.
      loss: ``"cross_entropy"`` (or ``"ce"``), ``"dlr"``, ``"margin"``, or ``(logits, labels) -> (batch,)``; a function
        may read any array as labels, such as the logits of the clean inputs.
      keep: ``"best"`` returns the first point that fools the model, else the point with the highest loss; ``"last"``
        never stops early and returns the last point of the last restart, as adversarial training wants it.
      targeted: labels are the classes that the attack aims at, and the loss is minimised.
      quantile: share of coordinates that an l1 step does not change.
      samples: draws of a random model, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> x_adv = attacks.pgd(epsilon=0.15, steps=3)(key, logits_fn, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]

      Rows of a table are attacked in their own units; without bounds, they may hold any numbers:

      >>> rows, classify = jnp.array([[30.0, -2.0]]), lambda rows: rows @ jnp.array([[0.1, 0.0], [0.0, 1.0]])
      >>> attack = attacks.pgd(epsilon=5.0, bounds=None, keep="last")
      >>> print(attack(key, classify, rows, jnp.array([0])))
      [[25.  3.]]

    Reference:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083; the l1 step:
      Tramer and Boneh 2019, Adversarial Training and Robustness for Multiple Perturbations, arXiv 1904.13000.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    steps: int = 40
    step_size: float | None = None
    random_start: bool | float = True
    restarts: int = 1
    loss: str | LossFn = "cross_entropy"
    keep: Literal["best", "last"] = "best"
    targeted: bool = False
    quantile: float = 0.99
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)
    steps_are_traced: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, steps=self.steps, restarts=self.restarts, samples=self.samples)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        loss_of(self.loss)
        _validate.probability(quantile=self.quantile)
        if not isinstance(self.random_start, bool):
            within = _validate.probability if self.bounds == _box.IMAGES else _validate.positive
            within(random_start=self.random_start)
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be best or last, got {self.keep!r}.")
        if self.step_size is not None:
            _validate.positive(step_size=self.step_size)
            if not isinstance(self.epsilon, jax.core.Tracer) and self.step_size * self.steps < self.epsilon:
                _validate.warn(
                    f"{self.steps} steps of step_size {self.step_size} cannot reach epsilon {self.epsilon}: "
                    "raise step_size or steps, or the attack is weaker than its epsilon says."
                )

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs, for one key or one key per input; ValueError for inputs of the wrong kind."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, steps=None, *, box=None):
        """Runs all restarts, traceable."""
        box = _box.of(box or self.bounds, x)
        model = Model(logits_fn, loss_of(self.loss), labels, self.samples, self.targeted)
        steps = jnp.int32(self.steps) if steps is None else steps
        step_size = 2.5 * epsilon / steps.astype(x.dtype) if self.step_size is None else self.step_size

        def restart(index, carry):
            best, _ = carry
            start_keys, step_keys = fold_in(fold_in(keys, index), 0), fold_in(fold_in(keys, index), 1)
            sigma = None if isinstance(self.random_start, bool) else self.random_start
            z = _ball.random_start(start_keys, x, epsilon, self.norm, box, sigma) if self.random_start else x

            def step(state):
                i, z, best = state
                value, fooled, gradient = model.ascend(fold_in(step_keys, i), z)
                best = better(best, z, value, fooled)
                moved = _ball.project(z + step_size * self._direction(gradient), x, epsilon, self.norm, box)
                return i + 1, moved, best

            def goes_on(state):
                i, _, best = state
                return (i < steps) & ((self.keep == "last") | ~best.fooled.all())

            _, z, best = jax.lax.while_loop(goes_on, step, (jnp.int32(0), z, best))
            if self.keep == "best":
                best = better(best, z, *model.look(fold_in(step_keys, steps), z))
            return best, z

        best, last = jax.lax.fori_loop(0, self.restarts, restart, (start_from(x), x))
        return _ball.settle(best.x if self.keep == "best" else last, x, epsilon, self.norm, box)

    def _direction(self, gradient):
        if self.norm != "l1":
            return _ball.steepest(gradient, self.norm)
        size = jnp.abs(gradient.reshape(gradient.shape[0], -1))
        kept = max(1, round((1 - self.quantile) * size.shape[-1]))
        least = jax.lax.top_k(size, kept)[0][:, -1]
        chosen = jnp.abs(gradient) >= _ball.per_row(least, gradient)
        return _ball.unit(jnp.where(chosen, jnp.sign(gradient), 0.0), "l1")


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class FGSM:
    r"""One step to the surface of the ball, along the steepest direction.

    .. math:: x + \epsilon\, v(\nabla_x L(x, y)), \text{ clipped to the box}

    with :math:`v` the sign for linf and the unit gradient for l2. For l1, epsilon is spent on the pixels with the
    largest gradients, each of which moves as far as the box allows.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      loss: as for :func:`pgd`.
      targeted: labels are the classes that the attack aims at, and the loss is minimised.
      samples: draws of a random model, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> x_adv = attacks.fgsm(epsilon=0.15)(key, logits_fn, x, labels)
      >>> print((x_adv - x)[0, :, :, 0])
      [[-0.15  0.15  0.15  0.15  0.15]
       [ 0.15  0.15  0.15  0.15  0.15]]

    Reference:
      Goodfellow, Shlens and Szegedy 2015, Explaining and Harnessing Adversarial Examples, arXiv 1412.6572.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    loss: str | LossFn = "cross_entropy"
    targeted: bool = False
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, samples=self.samples)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        loss_of(self.loss)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs; only random models use the key. ValueError for inputs of the wrong kind."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Takes the step, traceable."""
        box = _box.of(box or self.bounds, x)
        model = Model(logits_fn, loss_of(self.loss), labels, self.samples, self.targeted)
        gradient = model.ascend(keys, x).gradient
        if self.norm != "l1":
            return _ball.settle(x + epsilon * _ball.steepest(gradient, self.norm), x, epsilon, self.norm, box)
        flat = gradient.reshape(x.shape[0], -1)
        room = jnp.where(gradient == 0, 0.0, jnp.where(gradient > 0, box.high - x, x - box.low)).reshape(flat.shape)
        room = jnp.where(jnp.isinf(room), epsilon, room)
        order = jnp.argsort(-jnp.abs(flat), axis=-1)
        sorted_room = jnp.take_along_axis(room, order, -1)
        spent = jnp.cumsum(sorted_room, -1) - sorted_room
        moves = jnp.clip(epsilon - spent, 0.0, sorted_room)
        moves = jnp.put_along_axis(jnp.zeros_like(flat), order, moves, -1, inplace=False)
        return _ball.settle(x + (moves * jnp.sign(flat)).reshape(x.shape), x, epsilon, "l1", box)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentumIterative:
    r"""Iterated FGSM whose direction is a decaying sum of normalised gradients, which transfers better to other models.

    .. math:: g_{t+1} = \mu\, g_t + \frac{\nabla_x L(x_t, y)}{\lVert \nabla_x L(x_t, y) \rVert_1}, \qquad
              x_{t+1} = \Pi\bigl(x_t + \eta\, v(g_{t+1})\bigr)

    As published, it starts at x and returns the last point.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"`` or ``"l2"``.
      steps: number of gradients.
      step_size: eta; None is ``epsilon / steps``.
      decay: mu.
      loss: as for :func:`pgd`.
      targeted: labels are the classes that the attack aims at, and the loss is minimised.
      samples: draws of a random model, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> x_adv = attacks.momentum_iterative(epsilon=0.15, steps=3)(key, logits_fn, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]

    Reference:
      Dong et al. 2018, Boosting Adversarial Attacks with Momentum, arXiv 1710.06081.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    loss: str | LossFn = "cross_entropy"
    targeted: bool = False
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, steps=self.steps, samples=self.samples)
        _ball.check_norm(self.norm, ("linf", "l2"))
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        loss_of(self.loss)
        if self.step_size is not None:
            _validate.positive(step_size=self.step_size)
        if not 0 <= _validate.number(self.decay) <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {self.decay!r}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial inputs; only random models use the key. ValueError for inputs of the wrong kind."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Takes all steps, traceable."""
        box = _box.of(box or self.bounds, x)
        model = Model(logits_fn, loss_of(self.loss), labels, self.samples, self.targeted)
        step_size = epsilon / self.steps if self.step_size is None else self.step_size

        def step(i, state):
            z, momentum = state
            momentum = self.decay * momentum + _ball.unit(model.ascend(fold_in(keys, i), z).gradient, "l1")
            return _ball.project(
                z + step_size * _ball.steepest(momentum, self.norm), x, epsilon, self.norm, box
            ), momentum

        z, _ = jax.lax.fori_loop(0, self.steps, step, (x, jnp.zeros_like(x)))
        return _ball.settle(z, x, epsilon, self.norm, box)


pgd = PGD
fgsm = FGSM
momentum_iterative = MomentumIterative
