"""Scores under noise: their means and variances over noisy copies, on the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _blocks, _validate
from robustjax.certification._counts import check_measure, noise_in_units, sharding_of_images
from robustjax.certification._measures import Measure
from robustjax.certification.conformal._scores import ScoreFn, thr
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray, LogitsFn

_UNIFORM = np.uint32(2**32 - 1)  # no draw has this index
_ROUNDING = 1e-5


class SmoothedScores(NamedTuple):
    """Scores of each label over noisy copies of each input. ``jax.tree.map(lambda a: a[rows], scores)`` picks inputs.

    Attributes:
      mean: ``(batch, classes)``, in [0, 1].
      variance: ``(batch, classes)``, unbiased, of one copy's score; infinite for a single copy, which has none.
      num_samples: ``(batch,)``, number of copies of each input.
    """

    mean: Float[AnyArray, "batch classes"]
    variance: Float[AnyArray, "batch classes"]
    num_samples: Int[AnyArray, " batch"]


@functools.partial(jax.jit, static_argnames=("measure", "num_samples", "batch_size", "sharding"))
def _moments(key, logits_fn, score, x, *, measure, num_samples, batch_size, sharding):
    """Means, variances, and whether all logits were finite and all scores in [0, 1], for each input.

    Blocks of ``copies`` noisy copies of ``group`` inputs, about ``batch_size`` in all: batches are large even if there
    are few copies.
    """
    blocks = -(-num_samples // batch_size)
    copies = -(-num_samples // blocks)

    def of_images(keys, logits_fn, score, x):
        group = max(1, min(batch_size // copies, x.shape[0]))
        noisy = jax.ShapeDtypeStruct((group * copies, *x.shape[1:]), jnp.float32)
        logits = _validate.traced("logits_fn", noisy, lambda: jax.eval_shape(logits_fn, noisy))
        if not hasattr(logits, "shape") or len(logits.shape) != 2 or logits.shape[0] != noisy.shape[0]:
            got = getattr(logits, "shape", type(logits).__name__)
            raise ValueError(f"logits_fn must map {noisy.shape} to logits ({noisy.shape[0]}, classes), got {got}.")

        def of_group(args):
            image_keys, images = args
            uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, _UNIFORM)))(image_keys)

            def block(i, state):
                mean, squares, finite, bounded = state
                draws = i * copies + jnp.arange(copies, dtype=jnp.int32)
                member = (draws < num_samples)[None, :, None]
                keys = jax.vmap(lambda k: jax.vmap(jax.random.fold_in, (None, 0))(k, draws))(image_keys)
                noisy = jax.vmap(jax.vmap(measure.sample, (0, None)))(keys, images)
                logits = logits_fn(noisy.reshape(-1, *images.shape[1:]))
                probabilities = jax.nn.softmax(logits.astype(jnp.float32))
                scores = score(probabilities, uniforms.repeat(copies)).astype(jnp.float32)
                if scores.shape != logits.shape:
                    raise ValueError(f"score must return numbers of shape {logits.shape}, got {scores.shape}.")
                logits, scores = (a.reshape(group, copies, -1) for a in (logits, scores))
                finite &= (jnp.isfinite(logits) | ~member).all((1, 2))
                bounded &= ((scores >= -_ROUNDING) & (scores <= 1 + _ROUNDING) | ~member).all((1, 2))
                scores = scores.clip(0, 1)
                # The moments of the whole, from the moments of its parts: Chan, Golub and LeVeque 1983.
                before, now = (i * copies).astype(jnp.float32), member.sum(dtype=jnp.float32)
                part = jnp.where(member, scores, 0).sum(1) / now
                squares += jnp.where(member, (scores - part[:, None]) ** 2, 0).sum(1)
                squares += (part - mean) ** 2 * before * now / (before + now)
                return mean + (part - mean) * now / (before + now), squares, finite, bounded

            zeros, true = jnp.zeros((group, logits.shape[1]), jnp.float32), jnp.ones(group, bool)
            mean, squares, finite, bounded = jax.lax.fori_loop(0, blocks, block, (zeros, zeros, true, true))
            variance = squares / (num_samples - 1) if num_samples > 1 else jnp.full_like(mean, jnp.inf)
            fine = (finite & bounded)[:, None]
            return jnp.where(fine, mean.clip(0, 1), jnp.nan), jnp.where(fine, variance, jnp.nan), finite, bounded

        rows = x.shape[0] + -x.shape[0] % group
        index = jnp.arange(rows) % max(x.shape[0], 1)  # the last group is padded
        in_groups = lambda a: a[index].reshape(rows // group, group, *a.shape[1:])
        grouped = jax.lax.map(of_group, (in_groups(keys), in_groups(x)))
        return jax.tree.map(lambda a: a.reshape(rows, *a.shape[2:])[: x.shape[0]], grouped)

    keys = image_keys(key, x)
    if sharding is None:
        return of_images(keys, logits_fn, score, x)
    rows, everywhere = PartitionSpec(*sharding.spec[:1]), PartitionSpec()
    return jax.shard_map(
        of_images, mesh=sharding.mesh, in_specs=(rows, everywhere, everywhere, rows), out_specs=rows, check_vma=False
    )(keys, logits_fn, score, x)


@jax.jit
def _beside_others(logits_fn, x):
    """Logits of the first half of a batch, and beside other images: the model is compiled once."""
    half = -(-x.shape[0] // 2)
    batches = jnp.stack([x, jnp.concatenate([x[:half], _validate.unlike(x[half:])])])
    return jax.lax.map(logits_fn, batches)[:, :half]


@_arguments.checked
def smoothed_scores(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    score: ScoreFn = thr,
    num_samples: int = 256,
    batch_size: int | None = None,
    input_range: tuple[float, float] | None = (0.0, 1.0),
) -> SmoothedScores:
    r"""Computes means and variances of the scores of noisy copies.

    .. math:: \bar s(x, y) = \frac 1 n \sum_i S(x + \epsilon_i, y)

    Draw i of an input uses ``fold_in(image_key, i)``, as in :func:`robustjax.certification.sample_counts`, so that a
    result depends on the input and the key, and on ``batch_size`` and the other inputs only by rounding. The ``u`` of
    scores that take one is drawn once for an input, for all its copies and labels.

    There is one compiled program for a shape, a measure and a number of copies; its arguments include weights in a
    pytree, and settings that ``Partial`` binds to a score. Memory holds one block of copies. Inputs that are sharded
    over a mesh are scored in place.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(copies, ...)`` float32 to ``(copies, classes)``; normalisation belongs inside.
      x: ``(batch, ...)``, floating, [0, 1] images unnormalised.
      measure: what noise to add, for example ``gaussian(0.25)``.
      score: ``thr``, ``aps``, ``raps``, the result of ``ptt``, or any :data:`ScoreFn`.
      num_samples: number of copies of each input.
      batch_size: noisy copies in one call of ``logits_fn``, at most; None as in ``sample_counts``.
      input_range: the smallest and the largest number that x may hold; None for any.

    Returns:
      ``SmoothedScores`` on the device, float32. Under ``jit``, NaN where an error below would be raised.

    Raises:
      ValueError: for a key, x, num_samples or batch_size that are not as above, logits that are not finite or change
        with the rest of the batch (which is tried on one), and scores of another shape or outside [0, 1].

    Example:
      >>> scores = conformal.smoothed_scores(jax.random.key(0), logits_fn, x, certification.gaussian(0.5))
      >>> print(scores.mean)
      [[0.54 0.46]
       [0.73 0.27]]

    Reference:
      Gendler et al., "Adversarially robust conformal prediction", ICLR 2022.
    """
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, ...), got {x.shape}.")
    _validate.key(key, x.shape[0])
    logits_fn, score = _validate.as_pytree(logits_fn=logits_fn), _validate.as_pytree(2, score=score)
    check_measure(measure)
    if batch_size is None:
        batch_size = _blocks.at_once(x.shape[1:])
    _validate.at_least(1, num_samples=num_samples, batch_size=batch_size)
    here = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    if here:
        _validate.in_range(np.asarray(x), input_range)
        noise_in_units(measure, input_range)
    settings = {"measure": measure, "num_samples": int(num_samples), "batch_size": int(batch_size)}
    mean, variance, finite, bounded = _moments(key, logits_fn, score, x, **settings, sharding=sharding_of_images(x))
    if not isinstance(mean, jax.core.Tracer):
        for fine, what in ((finite, "logits_fn must return finite logits"), (bounded, "score must lie in [0, 1]")):
            if not fine.all():
                raise ValueError(f"{what}, not so for noisy copies of x[{int(fine.argmin())}].")
        if here and x.shape[0]:
            some = np.resize(np.asarray(x[:batch_size], np.float32), (max(2, batch_size), *x.shape[1:]))
            logits = np.asarray(_beside_others(logits_fn, some))
            if not _validate.same_rows(*logits).all():
                raise _validate.depends_on_batch()
            _validate.not_probabilities(logits_fn=logits[0])
    return SmoothedScores(mean, variance, jnp.full(x.shape[:1], num_samples, jnp.int32))
