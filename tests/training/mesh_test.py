import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robustjax import training


def test_mesh_takes_all_devices_and_leaves_partitioning_to_the_compiler():
    mesh = training.make_mesh()
    assert mesh.shape == {"data": 8}
    assert mesh.axis_types == (AxisType.Auto,)


def test_axes_in_their_order_take_the_first_devices():
    mesh = training.make_mesh({"data": 2, "noise": 3})
    assert list(mesh.shape.items()) == [("data", 2), ("noise", 3)]
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert mesh.devices.flatten().tolist() == jax.devices()[:6]
    some = jax.devices()[4:6]
    assert training.make_mesh(devices=some).devices.tolist() == some
    assert training.make_mesh({"noise": 1}, devices=some).devices.tolist() == some[:1]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 0}, "axes['data'] must be an integer of at least 1, got 0."),
        ({"data": 2, "noise": -1}, "axes['noise'] must be an integer of at least 1, got -1."),
        ({"data": 9}, "axes must name at least 1 and at most 8 devices, got data=9 = 9."),
        ({"data": 4, "noise": 4}, "axes must name at least 1 and at most 8 devices, got data=4 * noise=4 = 16."),
        ({}, "axes must name at least 1 and at most 8 devices, got none."),
    ],
)
def test_mesh_of_absent_devices(axes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        training.make_mesh(axes)


def test_replicate_copies(problem):
    copy = training.replicate(problem.model, training.make_mesh({"data": 1}))
    jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(copy)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(problem.model))


def test_rows_are_split_over_all_axes_in_order(problem):
    batch = next(problem.Stream(16))
    for axes in ({"data": 8}, {"data": 4, "noise": 2}):
        mesh = training.make_mesh(axes)
        image = training.shard_batch(batch, mesh).image
        assert image.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(tuple(axes))), image.ndim)
        for shard, device in zip(image.addressable_shards, mesh.devices.flat, strict=True):
            assert shard.device == device
        np.testing.assert_array_equal(image, batch.image)
        np.testing.assert_array_equal(image.addressable_shards[3].data, batch.image[6:8])


def test_batch_size_must_be_divisible(problem):
    with pytest.raises(ValueError, match="divisible by the number of devices, got 12 images for 8 devices"):
        training.shard_batch(next(problem.Stream(12)), training.make_mesh())
