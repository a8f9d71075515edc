"""What every detector promises; a new one joins with one line in DETECTORS."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import scoring
from robustjax.typing import Outputs

DETECTORS = {
    "ash_b": lambda: scoring.ash(scoring.energy(), method="B", percentile=50.0),
    "ash_p": lambda: scoring.ash(scoring.energy(), method="P", percentile=50.0),
    "ash_s": lambda: scoring.ash(scoring.energy(), percentile=50.0),
    "dice": lambda: scoring.dice(scoring.energy(), percentile=70.0),
    "energy": scoring.energy,
    "ensemble": lambda: scoring.ensemble(scoring.energy(), scoring.she(), scoring.fdbd()),
    "entropy": scoring.entropy,
    "fdbd": scoring.fdbd,
    "feature_normalized": lambda: scoring.feature_normalized(scoring.energy()),
    "generalized_entropy": scoring.generalized_entropy,
    "gradnorm": scoring.gradnorm,
    "kl_matching": scoring.kl_matching,
    "knn": lambda: scoring.knn(k=10),
    "mahalanobis": scoring.mahalanobis,
    "max_logit": scoring.max_logit,
    "msp": scoring.msp,
    "nac": scoring.nac,
    "nci": scoring.nci,
    "nnguide": scoring.nnguide,
    "react": lambda: scoring.react(scoring.energy()),
    "relative_mahalanobis": scoring.relative_mahalanobis,
    "residual": scoring.residual,
    "scale": lambda: scoring.scale(scoring.energy(), percentile=50.0),
    "she": scoring.she,
    "temperature_scaling": scoring.temperature_scaling,
    "vim": scoring.vim,
    "vra": lambda: scoring.vra(scoring.energy(), low=10.0),
}
OTHER_ARGUMENTS = {"make_detector", "mahalanobis_ensemble", "model_ensemble", "odin"}
"""Detectors whose functions take something else than the outputs of one model; their own tests hold them to this."""

CLASSES, DIM, ROWS = 3, 12, 120
MANY = 1100  # more than a block


def head():
    rng = np.random.default_rng(1)
    kernel = np.eye(DIM, CLASSES) + 0.05 * rng.normal(size=(DIM, CLASSES))
    return scoring.Head(kernel.astype(np.float32), 0.1 * rng.normal(size=CLASSES).astype(np.float32))


def outputs(seed, *, far=False, rows=ROWS):
    """Features behind a ReLU: a class lights one of the first units; what is far, only units that no class uses."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    own, spread = (0, [0.3, 2.0]) if far else (5, [0.5, 0.3])
    features = own * np.eye(CLASSES, DIM)[labels] + np.repeat(spread, [CLASSES, DIM - CLASSES]) * rng.normal(
        size=(rows, DIM)
    )
    features = np.abs(features).astype(np.float32)
    return Outputs(jnp.asarray(features @ head().kernel + head().bias), jnp.asarray(features))


def labels():
    """Those of ``outputs``, but for six rows: no model is always right."""
    return ((np.arange(ROWS) + (np.arange(ROWS) % 20 == 0)) % CLASSES).astype(np.int32)


@functools.cache
def fitted(name):
    return DETECTORS[name]().fit(outputs(0), labels(), head())


every_detector = pytest.mark.parametrize("name", DETECTORS)


def test_every_public_detector_is_here():
    factories = {
        name
        for name, function in vars(scoring).items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation in ("Detector", scoring.Detector)
    }
    assert len(factories) > 15
    assert not {name for name in factories - OTHER_ARGUMENTS if not any(key.startswith(name) for key in DETECTORS)}


@every_detector
def test_scores_are_finite_and_higher_for_what_is_far(name):
    detector = DETECTORS[name]()
    near, far = (detector.score(fitted(name), outputs(3, far=far, rows=40)) for far in (False, True))
    assert near.shape == (40,)
    assert near.dtype == jnp.float32
    near, far = np.asarray(near), np.asarray(far)
    assert np.isfinite(near).all()
    assert (near[:, None] < far[None]).mean() > 0.9


