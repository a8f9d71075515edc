"""Randomized smoothing: vote counts on the device, certificates from counts on the host."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from robustjax import _validate
from robustjax.certification._binomial import binomial_lower_bound, sign_test_p_value
from robustjax.certification._measures import Measure
from robustjax.certification._stopping import stops
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray, LogitsFn

ABSTAIN = -1
"""The label of an input for which no class can be certified or predicted."""


class Certificate(NamedTuple):
    """What is known of the smoothed classifier at each input; host arrays, one entry per input.

    Attributes:
      label: the certified class, or ``ABSTAIN``; int32.
      radius: the label is constant on the open ball of this radius, in the units of x and the norm of the measure;
        0 where abstained; float64.
      probability: lower confidence bound, at level 1 - alpha, of the probability of the selected class; float64.
      abstained: True where the bound does not exceed 1/2.
    """

    label: np.ndarray
    radius: np.ndarray
    probability: np.ndarray
    abstained: np.ndarray


@functools.partial(jax.jit, static_argnames=("measure", "batch_size", "sharding"))
def _votes(key, logits_fn, x, edges, bounds=None, *, measure, batch_size, sharding=None):
    """Counts votes of draws ``edges[g] <= index < edges[g + 1]``: (batch, groups, classes).

    The number of draws is an argument of the compiled program (a loop with a traced end; a scan's length would be part
    of it), so that one compilation serves every number. With a sharding, each device of its mesh works on its share of
    the images, and devices with the same images take turns with the blocks. With ``bounds``, the rows of a ``Rule``, an
    image is left at the first of the looks ``edges[2:]`` that stops the votes for the winner of the first group; what
    is counted of later groups is then a part of them.
    """
    noisy = jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jnp.float32)
    logits = jax.eval_shape(logits_fn, noisy)
    if not hasattr(logits, "shape") or len(logits.shape) != 2 or logits.shape[0] != batch_size or logits.shape[1] < 2:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(
            f"logits_fn must map {noisy.shape} to logits of shape ({batch_size}, classes >= 2), got {got}."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn must give floating logits, got {logits.dtype}.")
    num_classes = logits.shape[1]

    def of_images(keys, logits_fn, x, edges, bounds, turn=0, turns=1, shared=()):
        def of_image(args):
            image_key, image = args

            def stopped(counts, blocks):
                if bounds is None:
                    return jnp.zeros((), bool)
                counts = jax.lax.psum(counts, shared) if shared else counts
                count = counts[1:, counts[0].argmax()].cumsum(0)
                return ((edges[2:] - edges[0] <= blocks * batch_size) & stops(count, *bounds)).any()

            def block(state):
                i, counts, _ = state
                draws = edges[0] + (turn + i * turns) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(image_key, draws)
                logits = logits_fn(jax.vmap(measure.sample, (0, None))(keys, image))
                # A row that is not finite is an error of the model: it votes for no class (argmax would elect one).
                votes = jax.nn.one_hot(logits.argmax(-1), num_classes, dtype=bool)
                votes &= jnp.isfinite(logits).all(-1, keepdims=True)
                member = (edges[:-1, None] <= draws[None]) & (draws[None] < edges[1:, None])
                counts += (member[:, :, None] & votes[None]).sum(1, dtype=jnp.int32)
                return i + 1, counts, stopped(counts, (i + 1) * turns)

            blocks = (edges[-1] - edges[0] - 1) // batch_size + 1  # in this order, which cannot overflow
            rounds = (blocks - 1) // turns + 1  # the same for all who take turns: they may wait for one another
            start = (jnp.int32(0), jnp.zeros((edges.size - 1, num_classes), jnp.int32), jnp.zeros((), bool))
            return jax.lax.while_loop(lambda state: (state[0] < rounds) & ~state[2], block, start)[1]

        return jax.lax.map(of_image, (keys, x))

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


def _sharding_of_images(x) -> NamedSharding | None:
    """How whole images lie on several devices; None for one, and where images themselves are split."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1 or any(sharding.spec[1:]):
        return None
    return sharding


