"""Devices, processes, signals and watchers: none of them changes a certificate."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest
from etils import epath

from experiments import smoothing
from experiments.common import certificates, files, folders, runtimes
from robustjax import training

ROOT = pathlib.Path(__file__).parents[3]
TINY = {"model": "mlp", "num_epochs": 10, "num_images": 6, "num_estimation": 300, "sigma": 0.3}
PARALLEL = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}  # as in this process, so that training rounds alike


def lines_in(folder) -> list[list[str]]:
    return [line.split(",")[:6] for line in (epath.Path(folder) / "certificates.csv").read_text().splitlines()]


def command(results, *flags, **settings):
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **settings}.items()]
    return [sys.executable, "-m", "experiments.smoothing", f"--results-dir={results}", *settings, *flags]


def start(*args, environment=PARALLEL, **settings):
    return subprocess.Popen(
        command(*args, **settings), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def finished(smoothing_run):
    return smoothing_run[0]


@pytest.fixture
def trained(finished, tmp_path):
    """The same run, without its certificates."""
    config = dataclasses.replace(finished, results_dir=str(tmp_path))
    shutil.copytree(finished.folder(), config.folder())
    (config.folder() / "certificates.csv").unlink()
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data"}, "mesh must be given as in data=4,noise=2, got 'data'"),
        ({"mesh": "data=two"}, "mesh must be given as in"),
        ({"mesh": "data=2,data=4"}, "mesh must be given as in"),
        ({"mesh": "data=0"}, "mesh must give positive sizes to data and noise"),
        ({"mesh": "model=2"}, "mesh must give positive sizes to data and noise"),
        ({"num_processes": 2}, "num_processes and process_id need --coordinator HOST:PORT, got None"),
        ({"coordinator": "auto", "process_id": 0}, "num_processes and process_id need --coordinator HOST:PORT"),
        ({"coordinator": "host:1"}, "needs num_processes and a process_id"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "must be auto or HOST:PORT, got 'host'"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "got 2 and 2"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        runtimes.Runtime(**settings)


def test_meshes_of_a_process():
    assert dict(runtimes.HERE.local_mesh().shape) == {"data": 8, "noise": 1}
    assert dict(runtimes.Runtime(mesh="noise=2").local_mesh().shape) == {"data": 1, "noise": 2}
    assert dict(runtimes.Runtime(mesh="data=2, noise=2").local_mesh().shape) == {"data": 2, "noise": 2}
    assert dict(runtimes.Runtime(mesh="data=2,noise=2").global_mesh().shape) == {"data": 4}
    with pytest.raises(ValueError, match="16"):
        runtimes.Runtime(mesh="data=16").local_mesh()


@pytest.mark.parametrize("mesh", [pytest.param("data=1", marks=pytest.mark.slow), "data=2,noise=2"])
def test_certificates_do_not_depend_on_the_mesh(finished, trained, mesh):
    smoothing.run(trained, runtimes.Runtime(mesh=mesh))
    assert lines_in(trained.folder()) == lines_in(finished.folder())


@pytest.mark.slow
def test_sigterm_saves_ends_well_and_the_same_command_resumes(finished, tmp_path):
    long = tmp_path / "long"
    process = start(long, num_epochs=5000)
    checkpoints = long / "smoothing" / "digits-mlp-0.3" / "checkpoints"
    wait_for(lambda: checkpoints.is_dir(), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 0, words
    (saved,) = checkpoints.iterdir()
    assert f"stopped after step {int(saved.name)} of 50000; its checkpoint is in" in words

    folder = tmp_path / "smoothing" / "digits-mlp-0.3"
    process = start(tmp_path)
    wait_for(lambda: (folder / "certificates.csv").exists() and len(lines_in(folder)) > 2, process)
    process.send_signal(signal.SIGTERM)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 0, words
    done = subprocess.run(command(tmp_path), cwd=ROOT, env=PARALLEL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert lines_in(folder) == lines_in(finished.folder())


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_sigusr1_prints_the_progress(tmp_path, capfd):
    with runtimes.watching(runtimes.HERE, epath.Path(tmp_path), {}) as watch:
        os.kill(os.getpid(), signal.SIGUSR1)
        watch("training", 1000, 50, {"loss": 0.51234})
        os.kill(os.getpid(), signal.SIGUSR1)
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("beginning; ")
    assert second.startswith("training: 50 of 1,000, loss 0.5123; ")
    assert second.endswith(" s since the start")


def test_a_trace_is_begun_once_and_ended_after_its_seconds_or_with_the_run(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    for seconds, wanted in ((0, ["run/trace", "end", 2]), (1000, ["run/trace", 2, "end"])):
        monkeypatch.setattr(runtimes, "TRACE_SECONDS", seconds)
        with runtimes.watching(runtimes.Runtime(profile=True), epath.Path("run"), {}) as watch:
            for step in range(3):
                watch("certifying", 3, step, {})
            calls.append(step)
        assert calls == wanted
        calls.clear()


@pytest.mark.slow
def test_a_trace_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "TRACE_SECONDS", 0)
    with runtimes.watching(runtimes.Runtime(profile=True), epath.Path(tmp_path), {}) as watch:
        for step in range(2):
            watch("certifying", 2, step, {})
    assert list((tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb"))


def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX import proto

    runtime = runtimes.Runtime(log=("tensorboard",))
    with runtimes.watching(runtime, epath.Path(tmp_path), {"sigma": 0.5}) as watch:
        watch("training", 100, 50, {"loss": 0.25})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, found = path.read_bytes(), {}
    while content:  # a record: 8 bytes of length and 4 of checksum, an event, and 4 of checksum
        length = int.from_bytes(content[:8], "little")
        event = proto.event_pb2.Event.FromString(content[12 : 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + length :]
    assert found["training/loss"] == (50, 0.25)


def test_wandb_has_the_numbers_of_each_phase_by_its_own_steps(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def init(**settings):
        seen.append(settings)
        define = lambda name, step_metric: seen.append((name, step_metric))
        yield types.SimpleNamespace(define_metric=define, log=seen.append)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with runtimes.watching(runtimes.Runtime(log=("wandb",)), epath.Path("run"), {"sigma": 0.5}) as watch:
        for step in (50, 100):
            watch("training", 100, step, {"loss": 0.25})
    assert seen == [
        {"project": "robustjax", "dir": "run", "name": "run", "config": {"sigma": 0.5}},
        ("training/*", "training/step"),
        {"training/loss": 0.25, "training/step": 50},
        {"training/loss": 0.25, "training/step": 100},
    ]


@pytest.mark.slow
def test_wandb_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runtime = runtimes.Runtime(log=("wandb",))
    with runtimes.watching(runtime, epath.Path(tmp_path), {"sigma": 0.5}) as watch:
        watch("training", 100, 50, {"loss": 0.25})
        watch("certifying", 10, 1, {"samples/s": 1000.0})
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60  # W&B writes from a process of its own
    while b"training/loss" not in path.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"training/loss" in path.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX", "wandb": "wandb"}[name], None)
    with (
        pytest.raises(ValueError, match=rf"log {name} needs .*pip install 'robustjax\[{name}\]'"),
        runtimes.watching(runtimes.Runtime(log=(name,)), epath.Path(tmp_path), {}),
    ):
        pass


def test_seconds_of_compiling_are_separate():
    stopwatch = runtimes.Stopwatch()
    jax.jit(lambda x: x * 3.5 + 1)(jax.numpy.ones(3)).block_until_ready()
    time.sleep(0.05)
    seconds = stopwatch.seconds()
    assert 0 < seconds["compiling"] < seconds["total"]
    assert "s compiling, on 8 x cpu" in stopwatch.told()


def processes(results, count, *flags, **settings):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**PARALLEL, "JAX_NUM_CPU_DEVICES": str(8 // count)}
    place = ("--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id")
    return [start(results, *place, str(i), *flags, environment=environment, **settings) for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_leave_what_one_leaves(finished, tmp_path, count):
    started = processes(tmp_path, count)
    words = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * count, words
    folder = tmp_path / "smoothing" / "digits-mlp-0.3"
    assert lines_in(folder) == lines_in(finished.folder())
    assert sorted(path.name for path in folder.glob("*.csv")) == ["certificates.csv"]
    assert "average certified radius" in words[0][0]
    assert all(line.startswith("[Gloo]") for out, _ in words[1:] for line in out.splitlines())


@pytest.mark.slow
def test_when_one_process_is_killed_the_others_stop_and_one_alone_goes_on(finished, trained):
    """With so many draws for an image that none has finished when the other is killed."""
    shards = [trained.folder() / f"certificates-{i}-of-2.csv" for i in range(2)]
    first, second = processes(trained.results_dir, 2)
    wait_for(lambda: any(path.exists() and path.read_text().count("\n") > 1 for path in shards), first)
    second.kill()
    out, words = first.communicate(timeout=runtimes.HEARTBEAT_SECONDS + 120)
    second.communicate()
    if first.returncode != 0:  # else it had come to its end before it could notice
        assert "another process ended" in words or "another task died" in words, words
    smoothing.run(trained)
    assert lines_in(trained.folder()) == lines_in(finished.folder())


def test_files_in_an_object_store_are_written_whole(monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Store(MemoryFileSystem):
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs:/"))

    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: Store())
    folder = epath.Path("gs://bucket/results/run")
    config = smoothing.Config(results_dir="gs://bucket/results", name="run", **TINY)
    assert config.folder() == epath.Path("gs://bucket/results/smoothing/run")
    folders.open_run(folder, config, same=smoothing.SAME, overwrite=False)
    with pytest.raises(ValueError, match="another config .*alpha"):
        folders.open_run(folder, dataclasses.replace(config, alpha=0.5), same=smoothing.SAME, overwrite=False)
    line = certificates.line_of(3, 1, (1, 0.25, 0.75, 100), 0.1)
    with certificates.writer(folder, 0, 2) as write:
        write([line])
    certificates.merge(folder)
    assert certificates.read(folder).ids.tolist() == [3]
    assert not files.files(folder, "certificates-*")


def test_preemption_is_an_error_that_says_how_to_resume():
    with pytest.raises(training.Preempted, match="SIGTERM.*the same command resumes"):
        runtimes._raise_preempted()
