"""DeepFool: steps to the nearest linearised decision boundary until the class changes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax._precision import in_float32
from robustjax.attacks import _ball, _box
from robustjax.attacks._attack import check_settings, is_fooled, rows, run
from robustjax.attacks._compose import MinimumNorm, nearer, unmoved
from robustjax.typing import AnyArray, LogitsFn

_LEAST_STEP = 1e-5  # else steps that the box clips, and ties, would shrink without end


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepFool:
    r"""Minimum-norm attack that steps to the nearest of the linearised decision boundaries.

    With :math:`w_k = \nabla (f_k - f_y)` at the current point and q the dual of the norm p,

    .. math:: l = \arg\min_k \frac{|f_k - f_y|}{\lVert w_k \rVert_q}, \qquad
              r \leftarrow r + \frac{|f_l - f_y|}{\lVert w_l \rVert_q}\, v_l, \qquad z = x + (1 + \text{overshoot})\, r

    where :math:`v` is the unit gradient for l2 and its sign for linf; z is clipped to the box. No step is shorter than
    1e-5 of the largest width of the box, so that points on the border of the box, where steps are clipped, still cross
    the boundary. A model with batch normalisation must use its running statistics.

    Attributes:
      norm: ``"l2"`` or ``"linf"``.
      steps: largest number of steps; each input stops at the first point that fools the model.
      overshoot: how far to step beyond the boundary, as a share of the distance.
      candidates: number of classes to consider, those with the largest clean logits, including the label; all classes
        if there are fewer.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> found = attacks.deepfool(norm="linf")(key, logits_fn, x, labels)
      >>> print(found.distance)
      [0.1 0.2]

    Reference:
      Moosavi-Dezfooli et al. 2016, DeepFool: a simple and accurate method to fool deep neural networks,
      arXiv 1511.04599.
    """

    norm: Literal["l2", "linf"] = "l2"
    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10
    bounds: _box.Bounds | None = (0.0, 1.0)

    def __post_init__(self):
        check_settings(steps=self.steps)
        _ball.check_norm(self.norm, ("l2", "linf"))
        _box.keep_frozen(self)
        _validate.positive(overshoot=self.overshoot)
        _validate.at_least(2, candidates=self.candidates)

    def __call__(
        self, key: Key[Array, "..."], logits_fn: LogitsFn, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> MinimumNorm:
        """Returns adversarial inputs and their distances; the key is not used. Raises as :func:`pgd`."""
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Takes all steps, traceable."""
        box = _box.of(box or self.bounds, x)
        answer = lambda x: in_float32(logits_fn(x))
        logits = answer(x)
        others = jax.lax.top_k(logits, min(self.candidates, logits.shape[-1]))[1][:, 1:]
        # One-hot rows of the candidates minus the one-hot row of the label: (candidates - 1, batch, classes).
        one_hot = lambda classes: jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
        differences = jnp.moveaxis(one_hot(others) - one_hot(labels)[:, None], 1, 0)

        def step(state):
            i, z, total, found = state
            outputs, pull_back = jax.vjp(answer, z)
            found = self._look(found, outputs, z, x, labels)
            gradients = jax.vmap(lambda cotangent: pull_back(cotangent)[0])(differences)
            gradients = jnp.where(jnp.isfinite(gradients), gradients, 0.0)
            sizes = jax.vmap(lambda g: _ball.norms_of(g, "l1" if self.norm == "linf" else "l2"))(gradients)
            gaps = jnp.abs((differences * outputs[None]).sum(-1)).astype(x.dtype)
            lengths = jnp.where(sizes > 0, gaps / jnp.where(sizes > 0, sizes, 1.0), jnp.inf)
            nearest = lengths.argmin(0)[None]
            length = jnp.take_along_axis(lengths, nearest, 0)[0]
            gradient = jnp.take_along_axis(gradients, nearest.reshape(1, -1, *(1,) * (x.ndim - 1)), 0)[0]
            length = jnp.where(jnp.isfinite(length), jnp.maximum(length, _LEAST_STEP * box.scale), 0.0)
            total = total + _ball.per_row(length, x) * _ball.steepest(gradient, self.norm)
            z = rows(found.success, z, jnp.clip(x + (1 + self.overshoot) * total, box.low, box.high))
            return i + 1, z, total, found

        def goes_on(state):
            i, *_, found = state
            return (i < self.steps) & ~found.success.all()

        state = (jnp.int32(0), x, jnp.zeros_like(x), unmoved(x, is_fooled(logits, labels)))
        _, z, _, found = jax.lax.while_loop(goes_on, step, state)
        return self._look(found, answer(z), z, x, labels)

    def _look(self, found, logits, z, x, labels):
        return nearer(found, z, _ball.norms_of(z - x, self.norm), is_fooled(logits, labels) & ~found.success)


deepfool = DeepFool
