"""The reliability diagram passes through the points of its bins."""

import numpy as np
import pytest

from robustjax import metrics, plotting


def test_points_are_those_of_the_bins_and_shares_stand_below():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    figure = plotting.reliability_diagram({"cnn": metrics.reliability(probabilities, [0, 0, 1, 0])}, title="digits")
    above, below = figure.axes
    np.testing.assert_allclose(above.lines[0].get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(above.lines[1].get_xydata(), [[0.6, 0], [0.8, 1], [0.9, 1]])
    np.testing.assert_allclose(
        [segment[1] for segment in below.collections[0].get_segments()], [[0.6, 0.25], [0.8, 0.25], [0.9, 0.5]]
    )
    assert figure.get_suptitle() == "digits"


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "curves must have at least one entry, got none"),
        ({"a": ([0.5], [0.5, 1.0], [1.0])}, r"curves\['a'\] must have as many confidences"),
        ({"a": ([], [], [])}, r"curves\['a'\] must have as many .* at least one"),
        ({"a": ([0.5], [np.nan], [1.0])}, r"curves\['a'\] must have numbers in \[0, 1\]"),
    ],
)
def test_what_cannot_be_drawn_is_named(curves, message):
    with pytest.raises(ValueError, match=message):
        plotting.reliability_diagram(curves)
