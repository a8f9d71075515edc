"""Where a run happens and who watches it: devices, processes, logs and traces.

None of it changes a certificate of given weights; training changes only by rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from robustjax import _paths, training

AXES = ("data", "noise")
TRACE_SECONDS = 10
HEARTBEAT_SECONDS = 30
"""A process that is silent for so long counts as dead; the others then stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where to run and who watches; may differ when a run is resumed, and changes results only by rounding."""

    mesh: str = ""
    """Devices of each process: data=4,noise=2 splits images over 4 and noisy copies over 2. Empty: all split images."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes; auto: as set by Cloud TPU, GKE, SLURM or Open MPI."""
    num_processes: int | None = None
    """Number of processes; not with auto."""
    process_id: int | None = None
    """Index of this process, from 0; not with auto."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log metrics to tensorboard or wandb; pip install 'robustjax[tensorboard]' or 'robustjax[wandb]' first."""
    profile: bool = False
    """Write a JAX trace of ten seconds to the folder trace of the run."""
    cache_dir: str | None = None
    """Folder of compiled programs. None: $JAX_COMPILATION_CACHE_DIR, else the user's cache folder."""

    def __post_init__(self):
        axes = self.axes()
        if axes is not None and not (set(axes) <= set(AXES) and all(size >= 1 for size in axes.values())):
            raise ValueError(
                f"mesh must give positive sizes to data and noise, as in data=4,noise=2, got {self.mesh!r}."
            )
        count, index = self.num_processes, self.process_id
        if self.coordinator in (None, "auto") and (count, index) != (None, None):
            raise ValueError(f"num_processes and process_id need --coordinator HOST:PORT, got {self.coordinator!r}.")
        if self.coordinator not in (None, "auto"):
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(f"coordinator must be auto or HOST:PORT, got {self.coordinator!r}.")
        named = count is not None and index is not None and 0 <= index < count
        if self.coordinator not in (None, "auto") and not named:
            raise ValueError(
                f"coordinator {self.coordinator!r} needs num_processes and a process_id from 0 to num_processes - 1, "
                f"got {count} and {index}."
            )

    def axes(self) -> dict[str, int] | None:
        """Sizes of the axes by name; None for all devices.

        Raises:
          ValueError: ``mesh`` is malformed.
        """
        if not self.mesh:
            return None
        pairs = [part.partition("=") for part in self.mesh.split(",")]
        if len({name for name, _, _ in pairs}) < len(pairs) or not all(size.strip().isdecimal() for *_, size in pairs):
            raise ValueError(f"mesh must be given as in data=4,noise=2, got {self.mesh!r}.")
        return {name.strip(): int(size) for name, _, size in pairs}

    def local_mesh(self) -> Mesh:
        """The devices of this process, as ``data`` and ``noise``."""
        local = jax.local_devices()
        axes = {"data": len(local), "noise": 1} if (given := self.axes()) is None else {"data": 1, "noise": 1, **given}
        return training.make_mesh(axes, devices=local)

    def global_mesh(self) -> Mesh:
        """As many devices of every process, for training."""
        of_each = self.local_mesh().size
        by_process = [[d for d in jax.devices() if d.process_index == p][:of_each] for p in range(jax.process_count())]
        return training.make_mesh(devices=[device for devices in by_process for device in devices])


HERE = Runtime()
"""One process with all its devices."""


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Copies arrays that every process holds onto each device of a mesh of this process."""
    local = jax.tree.map(lambda a: a.addressable_data(0) if isinstance(a, jax.Array) else a, tree)
    return jax.device_put(local, NamedSharding(mesh, PartitionSpec()))


def is_remote(path: epath.Path) -> bool:
    """Whether the path is in an object store, such as gs:// and s3://."""
    return "://" in str(path)


def console() -> Console:
    """Where a run prints; of many processes, only the first does."""
    return Console(quiet=jax.process_index() != 0)


def log(message: str) -> None:
    """Prints a line; of many processes, only the first does."""
    console().print(message, soft_wrap=True, highlight=False, markup=False)


