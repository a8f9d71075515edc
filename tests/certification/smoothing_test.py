"""Counts against closed forms and invariances, certificates against the definition, soundness over many keys."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special, stats

from robustjax import _blocks, certification, perturbations
from robustjax.certification import ABSTAIN

SIGMA = 0.5
MEASURE = certification.gaussian(SIGMA)
X = np.random.default_rng(0).uniform(size=(6, 4, 4, 1)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
NORMAL = np.random.default_rng(2).normal(size=16)
NORMAL /= np.linalg.norm(NORMAL)


@jax.tree_util.Partial
def linear(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS


@jax.tree_util.Partial
def half_space(x):
    """Two classes, split by a hyperplane through the grey image; P(class 1) = Phi(distance / sigma)."""
    distance = (x.reshape(x.shape[0], -1) - 0.5) @ np.asarray(NORMAL, np.float32)
    return jnp.stack([jnp.zeros_like(distance), distance], axis=-1)


def counts(x=X, key=0, logits_fn=linear, num_samples=500, **kwargs):
    key = jax.random.key(key) if isinstance(key, int) else key
    return np.asarray(certification.sample_counts(key, logits_fn, x, MEASURE, num_samples=num_samples, **kwargs))


def test_counts_follow_the_closed_form():
    n = 20_000
    distance = (X.reshape(len(X), -1) - 0.5) @ NORMAL
    votes = counts(logits_fn=half_space, num_samples=n)
    assert (votes.sum(-1) == n).all()
    p_values = [stats.binomtest(int(k), n, p).pvalue for k, p in zip(votes[:, 1], special.ndtr(distance / SIGMA))]
    assert min(p_values) > 0.001 / len(X)


def test_counts_depend_on_the_image_and_the_key_alone():
    whole = counts()
    assert len({tuple(row) for row in whole}) == len(X)
    np.testing.assert_array_equal(counts(X[::-1])[::-1], whole)
    some = [4, 5, 4, 5, 0, 0]
    np.testing.assert_array_equal(counts(X[some]), whole[some])
    np.testing.assert_array_equal(counts(batch_size=7), whole)
    assert (counts(key=1) != whole).any()
    negative_zero = X * np.float32(0) * np.float32(-1)
    np.testing.assert_array_equal(counts(negative_zero), counts(np.zeros_like(X)))


def test_counts_of_a_range_add_up():
    np.testing.assert_array_equal(counts(num_samples=130) + counts(num_samples=370, first_sample=130), counts())


def test_keys_of_ones_own_replace_the_fingerprint():
    keys = jax.random.split(jax.random.key(5), len(X))
    own, some = counts(key=keys), np.array([3, 3, 0, 5, 1, 1])
    np.testing.assert_array_equal(counts(X[some], key=keys[some]), own[some])
    same = np.repeat(X[:1], 6, axis=0)
    assert len({tuple(row) for row in counts(same, key=keys)}) > 1
    assert len({tuple(row) for row in counts(same)}) == 1


def test_counts_by_hand():
    """A brute-force twin: one draw at a time, in Python."""
    image_key = perturbations.image_keys(jax.random.key(0), X[:1])[0]
    noisy = jax.jit(lambda i: MEASURE.sample(jax.random.fold_in(image_key, i), jnp.asarray(X[0])))
    votes = np.zeros(3, int)
    for i in range(40):
        votes[np.argmax(np.asarray(noisy(i)).reshape(-1) @ WEIGHTS)] += 1
    np.testing.assert_array_equal(counts(num_samples=40, batch_size=7)[0], votes)


def test_counts_are_the_same_on_many_devices_and_under_jit():
    assert jax.device_count() == 8
    x = np.concatenate([X, X[:2] + np.float32(0.01)])
    alone, few = counts(x), counts(x, num_samples=70)
    mesh = jax.make_mesh((2, 4), ("data", "noise"), axis_types=(AxisType.Auto,) * 2)
    for spec in (("data", "noise"), "data"):
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(spec)))
        np.testing.assert_array_equal(counts(spread), alone)
        np.testing.assert_array_equal(counts(spread, num_samples=70), few)  # a block for some devices
    jitted = jax.jit(lambda k, x, n: certification.sample_counts(k, linear, x, MEASURE, num_samples=n))
    np.testing.assert_array_equal(jitted(jax.random.key(0), spread, 500), alone)


def test_a_block_of_several_images_holds_the_draws_of_each(monkeypatch):
    """As on an accelerator: 40 draws of an image leave room for two more in a block of 150."""
    x = np.concatenate([X, X[:2] + np.float32(0.01)])
    alone = counts(x, num_samples=40, batch_size=40)
    monkeypatch.setattr(_blocks, "at_once", lambda shape: 150)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _blocks.of_draws(40, x.shape[1:]) == (40, 3)
    np.testing.assert_array_equal(counts(x, num_samples=40), alone)


def test_blocks_divide_draws_evenly(monkeypatch):
    """The waste of a block that is half empty: 10,100 draws were 11 blocks of 1,000, and 1,100 were two."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for num_samples, size, blocks in ((10_100, 920, 11), (1_100, 560, 2), (100_100, 1000, 101), (100, 120, 1)):
        assert _blocks.of_draws(num_samples, (32, 32, 3)) == (size, 1000 // size)
        assert -(-num_samples // size) == blocks
    assert _blocks.at_once((1024, 1024, 3)) < 100 < _blocks.at_once((224, 224, 3), backward=False)
    assert _blocks.at_once((224, 224, 3), backward=True) < 100


def test_one_compilation_serves_every_number_of_samples_and_all_weights():
    traces = []

    def logits_of(weights, x):
        traces.append(x.shape)
        return x.reshape(x.shape[0], -1) @ weights

    for n, scale in ((40, 1.0), (80, 2.0), (33, 3.0), (1, 1.0)):
        weights = jnp.asarray(WEIGHTS) * jnp.float32(scale)
        counts(logits_fn=jax.tree_util.Partial(logits_of, weights), num_samples=n, batch_size=40)
    assert len(set(traces)) == 1
    assert len(traces) <= 3  # the shape check, and the loop's body


def test_a_pytree_of_weights_is_read_anew():
    """Modules that are pytrees may be trained on between two calls."""

    @jax.tree_util.register_pytree_node_class
    class Module:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, x):
            return x.reshape(x.shape[0], -1) @ self.weights

        def tree_flatten(self):
            return (self.weights,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    module = Module(jnp.asarray(WEIGHTS))
    np.testing.assert_array_equal(counts(logits_fn=module), counts())
    module.weights = jnp.asarray(WEIGHTS[:, ::-1])
    np.testing.assert_array_equal(counts(logits_fn=module), counts()[:, ::-1])


def test_the_last_draw_indices_do_not_overflow():
    tail = counts(num_samples=50, first_sample=2**31 - 51, batch_size=7)
    assert (tail.sum(-1) == 50).all()


def test_memory_does_not_grow_with_the_number_of_samples():
    """The compiled program is one and the same, and it holds one block of noisy copies at a time."""
    from robustjax.certification import _counts

    def temporary_bytes(batch_size):
        edges = jnp.asarray([0, 10**6], jnp.int32)
        lowered = _counts._votes.lower(jax.random.key(0), linear, X, edges, measure=MEASURE, batch_size=batch_size)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1000) < 20 * 1000 * 16 * 4


def test_a_row_that_is_not_finite_votes_for_no_class():
    def broken(x):
        logits = linear(x)
        return jnp.where(x[:, 0, 0, :1] > 0.5, jnp.float32(jnp.nan), logits)

    lost = 500 - counts(logits_fn=broken).sum(-1)
    assert (lost > 0).all()
    assert (lost < 500).all()
    with pytest.raises(ValueError, match=r"must return finite logits, not so for \d+ of 100 noisy copies of x"):
        certification.certify(jax.random.key(0), broken, X, MEASURE, num_estimation=100)
    with pytest.raises(ValueError, match=r"must return finite logits, not so for \d+ of 300 noisy copies of x"):
        certification.predict(jax.random.key(0), broken, X, MEASURE, num_samples=300)
    with pytest.raises(ValueError, match="x and key must be concrete"):
        jax.jit(lambda x: certification.predict(jax.random.key(0), linear, x, MEASURE))(X)
    with pytest.raises(ValueError, match="x must be finite"):
        certification.certify(jax.random.key(0), linear, X * np.float32(np.nan), MEASURE, num_estimation=100)


def test_certify_is_selection_then_estimation():
    kwargs = {"num_selection": 50, "num_estimation": 450}
    cert = certification.certify(jax.random.key(0), linear, X, MEASURE, batch_size=7, **kwargs)
    by_hand = certification.certificate_from_counts(
        counts(num_samples=50), counts(num_samples=450, first_sample=50), MEASURE, alpha=0.001
    )
    for ours, expected in zip(cert, by_hand):
        np.testing.assert_array_equal(ours, expected)


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3), st.lists(st.integers(1, 10**5), min_size=3, max_size=3))
@settings(deadline=None)
def test_certificate_is_the_definition(selection, estimation):
    cert = certification.certificate_from_counts(np.array([selection]), np.array([estimation]), MEASURE, alpha=0.01)
    label, n = int(np.argmax(selection)), sum(estimation)
    bound = stats.beta.ppf(0.01, estimation[label], n - estimation[label] + 1)
    np.testing.assert_allclose(cert.probability, [bound], rtol=1e-9)
    assert cert.abstained[0] == (bound <= 0.5)
    assert cert.label[0] == (ABSTAIN if bound <= 0.5 else label)
    np.testing.assert_allclose(cert.radius[0], max(SIGMA * stats.norm.ppf(bound), 0), rtol=1e-9)


