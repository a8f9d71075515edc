import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from robustjax import metrics, scoring
from robustjax.scoring._factor import triangular_factor
from robustjax.typing import Outputs


def outputs(features, classes):
    features = np.asarray(features, np.float32)
    return Outputs(np.zeros((len(features), classes), np.float32), features)


def fit(features, labels, detector=None):
    detector = scoring.mahalanobis() if detector is None else detector
    return detector.fit(outputs(features, int(labels.max()) + 1), labels)


def score(state, features, detector=None):
    detector = scoring.mahalanobis() if detector is None else detector
    return np.asarray(detector.score(state, outputs(features, 2)))


def moments(features, labels):
    """Class means and tied covariance in float64."""
    features = np.asarray(features, np.float64)
    means = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
    residual = features - means[labels]
    return means, residual.T @ residual / len(features)


def distances(features, means, covariance):
    """Squared distances ``(batch, classes)`` by the definition, in float64."""
    difference = np.asarray(features, np.float64)[:, None] - means
    return np.einsum("bcd,de,bce->bc", difference, np.linalg.inv(covariance), difference)


def sample(seed, rows, dim, *, classes=3, smallest=1.0, rotate=True, offset=0.0):
    """Classes with one covariance, whose roots of eigenvalues reach from 1 to ``smallest``."""
    rng = np.random.default_rng(seed)
    deviations = np.geomspace(1, smallest, dim)
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(dim, dim)))[0] if rotate else np.eye(dim)
    means = 2 * np.random.default_rng(98).normal(size=(classes, dim))
    labels = (np.arange(rows) % classes).astype(np.int32)
    features = (means[labels] + rng.normal(size=(rows, dim))) * deviations @ basis + offset
    return features.astype(np.float32), labels