@every_detector
def test_scores_do_not_depend_on_the_company(name):
    detector, rows = DETECTORS[name](), outputs(2, rows=40)
    scores = detector.score(fitted(name), rows)
    for some in (np.arange(1), np.array([7, 31, 7, 0] * 10), np.arange(MANY) % 40):
        part = detector.score(fitted(name), Outputs(*(a[some] for a in rows)))
        np.testing.assert_allclose(part, scores[some], rtol=1e-5, atol=1e-6)
    assert detector.score(fitted(name), Outputs(*(a[:0] for a in rows))).shape == (0,)


@every_detector
def test_scores_do_not_depend_on_the_order_of_the_training_rows(name):
    detector, order = DETECTORS[name](), np.random.default_rng(4).permutation(ROWS)
    state = detector.fit(Outputs(*(a[order] for a in outputs(0))), labels()[order], head())
    near = outputs(2, rows=40)
    np.testing.assert_allclose(detector.score(state, near), detector.score(fitted(name), near), rtol=1e-3, atol=1e-4)


@every_detector
def test_a_state_is_a_tree_of_arrays_whose_training_rows_may_be_spread_over_devices(name):
    detector, near = DETECTORS[name](), outputs(2, rows=40)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(fitted(name)))
    on_host = jax.tree.map(np.asarray, fitted(name))
    scores = np.asarray(detector.score(fitted(name), near))
    np.testing.assert_array_equal(detector.score(on_host, near), scores)
    if jax.tree.leaves(on_host):  # mesh_test has the rows that are scored spread over devices
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        train = jax.device_put((outputs(0), labels()), jax.NamedSharding(mesh, jax.P("data")))
        there = jax.tree.map(np.asarray, detector.fit(*train, head()))
        np.testing.assert_allclose(detector.score(there, near), scores, rtol=1e-3, atol=1e-4)


@every_detector
def test_equal_settings_are_the_same_object(name):
    assert DETECTORS[name]() is DETECTORS[name]()
    factory = getattr(scoring, name, None)
    if factory is DETECTORS[name]:
        written = {key: value.default for key, value in inspect.signature(factory).parameters.items()}
        assert factory(**written) is factory()


@every_detector
def test_under_jit_scores_are_the_same_and_a_row_that_is_not_finite_is_refused_or_spoils_only_itself(name):
    detector, near = DETECTORS[name](), outputs(2, rows=MANY)  # among so many, XLA's max passes over a NaN
    compiled = jax.jit(detector.score)
    spoilt = Outputs(*(a.at[3, 1].set(jnp.nan) for a in near))
    for field, value in itertools.product(Outputs._fields, (jnp.nan, jnp.inf, -jnp.inf)):
        one = near._replace(**{field: getattr(near, field).at[3, 1].set(value)})
        with pytest.raises(
            ValueError, match=f"outputs.{field} must be finite, 1 of 1100 rows are not, the first is row 3"
        ):
            detector.score(fitted(name), one)
        assert np.flatnonzero(np.isnan(compiled(fitted(name), one))).tolist() == [3]
    whole = np.asarray(detector.score(fitted(name), near))
    np.testing.assert_allclose(compiled(fitted(name), near), whole, rtol=1e-4, atol=1e-5)
    scores = np.asarray(compiled(fitted(name), spoilt))
    assert np.isnan(scores[3])
    np.testing.assert_allclose(np.delete(scores, 3), np.delete(whole, 3), rtol=1e-4, atol=1e-5)


BAD = (
    (
        lambda: {"outputs": outputs(0)._replace(features=np.full((ROWS, DIM), np.inf, "f"))},
        "features must be finite",
    ),
    (
        lambda: {"outputs": outputs(0)._replace(features=np.zeros((ROWS, 2, DIM), "f"))},
        r"features must be \(120, ",
    ),
    (lambda: {"labels": labels()[1:]}, r"labels must be \(120,\) integers, got int32 \(119,\)"),
    (lambda: {"labels": labels() + 1}, r"labels must lie in 0, ..., 2, got 1 to 3"),
    (
        lambda: {"head": scoring.Head(head().kernel.T)},
        r"head.kernel must be \(dim, classes\) = \(12, 3\), got \(3, 12\)",
    ),
    (lambda: {"head": head()._replace(bias=np.zeros(2, np.float32))}, r"head.bias must be \(3,\), got \(2,\)"),
)


