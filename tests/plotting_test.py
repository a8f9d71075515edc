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