def test_auroc_is_that_of_the_theory():
    # Noncentral chi-squared against chi-squared, where the other class is too far away to be nearest.
    dim, shift = 8, 2.5
    rng = np.random.default_rng(0)
    root = rng.normal(size=(dim, dim)) + 3 * np.eye(dim)
    noise = lambda rows: rng.normal(size=(rows, dim)) @ root
    labels = (np.arange(20_000) % 2).astype(np.int32)
    means = np.stack([np.zeros(dim), np.full(dim, 1e3)]) @ root
    state = fit(noise(20_000) + means[labels], labels)
    inside = score(state, noise(20_000) + means[labels])
    outside = score(state, noise(20_000) + means[0] + shift * np.eye(dim)[3] @ root)
    np.testing.assert_allclose(inside.mean(), dim, rtol=0.02)
    values = stats.ncx2.rvs(dim, shift**2, size=10**6, random_state=1)
    theory = stats.chi2.cdf(values, dim).mean()
    assert abs(metrics.auroc(inside, outside) - theory) < 0.005


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_equals_float64_on_ill_conditioned_features(smallest, offset):
    # The covariance has condition number smallest^-2: 1e6 and 1e8. The offset costs the features digits of their own.
    train, labels = sample(0, 1500, 32, smallest=smallest, offset=offset)
    test = np.concatenate([sample(1, 100, 32, smallest=smallest, offset=offset)[0], train[:50] * np.float32(1.5)])
    wanted = distances(test, *moments(train, labels)).min(1)
    np.testing.assert_allclose(score(fit(train, labels), test), wanted, rtol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_float64_where_units_differ_a_million_times(offset):
    train, labels = sample(0, 1500, 32, smallest=1e-6, rotate=False, offset=offset)
    test = sample(1, 100, 32, smallest=1e-6, rotate=False, offset=offset)[0]
    wanted = distances(test, *moments(train, labels)).min(1)
    np.testing.assert_allclose(score(fit(train, labels), test), wanted, rtol=1e-4)


@pytest.mark.parametrize("smallest", [1.0, 1e-4])
def test_factor_is_a_root_of_the_second_moment(smallest):
    rows = sample(2, 700, 150, smallest=smallest)[0]
    factor = np.asarray(jax.jit(triangular_factor)(rows), np.float64)
    assert (np.tril(factor, -1) == 0).all()
    moment = rows.astype(np.float64).T @ rows / 700
    inverse = np.linalg.inv(np.linalg.cholesky(moment))
    np.testing.assert_allclose(inverse @ factor.T @ factor @ inverse.T, np.eye(150), atol=2e-3)


def test_distances_of_far_classes_keep_their_digits():
    # Expanding the square would leave |mean|^2 = 1e8 times the precision of float32: an error of ten.
    train, labels = sample(0, 400, 6)
    train = train + 5e3 * np.eye(6, dtype=np.float32)[labels]
    wanted = distances(train, *moments(train, labels)).min(1)
    np.testing.assert_allclose(score(fit(train, labels), train), wanted, rtol=5e-3, atol=5e-3)


def test_is_invariant_under_linear_maps_of_the_features():
    train, labels = sample(0, 400, 6)
    test = sample(1, 50, 6)[0]
    matrix = np.random.default_rng(5).normal(size=(6, 6)) + 2 * np.eye(6)
    wanted = score(fit(train, labels), test)
    np.testing.assert_allclose(score(fit(train @ matrix - 7, labels), test @ matrix - 7), wanted, rtol=1e-3)


def test_dead_and_repeated_units_change_nothing():
    train, labels = sample(0, 400, 6)
    test = sample(1, 40, 6)[0]
    wanted = score(fit(train, labels), test)
    wide = lambda features: np.concatenate([features, np.full((len(features), 2), 0.3), 3 * features[:, :2]], axis=1)
    tested = wide(test)
    tested[:, 6] += 1e3  # a unit that was dead in training says nothing
    np.testing.assert_allclose(score(fit(wide(train), labels), tested), wanted, rtol=1e-4)


def nearly_repeated(features, apart, seed):
    """Four more units, each that of another up to ``apart`` of its deviation."""
    noise = np.random.default_rng(seed).normal(size=(len(features), 4))
    return np.concatenate([features, features[:, :4] + apart * noise], axis=1, dtype=np.float32)


def test_units_that_repeat_others_up_to_1e_5_change_nothing():
    # The difference of two such units has the variance 5e-11 of the largest, below the cut.
    train, labels = sample(0, 400, 6)  # in the shapes of the test above
    test = sample(1, 40, 6)[0]
    for detector in (scoring.mahalanobis(), scoring.relative_mahalanobis()):
        state = fit(nearly_repeated(train, 1e-5, 2), labels, detector)
        wanted = score(fit(train, labels, detector), test, detector)
        np.testing.assert_allclose(score(state, nearly_repeated(test, 1e-5, 3), detector), wanted, rtol=1e-4, atol=1e-4)
        # Where a unit no longer repeats the other, their mean counts: what is across adds nothing.
        parted, mean = nearly_repeated(test, 0.0, 3), test.copy()
        parted[:, 6:] += 1
        mean[:, :4] += 0.5
        wanted = score(fit(train, labels, detector), mean, detector)
        np.testing.assert_allclose(score(state, parted, detector), wanted, rtol=1e-4, atol=1e-4)


def test_units_that_repeat_others_up_to_1e_3_count_by_their_difference():
    train, labels = sample(0, 400, 6)
    train, test = nearly_repeated(train, 1e-3, 2), nearly_repeated(sample(1, 40, 6)[0], 1e-3, 3)
    wanted = distances(test, *moments(train, labels)).min(1)
    np.testing.assert_allclose(score(fit(train, labels), test), wanted, rtol=1e-3)
    assert (wanted > 1.1 * distances(test[:, :6], *moments(train[:, :6], labels)).min(1)).mean() > 0.5


def test_fewer_rows_than_dimensions_give_the_pseudo_inverse():
    train, labels = sample(0, 30, 64)
    test = sample(1, 20, 64)[0]
    state = fit(train, labels)
    assert int(jnp.any(state.whitener != 0, axis=0).sum()) == 30 - 3
    means, covariance = moments(train, labels)
    deviation = np.sqrt(np.diag(covariance))
    difference = (test.astype(np.float64)[:, None] - means) / deviation
    inverse = np.linalg.pinv(covariance / np.outer(deviation, deviation), rcond=1e-9, hermitian=True)
    wanted = np.einsum("bcd,de,bce->bc", difference, inverse, difference).min(1)
    np.testing.assert_allclose(score(state, test), wanted, rtol=1e-3)


@pytest.mark.parametrize(("rows", "dim", "smallest"), [(400, 6, 1e-2), (400, 2, 1.0), (1500, 32, 10**-3.5)])
def test_relative_subtracts_the_distance_under_one_gaussian(rows, dim, smallest):
    # With a condition number of 1e7, the difference of two distances in float32 would have no digit left.
    train, labels = sample(0, rows, dim, smallest=smallest)
    test = sample(1, 60, dim, smallest=smallest)[0]
    nearest = distances(test, *moments(train, labels)).min(1)
    background = distances(test, *moments(train, np.zeros_like(labels)))[:, 0]
    detector = scoring.relative_mahalanobis()
    wanted = nearest - background
    atol = 1e-3 * np.abs(wanted).max()
    np.testing.assert_allclose(score(fit(train, labels, detector), test, detector), wanted, rtol=0, atol=atol)
    assert (wanted < 0).any()


def test_relative_counts_classes_by_their_rows():
    train, labels = sample(0, 400, 6)
    labels = np.where(np.arange(400) < 270, 0, labels).astype(np.int32)
    detector = scoring.relative_mahalanobis()
    state = fit(train, labels, detector)
    np.testing.assert_allclose(state.origin, train.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.cov((train @ state.background).T, bias=True), np.eye(3), atol=1e-4)


def test_added_classes_follow_the_rule_of_the_paper():
    train, labels = sample(0, 800, 6, classes=5, smallest=1e-2)
    test = sample(1, 80, 6, classes=5, smallest=1e-2)[0]
    old = (labels < 3) & (np.arange(800) < 200)  # 40 rows of each class that is there, 160 of those that come
    state = fit(train[old], labels[old])
    means, covariance = moments(train[old], labels[old])
    for c, before in ((3, 3), (4, 4)):
        new = train[labels == c]
        state = scoring.add_class(state, new)
        means = np.concatenate([means, new.mean(0, dtype=np.float64)[None]])
        covariance = (before * covariance + np.cov(new.T, bias=True)) / (before + 1)
    np.testing.assert_allclose(score(state, test), distances(test, means, covariance).min(1), rtol=1e-3)
    assert (scoring.nearest_class(state, test) == distances(test, means, covariance).argmin(1)).all()


def test_classes_of_equal_size_can_come_one_by_one():
    train, labels = sample(0, 800, 6, classes=5)  # in the shapes of the test above
    state = fit(train[labels < 3], labels[labels < 3])
    for c in (3, 4):
        state = scoring.add_class(state, train[labels == c])
    test, true = sample(1, 80, 6, classes=5)
    np.testing.assert_allclose(score(state, test), score(fit(train, labels), test), rtol=1e-4)
    assert (scoring.nearest_class(state, test) == true).mean() > 0.9


def test_a_new_class_wakes_a_dead_unit_and_may_have_one_row():
    train, labels = sample(0, 400, 6)
    train[:, 5] = 0
    state = fit(train, labels)
    woken = train[:1] + 3 * np.eye(6, dtype=np.float32)[5:]
    assert score(state, woken) == score(state, train[:1])
    one = scoring.add_class(state, woken)  # a single row has no spread: S shrinks by 3/4, and the unit is still dead
    assert one.white_means.shape == (4, 6)
    np.testing.assert_allclose(score(one, woken), 0, atol=1e-4)
    np.testing.assert_allclose(score(one, train[1:2]), score(state, train[1:2]) * 4 / 3, rtol=1e-4)
    two = scoring.add_class(state, woken + np.outer([1, -1], np.eye(6)[5]).astype(np.float32))
    # Now the unit has the variance 1/4: three off the new mean are six deviations.
    np.testing.assert_allclose(score(two, woken + 3 * np.eye(6, dtype=np.float32)[5:]), 9 * 4, rtol=1e-4)


def test_a_class_without_rows_is_named():
    train, labels = sample(0, 90, 4, classes=5)
    labels = np.where(labels == 3, 4, labels).astype(np.int32)
    for detector in (scoring.mahalanobis(), scoring.relative_mahalanobis()):
        with pytest.raises(ValueError, match="labels must hold every class, class 3 has no rows"):
            detector.fit(outputs(train, 5), labels)


def test_bad_rows_of_a_new_class_are_refused(unchecked):
    state = fit(*sample(0, 400, 6))
    for bad, got in ((np.zeros((0, 6)), r"\(0, 6\)"), (np.zeros((3, 5)), r"\(3, 5\)")):
        with pytest.raises(ValueError, match=rf"features must be \(rows >= 1, 6\), got {got}"):
            scoring.add_class(state, bad.astype(np.float32))
    with pytest.raises(ValueError, match=r"features must be \(rows >= 0, 6\), got \(3, 5\)"):
        scoring.nearest_class(state, np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match="state must be a MahalanobisState, got "):
        scoring.nearest_class((), np.zeros((3, 4), np.float32))
    spoilt = np.array([[0] * 6, [np.inf] * 6], np.float32)
    assert jax.jit(scoring.nearest_class)(state, spoilt)[1] == -1
    with pytest.raises(ValueError, match="features must be finite, 1 of 2 rows are not, the first is row 1"):
        scoring.nearest_class(state, spoilt)
    with pytest.raises(ValueError, match="features must be finite, 1 of 2 rows are not, the first is row 1"):
        scoring.add_class(state, np.array([[0] * 6, [np.nan] * 6], np.float32))


@pytest.mark.slow
def test_rows_spread_over_devices_give_the_same():
    train, labels = sample(0, 400, 6, smallest=1e-2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put((outputs(train, 3), labels), jax.NamedSharding(mesh, jax.P("data")))
    detector = scoring.relative_mahalanobis()
    state = detector.fit(*spread)
    wanted = score(fit(train, labels, detector), train, detector)
    np.testing.assert_allclose(detector.score(state, spread[0]), wanted, rtol=1e-3, atol=1e-3)
