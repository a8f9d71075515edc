"""Bars end at the means."""

import numpy as np
import pytest

from robustjax import plotting


def test_bars_are_means_from_the_start():
    values = {"a": {"near": [0.6, 0.8], "far": [0.9, 0.9]}, "b": {"near": [0.5, 0.5], "far": [1.0, 0.9]}}
    axes = plotting.bar_chart(values, label="AUROC", start=0.5).axes[0]
    np.testing.assert_allclose([[bar.get_width() for bar in bars] for bars in axes.containers], [[0.2, 0], [0.4, 0.45]])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 2


@pytest.mark.parametrize(
    ("values", "message"), [({}, "at least one entry"), ({"a": {"x": 1.0}, "b": {"y": 1.0}}, "the series")]
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        plotting.bar_chart(values, label="x")
