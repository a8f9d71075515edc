"""Placement for data-parallel training: parameters on every device, batches split over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from robustjax import _arguments, _validate
from robustjax.typing import Batch


@_arguments.checked
def make_mesh(axes: Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of devices with named axes.

    Training splits rows over all axes (:func:`shard_batch`); :mod:`robustjax.certification` splits images over the axes
    that they are sharded by, and noise over the others.

    Args:
      axes: how many devices along each axis, by name, the slowest first, for example ``{"data": 4, "noise": 2}``; None
        for one axis ``data`` of all devices. If it needs fewer devices than there are, the first ones are used.
      devices: the devices to use; None for ``jax.devices()``, the devices of all processes.

    Returns:
      The mesh; its axes are ``Auto``, so plain functions under ``jit`` are partitioned by the compiler.

    Raises:
      ValueError: an axis is shorter than 1, there are too few devices, or several processes have more devices than the
        axes need, so that a process might be left out.

    Example:
      >>> mesh = training.make_mesh({"data": 1})
      >>> mesh.axis_names
      ('data',)
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must be one or more, got none.")
    axes = {"data": len(devices)} if axes is None else dict(axes)
    _validate.at_least(1, **{f"axes[{name!r}]": size for name, size in axes.items()})
    wanted, processes = math.prod(axes.values()), len({device.process_index for device in devices})
    text = " * ".join(f"{name}={size}" for name, size in axes.items()) + f" = {wanted}" if axes else "none"
    if not axes or wanted > len(devices):
        raise ValueError(f"axes must name at least 1 and at most {len(devices)} devices, got {text}.")
    if processes > 1 and wanted < len(devices):
        raise ValueError(
            f"axes must use all {len(devices)} devices of the {processes} processes, got {text}; "
            "pass devices=jax.local_devices() for a mesh of only this process."
        )
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices[:wanted]
    )


@_arguments.checked
def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a pytree onto every device of the mesh; the copies share no memory with the argument.

    Args:
      tree: pytree of arrays, equal in every process, which is not checked; a tree that is replicated over another
        mesh, even of all processes, is accepted.
      mesh: from :func:`make_mesh`.

    Returns:
      The pytree, replicated.

    Example:
      >>> mesh = training.make_mesh({"data": 1})
      >>> training.replicate({"w": jnp.ones(3)}, mesh)["w"].sharding.is_fully_replicated
      True
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    if not mesh.is_multi_process and all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_put(tree, sharding, may_alias=False)

    def place(leaf: Any) -> jax.Array:  # device_put would gather every array from all processes to compare them
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return jax.make_array_from_callback(leaf.shape, sharding, np.array(leaf).__getitem__)

    return jax.tree.map(place, tree)


@_arguments.checked
def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits a batch along its first axis over all devices of the mesh.

    Args:
      batch: host arrays; with several processes, the rows of this process. The whole batch consists of the rows of all
        processes, in the order of their devices in the mesh.
      mesh: from :func:`make_mesh`.

    Returns:
      The batch as global arrays.

    Raises:
      ValueError: the number of rows is not a multiple of the number of devices.

    Example:
      >>> mesh = training.make_mesh({"data": 1})
      >>> training.shard_batch(digits[:4], mesh).image.shape
      (4, 8, 8, 1)
    """
    rows, devices = len(batch.label), len(mesh.local_devices)
    if rows % devices:
        raise ValueError(
            f"the batch size must be divisible by the number of devices, got {rows} images for {devices} devices; "
            "change the batch size or pass a mesh of fewer devices, make_mesh({'data': ...})."
        )
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
