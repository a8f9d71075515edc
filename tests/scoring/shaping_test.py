import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.typing import Outputs

ROWS, DIM, CLASSES = 60, 20, 4


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


HEAD = scoring.Head(random(0, DIM, CLASSES), random(1, CLASSES) / 10)
TRAIN, TEST = np.maximum(random(2, ROWS, DIM), 0), np.maximum(random(3, 15, DIM), 0)


def outputs(features, head=HEAD):
    logits = features @ np.asarray(head.kernel) + (0 if head.bias is None else np.asarray(head.bias))
    return Outputs(jnp.asarray(logits, jnp.float32), jnp.asarray(features, jnp.float32))


SEEN: list[Outputs] = []


def keep(state, outputs):
    SEEN.append(outputs)
    return outputs.logits[:, 0]


KEEP = scoring.Detector(lambda outputs, labels, head: (outputs, labels, head), keep)
"""A base that remembers what reached it."""


def reached(combinator, features, train=TRAIN, head=HEAD, **settings):
    """What a base is fitted to, and what it is to score."""
    detector, labels = combinator(KEEP, **settings), np.arange(len(train)) % len(head.kernel[0])
    state = detector.fit(outputs(train, head), labels, head)
    fitted, passed, head = state.base
    np.testing.assert_array_equal(passed, labels)

    @jax.jit
    def passed_on(state, outputs):
        with jax.disable_jit():  # what reaches the base is of this trace, not of one within
            detector.score(state, outputs)
        return SEEN.pop()

    test = passed_on(state, outputs(features, head))
    return fitted, head, jax.tree.map(lambda a: a[: len(features)], test)  # without the rows that fill the block


def shaped(combinator, features, train=TRAIN, head=HEAD, **settings):
    return np.asarray(reached(combinator, features, train, head, **settings)[-1].features)


def row_wise(function):
    return lambda train, features: np.stack([function(row) for row in features.astype(np.float64)])


def largest(row, percentile):
    return np.argsort(-row, kind="stable")[: DIM - round(DIM * percentile / 100)]


def ash(row, method, percentile=90.0):
    kept, result = largest(row, percentile), np.zeros(DIM)
    factors = {"P": row[kept], "B": row.sum() / len(kept), "S": row[kept] * np.exp(row.sum() / row[kept].sum())}
    result[kept] = factors[method]
    return result


def vra(train, features):
    low, high = np.percentile(train, [60, 95], axis=0)
    return np.where(features < low, 0, np.minimum(features, high))


def normalized(train, features):
    lengths = [np.linalg.norm(a.astype(np.float64), axis=-1) for a in (train, features)]
    return features * (lengths[0].mean() / lengths[1])[:, None]


def sparse(train, percentile=90):
    contributions = train.mean(0)[:, None] * HEAD.kernel
    return HEAD._replace(kernel=HEAD.kernel * (contributions > np.percentile(contributions, percentile)))


COMBINATORS = {  # the combinator and what it does to features, in NumPy
    "react": (scoring.react, lambda train, features: np.minimum(features, np.percentile(train, 90))),
    "dice": (scoring.dice, lambda train, features: features),
    "ash_s": (scoring.ash, row_wise(lambda row: ash(row, "S"))),
    "ash_b": (lambda base: scoring.ash(base, method="B"), row_wise(lambda row: ash(row, "B"))),
    "ash_p": (lambda base: scoring.ash(base, method="P"), row_wise(lambda row: ash(row, "P"))),
    "scale": (scoring.scale, row_wise(lambda row: row * np.exp(row.sum() / row[largest(row, 85)].sum()))),
    "vra": (scoring.vra, vra),
    "feature_normalized": (scoring.feature_normalized, normalized),
}


