import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from robustjax import scoring
from robustjax.scoring import _subspace
from robustjax.typing import Outputs

DIM, CLASSES = 24, 5


def head(seed=0):
    rng = np.random.default_rng(seed)
    return scoring.Head(rng.normal(size=(DIM, CLASSES)).astype(np.float32), rng.normal(size=5).astype(np.float32))


def outputs(seed, rows, *, smallest=0.1, offset=0.5):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(DIM, DIM)))[0]
    features = (rng.normal(size=(rows, DIM)) * np.geomspace(1, smallest, DIM)) @ basis + offset
    features = features.astype(np.float32)
    return Outputs(jnp.asarray(features @ head().kernel + head().bias), jnp.asarray(features))


def by_eigenvectors(train, test, principal_dim):
    """Origin, residuals of train and test in float64, by the equations of the paper."""
    kernel, bias = (np.asarray(a, np.float64) for a in head())
    origin = -np.linalg.pinv(kernel.T) @ bias
    centred, tested = (np.asarray(o.features, np.float64) - origin for o in (train, test))
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    complement = vectors[:, : DIM - principal_dim]
    return origin, *(np.linalg.norm(rows @ complement, axis=1) for rows in (centred, tested))


@pytest.mark.parametrize(("principal_dim", "smallest"), [(1, 0.1), (23, 0.1), (None, 0.1), (None, 1e-3)])
def test_equal_the_equations_in_float64(principal_dim, smallest):
    train, test = outputs(1, 400, smallest=smallest), outputs(2, 50, smallest=smallest)
    origin, inside, wanted = by_eigenvectors(train, test, principal_dim or DIM // 2)
    detector = scoring.residual(principal_dim=principal_dim)
    state = detector.fit(train, head=head())
    np.testing.assert_allclose(state.origin, origin, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.origin @ head().kernel, -head().bias, rtol=1e-4)  # where the logits are zero
    np.testing.assert_allclose(detector.score(state, test), wanted, rtol=1e-3, atol=1e-6)
    detector = scoring.vim(principal_dim=principal_dim)
    state = detector.fit(train, head=head())
    logits = np.asarray(train.logits, np.float64)
    alpha = logits.max(1).mean() / inside.mean()
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-4)
    energy = logsumexp(np.asarray(test.logits, np.float64), axis=1)
    np.testing.assert_allclose(detector.score(state, test), alpha * wanted - energy, rtol=1e-3, atol=1e-3)


def test_virtual_logit_is_on_average_the_largest_logit():
    train = outputs(1, 400)
    detector = scoring.vim()
    state = detector.fit(train, head=head())
    virtual = detector.score(state, train) + jax.nn.logsumexp(train.logits, axis=1)
    np.testing.assert_allclose(virtual.mean(), train.logits.max(1).mean(), rtol=1e-5)


def test_a_known_subspace_is_found_although_its_features_are_large():
    # Training rows fill the first four coordinates and hardly the others: the residual is the length of those.
    rng = np.random.default_rng(3)
    kernel = np.eye(DIM, CLASSES, dtype=np.float32)

    def rows(count, outside):
        features = np.concatenate([100 * rng.normal(size=(count, 4)), outside * rng.normal(size=(count, DIM - 4))], 1)
        features = jnp.asarray(features, jnp.float32)
        return Outputs(features @ kernel + 1, features)

    detector = scoring.residual(principal_dim=4)
    state = detector.fit(rows(400, 1e-2), head=scoring.Head(kernel))
    assert (state.origin == 0).all()
    test = rows(30, 1.0)
    wanted = np.linalg.norm(test.features[:, 4:], axis=1)
    np.testing.assert_allclose(detector.score(state, test), wanted, rtol=1e-3)


def test_default_dimension_is_that_of_the_paper():
    dims = {2048: 1000, 2047: 512, 768: 512, 767: 383, 512: 256, 2: 1}
    assert {dim: _subspace._principal_dim(None, np.zeros((1, dim))) for dim in dims} == dims
    train = outputs(1, 400)
    assert scoring.residual().fit(train, head=head()).complement.shape == (DIM, DIM // 2)


@pytest.mark.parametrize("factory", [scoring.vim, scoring.residual])
def test_fewer_rows_than_dimensions(factory):
    train, test = outputs(1, 15), outputs(2, 20)
    detector = factory(principal_dim=10)
    scores = detector.score(detector.fit(train, head=head()), test)
    origin, inside, wanted = by_eigenvectors(train, test, 10)
    if factory is scoring.vim:
        wanted = np.asarray(train.logits).max(1).mean() / inside.mean() * wanted - logsumexp(test.logits, axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factory", [scoring.vim, scoring.residual])
def test_bad_settings_are_refused(factory):
    with pytest.raises(ValueError, match="principal_dim must be an integer of at least 1, got 0"):
        factory(principal_dim=0)
    with pytest.raises(ValueError, match="principal_dim must lie in 1, ..., 23 for 24 features, got 24"):
        factory(principal_dim=24).fit(outputs(1, 40), head=head())
    with pytest.raises(ValueError, match=f"head must be given to fit {factory.__name__}, got None"):
        factory().fit(outputs(1, 40))


def test_an_alpha_without_meaning_is_refused():
    train = outputs(1, 400)
    with pytest.raises(ValueError, match="positive mean of the largest entries, got -"):
        scoring.vim().fit(train._replace(logits=train.logits - 100), head=head())
    with pytest.raises(
        ValueError, match="principal_dim must leave a residual of the training features, 10 leaves none"
    ):
        scoring.vim(principal_dim=10).fit(outputs(1, 10), head=head())
