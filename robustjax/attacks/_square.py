"""Random search without gradients: the Square attack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate, losses
from robustjax.attacks import _ball, _box
from robustjax.attacks._attack import Model, better, check_settings, fold_in, run, start_from
from robustjax.typing import AnyArray

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@_arguments.checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    r"""Random search over squares of pixels, which uses only the scores of the model, no gradients.

    Every query changes one square at a random place. For linf, the square moves to a corner of the ball, with one sign
    for each channel; for l2 and l1, it receives a bump that is paid for by the change of another square. A change is
    kept if the margin :math:`\max_{k \ne y} f_k - f_y` rises. The first squares cover a share ``initial_fraction`` of
    the image, which is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 changes. Each input stops at the
    first point that fools the model, and has its own random places and signs.

    Attributes:
      epsilon: radius of the ball, in units of the inputs; at most their largest distance, 1 in linf for images.
      norm: ``"linf"``, ``"l2"`` or ``"l1"``.
      queries: number of queries of each restart, including the start.
      initial_fraction: area of the first squares, as a share of the image.
      restarts: number of starts; the best point of all starts is returned.
      rescale_schedule: whether to rescale the halvings, meant for 10000 changes, to ``queries``.
      targeted: labels are the classes that the attack aims at.
      samples: number of draws of a random model for each query, see :func:`expectation_over_transformation`.
      bounds: the range of inputs: ``(low, high)``, numbers or one number for each feature, or None for any numbers.

    Example:
      >>> x_adv = attacks.square(epsilon=0.15, queries=100)(key, logits_fn, x, labels)
      >>> print(logits_fn(x_adv).argmax(-1) == labels)
      [False  True]

    Reference:
      Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via random search, arXiv
      1912.00049; l1 as in Croce and Hein 2021, Mind the box, arXiv 2103.01208. Differs from the authors' code: each
      input has its own places, squares reach the last row and column, images need not be square, and the start counts
      as one of the ``queries``.
    """

    epsilon: float
    norm: _ball.Norm = "linf"
    queries: int = 5000
    initial_fraction: float = 0.8
    restarts: int = 1
    rescale_schedule: bool = False
    targeted: bool = False
    samples: int | None = None
    bounds: _box.Bounds | None = (0.0, 1.0)

    sees_images: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(epsilon=self.epsilon, queries=self.queries, restarts=self.restarts, samples=self.samples)
        _ball.check_norm(self.norm)
        _box.keep_frozen(self)
        _box.check_epsilon(self.epsilon, self.norm, self.bounds)
        if not 0 < _validate.number(self.initial_fraction) <= 1:
            raise ValueError(f"initial_fraction must be above 0 and at most 1, got {self.initial_fraction!r}.")

    def __call__(
        self, key: Key[Array, "..."], logits_fn: Callable, x: Float[AnyArray, "batch ..."], labels: AnyArray
    ) -> Float[Array, "batch ..."]:
        """Returns adversarial images ``(batch, height, width, channels)``; ValueError for inputs of the wrong kind."""
        _validate.channels_last(x=x)
        return run(self, key, logits_fn, x, labels)

    def perturb(self, keys, logits_fn, x, labels, epsilon, *, box=None):
        """Runs all restarts, traceable."""
        least = 1 if self.norm == "linf" else 5
        if x.ndim != 4 or min(x.shape[1:3]) < least:
            raise ValueError(
                f"x must be (batch, height >= {least}, width >= {least}, channels), got {x.shape}: Square changes "
                "squares of pixels; attack other inputs with apgd or fab."
            )
        box = _box.of(box or self.bounds, x)
        model = Model(logits_fn, losses.margin, labels, self.samples, self.targeted)
        make = self._corners if self.norm == "linf" else self._bumps
        start, move, draws = make(x, epsilon, box)

        def restart(index, best):
            search_keys, model_keys = fold_in(fold_in(keys, index), 0), fold_in(fold_in(keys, index), 1)

            def ask(found, z, i):
                return better(found, z, *model.look(fold_in(model_keys, i), z))

            def query(state):
                i, found = state
                random = _uniform(fold_in(search_keys, i), (draws,), x.dtype)
                return i + 1, ask(found, move(found.x, random, i - 1), i)

            def goes_on(state):
                i, found = state
                return (i < self.queries) & ~(found.fooled | best.fooled).all()

            found = ask(start_from(x), start(fold_in(search_keys, 0)), 0)
            found = jax.lax.while_loop(goes_on, query, (jnp.int32(1), found))[1]
            return better(best, *found)

        best = jax.lax.fori_loop(0, self.restarts, restart, start_from(x))
        return _ball.settle(best.x, x, epsilon, self.norm, box)

    def _sides(self, height, width):
        """Side of the square that each change has."""
        change = np.arange(self.queries)
        if self.rescale_schedule:
            change = change * 10000 // self.queries
        share = self.initial_fraction / 2.0 ** np.searchsorted(_HALVINGS, change)
        side = np.round(np.sqrt(share * height * width)).astype(np.int32)
        if self.norm == "linf":
            return np.clip(side, 1, min(height, width))
        return np.minimum(np.maximum(side, 3) // 2 * 2 + 1, min(height, width))

    def _corners(self, x, epsilon, box):
        """Points of the ball at which every pixel has its smallest or its largest value."""
        _, height, width, channels = x.shape
        low, high = _ball.linf_bounds(x, epsilon, box)
        sides = jnp.asarray(self._sides(height, width))

        def start(keys):  # vertical stripes
            return jnp.where(_uniform(keys, (1, width, channels), x.dtype) < 0.5, low, high)

        def move(z, random, change):
            square, _ = _square(random[:, :2], sides[change], x)
            return jnp.where(square, jnp.where(random[:, None, None, 2:] < 0.5, low, high), z)

        return start, move, 2 + channels

    def _bumps(self, x, epsilon, box):
        """Points on the surface of the ball, made of two opposite bumps in each square."""
        _, height, width, channels = x.shape
        power = 2 if self.norm == "l2" else 4
        distinct, stage = np.unique(self._sides(height, width), return_inverse=True)
        bumps = np.zeros((len(distinct), 2, height, width))
        for i, side in enumerate(distinct):
            bump = _bump(side, power)
            bumps[i, :, :side, :side] = bump, bump.T
        distinct, stage, bumps = jnp.asarray(distinct), jnp.asarray(stage), jnp.asarray(bumps, x.dtype)

        def size(change):  # of each channel
            if self.norm == "l2":
                return jnp.sqrt(jnp.square(change).sum((1, 2), keepdims=True))
            return jnp.abs(change).sum((1, 2), keepdims=True)

        def at(change):
            if self.norm == "l2":
                return jnp.clip(x + epsilon * _ball.unit(change, "l2"), box.low, box.high)
            return _ball.project(x + change, x, epsilon, "l1", box)

        def start(keys):  # a grid of tiles
            side = min(height, width) // 5
            rows, columns = height // side, width // side
            random = _uniform(keys, (rows, columns, 1 + channels), x.dtype).repeat(side, 1).repeat(side, 2)
            upright = jnp.asarray(np.tile(_bump(side, power), (rows, columns))[None, :, :, None], x.dtype)
            turned = jnp.asarray(np.tile(_bump(side, power).T, (rows, columns))[None, :, :, None], x.dtype)
            tiles = jnp.where(random[..., :1] < 0.5, upright, turned) * jnp.where(random[..., 1:] < 0.5, -1.0, 1.0)
            top, left = (height - rows * side) // 2, (width - columns * side) // 2
            grid = jnp.zeros_like(x).at[:, top : top + rows * side, left : left + columns * side]
            return at(grid.set(tiles.astype(x.dtype)))

        def move(z, random, change):
            side = distinct[stage[change]]
            here, corner = _square(random[:, :2], side, x)
            there, _ = _square(random[:, 2:4], side, x)
            turned = (random[:, 4] < 0.5).astype(jnp.int32)
            bump = jax.vmap(lambda turned, to: jnp.roll(bumps[stage[change], turned], to, (0, 1)))(turned, corner)
            bump = bump[..., None] * jnp.where(random[:, None, None, 5:] < 0.5, -1.0, 1.0)
            spent = z - x
            kept = jnp.where(here, spent, 0.0)
            bump = bump + kept / (size(kept) + _ball.TINY)
            total = _ball.per_row(_ball.norms_of(spent, self.norm), x)
            moved = size(jnp.where(here | there, spent, 0.0))
            if self.norm == "l2":
                budget = jnp.sqrt(jnp.maximum(epsilon**2 - total**2, 0.0) / channels + moved**2)
            else:  # more than is available; the projection removes the excess
                budget = jnp.maximum(epsilon - total, 0.0) + moved * channels
            bump = bump * (budget / (size(bump) + _ball.TINY))
            return at(jnp.where(here, bump, jnp.where(there, 0.0, spent)))

        return start, move, 5 + channels


def _uniform(keys, shape, dtype):
    """Draws from [0, 1)."""
    draws = jax.vmap(lambda key: _ball.uniform(key, shape))(keys)
    return jnp.minimum((1 + draws) / 2, np.float32(1 - 2**-24)).astype(dtype)


def _square(random, side, x):
    """A square of the image, ``(batch, height, width, 1)``, and its upper left corner, ``(batch, 2)``."""
    _, height, width, _ = x.shape
    places = jnp.asarray([height, width], jnp.int32)[None] - side + 1
    corner = jnp.floor(random * places.astype(random.dtype)).astype(jnp.int32)
    rows, columns = jnp.arange(height)[None] - corner[:, :1], jnp.arange(width)[None] - corner[:, 1:]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
    return inside[..., None], corner


def _bump(side, power):
    """Two pyramids of opposite signs, one above the other, of norm 1: l2 for power 2, l1 for power 4."""

    def scaled(a):
        return a / np.linalg.norm(a.reshape(-1), 2 if power == 2 else 1) if a.size else a

    def pyramid(rows, columns):
        steps = 1.0 / np.arange(1, max(rows, columns) // 2 + 2) ** power
        heights = np.cumsum(steps[::-1])[::-1]  # sums of all steps up to this distance from the middle
        far = np.maximum(abs(np.arange(rows) - rows // 2)[:, None], abs(np.arange(columns) - columns // 2)[None])
        return scaled(heights[far])

    return scaled(np.concatenate([pyramid(side // 2, side), -pyramid(side - side // 2, side)]))


square = Square