def barrier(name: str) -> None:
    """Waits until all processes have reached this point."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        try:
            multihost.sync_global_processes(name, timeout=7 * 24 * 3600)
        except ValueError as error:  # what Gloo raises where a process is gone
            raise jax.errors.JaxRuntimeError(str(error)) from error


@contextlib.contextmanager
def started(runtime: Runtime) -> Iterator[None]:
    """Sets JAX up for a run: processes, the cache of compiled programs, and signals."""
    if jax.config.jax_compilation_cache_dir is None or runtime.cache_dir is not None:  # pyrefly: ignore
        import platformdirs

        folder = runtime.cache_dir or os.path.join(platformdirs.user_cache_dir("robustjax"), "xla")
        jax.config.update("jax_compilation_cache_dir", str(_paths.path_of(cache_dir=folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a run has many small programs
    if runtime.coordinator is not None:
        of_all: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
        if runtime.coordinator != "auto":
            of_all |= {"coordinator_address": runtime.coordinator, "num_processes": runtime.num_processes}
            of_all |= {"process_id": runtime.process_id}
            if runtime.process_id:
                sys.stderr.write(f"Waiting for process 0 at {runtime.coordinator}, for at most five minutes.\n")
        jax.distributed.initialize(**of_all)
    began = time.perf_counter()
    tell = lambda *_: sys.stderr.write(f"between loops; {time.perf_counter() - began:,.0f} s since the start\n")
    with on_signal("SIGTERM", _raise_preempted), on_signal("SIGUSR1", tell):
        yield
        barrier("end")  # JAX would not wait for long


def _raise_preempted(*_) -> None:
    raise training.Preempted("Received SIGTERM; the same command resumes this run.")


@contextlib.contextmanager
def on_signal(name: str, handler: Any) -> Iterator[None]:
    """Installs a handler; does nothing where the system has no such signal, or Python lets no handler be installed."""
    number, before = getattr(signal, name, None), None
    try:
        before = None if number is None else signal.signal(number, handler)
    except ValueError:  # not the main thread
        number = None
    try:
        yield
    finally:
        if number is not None:
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Any]:
    """Yields ``stop(step)``: whether SIGTERM has arrived, for a loop that can save before it ends."""
    asked: list[int] = []
    with on_signal("SIGTERM", lambda *_: asked.append(1)):
        yield lambda step: bool(asked)


def machine() -> str:
    """Devices of all processes, and the processor."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} x {platform.machine()}"


COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


@functools.cache
def _compilations() -> list[float]:
    """Seconds of each compilation since the first call."""
    durations: list[float] = []

    def listen(event: str, duration: float, **_: str | int | float) -> None:
        if event in COMPILING:
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)  # pyrefly: ignore[bad-argument-type]
    return durations


class Stopwatch:
    """Wall-clock seconds since it was made, and how many of them were spent on compiling."""

    def __init__(self):
        self._began, self._compiled = time.perf_counter(), len(_compilations())

    def seconds(self) -> dict[str, float]:
        """``total`` and ``compiling``."""
        return {"total": time.perf_counter() - self._began, "compiling": sum(_compilations()[self._compiled :])}

    def told(self) -> str:
        """The seconds and the machine, for a report."""
        seconds = self.seconds()
        return (
            f"This call took {seconds['total']:,.1f} s, of which {seconds['compiling']:,.1f} s compiling, on "
            f"{machine()}, jax {jax.__version__}."
        )


class Watch:
    """Receives the progress of a run and passes it on: to SIGUSR1, to TensorBoard and W&B, and to the profiler."""

    def __init__(self, loggers: list[Any], trace: epath.Path | None):
        self._loggers, self._trace, self._trace_began = loggers, trace, 0.0
        self._began, self._where = time.perf_counter(), "beginning"

    def __call__(self, phase: str, total: int, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of a step of a phase, such as ``training``."""
        text = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._where = f"{phase}: {step:,} of {total:,}" + (f", {text}" if text else "")
        for log in self._loggers:
            log(phase, step, numbers)
        if self._trace is not None and not self._trace_began:
            jax.profiler.start_trace(str(self._trace))
            self._trace_began = time.perf_counter()
        elif time.perf_counter() - self._trace_began >= TRACE_SECONDS:
            self.end_trace()

    def end_trace(self) -> None:
        """Writes the trace, if one is being made."""
        if self._trace is not None and self._trace_began:
            jax.profiler.stop_trace()
            self._trace = None

    def tell(self, *_) -> None:
        """Writes where the run stands to standard error."""
        sys.stderr.write(f"{self._where}; {time.perf_counter() - self._began:,.0f} s since the start\n")


@contextlib.contextmanager
def watching(runtime: Runtime, folder: epath.Path, settings: Mapping[str, Any]) -> Iterator[Watch]:
    """Yields the ``Watch`` to which the loops of a run report their numbers."""
    with contextlib.ExitStack() as stack:
        opened = {"tensorboard": _tensorboard, "wandb": _wandb}
        names = runtime.log if jax.process_index() == 0 else ()
        watch = Watch(
            [stack.enter_context(opened[name](folder, settings)) for name in names],
            folder / "trace" if runtime.profile else None,
        )
        stack.callback(watch.end_trace)
        stack.enter_context(on_signal("SIGUSR1", watch.tell))
        yield watch


def _extra(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"log {name} needs {module}: pip install 'robustjax[{name}]'.") from error


@contextlib.contextmanager
def _tensorboard(folder: epath.Path, settings: Mapping[str, Any]) -> Iterator[Any]:
    with _extra("tensorboard", "tensorboardX").SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in settings.items()))

        def log(phase: str, step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(f"{phase}/{name}", value, step)

        yield log


@contextlib.contextmanager
def _wandb(folder: epath.Path, settings: Mapping[str, Any]) -> Iterator[Any]:
    place = None if is_remote(folder) else str(folder)  # W&B writes only to local disks
    settings, known = dict(settings), set()
    with _extra("wandb", "wandb").init(project="robustjax", dir=place, name=folder.name, config=settings) as run:

        def log(phase: str, step: int, numbers: Mapping[str, float]) -> None:
            if phase not in known:  # each phase counts its own steps
                run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
                known.add(phase)
            run.log({f"{phase}/{name}": value for name, value in {**numbers, "step": step}.items()})

        yield log
