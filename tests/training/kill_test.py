"""Kills a training process at a random moment; the bits that it ends with must not change."""

import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).with_name("killed_run.py")


@pytest.fixture
def start(tmp_path):
    def run(folder, result):
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / folder), str(tmp_path / result)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    root = SCRIPT.parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return run


@pytest.mark.slow  # a killed run of experiments.smoothing is in the default suite
def test_a_killed_run_ends_with_the_same_bits(start, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    sys.stdout.write(f"seed {seed}\n")
    with start("whole", "whole.bin") as run:
        errors = run.communicate()[1]
    assert run.returncode == 0, errors

    with start("killed", "killed.bin") as run:
        for _ in range(rng.randint(6, 24)):
            run.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))  # a checkpoint takes about as long: some kills fall into one
        assert run.poll() is None
        run.kill()
    with start("killed", "killed.bin") as run:
        errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert "Resuming from step" in errors
    assert "damaged" not in errors
    assert (tmp_path / "killed.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
