"""Votes of a classifier under noise, counted on the device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from robustjax import _arguments, _blocks, _validate
from robustjax.certification._measures import Measure
from robustjax.certification._stopping import stops
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray, LogitsFn


@functools.partial(jax.jit, static_argnames=("measure", "batch_size", "group", "checked", "sharding"))
def _votes(key, logits_fn, x, edges, bounds=None, *, measure, batch_size, group=1, checked=False, sharding=None):
    """Counts votes of draws ``edges[g] <= index < edges[g + 1]``: (batch, groups, classes).

    The number of draws is an argument of the compiled program (a loop with a traced end, because the length of a scan
    would be static), so one compilation serves all numbers. With a sharding, each device of the mesh works on its own
    images, and devices with the same images take turns with the blocks. A block has ``batch_size`` copies of each of
    ``group`` images. With ``bounds``, the rows of a ``Rule``, an image, which then has blocks of its own, stops at the
    first of the looks ``edges[2:]`` at which the rule stops the votes for the winner of the first group; the counts of
    later groups are then incomplete.

    If ``checked``, the first block of each device is drawn once more, before it, with half of its copies replaced by
    other images. The second result, (batch,), is not 0 where that changed the logits of the other half.
    """
    copies = group * batch_size
    noisy = jax.ShapeDtypeStruct((copies, *x.shape[1:]), jnp.float32)
    logits = _validate.traced("logits_fn", noisy, lambda: jax.eval_shape(logits_fn, noisy))
    if not hasattr(logits, "shape") or len(logits.shape) != 2 or logits.shape[0] != copies or logits.shape[1] < 2:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"logits_fn must map {noisy.shape} to logits of shape ({copies}, classes >= 2), got {got}.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn must return floating-point logits, got {logits.dtype}.")
    num_classes = logits.shape[1]

    def of_images(keys, logits_fn, x, edges, bounds, turn=0, turns=1, shared=()):
        beside_others = jnp.arange(copies) >= -(-copies // 2)

        def of_group(args):
            image_keys, images, twice = args

            def stopped(counts, blocks):
                if bounds is None:
                    return jnp.zeros((), bool)
                counts = jax.lax.psum(counts, shared) if shared else counts
                count = counts[0, 1:, counts[0, 0].argmax()].cumsum(0)
                return ((edges[2:] - edges[0] <= blocks * batch_size) & stops(count, *bounds)).any()

            def block(state):
                i, counts, _, before, depends = state
                place = jnp.maximum(i, 0) if checked else i
                draws = edges[0] + (turn + place * turns) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
                keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, draws))(image_keys)
                noisy = jax.vmap(jax.vmap(measure.sample, (0, None)))(keys, images).reshape(copies, *x.shape[1:])
                if checked:
                    replaced = (beside_others & (i < 0)).reshape(-1, *(1,) * (x.ndim - 1))
                    noisy = jnp.where(replaced, _validate.unlike(noisy), noisy)
                logits = logits_fn(noisy)
                # A row that is not finite is an error of the model: it votes for no class (argmax would elect one).
                votes = jnp.isfinite(logits).all(-1).reshape(group, batch_size) & (edges[0] <= draws)[None]
                if checked:
                    votes &= i >= 0
                    depends |= twice & (i == 0) & ~(_validate.same_rows(logits, before) | beside_others).all()
                    before = logits
                winners = logits.argmax(-1).reshape(group, batch_size)
                part = (edges[1:, None] <= draws[None]).sum(0)[None]  # draws after the last have none, and are dropped
                image = jnp.arange(group)[:, None]
                counts = counts.at[image, part, winners].add(votes.astype(jnp.int32), mode="drop")
                return i + 1, counts, stopped(counts, (i + 1) * turns), before, depends

            blocks = (edges[-1] - edges[0] - 1) // batch_size + 1  # in this order, which cannot overflow
            rounds = (blocks - 1) // turns + 1  # the same for all devices that take turns: they may wait for each other
            no, none = jnp.zeros((), bool), jnp.zeros((group, edges.size - 1, num_classes), jnp.int32)
            before = jnp.zeros(logits.shape if checked else 0, logits.dtype)
            start = (-twice.astype(jnp.int32), none, no, before, no)
            _, counts, _, _, depends = jax.lax.while_loop(lambda s: (s[0] < rounds) & ~s[2], block, start)
            return counts, jnp.broadcast_to(depends.astype(jnp.int32), group)

        rows = x.shape[0] + -x.shape[0] % group
        index = jnp.arange(rows) % max(x.shape[0], 1)  # the last group is padded
        in_groups = lambda a: a[index].reshape(rows // group, group, *a.shape[1:])
        twice = (jnp.arange(rows // group) == 0) & checked
        found = jax.lax.map(of_group, (in_groups(keys), in_groups(x), twice))
        return jax.tree.map(lambda a: a.reshape(rows, *a.shape[2:])[: x.shape[0]], found)

    keys = image_keys(key, x)
    if sharding is None:
        return of_images(keys, logits_fn, x, edges, bounds)
    mesh, rows = sharding.mesh, PartitionSpec(*sharding.spec[:1])
    split = rows[0] if rows else None
    split = split if isinstance(split, tuple) else (split,)
    shared = tuple(axis for axis in mesh.axis_names if axis not in split)

    def of_device(keys, logits_fn, x, edges, bounds):
        turn, turns = jax.lax.axis_index(shared), jax.lax.axis_size(shared)
        return jax.lax.psum(of_images(keys, logits_fn, x, edges, bounds, turn, turns, shared), shared)

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(rows, everywhere, rows, everywhere, everywhere), out_specs=rows, check_vma=False
    )(keys, logits_fn, x, edges, bounds)


def sharding_of_images(x) -> NamedSharding | None:
    """The sharding of whole images over several devices; None for one device, and if single images are sharded."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1 or any(sharding.spec[1:]):
        return None
    return sharding


