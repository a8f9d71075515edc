"""Certifies images one group after another, each kept on disk."""

from __future__ import annotations

import time

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustjax import data

from ..common import certificates, command_line, runtimes, smoothers


def certify_images(
    folder: epath.Path,
    key: jax.Array,
    certify: smoothers.Procedure,
    test: data.Dataset,
    ids: np.ndarray,
    *,
    radius: float,
    mesh: Mesh,
    watch: runtimes.Watch,
) -> None:
    """Certifies the images without a certificate in ``folder``; each group is on disk before the next one begins.

    ``ids`` are positions in ``test``. A group has an image for each step of the axis ``data`` of the mesh; of several
    processes each takes its share. ``watch`` receives the share that is certified at ``radius``.
    """
    size, path = mesh.shape["data"], folder / "certificates.csv"
    process, processes = jax.process_index(), jax.process_count()
    if process == 0:
        certificates.merge(folder, runtimes.log)
    runtimes.barrier("certificates of before")
    done, labels, certificate, *_ = certificates.read(folder)
    if not np.isin(done, ids).all():
        raise ValueError(f"{path} holds other images than this run; delete it to certify again, or pass --overwrite.")
    if 0 < len(done) < len(ids):
        runtimes.log(f"Resuming after {len(done)} of {len(ids)} certificates in {path}.")
    left = np.setdiff1d(ids, done)[process::processes]
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    certified = int(((certificate.label == labels) & (certificate.radius >= radius)).sum())
    compiled, last_line, count, total = False, time.perf_counter(), len(done), len(done) + len(left)
    with certificates.writer(folder, process, processes) as write, command_line.progress_bar(runtimes.console()) as bar:
        task = bar.add_task("", total=total, completed=len(done), task_name="certifying")
        for start in range(0, len(left), size):
            group = left[start : start + size]
            image, label, _ = test[np.resize(group, size)]  # the last group is filled up
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.resize(group, size))
            x = jax.device_put(image, sharding)
            if not compiled:  # so that the seconds below are spent on sampling
                certify(keys, x, warm_up=True)
                compiled = True
            started = time.perf_counter()
            predicted, radii, probability, samples = certify(keys, x)
            seconds = (time.perf_counter() - started) / len(group)
            rows = zip(group.tolist(), np.asarray(label).tolist(), zip(predicted, radii, probability, samples))
            write([certificates.line_of(*row, seconds) for row in rows])
            certified += int(((predicted == label) & (radii >= radius))[: len(group)].sum())
            count += len(group)
            rate = samples[: len(group)].mean() / seconds
            watch("certifying", total, count, {f"certified at {radius:g}": certified / count, "samples/s": rate})
            description = f"{certified / count:.3f} certified at {radius:g}, {rate:,.0f} samples/s"
            bar.update(task, completed=count, description=description)
            if bar.disable and time.perf_counter() - last_line >= 60:
                last_line = time.perf_counter()
                runtimes.log(f"Certified {count:,} of {total:,}: {description}")
    runtimes.barrier("certificates")
    if process == 0:
        certificates.merge(folder, runtimes.log)
        missing = len(ids) - len(certificates.read(folder).ids)
        if missing:
            raise ValueError(
                f"{path} lacks {missing} of {len(ids)} images: another process may have written to it; run the same "
                "command again to certify the rest."
            )
