import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.typing import Outputs


def outputs(seed, rows=40, dim=6, classes=3):
    rng = np.random.default_rng(seed)
    return Outputs(*(jnp.asarray(3 * rng.normal(size=(rows, width)), jnp.float32) for width in (classes, dim)))


def standardised(detector, train, test):
    state = detector.fit(train)
    mine = np.asarray(detector.score(state, train), np.float64)
    return (np.asarray(detector.score(state, test)) - mine.mean()) / mine.std()


def test_scores_are_means_of_standardised_scores():
    members = scoring.energy(), scoring.gradnorm(), scoring.nnguide()
    both = scoring.ensemble(*members)
    found = both.score(both.fit(outputs(0)), outputs(1))
    np.testing.assert_allclose(
        found,
        np.mean([standardised(member, outputs(0), outputs(1)) for member in members], axis=0),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_units_of_a_member_do_not_matter():
    loud = scoring.Detector(scoring.energy().fit, lambda state, o: 1000 * scoring.energy().score(state, o) + 5)
    found, want = (
        ensemble.score(ensemble.fit(outputs(0)), outputs(1))
        for ensemble in (scoring.ensemble(one, scoring.gradnorm()) for one in (loud, scoring.energy()))
    )
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)


def test_one_member_ranks_as_it_does_alone():
    alone = scoring.ensemble(scoring.max_logit())
    found = np.asarray(alone.score(alone.fit(outputs(0)), outputs(1)))
    np.testing.assert_array_equal(np.argsort(found), np.argsort(-np.asarray(outputs(1).logits).max(-1)))


def test_ensembles_nest_with_combinators():
    head = scoring.Head(jnp.eye(6, 3))
    inner = scoring.ensemble(scoring.react(scoring.energy()), scoring.gradnorm())
    outer = scoring.react(scoring.ensemble(inner, scoring.msp()))
    scores = outer.score(outer.fit(outputs(0), None, head), outputs(1))
    assert scores.shape == (40,)
    assert jnp.isfinite(scores).all()


def test_several_models_are_scored_by_the_mean_over_models():
    train, test = ([outputs(seed, dim=dim) for seed, dim in pairs] for pairs in (((0, 6), (1, 8)), ((2, 6), (3, 8))))
    models = scoring.model_ensemble(scoring.gradnorm())
    state = models.fit(train)
    found = models.score(state, test)
    want = np.mean([standardised(scoring.gradnorm(), a, b) for a, b in zip(train, test)], axis=0)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(models.score)(state, test), found, rtol=1e-5, atol=1e-6)
    assert models is scoring.model_ensemble(detector=scoring.gradnorm())


def test_each_model_has_its_head_and_all_share_the_labels():
    heads = [scoring.Head(jnp.eye(6, 3)), scoring.Head(-jnp.eye(6, 3))]
    models, one = scoring.model_ensemble(scoring.nci()), scoring.ensemble(scoring.nci())
    found = models.score(models.fit([outputs(0)] * 2, None, heads), [outputs(1)] * 2)
    want = np.mean([one.score(one.fit(outputs(0), None, head), outputs(1)) for head in heads], axis=0)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    labels = np.asarray(outputs(0).logits).argmax(-1)
    patterns = scoring.model_ensemble(scoring.she())
    assert patterns.score(patterns.fit([outputs(0)], labels), [outputs(1)]).shape == (40,)


def fitted_models():
    models = scoring.model_ensemble(scoring.energy())
    return models, models.fit([outputs(0), outputs(1)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.ensemble(), "ensemble takes one or more detectors, got none"),
        (
            lambda: scoring.ensemble(scoring.energy),
            "detectors must be a Detector such as scoring.energy.., got <",
        ),
        (lambda: scoring.model_ensemble(3), "detector must be a Detector such as scoring.energy.., got 3"),
        (lambda: scoring.ensemble(scoring.energy()).fit(), "outputs must be given to fit ensemble, got None"),
        (lambda: scoring.ensemble(scoring.energy(), scoring.she()).fit(outputs(0)), "labels must be given to fit she"),
        (
            lambda: scoring.ensemble(scoring.msp(), scoring.energy()).fit(
                Outputs(jnp.zeros((4, 3)), jnp.zeros((4, 2)))
            ),
            "the training scores of member 0 must vary and be finite to be standardised, got standard deviation 0",
        ),
        (
            lambda: fitted_models()[0].fit(outputs(0)),
            "outputs must be a sequence of Outputs, one for each model, got one",
        ),
        (
            lambda: fitted_models()[0].fit([outputs(0)], None, [None] * 2),
            "heads must be one for each of the 1 models, got 2",
        ),
        (lambda: fitted_models()[0].fit([]), "outputs must hold one Outputs or more, got none"),
        (
            lambda: fitted_models()[0].score(fitted_models()[1], [outputs(0)]),
            r"outputs must be the same rows seen by each of 2 models, got 1 with rows \[40\]",
        ),
        (
            lambda: fitted_models()[0].score(fitted_models()[1], [outputs(0), outputs(0, rows=3)]),
            r"outputs must be the same rows seen by each of 2 models, got 2 with rows \[3, 40\]",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
