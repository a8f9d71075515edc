"""What all attacks share: checks, the compiled call, the loss, and the best point so far."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Key

from robustjax import _arguments, _callables, _validate, losses
from robustjax._precision import in_float32
from robustjax.attacks import _box
from robustjax.perturbations import image_keys
from robustjax.typing import AnyArray

LossFn = Callable[[Array, Array], Array]
"""``(logits (batch, classes), labels) -> (batch,)``, which the adversary maximises."""

LOSSES: dict[str, LossFn] = {
    "cross_entropy": losses.cross_entropy,
    "ce": losses.cross_entropy,
    "dlr": losses.difference_of_logits_ratio,
    "margin": losses.margin,
}


@runtime_checkable
class Attack(Protocol):
    """A configured adversary: a frozen dataclass, so that equal settings share one compiled program."""

    def __call__(self, key: Array, logits_fn: Callable, x: AnyArray, labels: AnyArray) -> Array:
        """Returns adversarial inputs, ``(batch, ...)``, in the ball around x and within the bounds."""
        ...


class Best(NamedTuple):
    """The best point of each input so far: the first that fools the model, else the one with the highest loss."""

    x: Float[Array, "batch ..."]
    value: Float[Array, " batch"]
    fooled: Bool[Array, " batch"]


class Step(NamedTuple):
    """The model at a point: losses, whether it is fooled, and the gradient of the losses."""

    value: Float[Array, " batch"]
    fooled: Bool[Array, " batch"]
    gradient: Float[Array, "batch ..."]


def loss_of(loss: str | LossFn) -> LossFn:
    """The loss of that name, or the function itself; ValueError for an unknown name."""
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, or a function, got {loss!r}.")
    return LOSSES[loss]


def check_settings(*, epsilon: float = 0.0, **at_least_1: int | None) -> None:
    """Raises ValueError for an epsilon below 0 or not finite, and for integers below 1; some may be None."""
    _validate.not_negative(epsilon=epsilon)
    optional = {name for name in ("samples", "batch_size") if at_least_1.get(name) is None}
    _validate.at_least(1, **{name: value for name, value in at_least_1.items() if name not in optional})


@_arguments.checked
def queries_of(attack: Any) -> int:
    """Counts the steps, or for Square the queries, that an attack may spend on one input.

    Args:
      attack: any attack; an :func:`at_budget` attack counts as the attack inside, an unknown attack as 1.

    Returns:
      The largest possible number over all targets, restarts and draws; one step may query the model more than once.

    Example:
      >>> attacks.queries_of(attacks.pgd(epsilon=0.1, steps=20, restarts=5))
      100
    """
    if not callable(attack):
        raise ValueError(f"attack must be a function, got {_validate.short(attack)}.")
    attack = getattr(attack, "attack", attack)
    names = ("queries", "steps", "num_targets", "restarts", "binary_search_steps", "samples")
    return math.prod(getattr(attack, name, None) or 1 for name in names)


def check_result(attack: Any, x_adv: Any, x: AnyArray) -> None:
    """Raises ValueError unless ``x_adv`` is an array of the shape of x."""
    if getattr(x_adv, "shape", None) != x.shape:
        got = getattr(x_adv, "shape", type(x_adv).__name__)
        hint = "; wrap it in attacks.at_budget" if hasattr(x_adv, "distance") else ""
        raise ValueError(f"attack must return inputs of shape {x.shape}, {attack!r} returned {got}{hint}.")


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding of an array over several devices; None for one device, for the host, and for a traced array."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    # With Explicit axes, models would have to name the sharding of their results.
    return NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec)


def of_rows(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array that has one row for each row of a sharded array."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def placed(sharding: NamedSharding | None, keys: Any, x: Any, labels: Any) -> tuple[Array, Array, Array]:
    """Puts rows where the sharding of x says, or on the default device; arrays that are there already are not moved."""
    if sharding is None:
        return keys, jnp.asarray(x), jnp.asarray(labels)
    return jax.device_put((keys, x, labels), (of_rows(sharding), sharding, of_rows(sharding)))


def keys_on_one_device(keys: Key[Array, " batch"], sharding: NamedSharding | None) -> Key[Array, " batch"]:
    """Keys on one device, from which blocks can be picked without communication between devices."""
    return keys if sharding is None else jax.device_put(keys, sharding.mesh.local_devices[0])


def divisible(size: int, sharding: NamedSharding | None) -> int:
    """The smallest number of rows, at least ``size``, that divides evenly over the devices of a sharding."""
    if sharding is None:
        return size
    whole = sharding.mesh.size
    shares = whole // of_rows(sharding).shard_shape((whole,))[0]
    return -(-size // shares) * shares


def run(attack: Any, key: Key[Array, "..."], logits_fn: Callable, x: Any, labels: Any, *traced: Any) -> Any:
    """Checks the arguments of an attack and calls its ``perturb``, compiled.

    ``attack.perturb(keys, logits_fn, x, labels, epsilon, *traced, box=box)`` gets one key for each input. Its epsilon
    and its box are traced, so that a curve over epsilons, or another range of inputs, compiles once; epsilon is rounded
    down to float32, the bounds to the nearest float32, as inputs are. Of an attack whose ``steps_are_traced``
    is true, the first of ``traced`` is the number of steps. No gradient flows through the result.
    Each of several devices attacks its own rows, and the result has the sharding of x. An attack whose ``sees_images``
    is not true gets flat rows, ``(batch, dim)``.
    """
    called_by_user = not _callables.is_separated(logits_fn)
    logits_fn = _validate.as_pytree(None, logits_fn=logits_fn)
    samples, bounds = getattr(attack, "samples", None), attack.bounds
    loss = getattr(attack, "loss", None)
    labels_are_classes = not callable(loss) or loss in LOSSES.values()
    if getattr(x, "ndim", 0) and not x.shape[0]:  # none of the results for one black image
        one = (np.zeros((1, *a.shape[1:]), a.dtype) for a in (x, labels))
        return jax.tree.map(lambda a: a[:0], run(attack, jax.random.key(0), logits_fn, *one, *traced))
    check_inputs(key, logits_fn, x, labels, bounds=bounds, samples=samples, labels_are_classes=labels_are_classes)
    if called_by_user:
        warn_of_probabilities(key, logits_fn, x, samples)
    epsilon = getattr(attack, "epsilon", None)
    attack = dataclasses.replace(attack, bounds=_box.static(bounds), **({} if epsilon is None else {"epsilon": 0.0}))
    if epsilon is not None:
        _box.check_epsilon(epsilon, getattr(attack, "norm", None), bounds, x.shape[1:])
        epsilon = epsilon if isinstance(epsilon, jax.core.Tracer) else _float32_below(epsilon)
    try:
        hash(attack)
    except TypeError as error:
        raise ValueError(f"settings of an attack must be hashable, Python's own numbers, got {attack!r}.") from error
    if getattr(attack, "steps_are_traced", False):  # epsilon is 0: no step size is too small for it
        traced = (np.int32(attack.steps), *traced)
        attack = dataclasses.replace(attack, steps=1)
    sharding = sharding_of(x)
    keys, x, labels = placed(sharding, keys_of(key, x), x, labels)
    logits_fn, x, epsilon = jax.lax.stop_gradient((logits_fn, x, epsilon))
    as_rows = not getattr(attack, "sees_images", False)
    if sharding is not None and any(sharding.spec[1:]):  # each input is sharded too: leave it to the compiler
        sharding, as_rows = None, False
    known = {"attack": attack, "sharding": sharding, "as_rows": as_rows}
    return _perturb(keys, logits_fn, x, labels, epsilon, _box.of(bounds, x), *traced, **known)


def _float32_below(value):
    nearest = np.float32(min(float(value), float(np.finfo(np.float32).max)))
    return np.nextafter(nearest, np.float32(0)) if float(nearest) > value else nearest


_image_keys = jax.jit(image_keys)  # one program instead of about 25 separately compiled operations


def keys_of(key: Key[Array, "..."], x: AnyArray) -> Key[Array, " batch"]:
    """``image_keys``; keys that are one per input already are returned as they are."""
    return key if key.ndim else _image_keys(key, x)


@jax.jit(static_argnames=("attack", "sharding", "as_rows"))
def _perturb(keys, logits_fn, x, labels, epsilon, box, *traced, attack, sharding, as_rows):
    def perturb(keys, logits_fn, x, labels, epsilon, box, *traced):
        if not as_rows:
            return attack.perturb(keys, logits_fn, x, labels, epsilon, *traced, box=box)
        # On CPUs the attack's own arithmetic is twice as fast on flat rows as on images of one or three channels.
        asked = lambda *at: logits_fn(*at[:-1], at[-1].reshape(*at[-1].shape[:1], *x.shape[1:]))
        flat = x.reshape(x.shape[0], -1)
        results = attack.perturb(keys, asked, flat, labels, epsilon, *traced, box=_box.as_row(box))
        return jax.tree.map(lambda a: a.reshape(x.shape) if a.shape == flat.shape else a, results)

    if sharding is None:
        return perturb(keys, logits_fn, x, labels, epsilon, box, *traced)
    # No device waits for another: each ends its loops when its own rows are done, and no rows are gathered.
    rows, everywhere = PartitionSpec(*sharding.spec[:1]), PartitionSpec()
    specs = (rows, everywhere, rows, rows, everywhere, everywhere, *(everywhere for _ in traced))
    perturb = jax.shard_map(perturb, mesh=sharding.mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return perturb(keys, logits_fn, x, labels, epsilon, box, *traced)


def check_inputs(
    key,
    logits_fn,
    x,
    labels,
    *,
    bounds: _box.Bounds | None = _box.IMAGES,
    samples: int | None = None,
    labels_are_classes: bool = True,
) -> None:
    """Raises ValueError for inputs that no attack can use; the values of traced arrays are not checked."""
    if not isinstance(x, (jax.Array, np.ndarray)) or x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"x must be a float32 array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, ...), got {x.shape}.")
    _validate.key(key, x.shape[0])
    with jax.ensure_compile_time_eval():  # constants are checked under jit, too
        _box.check_inside(x, bounds)
    if not isinstance(labels, (jax.Array, np.ndarray)) or labels.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"x and labels must have one row for each input, got x of shape {x.shape} and labels "
            f"{getattr(labels, 'shape', _validate.short(labels))}; a single image is x[None] with labels of shape (1,)."
        )
    arguments = (x,) if samples is None else (key, x)
    try:
        inspect.signature(logits_fn).bind(*arguments)
    except TypeError as error:
        wanted = "only inputs, x -> logits" if samples is None else "a key and inputs, (key, x) -> logits"
        raise ValueError(f"logits_fn must take {wanted}, but {error}.") from error
    except ValueError:  # some callables have no signature
        pass
    batch = max(1, x.shape[0])
    # Models need not take an empty batch.
    given = (key, x) if x.shape[0] else (jax.random.key(0), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    logits = _validate.traced("logits_fn", x, lambda: _logits.eval_shape(logits_fn, *given, samples))
    if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        got = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"logits_fn must return shape ({batch}, classes >= 2), got {got}.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn must return floating-point logits, got {logits.dtype}.")
    if not labels_are_classes:
        return
    _validate.labels(labels, x.shape[0], logits.shape[1])


@jax.jit(static_argnums=3)
def _logits(logits_fn, key, x, samples):
    if samples is None:
        return logits_fn(x)
    return jax.vmap(lambda k, x: logits_fn(k, x[None])[0])(image_keys(key, x), x)


_MAY_END_IN_PROBABILITIES = {"div", "exp", "logistic", "mul"}


def warn_of_probabilities(key, logits_fn, x, samples: int | None = None) -> None:
    """Warns if the model returns probabilities; it is asked only if its last step can make some, as softmax does."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, logits_fn, x))):
        return
    if _MAY_END_IN_PROBABILITIES & _callables.last_steps(_logits.trace(logits_fn, key, x, samples).jaxpr):
        logits = _logits(logits_fn, key, x, samples)
        if logits.is_fully_addressable:
            _validate.not_probabilities(logits_fn=logits)


