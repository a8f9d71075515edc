"""Blocks of rows: what runs at once, wherever state and rows lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.scoring._detector import BLOCK, in_blocks
from robustjax.typing import Outputs

KERNEL = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)


def on_mesh(array, spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(array, jax.NamedSharding(mesh, spec))


def noting():
    seen = []

    @jax.jit
    def function(state, rows):
        seen.append(rows.shape[0])  # once for each shape, when it is traced
        return jnp.matmul(rows, state, precision="highest")

    return function, seen


@pytest.mark.parametrize("spec", [None, jax.P("data"), jax.P()], ids=["one_device", "sharded", "replicated"])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray, lambda a: jax.device_put(a, jax.devices()[1])])
def test_rows_go_in_blocks_to_a_state_on_any_devices(place, spec):
    state = KERNEL if spec is None else on_mesh(KERNEL, spec)
    function, seen = noting()
    for rows in (24, 10, 3):
        got = in_blocks(function, state, place(ROWS[:rows]), 4)
        np.testing.assert_allclose(got, ROWS[:rows] @ KERNEL, rtol=1e-5, atol=1e-5)
    assert set(seen) == {4}


def test_rows_on_several_devices_stay_there():
    function, seen = noting()
    got = in_blocks(function, on_mesh(KERNEL, jax.P()), on_mesh(ROWS, jax.P("data")), 4)
    assert seen == [4]  # the three of each device, filled up
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, ROWS @ KERNEL, rtol=1e-5, atol=1e-5)


def test_a_detector_fitted_on_a_mesh_scores_in_blocks():
    detector, outputs = scoring.knn(k=3), Outputs(jnp.zeros((ROWS.shape[0], 2)), jnp.asarray(ROWS))
    spread = detector.fit(jax.tree.map(lambda a: on_mesh(a, jax.P("data")), outputs))
    assert any(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(spread))
    many = jax.tree.map(lambda a: np.tile(a, (BLOCK // 8, 1)) + np.float32(0.1), outputs)
    whole = detector.score(detector.fit(outputs), many)
    np.testing.assert_allclose(detector.score(spread, many), whole, rtol=1e-5, atol=1e-5)
