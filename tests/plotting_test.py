"""What is drawn is what was given: vertices of the step curve, pixels of the grid."""

import numpy as np
import pytest

from robustjax import plotting


def test_curve_is_the_step_function_of_certified_accuracy():
    radius, correct = np.array([0.5, 0.2, 1.0, 0.0]), np.array([True, True, False, False])
    figure = plotting.certified_accuracy_curve({"run": (radius, correct), "other": (radius, ~correct)})
    line = figure.axes[0].lines[0]
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.5], [0.2, 0.25], [0.5, 0.0]])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["run", "other"]
    assert figure.axes[0].get_xlim()[1] >= 1.0


def test_robust_accuracy_begins_at_the_clean_one_and_follows_the_radii():
    curves = {"pgd": ([0.2, 0.1], [0.5, 0.7]), "square": ([0.1, 0.2], [0.8, 0.6])}
    axes = plotting.robust_accuracy_curve(curves, clean=0.9, norm="l2", title="digits").axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0.9], [0.1, 0.7], [0.2, 0.5]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pgd", "square"]
    assert axes.get_xlabel().startswith("l2 epsilon")
    assert axes.get_title() == "digits"
    bare = plotting.robust_accuracy_curve(curves).axes[0]
    np.testing.assert_allclose(bare.lines[1].get_xydata(), [[0.1, 0.8], [0.2, 0.6]])


def test_loss_over_steps_is_drawn_at_the_steps_that_were_taken():
    axes = plotting.loss_over_steps({"0.1": ([1, 5, 20], [0.5, 0.9, 1.0]), "0.2": ([1, 2], [1.0, 1.5])}).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.5], [5, 0.9], [20, 1.0]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "5", "20"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("draw", "curves", "message"),
    [
        (plotting.robust_accuracy_curve, {}, "curves must hold at least one run"),
        (plotting.loss_over_steps, {"a": ([1, 2], [1.0])}, r"curves\['a'\] must be two vectors of one length"),
        (plotting.robust_accuracy_curve, {"a": ([], [])}, r"curves\['a'\] must be two vectors of one length"),
        (plotting.robust_accuracy_curve, {"a": ([0.1], [70.0])}, r"must have accuracies in \[0, 1\], got \[70.\]"),
        (plotting.loss_over_steps, {"a": ([0], [1.0])}, r"must have steps of at least 1, got \[0.\]"),
    ],
)
def test_bad_curves_of_attacks_are_named(draw, curves, message):
    with pytest.raises(ValueError, match=message):
        draw(curves)


def test_spread_is_from_the_least_to_the_largest_run():
    curves = {"plain": ([64, 256], [[0.4, 0.6], [0.2, 0.3]])}
    axes = plotting.spread_curve(curves, {"rate": ([64, 256], [0.5, 0.25])}, labels=("d", "ACR")).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[64, 0.5], [256, 0.25]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[64, 0.5], [256, 0.25]])
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.round(6).tolist()} == {(64, 0.4), (64, 0.6), (256, 0.2), (256, 0.3)}


def test_grid_shows_the_images_as_they_are():
    images = np.random.default_rng(0).uniform(-0.5, 1.5, (5, 8, 8, 1)).astype(np.float32)
    figure = plotting.image_grid(images, titles=list("abcde"), columns=3)
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == list("abcde")
    np.testing.assert_array_equal(drawn[3].images[0].get_array(), np.clip(images[3, ..., 0], 0, 1))


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curves must hold at least one run"),
        (
            {"a": (np.zeros(3), np.zeros(2, bool))},
            r"curves\['a'\] must be two vectors of one length, got \(3,\), \(2,\)",
        ),
    ],
)
def test_bad_curves_are_named(curves, message):
    with pytest.raises(ValueError, match=message):
        plotting.certified_accuracy_curve(curves)


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (np.zeros((8, 8, 1), np.float32), {}, r"images must be \(n >= 1, height, width, 1 or 3\), got \(8, 8, 1\)"),
        (np.zeros((1, 8, 8, 1), np.uint8), {}, "images must be floating"),
        (np.zeros((2, 8, 8, 1), np.float32), {"titles": ["a"]}, "titles must have one text for each of the 2 images"),
        (np.zeros((2, 8, 8, 1), np.float32), {"columns": 0}, "columns must be at least 1, got 0"),
    ],
)
def test_bad_images_are_named(images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        plotting.image_grid(images, **kwargs)


def test_histograms_share_bins_and_have_area_one():
    random = np.random.default_rng(0)
    sets = {"in": random.normal(size=400), "out": np.append(random.normal(3, 1, 99), np.inf)}
    figure = plotting.score_histograms({"msp": sets, "energy": sets, "knn": sets, "vim": sets}, columns=3, num_bins=20)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == ["msp", "energy", "knn", "vim"]
    bars = drawn[0].containers[0]
    np.testing.assert_allclose(sum(bar.get_height() * bar.get_width() for bar in bars), 1)
    assert len(bars) == 20


def test_roc_runs_through_the_rates_of_every_threshold():
    figure = plotting.roc_curves({"a": ([0.0, 1.0, 1.0], [1.0, 2.0])})
    points = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[1, 1], [2 / 3, 1], [0, 0.5], [0, 0]])


def test_bars_are_means_from_the_start():
    values = {"a": {"near": [0.6, 0.8], "far": [0.9, 0.9]}, "b": {"near": [0.5, 0.5], "far": [1.0, 0.9]}}
    axes = plotting.bar_chart(values, label="AUROC", start=0.5).axes[0]
    np.testing.assert_allclose([[bar.get_width() for bar in bars] for bars in axes.containers], [[0.2, 0], [0.4, 0.45]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plotting.score_histograms({}), "at least one detector"),
        (lambda: plotting.score_histograms({"a": {"in": [np.nan]}}), r"scores\['a'\]\['in'\] must be a vector"),
        (lambda: plotting.roc_curves({"a": ([], [1.0])}), r"scores\['a'\]\[0\] must be a vector"),
        (lambda: plotting.bar_chart({}, label="x"), "at least one entry"),
        (lambda: plotting.bar_chart({"a": {"x": 1.0}, "b": {"y": 1.0}}, label="x"), "series"),
    ],
)
def test_bad_scores_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