def check_measure(measure: object) -> None:
    if not isinstance(measure, Measure):
        raise ValueError(f"measure must be a smoothing measure such as gaussian(0.5), got {measure!r}.")


def count_votes(
    key, logits_fn, x, measure, edges, batch_size, bounds=None, checked=False
) -> tuple[Int[Array, "batch groups classes"], Int[Array, " batch"]]:
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, ...), got {x.shape}.")
    _validate.key(key, x.shape[0])
    logits_fn = _validate.as_pytree(logits_fn=logits_fn)
    check_measure(measure)
    group, sharding = 1, sharding_of_images(x)
    if batch_size is None:
        known = bounds is None and not any(isinstance(edge, jax.core.Tracer) for edge in edges)
        batch_size, group = _blocks.of_draws(int(edges[-1] - edges[0]) if known else None, x.shape[1:])
        group = max(1, min(group, (x.shape if sharding is None else sharding.shard_shape(x.shape))[0]))
    _validate.at_least(1, batch_size=batch_size)
    if not isinstance(edges[-1], jax.core.Tracer) and edges[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"num_samples must keep draw indices within int32, got {edges[-1]} draws.")
    edges = jnp.asarray(edges, jnp.int32)
    settings = {"measure": measure, "batch_size": int(batch_size), "group": group, "sharding": sharding}
    return _votes(key, logits_fn, x, edges, bounds, checked=checked, **settings)


def counts_on_host(key, logits_fn, x, measure, edges, batch_size, bounds=None) -> np.ndarray:
    """``count_votes`` on the host; ValueError for a model whose logits change with the rest of a block."""
    counts, depends = count_votes(key, logits_fn, x, measure, edges, batch_size, bounds, checked=True)
    if np.asarray(depends).any():
        raise _validate.depends_on_batch()
    return np.asarray(counts)


