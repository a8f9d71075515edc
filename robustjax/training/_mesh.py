"""Placement for data-parallel training: parameters on every device, batches split over them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robustjax.typing import Batch


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Makes a mesh with the single axis ``data``.

    Args:
      num_devices: how many devices, the first of ``jax.devices()``; None for all of them, of all processes.

    Returns:
      The mesh; its axis is ``Auto``, so plain functions under ``jit`` are partitioned by the compiler.

    Raises:
      ValueError: there are not that many devices.
    """
    available = jax.device_count()
    num_devices = available if num_devices is None else num_devices
    if not 1 <= num_devices <= available:
        raise ValueError(f"num_devices must be between 1 and {available}, the devices there are, got {num_devices}.")
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a pytree onto every device of the mesh; the copies share no memory with the argument.

    Args:
      tree: pytree of arrays, the same in every process.
      mesh: from :func:`make_mesh`.

    Returns:
      The pytree, replicated.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()), may_alias=False)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits a batch along its first axis over the devices of the mesh.

    Args:
      batch: host arrays; with several processes, the rows of this one.
      mesh: from :func:`make_mesh`.

    Returns:
      The batch as global arrays.

    Raises:
      ValueError: the number of rows is not a multiple of the number of devices.
    """
    rows, devices = len(batch.label), len(mesh.local_devices)
    if rows % devices:
        raise ValueError(
            f"the batch size must be divisible by the number of devices, got {rows} images for {devices} devices; "
            "change the batch size or pass make_mesh(num_devices=...)."
        )
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