def _check_measure(measure: object) -> None:
    if not isinstance(measure, Measure):
        raise ValueError(f"measure must be a smoothing measure such as gaussian(0.5), got {measure!r}.")


def _count(key, logits_fn, x, measure, edges, batch_size, bounds=None) -> Int[Array, "batch groups classes"]:
    if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be a floating array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, ...), got {x.shape}.")
    _validate.key(key, x.shape[0])
    logits_fn = _validate.as_pytree(logits_fn=logits_fn)
    _check_measure(measure)
    if batch_size is None:
        batch_size = 200 if jax.default_backend() == "cpu" else 1000
    _validate.at_least(1, batch_size=batch_size)
    if not isinstance(edges[-1], jax.core.Tracer) and edges[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"num_samples must keep draw indices within int32, got {edges[-1]} draws.")
    edges = jnp.asarray(edges, jnp.int32)
    return _votes(
        key, logits_fn, x, edges, bounds, measure=measure, batch_size=int(batch_size), sharding=_sharding_of_images(x)
    )


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

    Draw i of an image uses ``fold_in(image_key, i)``, so that counts do not depend on the batch of images, on
    ``batch_size``, on the order of the blocks or on the number of devices, as long as the logits do not; and the
    counts of draws [0, n) and [n, m) add up to those of [0, m). This holds for Threefry keys, JAX's default; ``rbg``
    keys draw sound noise that does depend on ``batch_size``, because JAX maps their generator over keys in another way.

    One compiled program: a loop over images, in it a loop over blocks of ``batch_size`` noisy copies, and counts that
    stay on the device. Memory holds one block, whatever ``num_samples``; another ``num_samples`` does not compile
    again. As under ``jax.jit``, a plain function is traced once, and the arrays that it closes over become constants of
    the program: what is assigned to them later is not seen. Give ``jax.tree_util.Partial(logits_of, weights)``, or a
    module that is a pytree of arrays (Equinox, Flax NNX), and weights are arguments: always the present ones, and new
    ones do not compile again.

    Args:
      key: one typed key, or ``(batch,)`` of them; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``.
      x: ``(batch, ...)``, floating. Images that are split over some axes of a mesh are counted there, and devices with
        the same images share their draws.
      measure: what noise to add, for example ``gaussian(0.5)``.
      num_samples: draws for each input, at least 1; may be traced.
      first_sample: index of the first draw.
      batch_size: noisy copies in one call of ``logits_fn``; None is 200 on a CPU and 1000 on an accelerator.

    Returns:
      ``(batch, classes)`` int32. Ties go to the lowest class. Rows sum to ``num_samples``, less one for each draw with
      logits that are not finite.

    Raises:
      ValueError: for a key, x, num_samples or batch_size that are not as above, or logits of another shape.

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "SampleUnderNoise".
    """
    _validate.at_least(1, num_samples=num_samples)
    _validate.at_least(0, first_sample=first_sample)
    edges = (first_sample, first_sample + num_samples)
    return _count(key, logits_fn, x, measure, edges, batch_size)[:, 0]


def _check_on_host(key: Array, x: AnyArray) -> None:
    if isinstance(x, jax.core.Tracer) or isinstance(key, jax.core.Tracer):
        raise ValueError("x and key must be concrete: bounds are computed on the host. Under jit, use sample_counts.")
    if isinstance(x, (jax.Array, np.ndarray)) and not np.isfinite(np.asarray(x)).all():
        raise ValueError("x must be finite, got NaN or infinity in it.")


def _check_all_voted(counts: np.ndarray, num_samples: int | np.ndarray) -> None:
    lost = num_samples - counts.sum(-1)
    if lost.any():
        worst = int(lost.argmax())
        lost, of = lost[worst], np.broadcast_to(num_samples, lost.shape)[worst]
        raise ValueError(f"logits_fn gave logits that are not finite for {lost} of {of} noisy copies of x[{worst}].")


def certify(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    num_selection: int = 100,
    num_estimation: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
) -> Certificate:
    r"""Certifies the smoothed classifier around each input.

    The class A with most of ``num_selection`` votes is selected; of ``num_estimation`` fresh votes, :math:`n_A` for it
    give :math:`\underline{p_A}` by Clopper and Pearson, and the radius is ``measure.radius(p_A)``.

    Args:
      key: one typed key, or ``(batch,)`` of them; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``; normalisation belongs inside.
      x: ``(batch, ...)``, floating, [0, 1] images unnormalised.
      measure: the smoothing measure, for example ``gaussian(0.5)``.
      num_selection: draws that select the class.
      num_estimation: draws that bound its probability.
      alpha: probability, for each input, that its certificate is wrong.
      batch_size: noisy copies in one call of ``logits_fn``; see ``sample_counts``.

    Returns:
      A ``Certificate`` of host arrays.

    Raises:
      ValueError: for an argument that is not as above, and for logits that are not finite.

    Guarantee:
      For every input, over the draws: with probability at least 1 - alpha, the label is what the smoothed classifier
      returns everywhere in the open ball of ``radius``, or it is ``ABSTAIN``. Each input by itself: of m certificates,
      m * alpha may be wrong. It speaks of the smoothed classifier, not of ``logits_fn``, and holds in exact
      arithmetic; see :func:`gaussian` for floating point.

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "Certify". Differs from it at a bound of exactly 1/2,
      where it returns a class and we abstain, because two classes may then tie.
    """
    _validate.at_least(1, num_selection=num_selection, num_estimation=num_estimation)
    _validate.probability(alpha=alpha)
    if alpha ** (1 / num_estimation) <= 0.5:
        warnings.warn(
            f"num_estimation={num_estimation} draws can never certify at alpha={alpha}: even if all agree, the bound "
            "does not exceed 1/2.",
            stacklevel=2,
        )
    _check_on_host(key, x)
    edges = (0, num_selection, num_selection + num_estimation)
    counts = np.asarray(_count(key, logits_fn, x, measure, edges, batch_size))
    _check_all_voted(counts[:, 0], num_selection)
    _check_all_voted(counts[:, 1], num_estimation)
    return certificate_from_counts(counts[:, 0], counts[:, 1], measure, alpha=alpha)


def predict(
    key: Key[Array, "..."],
    logits_fn: LogitsFn,
    x: Float[AnyArray, "batch ..."],
    measure: Measure,
    *,
    num_samples: int = 1000,
    alpha: float = 0.001,
    batch_size: int | None = None,
) -> np.ndarray:
    """Predicts with the smoothed classifier, or abstains.

    Args:
      key: one typed key, or ``(batch,)`` of them; see :func:`robustjax.perturbations.image_keys`.
      logits_fn: maps ``(batch_size, ...)`` float32 to ``(batch_size, classes)``.
      x: ``(batch, ...)``, floating.
      measure: the smoothing measure.
      num_samples: draws for each input.
      alpha: probability, for each input, of returning another class than the smoothed classifier's.
      batch_size: noisy copies in one call of ``logits_fn``; see ``sample_counts``.

    Returns:
      ``(batch,)`` int32 host array of classes and ``ABSTAIN``.

    Raises:
      ValueError: for an argument that is not as above, and for logits that are not finite.

    Guarantee:
      For every input by itself, over the draws: a class other than the smoothed classifier's is returned with
      probability at most alpha.

    Reference:
      Cohen, Rosenfeld and Kolter, arXiv:1902.02918, algorithm "Predict".
    """
    _validate.at_least(1, num_samples=num_samples)
    _validate.probability(alpha=alpha)
    if 2.0 * 0.5**num_samples > alpha:
        warnings.warn(
            f"num_samples={num_samples} draws can never decide at alpha={alpha}: even if all agree, the p-value "
            "exceeds it.",
            stacklevel=2,
        )
    _check_on_host(key, x)
    counts = np.asarray(sample_counts(key, logits_fn, x, measure, num_samples=num_samples, batch_size=batch_size))
    _check_all_voted(counts, num_samples)
    return prediction_from_counts(counts, alpha=alpha)


def _check_counts(name: str, counts) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] < 2 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"{name} must be integers (batch, classes >= 2), got {counts.dtype} {counts.shape}.")
    if (counts < 0).any():
        raise ValueError(f"{name} must not be negative, got {counts.min()}.")
    return counts


def certificate_from_counts(
    selection_counts: Int[AnyArray, "batch classes"],
    estimation_counts: Int[AnyArray, "batch classes"],
    measure: Measure,
    *,
    alpha: float = 0.001,
    num_estimation: int | None = None,
) -> Certificate:
    """Turns vote counts into certificates, in float64 on the host.

    Args:
      selection_counts: ``(batch, classes)`` votes that select the class.
      estimation_counts: ``(batch, classes)`` votes of other draws, which bound its probability.
      measure: the measure that the draws were made with.
      alpha: probability, for each input, that its certificate is wrong.
      num_estimation: draws behind each row of ``estimation_counts``; None is the sum of the row. Where draws were lost
        (logits that are not finite), pass the number made: a lost draw counts against the class.

    Returns:
      A ``Certificate``.

    Raises:
      ValueError: for counts that are not (batch, classes) integers >= 0, that differ in shape or exceed
        ``num_estimation``, and for alpha outside (0, 1).

    Guarantee:
      As ``certify``, if the two sets of draws are independent and their numbers were fixed beforehand.
    """
    selection = _check_counts("selection_counts", selection_counts)
    estimation = _check_counts("estimation_counts", estimation_counts)
    if selection.shape != estimation.shape:
        raise ValueError(
            f"selection_counts and estimation_counts must have one shape, got {selection.shape} and {estimation.shape}."
        )
    sums = estimation.sum(-1)
    if num_estimation is not None and (sums > num_estimation).any():
        raise ValueError(f"num_estimation={num_estimation} is less than the {sums.max()} votes of a row.")
    if num_estimation is None and (sums == 0).any():
        raise ValueError(
            f"estimation_counts must hold at least one vote in each row, row {int(sums.argmin())} has none."
        )
    label = selection.argmax(-1).astype(np.int32)
    successes = np.take_along_axis(estimation, label[:, None], axis=-1)[:, 0]
    probability = binomial_lower_bound(successes, sums if num_estimation is None else num_estimation, alpha)
    abstained = probability <= 0.5
    return Certificate(
        label=np.where(abstained, np.int32(ABSTAIN), label),
        radius=np.where(abstained, 0.0, measure.radius(probability)),
        probability=probability,
        abstained=abstained,
    )


def prediction_from_counts(counts: Int[AnyArray, "batch classes"], *, alpha: float = 0.001) -> np.ndarray:
    """Turns vote counts into predictions: the top class, if it beats the second by a sign test at level alpha.

    Args:
      counts: ``(batch, classes)`` votes.
      alpha: probability, for each input, of returning another class than the smoothed classifier's.

    Returns:
      ``(batch,)`` int32 host array of classes and ``ABSTAIN``.

    Raises:
      ValueError: for counts that are not (batch, classes) integers >= 0, and for alpha outside (0, 1).

    Reference:
      Hung and Fithian, "Rank verification for exponential families", arXiv:1610.03944, which makes the test valid
      although the two classes are chosen by the same counts.
    """
    _validate.probability(alpha=alpha)
    counts = _check_counts("counts", counts)
    second, first = np.sort(counts, axis=-1)[:, -2:].T
    return np.where(sign_test_p_value(first, second) <= alpha, counts.argmax(-1), ABSTAIN).astype(np.int32)