@every_detector
def test_bad_arguments_of_fit_are_refused(name):
    for bad, message in BAD:
        with pytest.raises(ValueError, match=message):
            DETECTORS[name]().fit(**{"outputs": outputs(0), "labels": labels(), "head": head()} | bad())


@every_detector
def test_what_is_missing_is_named(name):
    try:
        DETECTORS[name]().fit(outputs(0))
    except ValueError as error:
        assert "must be given to fit" in str(error)  # noqa: PT017


COARSE = [
    (name, jnp.bfloat16) for name in ("kl_matching", "knn", "mahalanobis", "react", "relative_mahalanobis", "vim")
]


@pytest.mark.parametrize(("name", "dtype"), [*COARSE, ("residual", jnp.float16)])
def test_coarse_outputs_are_taken_as_float32(name, dtype):
    detector = DETECTORS[name]()
    train, test = (jax.tree.map(lambda a: a.astype(dtype), some) for some in (outputs(0), outputs(2, rows=40)))
    wide, tested = (jax.tree.map(lambda a: a.astype(np.float32), some) for some in (train, test))
    coarse = jax.tree.map(lambda a: a.astype(dtype), head())
    found = detector.score(detector.fit(train, labels(), coarse), test)
    want = detector.score(detector.fit(wide, labels(), jax.tree.map(lambda a: a.astype(np.float32), coarse)), tested)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


OF_LOGITS = ["energy", "entropy", "generalized_entropy", "kl_matching", "max_logit", "msp", "temperature_scaling"]


@every_detector
def test_bare_logits_are_taken_by_what_reads_only_logits_and_refused_by_name_by_the_rest(name):
    detector, (train, _), (near, _) = DETECTORS[name](), outputs(0), outputs(2, rows=40)
    if name in OF_LOGITS:
        state = detector.fit(train, labels(), head())
        assert jax.tree.all(jax.tree.map(np.array_equal, state, fitted(name)))
        want = np.asarray(detector.score(fitted(name), outputs(2, rows=40)))
        np.testing.assert_array_equal(detector.score(state, near), want)
        np.testing.assert_array_equal(detector.score(state, np.asarray(near)), want)
        if name == "energy":
            np.testing.assert_allclose(jax.jit(detector.score)(state, near), want, rtol=1e-4, atol=1e-5)
    else:
        for call in (lambda: detector.fit(train, labels(), head()), lambda: detector.score(fitted(name), near)):
            with pytest.raises(ValueError, match=r"outputs must be Outputs\(logits, features\), because this detector"):
                call()


def test_an_ensemble_of_what_reads_only_logits_takes_bare_logits():
    for detector, several in (
        (scoring.ensemble(scoring.energy(), scoring.kl_matching()), lambda rows: rows),
        (scoring.model_ensemble(scoring.entropy()), lambda rows: [rows, rows * 2]),
    ):
        (train, _), (near, _) = outputs(0), outputs(2, rows=40)
        state = detector.fit(several(train), labels())
        with_features = jax.tree.map(lambda logits: Outputs(logits, logits[:, :1]), several(near))
        np.testing.assert_array_equal(detector.score(state, several(near)), detector.score(state, with_features))
    with pytest.raises(ValueError, match="outputs must be a sequence of Outputs, one for each model, got one Array"):
        detector.fit(train)


OF_CLASSES = ["dice", "fdbd", "kl_matching", "nac", "nci", "react", "she"]
OF_FEATURES = [name for name in OF_CLASSES if name != "kl_matching"]
OF_FEATURES += ["knn", "mahalanobis", "nnguide", "relative_mahalanobis", "residual", "vim"]