@pytest.mark.parametrize("name", COMBINATORS)
def test_features_are_shaped_as_in_numpy_and_logits_are_those_of_the_head(name):
    combinator, reference = COMBINATORS[name]
    train, head, test = reached(combinator, TEST)
    np.testing.assert_allclose(head.kernel, sparse(TRAIN).kernel if name == "dice" else HEAD.kernel)
    for found, features in ((train, TRAIN), (test, TEST)):
        want = outputs(reference(TRAIN, features), head)
        np.testing.assert_allclose(found.features, want.features, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "base"), [("react", scoring.mahalanobis()), ("dice", scoring.vim())])
def test_a_combinator_is_its_base_on_what_reaches_it(name, base):
    combinator, (train, head, test) = COMBINATORS[name][0], reached(COMBINATORS[name][0], TEST)
    labels = np.asarray(train.logits).argmax(-1)
    want = base.score(base.fit(train, labels, head), test)
    detector = combinator(base)
    found = detector.score(detector.fit(outputs(TRAIN), labels, HEAD), outputs(TEST))
    assert np.isfinite(want).all()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_a_head_without_bias_gives_logits_without():
    train, head, test = reached(scoring.react, TEST, head=scoring.Head(HEAD.kernel))
    assert head.bias is None
    np.testing.assert_allclose(test.logits, np.asarray(test.features) @ HEAD.kernel, rtol=1e-4, atol=1e-5)


def test_at_equality_dice_drops_and_vra_keeps():
    """Contributions of 1, ..., 5 have the median 3, which is dropped; features equal to their percentile stay."""
    train = np.tile(np.arange(1.0, 6.0, dtype=np.float32), (4, 1))
    alike = scoring.Head(np.ones((5, 2), np.float32))
    _, head, _ = reached(scoring.dice, train[:1], train, alike, percentile=50.0)
    np.testing.assert_array_equal(head.kernel, np.repeat([[0], [0], [0], [1], [1]], 2, axis=1))
    found = shaped(scoring.vra, train[:1], train, alike, low=20.0, high=80.0)
    np.testing.assert_array_equal(found, train[:1])


def test_combinators_nest():
    twice = scoring.react(scoring.scale(scoring.energy()))
    found = twice.score(twice.fit(outputs(TRAIN), None, HEAD), outputs(TEST))
    (_, clip), (_, grow), energy = COMBINATORS["react"], COMBINATORS["scale"], scoring.energy()
    want = energy.score((), outputs(grow(None, clip(TRAIN, TEST))))
    np.testing.assert_allclose(found, want, rtol=1e-4)


ROW = np.array([[4.0, 1.0, 3.0, 2.0, 0.0]], np.float32)
FIVE = scoring.Head(np.ones((5, 2), np.float32))


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"method": "P", "percentile": 50.0}, [4, 0, 3, 2, 0]),  # 5 / 2 is rounded to the even 2, three are kept
        ({"method": "P", "percentile": 60.0}, [4, 0, 3, 0, 0]),
        ({"method": "P", "percentile": 70.0}, [4, 0, 0, 0, 0]),  # 7 / 2 to the even 4
        ({"method": "B", "percentile": 60.0}, [5, 0, 5, 0, 0]),
        ({"method": "S", "percentile": 60.0}, [4 * np.exp(10 / 7), 0, 3 * np.exp(10 / 7), 0, 0]),
        ({"percentile": 80.0}, [4 * np.exp(10 / 4), 0, 0, 0, 0]),
    ],
)
def test_ash_by_hand(settings, want):
    np.testing.assert_allclose(shaped(scoring.ash, ROW, ROW, FIVE, **settings), [want], rtol=1e-5)


