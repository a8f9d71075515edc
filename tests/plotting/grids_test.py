"""The grid shows the pixels that were given."""

import numpy as np
import pytest

from robustjax import plotting


def test_grid_shows_the_images_as_they_are():
    images = np.random.default_rng(0).uniform(-0.5, 1.5, (5, 8, 8, 1)).astype(np.float32)
    figure = plotting.image_grid(
        images, titles=list("abcde"), columns=3, title="pgd, linf epsilon 8/255", row_labels=["image", "adversarial"]
    )
    drawn = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == list("abcde")
    np.testing.assert_array_equal(drawn[3].images[0].get_array(), np.clip(images[3, ..., 0], 0, 1))
    assert figure.get_suptitle() == "pgd, linf epsilon 8/255"
    assert [axes.get_ylabel() for axes in drawn] == ["image", "", "", "adversarial", ""]


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (np.zeros((8, 8, 1), np.float32), {}, r"images must be \(n >= 1, height, width, 1 or 3\), got \(8, 8, 1\)"),
        (np.zeros((1, 8, 8, 1), np.uint8), {}, "images must be floating"),
        (np.zeros((2, 8, 8, 1), np.float32), {"titles": ["a"]}, "titles must have one text for each of the 2 images"),
        (np.zeros((2, 8, 8, 1), np.float32), {"row_labels": []}, "row_labels must have one text for each of the 1 row"),
        (np.zeros((2, 8, 8, 1), np.float32), {"columns": 0}, "columns must be at least 1, got 0"),
    ],
)
def test_bad_images_are_named(images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        plotting.image_grid(images, **kwargs)
