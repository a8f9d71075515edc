"""The study of half-spaces: its distributions, its thresholds, what it counts, and what it refuses."""

import numpy as np
import pytest

from experiments.claims import halfspaces


def test_numbers_say_what_was_measured():
    config = halfspaces.STUDY.tiny
    limits = halfspaces.thresholds(config)._asdict()
    for seed in range(3):
        found = halfspaces.measure(config, seed)
        for numbers in found.values():
            failed = {part for part, limit in limits.items() if numbers[part] > float(limit)}
            assert not (failed and numbers["accepted"])
            for test, parts in halfspaces.TESTS.items():
                assert numbers[test] == bool(failed & {*parts})
            assert 0 <= numbers["excess"] <= 1
            assert numbers["excess_if_accepted"] == (numbers["excess"] if numbers["accepted"] else 0)
        assert found["normal"]["excess"] < config.epsilon
        best = found["normal"]["best_error"] + found["normal"]["excess"]
        assert found["normal"]["error"] == pytest.approx(best, abs=0.05)
        assert not found["gap"]["accepted"]
        assert found["gap"]["T2"]


def test_distributions_are_what_they_say():
    w = np.array([0.6, 0.8, 0.0])
    rng = np.random.default_rng(0)
    assert np.abs(halfspaces.gap(rng, 500, w) @ w).min() >= halfspaces.GAP * (1 - 1e-9)
    flat = halfspaces.flat(rng, 5000, w)
    near = flat[np.abs(flat @ w) < halfspaces.FLAT]
    assert len(near) > 50
    assert np.linalg.matrix_rank(near - np.outer(near @ w, w), tol=1e-6) == 1
    for name in ("normal", "whitened", "student", "hypercube"):
        variance = halfspaces.DISTRIBUTIONS[name](rng, 50_000, w).var(0)
        np.testing.assert_allclose(variance, 1, rtol=0.3 if name == "student" else 0.05)


def test_a_small_delta_has_the_draws_that_it_needs():
    config = halfspaces.Config(dimension=2, num_samples=30, epsilon=0.2, delta=0.01)
    assert all(np.isfinite(limit) for limit in halfspaces.thresholds(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributions": ("gap",)}, r"distributions must hold normal, and each at most once, got \('gap',\)"),
        ({"eta": 0.6}, r"eta must lie in \[0, 1/2\), got 0.6"),
        ({"epsilon": 0.0}, "epsilon must lie strictly between 0 and 1, got 0.0"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1, got 1.0"),
        ({"dimension": 1}, "dimension must be an integer of at least 2, got 1"),
        ({"num_samples": 32}, "num_samples must be an integer of at least 33, got 32"),
        ({"num_fresh": 0}, "num_fresh must be an integer of at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        halfspaces.Config(**settings)
