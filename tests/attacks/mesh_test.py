"""Attacks on inputs that are spread over the devices of a mesh: the results of one device, where the inputs lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from robustjax import attacks
from robustjax.attacks import _attack, _box

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 16)
EPSILON = 0.03
BOTH, DATA = PartitionSpec(("data", "noise")), PartitionSpec("data")
k1, k2, k3 = (np.random.default_rng(seed) for seed in (1, 2, 3))
WEIGHTS = k1.normal(size=(25, 16)).astype(np.float32), k2.normal(size=(16, 5)).astype(np.float32)
X = k3.uniform(size=(16, 5, 5, 1)).astype(np.float32)


def network(weights, x):
    return jax.nn.relu((x.reshape(-1, 25) - 0.5) @ weights[0]) @ weights[1]


MODEL = jax.tree_util.Partial(network, WEIGHTS)
LABELS = np.array(network(WEIGHTS, X).argmax(-1), np.int32)
LABELS[0] = (LABELS[0] + 1) % 5  # misclassified as it is


def on_mesh(*arrays, spec=BOTH, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("data", "noise"), axis_types=(axis_type,) * 2)
    return jax.device_put(arrays, NamedSharding(mesh, spec))


def lies_as(array, x):
    return array.sharding.is_equivalent_to(x.sharding, array.ndim)


FGSM = attacks.fgsm(epsilon=EPSILON)
ATTACKS = {
    "apgd_targeted": attacks.apgd_targeted(epsilon=EPSILON, steps=5, num_targets=2),
    "square": attacks.square(epsilon=EPSILON, queries=20),
    "fab": attacks.fab(steps=1, num_targets=1),
    "carlini_wagner": attacks.carlini_wagner(steps=2, binary_search_steps=2, initial_c=1.0),
    "worst_of": attacks.worst_of(FGSM, attacks.at_budget(attacks.deepfool(steps=5), 0.2)),
}


SLOW = ("apgd_targeted", "fab", "carlini_wagner")  # loops like those of square, results like those of deepfool


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ATTACKS])
def test_a_mesh_finds_what_one_device_finds_and_leaves_it_where_the_inputs_lie(name):
    attack, (x, labels) = ATTACKS[name], on_mesh(X, LABELS)
    alone, spread = attack(KEYS, MODEL, X, LABELS), attack(KEYS, MODEL, x, labels)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        assert len(one.devices()) == 1
        assert lies_as(many, x)
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    x_adv = [getattr(found, "x", found) for found in (alone, spread)]
    fooled = [network(WEIGHTS, np.asarray(z)).argmax(-1) != LABELS for z in x_adv]
    np.testing.assert_array_equal(*fooled)
    assert 1 < fooled[0].sum() < 16


def test_random_models_too():
    attack = attacks.expectation_over_transformation(FGSM, samples=2)
    noisy = lambda key, x: MODEL(x) * (jax.random.key_data(key) % 7).astype(jnp.float32).mean()  # compiles quickly
    x, labels = on_mesh(X, LABELS)
    spread = attack(KEYS, noisy, x, labels)
    assert lies_as(spread, x)
    np.testing.assert_allclose(spread, attack(KEYS, noisy, X, LABELS), atol=1e-6)


IMAGES = np.tile(X, 4)
OF_FIRST_CHANNEL = jax.tree_util.Partial(lambda weights, x: network(weights, x[..., 0]), WEIGHTS)


@pytest.mark.parametrize(
    ("spec", "axis_type"),
    [(DATA, AxisType.Auto), (BOTH, AxisType.Explicit), (PartitionSpec(None, None, None, "data"), AxisType.Auto)],
)
def test_however_the_inputs_are_spread(spec, axis_type):
    (x,) = on_mesh(IMAGES, spec=spec, axis_type=axis_type)
    spread = FGSM(KEY, OF_FIRST_CHANNEL, x, LABELS)  # labels on one device
    assert lies_as(spread, x)
    np.testing.assert_allclose(spread, FGSM(KEY, OF_FIRST_CHANNEL, IMAGES, LABELS), atol=1e-6)


def test_devices_say_nothing_to_each_other():
    x, labels = on_mesh(X, LABELS)
    keys, attack = jax.device_put(KEYS, labels.sharding), attacks.pgd(epsilon=0.0, steps=3)
    program = _attack._perturb.lower(
        keys,
        MODEL,
        x,
        labels,
        np.float32(0),
        _box.of(attack.bounds, x),
        attack=attack,
        sharding=x.sharding,
        as_rows=True,
    )
    text = program.compile().as_text()
    assert "while" in text
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]


class Seen:
    """An attack that notes how its inputs lie."""

    def __init__(self, epsilon=EPSILON):
        self.blocks, self.attack = [], attacks.fgsm(epsilon=epsilon)

    def __call__(self, key, logits_fn, x, labels):
        self.blocks.append((x.shape[0], len(x.devices()), len(labels.devices()), len(key.devices())))
        return self.attack(key, logits_fn, x, labels)


@pytest.mark.parametrize(("spec", "size", "rows"), [(BOTH, 5, 8), (DATA, 3, 4), (DATA, 8, 8)])
def test_a_block_divides_over_the_devices_of_its_rows(spec, size, rows):
    assert _attack.divisible(size, _attack.sharding_of(*on_mesh(X, spec=spec))) == rows


def test_robust_accuracy_spreads_its_blocks():
    x, labels = on_mesh(X, LABELS, spec=DATA)
    seen = Seen()
    spread = attacks.robust_accuracy(KEYS, seen, MODEL, x, labels, batch_size=3)
    assert seen.blocks == [(4, 8, 8, 8)] * 4
    assert 0 < spread < 1
    seen.blocks.clear()
    assert attacks.robust_accuracy(KEYS, seen, MODEL, X, LABELS, batch_size=3) == spread
    assert {devices for _, *devices in map(list, seen.blocks) for devices in devices} == {1}


def test_autoattack_spreads_its_blocks(monkeypatch):
    parts = {"first": Seen(EPSILON / 2), "second": Seen()}
    monkeypatch.setattr(attacks.autoattack, "attacks", lambda self, num_classes: parts)
    monkeypatch.setattr(attacks.autoattack, "_few_classes", lambda self, num_classes: ())
    attack, (x, labels) = attacks.autoattack(epsilon=EPSILON, norm="linf", batch_size=10), on_mesh(X, LABELS)
    spread = attack.evaluate(KEYS, MODEL, x, labels)
    assert parts["first"].blocks == [(16, 8, 8, 8)]
    assert spread.per_attack["first"] > spread.per_attack["second"]
    alone = attack.evaluate(KEYS, MODEL, X, LABELS)
    assert spread.per_attack == alone.per_attack
    np.testing.assert_array_equal(spread.correct, alone.correct)
    np.testing.assert_allclose(spread.x_adv, alone.x_adv, atol=1e-6)
    assert 0 < spread.robust_accuracy < spread.clean_accuracy == 15 / 16
    as_attack = attack(KEYS, MODEL, x, labels)
    assert lies_as(as_attack, x)
    np.testing.assert_array_equal(as_attack, spread.x_adv)


def test_one_compilation_for_all_blocks():
    traces = []

    def counted(x):
        traces.append(x.shape)
        return network(WEIGHTS, x)

    counted = jax.tree_util.Partial(counted)
    for times in (2, 3):
        (x,), labels = on_mesh(np.concatenate([X] * times)), np.concatenate([LABELS] * times)
        traces.clear()
        attacks.robust_accuracy(jax.random.split(KEY, len(labels)), FGSM, counted, x, labels, batch_size=8)
    assert set(traces) == {(48, 5, 5, 1)}  # the check of shapes: everything else is there