def is_fooled(logits: Float[Array, "batch classes"], labels: Array, *, targeted: bool = False) -> Bool[Array, " batch"]:
    """Whether the answer is wrong, or is the target; logits that are not finite never count as fooled."""
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):  # labels of the caller's own loss
        return jnp.zeros(logits.shape[0], bool)
    answered = logits.argmax(-1) == labels
    return jnp.isfinite(logits).all(-1) & (answered if targeted else ~answered)


class Model(NamedTuple):
    """A model as an attack sees it: the losses at a point, with or without their gradients.

    Attributes:
      logits_fn: ``x -> logits``; with ``samples``, ``(key, x) -> logits``, called with one key and one input at a time.
      loss: the loss that the attack maximises.
      labels: labels of the inputs; the target classes where ``targeted``.
      samples: number of draws of a random model to average over, or None for a deterministic model.
      targeted: whether the loss is minimised instead.
    """

    logits_fn: Callable
    loss: LossFn
    labels: Array
    samples: int | None = None
    targeted: bool = False

    def answer(self, keys: Key[Array, " batch"], x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
        """Logits; for a random model, mean probabilities."""
        return self._averaged(self._of_draw, keys, x)[1][1]

    def look(self, keys: Key[Array, " batch"], x: Float[Array, "batch ..."]) -> tuple[Array, Array]:
        """Losses, and whether the model is fooled."""
        _, (values, outputs) = self._averaged(self._of_draw, keys, x)
        return values, is_fooled(outputs, self.labels, targeted=self.targeted)

    def ascend(self, keys: Key[Array, " batch"], x: Float[Array, "batch ..."]) -> Step:
        """Losses, whether the model is fooled, and gradients, zero where they are not finite.

        The losses are summed, not averaged, so that an input's gradient does not depend on the rest of the batch.
        """
        gradient, (values, outputs) = self._averaged(jax.grad(self._of_draw, has_aux=True), keys, x)
        fooled = is_fooled(outputs, self.labels, targeted=self.targeted)
        return Step(values, fooled, jnp.where(jnp.isfinite(gradient), gradient, 0.0))

    def _of_draw(self, x, keys):
        if self.samples is None:
            logits = self.logits_fn(x)
        else:
            logits = jax.vmap(lambda key, x: self.logits_fn(key, x[None])[0])(keys, x)
        logits = in_float32(logits)
        values = self.loss(logits, self.labels)
        if getattr(values, "shape", None) != x.shape[:1] or not jnp.issubdtype(values.dtype, jnp.floating):
            got = f"{values.dtype} of shape {values.shape}" if hasattr(values, "shape") else type(values).__name__
            raise ValueError(f"loss must return ({x.shape[0]},) floating values, got {got}.")
        values = values.astype(x.dtype) * (-1.0 if self.targeted else 1.0)
        return values.sum(), (values, logits if self.samples is None else jax.nn.softmax(logits))

    def _averaged(self, function, keys, x):
        """One draw after another, so that memory holds only one."""
        if self.samples is None:
            return function(x, keys)

        def add(i, total):
            return jax.tree.map(jnp.add, total, function(x, jax.vmap(jax.random.fold_in, (0, None))(keys, i)))

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, x, keys))
        return jax.tree.map(lambda a: a / self.samples, jax.lax.fori_loop(0, self.samples, add, zeros))


def start_from(x: Float[Array, "batch ..."]) -> Best:
    """No point yet: any point is better."""
    return Best(x, jnp.full(x.shape[0], -jnp.inf, x.dtype), jnp.zeros(x.shape[0], bool))


def better(best: Best, x: Float[Array, "batch ..."], value: Array, fooled: Array) -> Best:
    """The better of the best point and another: the first that fools the model, else the one with the higher loss."""
    take = ~best.fooled & (fooled | (value > best.value))
    pick = lambda a, b: jnp.where(take.reshape(take.shape[0], *(1,) * (a.ndim - 1)), a, b)
    return Best(pick(x, best.x), pick(value, best.value), best.fooled | fooled)


def fold_in(keys: Key[Array, " batch"], data: Any) -> Key[Array, " batch"]:
    """Folds the same number into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def rows(condition: Bool[Array, " batch"], a: AnyArray, b: AnyArray) -> Array:
    """``a`` in the rows where the condition holds, else ``b``."""
    return jnp.where(condition.reshape(condition.shape[0], *(1,) * (a.ndim - 1)), a, b)
