"""Certificates that stop early against counts of all draws, and their guarantee over ten thousand runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special

from robustjax import certification
from robustjax.certification import ABSTAIN, _stopping

SIGMA = 0.5
MEASURE = certification.gaussian(SIGMA)
NORMAL = np.random.default_rng(2).normal(size=16)
NORMAL /= np.linalg.norm(NORMAL)
DISTANCES = np.array([-0.6, 0.0, 0.1, 0.35, 0.5, 0.7, 1.2, 3.0])


def at(distances):
    return (0.5 + np.asarray(distances)[:, None] * NORMAL).reshape(-1, 4, 4, 1).astype(np.float32)


X = at(DISTANCES)


@jax.tree_util.Partial
def half_space(x):
    """Three classes of which the last never wins; P(class 1) = Phi(distance / sigma)."""
    distance = (x.reshape(x.shape[0], -1) - 0.5) @ np.asarray(NORMAL, np.float32)
    return jnp.stack([jnp.zeros_like(distance), distance, jnp.full_like(distance, -100.0)], axis=-1)


def sequential(x=X, key=0, logits_fn=half_space, max_samples=2000, num_selection=60, **kwargs):
    key = jax.random.key(key) if isinstance(key, int) else key
    kwargs |= {"max_samples": max_samples, "num_selection": num_selection, "input_range": None}
    return certification.certify_sequential(key, logits_fn, x, MEASURE, **kwargs)


def assert_same(one, other):
    for ours, expected in zip(one, other):
        np.testing.assert_array_equal(ours, expected)


@functools.cache
def counts(end):
    return np.asarray(certification.sample_counts(jax.random.key(0), half_space, X, MEASURE, num_samples=end))


def by_hand(target_radius, alpha=0.001, max_samples=2000, num_selection=60):
    """A brute-force twin: all draws of every image, then look by look in Python."""
    if target_radius is None:
        rule = _stopping.radius_rule(MEASURE, alpha, 0.05, max_samples, 0.05)
    else:
        rule = _stopping.target_rule(special.ndtr(target_radius / SIGMA), alpha, 0.05, max_samples)
    selection = counts(num_selection)
    later = [counts(num_selection + int(n)) - selection for n in rule.looks]
    answers = []
    for image in range(len(X)):
        label, bound = int(selection[image].argmax()), 0.0
        for i, n in enumerate(rule.looks):
            votes = int(later[i][image, label])
            if target_radius is None:
                bound = max(bound, float(certification.binomial_lower_bound(votes, n, alpha / len(rule.looks))))
                stop = votes <= rule.low[i] or rule.first[i] <= votes <= rule.last[i]
            else:
                bound = special.ndtr(target_radius / SIGMA) if votes >= rule.first[i] else 0.0
                stop = votes <= rule.low[i] or bound > 0
            if stop:
                break
        certified = bound > 0.5 if target_radius is None else bound > 0
        radius = SIGMA * special.ndtri(bound) if certified else 0.0
        answers.append((label if certified else ABSTAIN, radius, bound, not certified, num_selection + n))
    return [np.array(column) for column in zip(*answers)]


@pytest.mark.parametrize("target_radius", [None, 0.25, 0.5])
def test_answers_are_those_of_all_draws_look_by_look(target_radius):
    ours = sequential(target_radius=target_radius)
    for field, expected in zip(ours, by_hand(target_radius)):
        np.testing.assert_allclose(field, expected, rtol=1e-9)
    assert len(set(ours.num_samples.tolist())) > 2
    assert 0 < ours.abstained.sum() < len(X)
    assert [field.dtype.name for field in ours] == ["int32", "float64", "float64", "bool", "int64"]


def test_answers_depend_on_the_image_and_the_key_alone():
    for target_radius in (None, 0.5):
        whole = sequential(target_radius=target_radius)
        assert_same(sequential(X[::-1], target_radius=target_radius), [field[::-1] for field in whole])
        assert_same(sequential(target_radius=target_radius, batch_size=37), whole)
    some = np.array([4, 4, 1, 1, 4, 6, 6, 1])
    assert_same(sequential(X[some], target_radius=0.5), [field[some] for field in whole])
    assert (sequential(target_radius=0.5, key=1).num_samples != whole.num_samples).any()


def test_answers_are_the_same_on_many_devices():
    assert jax.device_count() == 8
    # An image on each device; and four devices for each image, which stop together.
    for shape, targets in (((8, 1), (0.5,)), ((2, 4), (None,))):
        mesh = jax.make_mesh(shape, ("data", "noise"), axis_types=(AxisType.Auto,) * 2)
        spread = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
        for target in targets:
            alone = sequential(target_radius=target)
            assert_same(sequential(spread, target_radius=target, batch_size=40), alone)


def test_decisions_are_those_of_certify_but_for_the_doubtful():
    x = at([-1.0, -0.2, 0.0, 0.3, 0.4, 0.6, 0.8, 1.5])
    full = certification.certify(jax.random.key(0), half_space, x, MEASURE, num_estimation=20_000, input_range=None)
    target = sequential(x, target_radius=0.5, max_samples=20_000, num_selection=100)
    np.testing.assert_array_equal(target.label, np.where(full.radius >= 0.5, full.label, ABSTAIN))
    np.testing.assert_array_equal(target.radius, np.where(full.radius >= 0.5, 0.5, 0.0))
    assert target.num_samples.mean() < 2000
    radius = sequential(x, max_samples=20_000, num_selection=100, tolerance=0.1)
    np.testing.assert_array_equal(radius.label, full.label)
    assert (radius.radius[[0, 1, 3, 4, 5, 6, 7]] >= 0.85 * full.radius[[0, 1, 3, 4, 5, 6, 7]]).all()
    assert radius.num_samples.mean() < 0.5 * 20_100


def test_images_that_are_decided_cost_no_more():
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return half_space(x)

    answer = sequential(logits_fn=counted, target_radius=0.5, batch_size=50)
    jax.effects_barrier()
    assert len(calls) == -(-answer.num_samples // 50).sum() + 1  # the block that is looked at twice
    assert answer.num_samples.min() == 160
    assert answer.num_samples.max() > 300


def test_one_compilation_serves_every_target_and_all_weights():
    traces = []

    def scaled(scale, x):
        traces.append(x.shape)
        return half_space(x) * scale

    for scale, target in ((1.0, 0.1), (2.0, 0.5), (3.0, 0.75), (1.0, 0.0)):
        sequential(logits_fn=jax.tree_util.Partial(scaled, jnp.float32(scale)), target_radius=target, batch_size=40)
    assert len(traces) <= 3  # the shape check, and the loop's body


@pytest.mark.parametrize("target_radius", [0.3, None])
def test_wrong_certificates_are_within_alpha_at_the_boundary(target_radius):
    """A half-space, where the largest radius is known: exactly the target, so that each certificate is wrong."""
    alpha, runs, distance = 0.05, 10_000, 0.3
    one_pixel = jax.tree_util.Partial(lambda x: jnp.stack([jnp.zeros_like(x), x], axis=-1)[:, 0, 0, 0])
    x = np.full((runs, 1, 1, 1), distance - 1e-6, np.float32)
    keys = jax.random.split(jax.random.key(7), runs)
    answer = sequential(x, keys, one_pixel, target_radius=target_radius, alpha=alpha, max_samples=300, batch_size=80)
    wrong = (answer.radius >= distance) | (answer.label == 0)
    spread = 3 * np.sqrt(alpha * (1 - alpha) / runs)
    assert wrong.mean() <= alpha + spread
    assert wrong.mean() > (0.8 * alpha if target_radius else 0.1 * alpha)
    np.testing.assert_array_equal(answer.label == ABSTAIN, answer.abstained)


def test_wrong_certificates_are_within_alpha_with_all_looks():
    """The public rule on counts drawn by NumPy: up to 100,000 draws each, ten thousand times."""
    runs, q, alpha = 10_000, special.ndtr(1.0), 0.01
    rule = _stopping.target_rule(q, alpha, 0.05, 100_000)
    steps = np.random.default_rng(0).binomial(np.diff(rule.looks, prepend=0), q, size=(runs, len(rule.looks)))
    votes = steps.cumsum(-1)
    look = _stopping.stops(votes, *rule[1:]).argmax(-1)
    certified = (votes >= rule.first)[np.arange(runs), look]
    assert 0.5 * alpha < certified.mean() <= alpha + 3 * np.sqrt(alpha / runs)
    failed = (_stopping.lower_bounds(votes, rule, alpha) > q).any(-1)
    assert 0 < failed.mean() <= alpha


def test_logits_that_are_not_finite_are_told():
    def broken(x):
        return jnp.where(x[:, 0, 0, :1] > 0.5, jnp.float32(jnp.nan), half_space(x))

    for target_radius in (0.5, None):
        with pytest.raises(
            ValueError, match=r"logits_fn must return finite logits, not so for \d+ of \d+ noisy copies of x\[\d\]"
        ):
            sequential(logits_fn=broken, target_radius=target_radius)


def test_a_target_of_zero_asks_for_the_label():
    answer = sequential(target_radius=0.0)
    assert answer.label[[0, 5, 6, 7]].tolist() == [0, 1, 1, 1]
    assert (answer.radius == 0).all()
    assert (answer.probability[~answer.abstained] == 0.5).all()


def test_a_measure_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Linear:
        norm = "l1"

        def sample(self, key, x):
            return MEASURE.sample(key, x)

        def radius(self, probability):
            return 2 * np.maximum(np.asarray(probability) - 0.5, 0)

    key = jax.random.key(0)
    settings = {"target_radius": 0.6, "max_samples": 2000, "input_range": None}
    answer = certification.certify_sequential(key, half_space, X, Linear(), **settings)
    assert (answer.radius == np.where(answer.abstained, 0.0, 0.6)).all()
    assert answer.probability.max() == pytest.approx(0.8)
    assert 0 < answer.abstained.sum() < len(X)


def test_no_images_give_empty_arrays():
    for target_radius in (None, 0.5):
        assert [len(field) for field in sequential(X[:0], target_radius=target_radius)] == [0] * 5


def test_too_few_draws_ever_to_certify_are_told():
    with pytest.warns(UserWarning, match=r"max_samples=9 draws can never certify at alpha=0.001: .* not exceed 0.5\.$"):
        assert sequential(max_samples=9).abstained.all()
    with pytest.warns(UserWarning, match="max_samples=30 draws can never certify at alpha=0.001: .* exceed 0.841345"):
        assert sequential(max_samples=30, target_radius=0.5).abstained.all()
    sure = jax.tree_util.Partial(lambda x: half_space(jnp.ones_like(x) * 9))
    with pytest.warns(UserWarning, match="max_samples=39 draws can never certify"):
        assert sequential(logits_fn=sure, max_samples=39, target_radius=0.5).abstained.all()
    assert not sequential(logits_fn=sure, max_samples=40, target_radius=0.5).abstained.any()  # 0.841^40 < 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_radius": -0.5}, "target_radius must be at least 0 and finite, got -0.5"),
        ({"target_radius": np.inf}, "target_radius must be at least 0 and finite, got inf"),
        ({"target_radius": np.nan}, "target_radius must be at least 0 and finite, got nan"),
        ({"target_radius": 4.5}, "target_radius must be at most 2.58329, the reach of Gaussian("),
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1, got 1.0"),
        ({"futility": 0.0}, "futility must lie strictly between 0 and 1, got 0.0"),
        ({"tolerance": 1.5}, "tolerance must lie strictly between 0 and 1, got 1.5"),
        ({"max_samples": 0}, "max_samples must be an integer of at least 1, got 0"),
        ({"max_samples": 2**31 - 50}, "max_samples must keep draw indices within int32, got 2147483598"),
        ({"num_selection": 2.5}, "num_selection must be an integer, got 2.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"measure": 0.5, "target_radius": 0.5}, "measure must be a smoothing measure such as gaussian(0.5), got 0.5"),
        ({"x": X[0, 0, 0]}, "x must have shape (batch, ...), got (1,)"),
        ({"x": X * np.float32(np.nan)}, "x must be finite"),
        ({"input_range": (0, 1)}, "x must lie in [0, 1], got values from -1.45172 to 1.93869"),
        ({"input_range": (1, 0)}, "input_range must be (low, high) with low < high, or None, got (1, 0)"),
        ({"key": 0}, "key must be a typed key from jax.random.key, got 0"),
        ({"logits_fn": lambda x: x}, "to logits of shape (8, classes >= 2), got (8, 4, 4, 1)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(change, message):
    arguments = {"key": jax.random.key(0), "logits_fn": half_space, "x": X, "batch_size": 8, "max_samples": 200}
    arguments = {"measure": MEASURE, "input_range": None} | arguments | change
    key, logits_fn, x, measure = (arguments.pop(name) for name in ("key", "logits_fn", "x", "measure"))
    with pytest.raises(ValueError, match=re.escape(message)):
        certification.certify_sequential(key, logits_fn, x, measure, **arguments)


def test_bounds_are_for_the_host():
    with pytest.raises(ValueError, match="x and key must be concrete"):
        jax.jit(lambda x: sequential(x))(X)
