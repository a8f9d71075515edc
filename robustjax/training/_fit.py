"""The training loop."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustjax import _arguments, _paths, _validate
from robustjax.data import BatchIterator
from robustjax.losses import Objective
from robustjax.training import _checkpoint
from robustjax.training._mesh import make_mesh, replicate, shard_batch
from robustjax.training._step import TrainState, make_step
from robustjax.typing import Apply

_SECONDS_BETWEEN_LINES = 60
_STEPS_AHEAD = 2
"""How many steps the host may run ahead: enough that the device never waits, few enough to bound memory."""


class Preempted(Exception):
    """Training was asked to stop before its end; the message says what was kept."""


class FitResult(NamedTuple):
    """The result of training.

    Attributes:
      state: after the last step.
      history: columns by name: ``step``, and the mean of each metric over the steps since the previous row.
    """

    state: TrainState
    history: dict[str, np.ndarray]


@_arguments.checked
def fit(
    apply: Apply,
    state: TrainState,
    batches: BatchIterator,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    keep: int = 2,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    mesh: Mesh | None = None,
    log_every: int = 50,
    progress: bool = True,
    log: Callable[[str], None] | None = None,
    stop: Callable[[int], bool] | None = None,
    on_metrics: Callable[[int, Mapping[str, float]], None] | None = None,
) -> FitResult:
    """Trains for a number of steps; it can be killed at any moment and started again.

    With a ``folder``, the run resumes from the newest whole checkpoint in it: state of model and optimizer, PRNG key,
    position of the iterator and history. A run that is killed and started again with the same arguments on the same
    machine ends with the same parameters, bit for bit if the device computes deterministically, as CPUs do; on another
    number of devices or processes, the parameters agree up to rounding. The loop runs two steps ahead of the device, so
    that the device never waits and few batches are in memory; it waits for the device only to save.

    With several processes (``jax.distributed``), all call it with the same arguments and a mesh of all devices, and
    each passes its rows of every batch. Only process 0 shows progress, logs and reports metrics.

    Args:
      apply: the model.
      state: from :func:`robustjax.training.init`, at step 0; it is copied, not donated.
      batches: training batches, all of the same size; the only data that is read.
      objective: what to minimise.
      optimizer: the one that ``state`` was made with.
      num_steps: total number of steps, including those before the run resumed.
      folder: where checkpoints go, shared by all processes: a path, or a URL that :mod:`etils.epath` and Orbax know,
        such as ``gs://bucket/run``; None for no checkpoints.
      checkpoint_every: steps between checkpoints; one more is written at the end.
      keep: number of checkpoints kept.
      config: settings of the run, kept with its checkpoints; a folder with other settings is refused. None resumes with
        those that the folder has.
      overwrite: whether checkpoints in the folder are deleted first.
      mesh: devices to train on; None for all.
      log_every: steps between rows of the history.
      progress: whether to show a progress bar or, if standard error is not a terminal, to log a line every minute.
      log: called with a line when a run resumes, for damaged checkpoints, and for progress without a terminal; None for
        standard error.
      stop: called after each step with its number. Once it returns True, a checkpoint is written, if there is a folder,
        and training ends with :class:`Preempted`. With several processes it is enough that one returns True: all stop
        after the same step, which may be the next one.
      on_metrics: called with the step and the metrics of each row of the history when it is recorded.

    Returns:
      The trained state and the history.

    Raises:
      FloatingPointError: the loss or the parameters are no longer finite; earlier checkpoints stay.
      OSError: a checkpoint could not be written, perhaps because the disk is full; earlier checkpoints stay.
      Preempted: ``stop`` returned True.
      ValueError: an argument is out of range, the folder belongs to another run, or it has no readable checkpoint.

    Example:
      >>> state = training.init(jax.random.key(1), model.state, optimizer)
      >>> batches = data.batches(digits, 32, seed=0)
      >>> result = training.fit(
      ...     model.apply, state, batches, objective=losses.standard(), optimizer=optimizer, num_steps=100,
      ...     progress=False,
      ... )
      >>> print(result.history["step"], result.history["loss"])
      [ 50 100] [1.46 0.66]
    """
    _validate.at_least(1, num_steps=num_steps, checkpoint_every=checkpoint_every, keep=keep, log_every=log_every)
    mesh = make_mesh() if mesh is None else mesh
    log, first = log or _checkpoint.to_stderr, jax.process_index() == 0
    if not first:  # one process speaks for all
        log, progress, on_metrics = lambda message: None, False, None
    folder = None if folder is None else _checkpoint.as_folder(folder)
    config = json.loads(json.dumps(config))
    state, columns = replicate(state, mesh), {}
    if folder is not None:
        _check_spans_processes(mesh)
        _checkpoint.check_shared(folder)
        if first:
            _paths.make_folder(folder)
            if overwrite:
                _checkpoint.clear(folder)
        restored = _checkpoint.restore(folder, state, log)
        if restored is not None:
            _check_same_run(folder, restored, config, num_steps)
            config = restored.metadata["config"] if config is None else config
            state, columns = restored.state, restored.metadata["history"]
            batches.set_state(restored.metadata["batches"])
            taken = int(state.step)
            log(
                f"Resuming from step {taken} of {num_steps}, checkpoint in {folder}."
                if taken < num_steps
                else f"Re-using the finished training of {num_steps} steps in {folder}."
            )

    step = make_step(objective, optimizer)
    start = int(state.step)
    # Virtual CPU devices share one pool of threads, on which the collectives of several steps in flight can deadlock.
    ahead = 0 if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else _STEPS_AHEAD
    stopping = _agreed(stop, mesh, steps_late=min(ahead, 1))
    under_way: collections.deque[dict[str, jax.Array]] = collections.deque()
    waiting: list[dict[str, jax.Array]] = []  # metrics of the last interval, which the device has computed by now
    recent: list[dict[str, jax.Array]] = []  # and of the current one
    with _progress(start, num_steps, shown=progress, log=log) as report:
        for count in range(start + 1, num_steps + 1):
            batch = next(batches, None)
            if batch is None:
                raise ValueError(f"batches ended after {count - 1} of num_steps={num_steps}.")
            batch = shard_batch(batch, mesh)
            state, metrics = step(apply, state, batch)
            recent.append(metrics)
            under_way.append(metrics)
            if len(under_way) > ahead:  # each holds a batch; by default, JAX queues 32 of them
                jax.block_until_ready(under_way.popleft())
            preempted = stopping(count)
            closing = preempted or count == num_steps or (folder is not None and count % checkpoint_every == 0)
            if closing or count % log_every == 0:
                _record(columns, count - len(recent), waiting, on_metrics)
                waiting, recent = recent, []
                report(count, len(batch.label), columns)
            if closing:
                _record(columns, count, waiting, on_metrics)
                waiting = []
                _check_finite(state)
                if folder is not None:
                    metadata = {"config": config, "batches": batches.get_state(), "history": columns}
                    _checkpoint.save(folder, state, metadata, keep=keep)
            if preempted:
                kept = "without a folder, nothing was kept" if folder is None else f"its checkpoint is in {folder}"
                raise Preempted(f"training was stopped after step {count} of {num_steps}; {kept}.")
    return FitResult(state, {name: np.asarray(column) for name, column in columns.items()})


def _agreed(stop: Callable[[int], bool] | None, mesh: Mesh, *, steps_late: int) -> Callable[[int], bool]:
    """``stop``, but true in all processes at the same step, a fixed number of steps after it was first true in one."""
    if stop is None or not mesh.is_multi_process:
        return lambda step: stop is not None and bool(stop(step))
    sharding, any_asked = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), jax.jit(jnp.any)
    under_way: collections.deque[jax.Array] = collections.deque()

    def stopping(step: int) -> bool:
        asked = np.full(len(mesh.local_devices), bool(stop(step)))
        under_way.append(any_asked(jax.make_array_from_process_local_data(sharding, asked)))
        return len(under_way) > steps_late and bool(under_way.popleft())

    return stopping


def _check_spans_processes(mesh: Mesh) -> None:
    """Processes that write to one folder must train together: with a mesh of some of them, the others would wait."""
    there, count = {device.process_index for device in mesh.devices.flat}, jax.process_count()
    if len(there) < count:
        raise ValueError(
            f"mesh must have devices of all {count} processes to train with a folder, got devices of {len(there)}."
        )


def _record(
    columns: dict[str, list],
    last_step: int,
    metrics: Sequence[Mapping[str, jax.Array]],
    on_metrics: Callable[[int, Mapping[str, float]], None] | None,
) -> None:
    """Appends one row: the means over the steps up to ``last_step``."""
    if not metrics:
        return
    fetched = jax.device_get(metrics)
    for step, values in enumerate(fetched, last_step + 1 - len(fetched)):
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(_not_finite(f"the loss is {values['loss']}", step))
    row = {name: float(np.mean([values[name] for values in fetched], dtype=np.float64)) for name in fetched[0]}
    for name, value in {"step": last_step, **row}.items():
        columns.setdefault(name, []).append(value)
    if on_metrics is not None:
        on_metrics(last_step, row)


def _check_finite(state: TrainState) -> None:
    """Raises before parameters that are not finite replace good ones."""
    if not all(np.isfinite(leaf).all() for leaf in jax.device_get(jax.tree.leaves(state.model))):
        raise FloatingPointError(_not_finite("a parameter or batch statistic is not finite", int(state.step)))


def _not_finite(what: str, step: int) -> str:
    return (
        f"{what} at step {step}; training stopped, earlier checkpoints are kept. Try a lower learning rate, and "
        "check for labels out of range."
    )


def _check_same_run(
    folder: epath.Path, restored: _checkpoint.Restored, config: Mapping[str, Any] | None, num_steps: int
) -> None:
    there = restored.metadata["config"]
    if config is not None and there is not None and config != there:
        differing = {name: (there.get(name), config.get(name)) for name in {*there, *config}}
        text = ", ".join(f"{name}: {a!r} there, {b!r} now" for name, (a, b) in sorted(differing.items()) if a != b)
        raise ValueError(
            f"folder={str(folder)!r} belongs to a run with another config ({text}); "
            "use another folder, delete this one, or pass overwrite=True."
        )
    if restored.state.step > num_steps:
        raise ValueError(f"folder={str(folder)!r} is at step {int(restored.state.step)}, beyond num_steps={num_steps}.")


@contextlib.contextmanager
def _progress(
    start: int, num_steps: int, *, shown: bool, log: Callable[[str], None]
) -> Iterator[Callable[[int, int, Mapping[str, list]], None]]:
    """Yields ``report(step, batch_size, columns)``: a bar on a terminal, otherwise a line every minute."""
    from rich import console, progress

    terminal = console.Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn("training"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
        console=terminal,
        disable=not (shown and terminal.is_terminal),
    )
    task = bar.add_task("compiling", total=num_steps, completed=start)
    last_step, last_time, last_line = start, time.perf_counter(), time.perf_counter()

    def report(step: int, batch_size: int, columns: Mapping[str, list]) -> None:
        nonlocal last_step, last_time, last_line
        now = time.perf_counter()
        rate = (step - last_step) * batch_size / (now - last_time)
        last_step, last_time = step, now
        numbers = [f"{name} {column[-1]:.4f}" for name, column in columns.items() if name != "step"]
        description = "  ".join([*numbers, f"{rate:,.0f} images/s"])
        bar.update(task, completed=step, description=description)
        if shown and bar.disable and now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = now
            log(f"Step {step:,} of {num_steps:,}: {description}")

    with bar:
        yield report
