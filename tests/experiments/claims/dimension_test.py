"""Plain and dual smoothing over image sizes: what is measured of the runs, and what is refused."""

import pytest

from experiments import smoothing
from experiments.claims import _frame, dimension
from experiments.common import runtimes


def test_each_seed_is_made_of_runs_of_smoothing_at_every_size(tmp_path, monkeypatch):
    runs = []

    def run(config, runtime):
        runs.append(config)
        radius = config.image_size * (2 if config.dual else 1) + (config.dual and config.image_size == 16)
        return {"standard_accuracy": 0.5, "average_certified_radius": radius, "abstained": 0.25}

    monkeypatch.setattr(smoothing, "run", run)
    place = _frame.Place(tmp_path, runtimes.HERE, runtimes.console(), runtimes.Watch([], None))
    found = dimension.measure(dimension.Config(sizes=(8, 16), sigma=0.75), 3, place)
    assert {(run.seed, run.sigma, run.results_dir) for run in runs} == {(3, 0.75, str(tmp_path))}
    assert len({run.folder() for run in runs}) == 4
    assert {arm: numbers["dimension"] for arm, numbers in found.items()} == {
        "8 x 8, plain": 64, "8 x 8, dual": 64, "16 x 16, plain": 256, "16 x 16, dual": 256,
    }  # fmt: skip
    assert found["16 x 16, plain"]["growth"] == 2
    assert found["16 x 16, dual"]["growth"] == 33 / 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (1, 8)}, r"sizes must be at least 2 pixels, in growing order, got \(1, 8\)"),
        ({"sizes": (8, 8)}, "sizes must be at least 2 pixels, in growing order"),
        ({"num_estimation": 1}, "num_estimation must be an integer of at least 2, got 1"),
        ({"sigma": -1.0}, "sigma must be positive and finite, got -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dimension.Config(**settings)