def test_lost_draws_count_against_the_class():
    votes = np.array([[0, 90]])
    full = certification.certificate_from_counts(votes, votes, MEASURE)
    lost = certification.certificate_from_counts(votes, votes, MEASURE, num_estimation=100)
    assert lost.probability < full.probability
    np.testing.assert_allclose(lost.probability, certification.binomial_lower_bound([90], 100, 0.001))


def test_prediction_is_the_sign_test():
    votes = np.array([[600, 400, 0], [510, 490, 0], [500, 500, 0], [0, 0, 0], [3, 10, 990]])
    np.testing.assert_array_equal(certification.prediction_from_counts(votes), [0, ABSTAIN, ABSTAIN, ABSTAIN, 2])
    labels = certification.predict(jax.random.key(0), linear, X, MEASURE)
    np.testing.assert_array_equal(labels, certification.prediction_from_counts(counts(num_samples=1000)))
    assert labels.dtype == np.int32


def test_certified_radius_seldom_exceeds_the_true_one():
    """A half-space, where the largest radius is known (the distance to the plane): passed in alpha of runs at most."""
    alpha, runs, distance = 0.05, 2000, 0.3
    x = np.broadcast_to(0.5 + distance * NORMAL.reshape(4, 4, 1), (runs, 4, 4, 1)).astype(np.float32)
    keys = jax.random.split(jax.random.key(7), runs)
    settings = {"num_estimation": 500, "batch_size": 600, "input_range": None}
    cert = certification.certify(keys, half_space, x, MEASURE, alpha=alpha, **settings)
    unsound = (cert.radius > distance) | (cert.label == 0)
    assert unsound.sum() > 0  # the bound is close enough to fail now and then
    assert unsound.mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / runs)


