"""Certifying group by group: the same lines however many processes share the images, and after an interruption."""

import contextlib

import jax
import numpy as np
import pytest
from etils import epath

from experiments.common import certificates, runtimes
from experiments.smoothing import _certify
from robustjax import data

IDS = np.arange(0, 70, 7)


def certify(keys, x, warm_up=False):
    """Answers that depend on the key and the image."""
    draws = np.asarray(jax.random.key_data(keys)).sum(-1) % 100
    return draws % 10, draws / 100 + np.asarray(x).mean((1, 2, 3)), draws / 100, draws


@contextlib.contextmanager
def as_process(index, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: index)
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(runtimes, "barrier", lambda name: None)
        yield


def run(folder, certify=certify):
    test, key, watch = data.load("digits", "test"), jax.random.key(0), runtimes.Watch([], None)
    mesh = runtimes.HERE.local_mesh()
    _certify.certify_images(epath.Path(folder), key, certify, test, IDS, radius=0.5, mesh=mesh, watch=watch)


def lines_in(folder):
    return [line.split(",")[:7] for line in (folder / "certificates.csv").read_text().splitlines()]


def test_shares_of_processes_and_interrupted_runs_come_to_the_same(tmp_path):
    whole, shared, broken = (tmp_path / name for name in ("whole", "shared", "broken"))
    for folder in (whole, shared, broken):
        folder.mkdir()
    run(whole)
    assert [line[0] for line in lines_in(whole)] == ["index", *map(str, IDS)]

    def first(keys, x, warm_up=False):
        if warm_up:  # both have begun, and the first has written nothing
            with as_process(1, 2):
                run(shared)
            assert "certificates-1-of-2.csv" in [path.name for path in shared.iterdir()]
        return certify(keys, x)

    with as_process(0, 2):
        run(shared, first)
    assert [path.name for path in shared.iterdir()] == ["certificates.csv"]
    assert lines_in(shared) == lines_in(whole)

    def interrupted(keys, x, warm_up=False):
        if certificates.read(epath.Path(broken)).ids.size:
            raise KeyboardInterrupt
        return certify(keys, x)

    with pytest.raises(KeyboardInterrupt):
        run(broken, interrupted)
    assert 1 < len(lines_in(broken)) < len(lines_in(whole))
    run(broken)
    assert lines_in(broken) == lines_in(whole)


def test_a_process_that_left_images_out_is_noticed(tmp_path):
    with as_process(0, 2), pytest.raises(ValueError, match=r"lacks 5 of 10 images: another process may have written"):
        run(tmp_path)
    with pytest.raises(ValueError, match="certificates.csv holds other images than this run; delete it"):
        _certify.certify_images(
            epath.Path(tmp_path), jax.random.key(0), certify, data.load("digits", "test"), IDS[1:], radius=0.5,
            mesh=runtimes.HERE.local_mesh(), watch=runtimes.Watch([], None),
        )  # fmt: skip
