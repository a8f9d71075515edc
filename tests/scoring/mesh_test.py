"""Rows that are spread over the devices of a mesh: fitted and scored there, as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robustjax import scoring
from robustjax.scoring._detector import BLOCK
from robustjax.scoring._inputs import IMAGES
from robustjax.typing import Outputs

BOTH, DATA = PartitionSpec(("data", "noise")), PartitionSpec("data")
CLASSES, DIM = 3, 6
rng = np.random.default_rng(0)
HEAD = scoring.Head(rng.normal(size=(DIM, CLASSES)).astype(np.float32))


def on_mesh(tree, spec=BOTH, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("data", "noise"), axis_types=(axis_type,) * 2)
    return jax.device_put(tree, NamedSharding(mesh, spec))


def outputs(seed, rows):
    features = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    features += 4 * np.eye(CLASSES, DIM, dtype=np.float32)[np.arange(rows) % CLASSES]
    return Outputs(features @ HEAD.kernel, features)


TRAIN, LABELS = outputs(0, 160), (np.arange(160) % CLASSES).astype(np.int32)
TEST = outputs(1, 8 * (BLOCK + 76))  # for each device a block, and the rest of one
DETECTORS = {
    "energy": scoring.energy(),
    "knn": scoring.knn(k=5),
    "mahalanobis": scoring.mahalanobis(),
    "vim": scoring.vim(),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_mesh_fits_and_scores_as_one_device_does(name):
    detector, rows = DETECTORS[name], on_mesh(TEST)
    alone = detector.fit(TRAIN, LABELS, HEAD)
    wanted = detector.score(alone, TEST)
    spread = detector.score(alone, rows)
    assert spread.sharding.is_equivalent_to(rows.features.sharding, 1)
    np.testing.assert_allclose(spread, wanted, rtol=1e-6, atol=1e-6)
    if name == "knn":
        np.testing.assert_array_equal(spread, wanted)
    if name in ("knn", "mahalanobis"):
        there = detector.fit(*on_mesh((TRAIN, LABELS)), HEAD)
        np.testing.assert_allclose(detector.score(there, rows), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "axis_type"),
    [(DATA, AxisType.Auto), (PartitionSpec(), AxisType.Auto), (BOTH, AxisType.Explicit)],
    ids=["some_axes", "copies", "explicit"],
)
def test_however_rows_are_spread(spec, axis_type):
    detector, few = DETECTORS["energy"], Outputs(*(a[:16] for a in TEST))
    rows = on_mesh(few, spec, axis_type)
    state = detector.fit(rows, head=HEAD)
    spread = detector.score(state, rows._replace(features=few.features))  # one half of them on the host
    assert spread.sharding.is_equivalent_to(rows.logits.sharding, 1)
    np.testing.assert_allclose(spread, detector.score(state, few), rtol=1e-6)


def test_no_rows():
    assert DETECTORS["energy"].score((), on_mesh(Outputs(*(a[:0] for a in TEST)))).shape == (0,)


def test_a_row_that_is_not_finite_is_found():
    features = TEST.features[:16].copy()
    features[11, 2] = np.nan
    with pytest.raises(ValueError, match="outputs.features must be finite, 1 of 16 rows are not, the first is row 11"):
        DETECTORS["energy"].score((), on_mesh(Outputs(TEST.logits[:16], features)))


def test_images_go_through_the_model_in_blocks_of_each_device():
    seen = []

    def logits_fn(kernel, images):
        seen.append(images.shape[0])
        return jnp.tanh(images.reshape(images.shape[0], -1)) @ kernel

    detector = scoring.odin(jax.tree_util.Partial(logits_fn, HEAD.kernel), epsilon=0.01)
    images = rng.uniform(size=(8 * (IMAGES + 1), 3, 2, 1)).astype(np.float32)
    spread = detector.score((), on_mesh(images))
    assert set(seen) == {IMAGES}
    assert len(spread.devices()) == 8
    np.testing.assert_allclose(spread, detector.score((), images), rtol=1e-5)


def test_one_compilation_for_every_number_of_rows():
    seen = []

    def score(state, outputs):
        seen.append(outputs.features.shape)
        return outputs.features.sum(-1)

    detector = scoring.make_detector(None, score)
    for rows in (8, 800, 8 * (BLOCK + 3)):
        some = Outputs(*(a[:rows] for a in TEST))
        np.testing.assert_allclose(detector.score((), on_mesh(some)), some.features.sum(-1), rtol=1e-4, atol=1e-5)
    assert seen == [(BLOCK, DIM)]