def test_no_images_give_empty_arrays():
    cert = certification.certify(jax.random.key(0), linear, X[:0], MEASURE, num_estimation=100)
    assert [len(field) for field in cert] == [0, 0, 0, 0]
    assert certification.predict(jax.random.key(0), linear, X[:0], MEASURE).shape == (0,)
    assert counts(X[:0]).shape == (0, 3)


def test_too_few_draws_ever_to_certify_are_told():
    with pytest.warns(UserWarning, match="num_estimation=9 draws can never certify at alpha=0.001"):
        cert = certification.certify(jax.random.key(0), linear, X, MEASURE, num_estimation=9)
    assert cert.abstained.all()
    with pytest.warns(UserWarning, match="num_samples=10 draws can never decide at alpha=0.001"):
        assert (certification.predict(jax.random.key(0), linear, X, MEASURE, num_samples=10) == ABSTAIN).all()


def test_a_model_that_depends_on_its_batch_is_refused():
    """In a block of 3 copies the first 2 are compared; the votes of a model that is right are those of other draws."""

    def normalised(x):
        logits = linear(x)
        return (logits - logits.mean(0, keepdims=True)) / (logits.std(0, keepdims=True) + 1e-5)

    settings = {"num_estimation": 40, "batch_size": 3}
    certify = lambda model: certification.certify(jax.random.key(0), model, X, MEASURE, **settings)
    for call in (
        lambda: certify(normalised),
        lambda: certification.predict(jax.random.key(0), normalised, X, MEASURE, num_samples=40, batch_size=3),
        lambda: certification.certify_sequential(
            jax.random.key(0), normalised, X, MEASURE, max_samples=200, batch_size=3
        ),
        lambda: certification.sample_counts(jax.random.key(0), normalised, X, MEASURE, num_samples=40, batch_size=3),
    ):
        with pytest.raises(ValueError, match="must answer each input by itself, .* in another batch"):
            call()
    counts = [
        certification.sample_counts(jax.random.key(0), linear, X, MEASURE, num_samples=n, first_sample=first)
        for n, first in ((100, 0), (40, 100))
    ]
    for got, expected in zip(certify(linear), certification.certificate_from_counts(*counts, MEASURE)):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0, 0, 0]}, "x must have shape (batch, ...), got (1,)"),
        ({"x": (X * 255).astype(np.uint8)}, "x must be a floating array (batch, ...), got uint8"),
        ({"x": [[1.0]]}, "x must be a floating array (batch, ...), got [[1.0]]"),
        ({"x": X * 255}, "x must lie in [0, 1], got values from"),
        ({"key": np.zeros(2, np.uint32)}, "key must be a typed key from jax.random.key, got uint32"),
        ({"key": 0}, "key must be a typed key from jax.random.key, got 0"),
        ({"num_estimation": 0}, "num_estimation must be an integer of at least 1, got 0"),
        ({"num_selection": 2.5}, "num_selection must be an integer, got 2.5"),
        ({"num_estimation": 2**31}, "draw indices within int32"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"logits_fn": None}, "logits_fn must be a function, got None"),
        ({"measure": 0.5}, "measure must be a smoothing measure such as gaussian(0.5), got 0.5"),
        ({"alpha": 0.0}, "alpha must lie strictly between 0 and 1, got 0.0"),
        (
            {"logits_fn": lambda x: x},
            "logits_fn must map (8, 4, 4, 1) to logits of shape (8, classes >= 2), got (8, 4, 4, 1)",
        ),
        ({"logits_fn": lambda x: linear(x)[:, :1]}, "got (8, 1)"),
        ({"logits_fn": lambda x: linear(x).argmax(-1)}, "got (8,)"),
        ({"logits_fn": lambda x: linear(x).astype(jnp.int32)}, "must return floating-point logits, got int32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(change, message):
    arguments = {"key": jax.random.key(0), "logits_fn": linear, "x": X, "batch_size": 8, "num_estimation": 20} | change
    key, logits_fn, x, measure = (arguments.pop(name, MEASURE) for name in ("key", "logits_fn", "x", "measure"))
    with pytest.raises(ValueError, match=re.escape(message)):
        certification.certify(key, logits_fn, x, measure, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_keys_must_be_one_or_one_for_each_image():
    with pytest.raises(ValueError, match=re.escape("key must have shape () or (6,), got (5,)")):
        counts(key=jax.random.split(jax.random.key(0), 5))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["negative", "float", "rank", "one class", "shape", "empty row"])
def test_bad_counts_are_named(kind):
    good = np.array([[3, 90], [50, 50]])
    bad = {
        "negative": (good, good - 4, "estimation_counts must not be negative, got -1"),
        "float": (good, good * 1.0, "estimation_counts must be an array of integers"),
        "rank": (
            good[0],
            good,
            "selection_counts must be an array of integers (batch, classes), got int64",
        ),
        "one class": (good[:, :1], good, "selection_counts must be integers (batch, classes >= 2), got int64 (2, 1)"),
        "shape": (good, good[:1], "must have one shape, got (2, 2) and (1, 2)"),
        "empty row": (good, good * np.array([[1], [0]]), "row 1 has none"),
    }[kind]
    with pytest.raises(ValueError, match=re.escape(bad[2])):
        certification.certificate_from_counts(bad[0], bad[1], MEASURE)