@_arguments.checked
def sample_counts(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    num_samples: int | Int[Array, ""],
    first_sample: int = 0,
    batch_size: int | None = None,
) -> Int[Array, "batch classes"]:
    r"""Counts how often each class wins under noise.

    .. math:: n_c(x) = \sum_{i} 1[\arg\max f(x + \epsilon_i) = c]

    Draw i of an image uses ``fold_in(image_key, i)``. Counts therefore do not depend on the batch of images, on
    ``batch_size``, on the order of the blocks or on the number of devices, as long as the logits do not, and the counts
    of draws [0, n) and [n, m) add up to the counts of draws [0, m). This holds for Threefry keys, JAX's default.
    ``rbg`` keys draw sound noise that does depend on ``batch_size``, because JAX vectorises that generator differently.

    All of it is one compiled program: a loop over images and, inside, a loop over blocks of ``batch_size`` noisy
    copies, with counts that stay on the device. Memory holds one block for any ``num_samples``. With a ``batch_size``,
    another ``num_samples`` does not compile again; without, blocks divide the draws evenly, and every multiple of 40
    copies is compiled once. As under ``jax.jit``, a plain function is traced once: the arrays that it closes over
    become constants of the program, and later assignments to them have no effect. The weights of an Equinox or a Flax
    NNX module, of ``functools.partial(model.apply, variables)`` and of ``jax.tree_util.Partial(logits_of, weights)``
    are arguments of the program instead: new weights are used and do not compile again. Python's numbers, text and
    functions in these are part of the program, but for the numbers that ``jax.tree_util.Partial`` binds.

    Args:
      key: one typed key, or ``(batch,)`` keys; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``.
      x: ``(batch, ...)``, floating. Images that are sharded over some axes of a mesh are counted in place, and devices
        with the same images share their draws.
      measure: what noise to add, for example ``gaussian(0.5)``.
      num_samples: draws for each input, at least 1; may be traced.
      first_sample: index of the first draw.
      batch_size: noisy copies in one call of ``logits_fn``; None is at most 200 on a CPU and 1000 on an accelerator,
        fewer for large images, and there a block holds several images where one has too few draws to fill it.

    Returns:
      ``(batch, classes)`` int32. Ties go to the lowest class. Rows sum to ``num_samples`` minus the number of
      draws with logits that are not finite.

    Raises:
      ValueError: for a key, x, num_samples or batch_size that are not as above, logits of another shape, and, outside
        of ``jit``, logits that change with the rest of a block: one block more is computed.

    Example:
      >>> measure = certification.gaussian(0.5)
      >>> print(certification.sample_counts(jax.random.key(0), logits_fn, x, measure, num_samples=1000))
      [[ 209  791]
       [   0 1000]]

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "SampleUnderNoise".
    """
    _validate.at_least(1, num_samples=num_samples)
    _validate.at_least(0, first_sample=first_sample)
    edges, checked = (first_sample, first_sample + num_samples), not isinstance(x, jax.core.Tracer)
    counts, depends = count_votes(key, logits_fn, x, measure, edges, batch_size, checked=checked)
    here = checked and not isinstance(depends, jax.core.Tracer) and depends.is_fully_addressable
    if here and np.asarray(depends).any():
        raise _validate.depends_on_batch()
    return counts[:, 0]


def check_on_host(key: Array, x: AnyArray, measure: Measure, input_range: tuple[float, float] | None) -> None:
    if isinstance(x, jax.core.Tracer) or isinstance(key, jax.core.Tracer):
        raise ValueError("x and key must be concrete: bounds are computed on the host. Under jit, use sample_counts.")
    if isinstance(x, (jax.Array, np.ndarray)) and jnp.issubdtype(x.dtype, jnp.floating):
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise ValueError("x must be finite, got NaN or infinity in it.")
        _validate.in_range(x, input_range)
    noise_in_units(measure, input_range)


def noise_in_units(measure: Measure, input_range: tuple[float, float] | None) -> None:
    """Warns of noise that is larger than the range of the inputs, such as sigma=12 for 12/255."""
    if input_range is not None:
        reach = _validate.number(input_range[1]) - _validate.number(input_range[0])
        # Not of l1 measures, whose noise in papers reaches several times the range.
        _validate.in_units(reach, sigma=getattr(getattr(measure, "measure", measure), "sigma", 0.0))


def check_all_voted(counts: np.ndarray, num_samples: int | np.ndarray) -> None:
    lost = num_samples - counts.sum(-1)
    if lost.any():
        worst = int(lost.argmax())
        lost, of = lost[worst], np.broadcast_to(num_samples, lost.shape)[worst]
        raise ValueError(f"logits_fn must return finite logits, not so for {lost} of {of} noisy copies of x[{worst}].")