@pytest.mark.parametrize(
    ("name", "field"),
    [*((name, "logits") for name in OF_CLASSES), *((name, "features") for name in OF_FEATURES)],
)
def test_rows_of_another_width_than_the_fitted_ones_are_refused(name, field):
    near = outputs(2, rows=40)
    columns = getattr(near, field).shape[1]
    for width in (columns - 1, columns + 1):
        other = near._replace(**{field: jnp.ones((40, width))})
        message = rf"outputs.{field} must be \(40, {columns}\), as the state was fitted on, got \(40, {width}\)"
        with pytest.raises(ValueError, match=message):
            DETECTORS[name]().score(fitted(name), other)


@pytest.mark.parametrize("name", ["ensemble", "temperature_scaling", *sorted({*OF_CLASSES, *OF_FEATURES})])
def test_a_state_of_another_detector_is_refused(name):
    for state in (None, (), fitted("vim" if name != "vim" else "residual")):
        message = f"state must come from fit of this detector, got {type(state).__name__}"
        with pytest.raises(ValueError, match=message):
            DETECTORS[name]().score(state, outputs(2, rows=40))


@pytest.mark.parametrize(
    "name", ["she", "nnguide", "fdbd", "nci", "mahalanobis", "relative_mahalanobis", "residual", "vim"]
)
def test_features_whose_products_leave_float32_are_refused(name):
    """Times 1e20 or 1e-20, with a head to match, the network is the same, and scores would be constant or infinite."""
    train = outputs(0)
    for scale in (2.0**66, 2.0**-66):
        scaled = train._replace(features=train.features * scale)
        with pytest.raises(ValueError, match=f"outputs.features must have a largest magnitude .* to fit {name}, got"):
            getattr(scoring, name)().fit(scaled, labels(), scoring.Head(head().kernel / scale, head().bias))


def test_scores_beyond_float32_are_refused():
    near = outputs(2, rows=40)
    huge = near._replace(features=near.features.at[7].set(1e38))
    with pytest.raises(
        ValueError, match="state and outputs must be finite .*, 1 of 40 scores are NaN, the first of row 7"
    ):
        scoring.relative_mahalanobis().score(fitted("relative_mahalanobis"), huge)


def test_a_head_may_be_nested_lists():
    state = scoring.fdbd().fit(outputs(0), head=tuple(a.tolist() for a in head()))
    assert all((a == b).all() for a, b in zip(state, fitted("fdbd")))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scoring.fdbd().fit(outputs(0), head=(*head(), 1)),
            r"head must be Head\(kernel, bias\), got tuple of 3",
        ),
        (lambda: scoring.fdbd().fit(outputs(0), head=head().kernel), r"head must be Head\(kernel, bias\), got ndarray"),
        (lambda: scoring.fdbd().fit(outputs(0), head=(None, 1)), r"head must be Head\(kernel, bias\), got tuple of 2"),
        (
            lambda: scoring.msp().fit(tuple(outputs(0))),
            r"outputs must be Outputs\(logits, features\) or logits .*, got tuple",
        ),
        (
            lambda: scoring.msp().score((), tuple(outputs(0))),
            r"outputs must be Outputs\(logits, features\) or logits .*, got tuple",
        ),
        (lambda: scoring.knn(k=np.array([3])), r"k must be an integer, got int64 of shape \(1,\)"),
        (
            lambda: scoring.react(scoring.energy(), percentile="90"),
            "percentile must be a number, got '90'",
        ),
        (lambda: scoring.nci(alpha="1"), "alpha must be a number, got '1'"),
    ],
)
def test_other_types_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rows_and_a_broken_head_are_refused():
    rows, labels = outputs(0, rows=20), jnp.arange(20) % CLASSES
    empty = Outputs(rows.logits[:0], rows.features[:0])
    with pytest.raises(ValueError, match="outputs must hold at least one row to fit on, got none"):
        scoring.fdbd().fit(empty, labels[:0], scoring.Head(jnp.ones((DIM, CLASSES)), None))
    for name, head in {
        "kernel": scoring.Head(jnp.full((DIM, CLASSES), jnp.nan), None),
        "bias": scoring.Head(jnp.ones((DIM, CLASSES)), jnp.full(CLASSES, jnp.inf)),
    }.items():
        with pytest.raises(ValueError, match=f"head.{name} must be finite"):
            scoring.fdbd().fit(rows, labels, head)
