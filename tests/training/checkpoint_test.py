"""Where checkpoints go, and what happens when they cannot."""

import os
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from robustjax import training
from tests.training import process_run

FOLDER = "s3://bucket/runs/one"


class Bucket(MemoryFileSystem):
    """An object store in memory: no folders but those of its files, nothing is renamed, writes end when told."""

    protocol, cachable = "s3", False

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs, self.writes_left = {}, [""], 10**6

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("s3://").strip("/")

    def open(self, path, mode="rb", **settings):
        if "w" in mode:
            if self.writes_left == 0:
                raise OSError("connection lost")
            self.writes_left -= 1
        return super().open(path, mode, **settings)

    def mv(self, *arguments, **settings):
        raise AssertionError("renamed")

    rename = mv


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.fs", lambda self, path: bucket)
    monkeypatch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
    return bucket


def train(folder, num_steps=15, **settings):
    mesh = training.make_mesh({"data": 1})
    settings = {"mesh": mesh, "folder": folder, "num_steps": num_steps, "log": len, **settings}
    return process_run.train(process_run.Stream(), **settings).state


@pytest.fixture(scope="module")
def whole():
    return train(None).model


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def names(folder=FOLDER):
    return sorted(path.name for path in epath.Path(folder).iterdir())


def test_an_object_store_keeps_a_run(bucket, whole):
    url = epath.Path(FOLDER)
    train(FOLDER, 12, keep=1)
    assert names() == ["00000012"]
    said = []
    assert same(train(url, log=said.append).model, whole)
    assert said == [f"Resuming from step 12 of 15, checkpoint in {FOLDER}."]
    assert names() == ["00000012", "00000015"]
    assert same(training.restore_model(url, process_run.model()), whole)
    train(url, 5, overwrite=True)
    assert names() == ["00000005"]


REST = [(0, 0), (0, 1), (0, 17), (10, 1), (10, 10)]


@pytest.mark.parametrize(
    ("before", "writes"),
    [(0, 10), (10, 0), (10, 17), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_what_an_object_store_has_in_part_is_no_checkpoint(bucket, whole, before, writes):
    if before:
        train(FOLDER, before)
    bucket.writes_left = writes
    message = f"step {before + 5} could not be written to {FOLDER} (connection lost); earlier ones are kept"
    with pytest.raises(OSError, match=re.escape(message)):
        train(FOLDER)
    assert any("/SHA256SUMS" in path for path in bucket.store) == bool(before)
    bucket.writes_left = 10**6
    said = []
    assert same(train(FOLDER, log=said.append).model, whole)
    assert said == ([f"Resuming from step 10 of 15, checkpoint in {FOLDER}."] if before else [])
    assert names() == ["00000010", "00000015"]


def test_damage_in_an_object_store_is_seen(bucket, whole):
    train(FOLDER)
    (epath.Path(FOLDER) / "00000015" / "metadata.json").write_text("{}")
    said = []
    assert same(train(FOLDER, log=said.append).model, whole)
    assert said[0] == f"The checkpoint {FOLDER}/00000015 is damaged; falling back to the previous one."


def test_a_url_that_was_a_path_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = "folder must be a path, or a URL .*, got 'gs:/bucket/run', which lost a slash; pass it as text or as"
    with pytest.raises(ValueError, match=f"^{message}"):
        train(pathlib.Path("gs://bucket/run"))
    assert not list(tmp_path.iterdir())


def test_a_relative_folder_may_have_any_name(whole, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert same(train("[seed=1] *", 10).model, train("[seed=1] *", 10).model)
    assert names(tmp_path / "[seed=1] *") == ["00000005", "00000010"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where the user may mount one."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("mounting a small file system needs more rights")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


# TensorStore's threads may end after the event loop of Orbax that they report to.
@pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "free", [0, 28_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (12_000, 44_000, 60_000))]
)
def test_a_full_disk(small_disk, whole, free, capfd):
    folder = small_disk / "run"
    train(folder, 10)
    disk = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(b"0" * (disk.f_bavail * disk.f_frsize - free))
    with pytest.raises(OSError, match=re.escape(f"checkpoint of step 15 could not be written to {folder} (")) as error:
        train(folder)
    assert "No space left on device" in str(error.value)
    assert capfd.readouterr().err == ""
    assert names(folder) == ["00000005", "00000010"]
    (small_disk / "other").unlink()
    assert same(train(folder).model, whole)


def test_any_failure_to_write_is_an_oserror(monkeypatch, tmp_path, whole):
    from orbax.checkpoint import v1 as ocp

    def fails(path, parts):
        pathlib.Path(f"{path}.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    train(tmp_path, 10)
    with monkeypatch.context() as patched:
        patched.setattr(ocp, "save_checkpointables", fails)
        with pytest.raises(OSError, match=re.escape("(RESOURCE_EXHAUSTED: No space left on device); earlier ones")):
            train(tmp_path)
    assert names(tmp_path) == ["00000005", "00000010"]
    assert same(train(tmp_path).model, whole)
