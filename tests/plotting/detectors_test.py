"""Histograms have area one, ROC curves pass through the rates of every threshold, and the best detectors are shown."""

import numpy as np
import pytest

from robustjax import metrics, plotting


def test_histograms_share_bins_and_have_area_one():
    random = np.random.default_rng(0)
    sets = {"in": random.normal(size=400), "out": np.append(random.normal(3, 1, 99), np.inf)}
    figure = plotting.score_histograms({"msp": sets, "energy": sets, "knn": sets, "vim": sets}, columns=3, num_bins=20)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == ["msp", "energy", "knn", "vim"]
    bars = drawn[0].containers[0]
    np.testing.assert_allclose(sum(bar.get_height() * bar.get_width() for bar in bars), 1)
    assert len(bars) == 20
    middle, height = drawn[0].lines[0].get_xydata().T
    np.testing.assert_allclose(middle, [bar.get_x() + bar.get_width() / 2 for bar in bars])
    np.testing.assert_allclose(height.sum() * bars[0].get_width(), 1)


def test_roc_runs_through_the_rates_of_every_threshold():
    figure = plotting.roc_curves({"a": ([0.0, 1.0, 1.0], [1.0, 2.0])})
    points = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[1, 1], [2 / 3, 1], [0, 0.5], [0, 0]])


@pytest.fixture(scope="module")
def pairs():
    random = np.random.default_rng(0)
    return {f"detector_{i}": (random.normal(0, 1, 50), random.normal(i * 7 % 10 / 4, 1, 50)) for i in range(10)}


@pytest.mark.parametrize(("most", "count"), [(8, 8), (None, 10)])
def test_the_best_detectors_are_shown_and_the_rest_is_counted(pairs, most, count):
    areas = {name: metrics.auroc(*pair) for name, pair in pairs.items()}
    best = sorted(areas, key=areas.get, reverse=True)[:count]
    note = {"AUROC"} if count == 10 else {f"AUROC of the best {count} of 10 detectors; {10 - count} left out"}
    legend = plotting.roc_curves(pairs, most=most).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [f"{name}, {areas[name]:.3f}" for name in best]
    assert {legend.get_title().get_text()} == note

    sets = {name: {"in": pair[0], "near": pair[1][:25], "far": pair[1][25:]} for name, pair in pairs.items()}
    figure = plotting.score_histograms(sets, most=most)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [name for name in pairs if name in best]
    assert (f"; {10 - count} left out" in figure.legends[0].get_title().get_text()) == (count < 10)


def test_one_set_has_no_best_detector():
    figure = plotting.score_histograms({name: {"in": [0.0, 1.0]} for name in "abc"}, most=2)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.score_histograms({}), "at least one detector"),
        (lambda: plotting.score_histograms({"a": {"in": [np.nan]}}), r"scores\['a'\]\['in'\] must be a vector"),
        (lambda: plotting.roc_curves({"a": ([], [1.0])}), r"scores\['a'\]\[0\] must be a vector"),
        (lambda: plotting.roc_curves({"a": ([0.0], [1.0])}, most=0), "most must be an integer of at least 1, got 0"),
    ],
)
def test_bad_scores_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
