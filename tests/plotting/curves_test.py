"""The curves pass through the given points."""

import numpy as np
import pytest

from robustjax import plotting


def names_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curve_is_the_step_function_of_certified_accuracy():
    radius, correct = np.array([0.5, 0.2, 1.0, 0.0]), np.array([True, True, False, False])
    figure = plotting.certified_accuracy_curve({"run": (radius, correct), "other": (radius, ~correct)})
    line = figure.axes[0].lines[0]
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.5], [0.2, 0.25], [0.5, 0.0]])
    assert names_of(figure) == ["run", "other"]
    assert figure.axes[0].get_xlim()[1] >= 1.0


def test_robust_accuracy_begins_at_the_clean_one_and_follows_the_radii():
    curves = {"pgd": ([0.2, 0.1], [0.5, 0.7]), "square": ([0.1, 0.2], [0.8, 0.6])}
    figure = plotting.robust_accuracy_curve(curves, clean=0.9, norm="l2", title="digits")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[0, 0.9], [0.1, 0.7], [0.2, 0.5]])
    assert names_of(figure) == ["pgd", "square"]
    assert figure.axes[0].get_xlabel().startswith("l2 epsilon")
    assert figure.get_suptitle() == "digits"
    bare = plotting.robust_accuracy_curve(curves).axes[0]
    np.testing.assert_allclose(bare.lines[1].get_xydata(), [[0.1, 0.8], [0.2, 0.6]])


def test_loss_over_steps_is_drawn_at_the_steps_that_were_taken():
    axes = plotting.loss_over_steps({"0.1": ([1, 5, 20], [0.5, 0.9, 1.0]), "0.2": ([1, 2], [1.0, 1.5])}).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.5], [5, 0.9], [20, 1.0]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "5", "20"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == 0


def test_spread_is_from_the_smallest_to_the_largest_run():
    curves = {"plain": ([64, 256], [[0.4, 0.6], [0.2, 0.3]])}
    axes = plotting.spread_curve(curves, {"rate": ([64, 256], [0.5, 0.25])}, labels=("d", "ACR")).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[64, 0.5], [256, 0.25]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[64, 0.5], [256, 0.25]])
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band.round(6).tolist()} == {(64, 0.4), (64, 0.6), (256, 0.2), (256, 0.3)}
    assert axes.get_ylim()[0] == 0


def test_negative_values_stay_in_sight():
    curves = {"gain": ([0, 1], [[-0.5, -0.1], [0.2, 0.3]])}
    axes = plotting.spread_curve(curves, labels=("share", "gain"), xscale="linear").axes[0]
    assert axes.get_xscale() == "linear"
    assert axes.get_ylim()[0] < -0.5


@pytest.mark.parametrize(
    ("draw", "curves", "message"),
    [
        (plotting.certified_accuracy_curve, {}, "curves must have at least one curve"),
        (
            plotting.certified_accuracy_curve,
            {"a": (np.zeros(3), np.zeros(2, bool))},
            r"curves\['a'\] must be two vectors of one length, got \(3,\), \(2,\)",
        ),
        (plotting.robust_accuracy_curve, {}, "curves must have at least one curve"),
        (plotting.loss_over_steps, {"a": ([1, 2], [1.0])}, r"curves\['a'\] must be two vectors of one length"),
        (plotting.robust_accuracy_curve, {"a": ([], [])}, r"curves\['a'\] must be two vectors of one length"),
        (plotting.robust_accuracy_curve, {"a": ([0.1], [70.0])}, r"must have accuracies in \[0, 1\], got 70 to 70"),
        (plotting.loss_over_steps, {"a": ([0], [1.0])}, r"must have steps of at least 1, got 0"),
    ],
)
def test_bad_curves_are_named(draw, curves, message):
    with pytest.raises(ValueError, match=message):
        draw(curves)


@pytest.mark.parametrize(
    ("x", "xscale", "message"),
    [
        ([0.0, 1.0], "log", r"curves\['a'\] must have positive x on a logarithmic axis, got 0"),
        ([1.0, 2.0], "cubic", "xscale must be 'log' or 'linear', got 'cubic'"),
    ],
)
def test_bad_axes_are_named(x, xscale, message):
    with pytest.raises(ValueError, match=message):
        plotting.spread_curve({"a": (x, [[1.0], [2.0]])}, labels=("x", "y"), xscale=xscale)
