"""No random key is used twice in a run: a key is drawn with once, or split, or folded into, and never two of these."""

import collections
import contextlib
import functools

import jax
import numpy as np
import pytest

from experiments import adversarial, ood, smoothing
from experiments.claims import __main__ as claims
from experiments.claims import _frame

DRAWS = (
    "bits",
    "uniform",
    "normal",
    "truncated_normal",
    "randint",
    "bernoulli",
    "permutation",
    "choice",
    "beta",
    "laplace",
)


@contextlib.contextmanager
def recorded():
    """Counts what is done with each key: ``{key: {use: times}}``, also in compiled programs."""
    found = collections.defaultdict(collections.Counter)
    inside = []  # a draw that is made of other draws is one

    def note(use, key):
        for row in np.asarray(key).reshape(-1, 2).tolist():
            found[tuple(row)][use] += 1

    def watched(use, function):
        @functools.wraps(function)
        def call(key, *args, **kwargs):
            if not inside:
                jax.debug.callback(functools.partial(note, use), jax.random.key_data(key))
            inside.append(use)
            try:
                return function(key, *args, **kwargs)
            finally:
                inside.pop()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in (*DRAWS, "split", "fold_in"):
            use = name if name in ("split", "fold_in") else "draw"
            patch.setattr(jax.random, name, watched(use, getattr(jax.random, name)))
        jax.clear_caches()  # what is compiled already records nothing
        yield found
        jax.effects_barrier()
    jax.clear_caches()


def used_twice(found):
    return {key: dict(uses) for key, uses in found.items() if len(uses) > 1 or uses["draw"] > 1}


@pytest.mark.slow  # as all of these: other tests would compile again what clear_caches forgets
def test_a_key_that_is_used_twice_is_found():
    with recorded() as found:
        key = jax.random.key(0)
        first, second = jax.random.split(key)
        jax.jit(jax.vmap(jax.random.normal))(jax.random.split(first, 3))
        jax.random.permutation(second, 5)
    assert not used_twice(found)
    assert sum(uses["draw"] for uses in found.values()) == 4
    with recorded() as found:
        keys = jax.random.split(key, 2)
        jax.random.normal(keys[0])
        jax.lax.map(lambda i: jax.random.normal(jax.random.fold_in(key, i)), jax.numpy.arange(2))  # equals split
    assert len(used_twice(found)) == 2


COMMON = {"num_epochs": 1, "num_images": 4, "model": "mlp", "seed": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("product", "settings"),
    [
        (smoothing, {**COMMON, "num_selection": 4, "num_estimation": 20}),
        (smoothing, {**COMMON, "num_selection": 4, "num_estimation": 20, "dual": True}),
        (smoothing, {**COMMON, "num_selection": 4, "num_estimation": 20, "training": "smoothmix"}),
        (ood, {"num_epochs": 1, "model": "mlp", "seeds": 2, "detectors": ("msp", "knn"), "training": "cutmix"}),
        (adversarial, {**COMMON, "attacks": ("pgd_20", "square"), "epsilons": (0.1,), "train_steps": 2}),
        (adversarial, {**COMMON, "attacks": ("pgd_20",), "epsilons": (0.1,), "sigma": 0.5, "samples": 2}),
    ],
    ids=["smoothing", "dual", "smoothmix", "ood", "adversarial", "smoothed"],
)
def test_products(product, settings, tmp_path):
    with recorded() as found:
        product.run(product.Config(results_dir=str(tmp_path), **settings))
    assert found
    assert not used_twice(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conformal", "prototypes", "accelat", "halfspaces", "mixing"])
def test_studies(name, tmp_path):
    study = claims.study_of(name)
    with recorded() as found:
        _frame.run(study, study.tiny, _frame.Repeat(seeds=1, results_dir=str(tmp_path)))
    assert found
    assert not {key: dict(uses) for key, uses in found.items() if len(uses) > 1}  # arms share the draws of a seed
