"""Training by several processes on this machine, which find each other over the loopback interface."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import chex
import numpy as np
import pytest

from robustjax import training
from tests.training import process_run

SCRIPT = pathlib.Path(process_run.__file__)


@pytest.fixture
def start(tmp_path):
    """Starts the processes of one run; kills what is left of them after the test."""
    running = []

    def run(count=2, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])}
        for index in range(count):
            arguments = [SCRIPT, address, count, index, tmp_path / "run", json.dumps(settings)]
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                )
            )  # fmt: skip
        return running[-count:]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def said(process, seconds=240):
    """What a process says until it ends, by name."""
    lines, errors = process.communicate(timeout=seconds)
    found = {"stderr": errors}
    for line in lines.splitlines():
        if line.startswith('["'):  # the others are of the libraries
            name, value = json.loads(line)
            found.setdefault(name, []).append(value)
    return found


def all_said(processes):
    results = [said(process) for process in processes]
    for process, result in zip(processes, results, strict=True):
        assert process.returncode == 0, (result.get("error"), result["stderr"][-2000:])
    return results


def alone(folder=None, **settings):
    mesh = training.make_mesh({"data": 1})
    return process_run.train(process_run.Stream(), folder=folder, mesh=mesh, log=len, **settings)


@pytest.fixture(scope="module")
def whole():
    return alone().state.model.params


def assert_close(parameters, whole):
    chex.assert_trees_all_close({name: np.float32(a) for name, a in parameters.items()}, dict(whole), atol=1e-5)


def test_a_run_of_two_processes_is_stopped_by_either_and_continued_by_one(start, whole, tmp_path):
    first, second = (said(process) for process in start(stop_at={"1": 6}))
    for result in (first, second):
        assert result["step"] == [1, 2, 3, 4, 5, 6]
        message = f"training was stopped after step 6 of 20; its checkpoint is in {tmp_path / 'run'}."
        assert result["error"] == [f"Preempted: {message}"], result["stderr"][-2000:]
        assert [text.split(";")[0].split(" to train")[0] for text in result["refused"]] == [
            "axes must use all 4 devices of the 2 processes, got data=1 = 1",
            "mesh must have devices of all 2 processes",
            "folder='s3://bucket/run' must lie on a file system that the 2 processes share or on gs://, and have none "
            "of *?[ in its name.",
        ]
        assert result["agreed"] == [[False, False, True, False]]  # one step after process 0 asked
    assert first["row"] == [3, 5, 6]
    assert "row" not in second
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["00000005", "00000006"]
    assert_close(alone(tmp_path / "run").state.model.params, whole)


def kill(processes, index, step):
    """Kills one of two processes after a step; returns what the other says until it ends by itself."""
    for line in processes[index].stdout:
        if line == f'["step", {step}]\n':
            break
    processes[index].kill()
    result = said(processes[1 - index], seconds=120)  # the heartbeat is missed after 10
    assert processes[1 - index].returncode != 0
    return result


def says_why(result):
    return "error" in result or "another task died" in result["stderr"]


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_two_though_one_is_killed(start, whole, tmp_path):
    with pytest.raises(training.Preempted):
        alone(tmp_path / "run", stop=lambda step: step == 6)
    (tmp_path / "run" / "00000006" / "metadata.json").write_text("{")
    damaged = f"The checkpoint {tmp_path / 'run' / '00000006'} is damaged; falling back to the previous one."
    resuming = f"Resuming from step {{}} of 20, checkpoint in {tmp_path / 'run'}."
    result = kill(start(pause=0.05), index=1, step=12)
    assert says_why(result)
    assert result["log"] == [damaged, resuming.format(5)]

    first, second = all_said(start())
    assert first["log"] in ([resuming.format(10)], [resuming.format(15)])
    assert "log" not in second
    assert_close(first["parameters"][0], whole)
    assert first["parameters"] == second["parameters"]
    assert first["restored the same"] == second["restored the same"] == [True]


@pytest.mark.slow
def test_the_others_end_when_the_first_process_is_killed(start):
    assert says_why(kill(start(pause=0.05), index=0, step=6))


@pytest.mark.slow
def test_four_processes_equal_one(start, whole):
    for result in all_said(start(4, devices=1)):
        assert_close(result["parameters"][0], whole)
