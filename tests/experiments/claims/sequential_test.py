"""The study of sequential certification: how it trains, what it compares, and what it refuses."""

import pytest

from experiments import smoothing
from experiments.claims import sequential
from experiments.smoothing import sequential as tool


def test_training_and_comparison_are_of_one_setting():
    config = sequential.Config(dataset="mnist", model="lenet", sigma=0.25, num_images=100, radii=(0.5,), alpha=0.01)
    trained = config.training(3, "here")
    assert (trained.dataset, trained.model, trained.sigma, trained.seed) == ("mnist", "lenet", 0.25, 3)
    compared = config.comparison(str(trained.folder()), "here")
    assert compared.runs == (str(trained.folder()),)
    assert (compared.num_images, compared.radii, compared.alpha) == (100, (0.5,), 0.01)
    assert (trained.num_images, trained.num_estimation) == (1, 100)  # its own certificate is not used


def test_numbers_are_those_of_the_comparison(monkeypatch, tmp_path):
    from rich.console import Console

    from experiments.claims import _frame
    from experiments.common import runtimes

    row = {"draws": 300.0, "median": 200.0, "lost": 2.0, "gained": 1.0, "images": 10}
    rows = [
        {"question": "target_radius", "value": 0.25, "sequential": 0.5, "certify": 0.625, **row},
        {"question": "tolerance", "value": 0.1, "sequential": 0.375, "certify": 0.5, **row},
    ]
    monkeypatch.setattr(smoothing, "run", lambda config, runtime: None)
    monkeypatch.setattr(tool, "run", lambda config: rows)
    place = _frame.Place(tmp_path, runtimes.HERE, Console(quiet=True), runtimes.Watch([], None))
    assert sequential.measure(sequential.Config(), 0, place) == {
        "sequential, radius 0.25": {"certified": 0.5, **row},
        "certify, radius 0.25": {"certified": 0.625, "draws": 100_100},
        "sequential, tolerance 0.1": {"acr": 0.375, **row},
        "certify, tolerance 0.1": {"acr": 0.5, "draws": 100_100},
    }


def test_bars_ask_for_a_tenth_of_the_draws_and_a_point_of_accuracy():
    assert [str(bar) for bar in sequential.bars(sequential.Config(radii=(0.5,)))] == [
        "draws: sequential, radius 0.5 < 10010",
        "certified: sequential, radius 0.5 >= certify, radius 0.5 - 0.01",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"num_images": 0}, "num_images must be an integer of at least 1"),
        ({"radii": (0.1, 0.1)}, "radii must be given once each"),
        ({"radii": (9.0,)}, r"radii must be at most 1\.90573, the largest that 100,000 draws can certify, got 9"),
        ({"tolerances": (1.0,)}, "tolerances must lie strictly between 0 and 1"),
        ({"max_samples": 5}, "max_samples must be larger: 5 certify nothing at alpha 0.001"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sequential.Config(**settings)