def test_ash_keeps_as_many_of_equal_features_the_first_ones():
    rows = np.array([[1, 2, 2, 2, 2], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]], np.float32)
    pruned = shaped(scoring.ash, rows, rows, FIVE, method="P", percentile=60.0)
    np.testing.assert_array_equal(pruned, [[0, 2, 2, 0, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]])
    filled = shaped(scoring.ash, rows, rows, FIVE, method="B", percentile=60.0)
    np.testing.assert_array_equal(filled, [[0, 4.5, 4.5, 0, 0], [1.5, 0, 0, 0, 1.5], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("combinator", [scoring.ash, scoring.scale])
def test_scaling_overflows_nowhere(combinator):
    rows = np.stack([np.full(400, 7.0), np.zeros(400), -np.ones(400)]).astype(np.float32)
    head = scoring.Head(random(4, 400, 2))
    _, _, (logits, found) = reached(combinator, rows, rows, head, percentile=99.75)
    assert np.isfinite(logits).all()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0].max(), 7 * np.exp(40), rtol=1e-4)
    np.testing.assert_array_equal(found[1], 0)


def test_scaled_rows_keep_their_direction_and_single_units_grow_least():
    found = shaped(scoring.scale, TEST)
    factors = np.linalg.norm(found, axis=1) / np.linalg.norm(TEST, axis=1)
    np.testing.assert_allclose(found, factors[:, None] * TEST, rtol=1e-4)
    single = shaped(scoring.scale, np.eye(1, DIM, dtype=np.float32))
    np.testing.assert_allclose(single, np.e * np.eye(1, DIM), rtol=1e-5)
    assert (factors > np.e).all()


def test_normalized_features_have_the_mean_length_whatever_they_had():
    long = shaped(scoring.feature_normalized, 1000 * TEST)
    np.testing.assert_allclose(long, shaped(scoring.feature_normalized, TEST), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(long, axis=1), np.linalg.norm(TRAIN, axis=1).mean(), rtol=1e-5)
    np.testing.assert_array_equal(shaped(scoring.feature_normalized, 0 * TEST), 0)


def test_react_takes_back_what_a_few_huge_units_do():
    """The finding of the paper: far inputs light few units beyond training rows, which energy takes for certainty."""
    spiked = TEST.copy()
    unit = HEAD.kernel.max(1).argmax()
    spiked[:, unit] = 50
    clipped = scoring.react(scoring.energy())
    state = clipped.fit(outputs(TRAIN), None, HEAD)
    plain, react = (
        np.asarray(d.score(s, outputs(spiked)) - d.score(s, outputs(TEST)))
        for d, s in ((scoring.energy(), ()), (clipped, state))
    )
    assert (plain < -20).all()
    assert (react > -20).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scoring.react(scoring.energy(), percentile=100.0),
            "percentile must lie strictly between 0 and 100, got 100",
        ),
        (
            lambda: scoring.dice(scoring.energy(), percentile=0.0),
            "percentile must lie strictly between 0 and 100, got 0",
        ),
        (
            lambda: scoring.ash(scoring.energy(), percentile=-1.0),
            "percentile must lie strictly between 0 and 100, got -1",
        ),
        (lambda: scoring.scale(scoring.energy(), percentile=np.nan), "percentile must lie strictly .* got nan"),
        (lambda: scoring.vra(scoring.energy(), high=101.0), "high must lie strictly between 0 and 100, got 101"),
        (lambda: scoring.vra(scoring.energy(), low=95.0), "low must be less than high, got 95.0 and 95.0"),
        (lambda: scoring.ash(scoring.energy(), method="X"), "method must be S, B or P, got 'X'"),
        (
            lambda: scoring.react(scoring.energy),
            "detector must be a Detector such as scoring.energy.., got <function energy",
        ),
        (lambda: scoring.scale(scoring.energy()).fit(outputs(TRAIN)), "head must be given to fit scale, got None"),
        (lambda: scoring.scale(scoring.energy()).fit(), "outputs must be given to fit scale, got None"),
        (
            lambda: shaped(scoring.react, TEST, percentile=30.0),
            "percentile must reach positive .* 30.0 per cent .* at most 0",
        ),
        (
            lambda: shaped(scoring.ash, TEST, percentile=99.0),
            "percentile must leave at least one of 20 features, got 99.0",
        ),
        (
            lambda: shaped(scoring.scale, TEST, percentile=99.0),
            "percentile must leave at least one of 20 features, got 99",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
