"""No text is cut or covers another, and curves, bars and histograms can be told apart without colour."""

import itertools
import string

import numpy as np
import pytest
from matplotlib.text import Text

from robustjax import plotting
from robustjax.plotting import _canvas

LONG = "mutual_information_of_an_ensemble"
TITLE = "near: digits 6,7,8,9, permuted_pixels, textures_of_three_scales, inverted; each of them with 1,000 images"
NAMES = [f"{LONG[: 3 + i]}_{i}" for i in range(28)]


def scores(scale):
    random = np.random.default_rng(0)
    return {name: tuple(scale * random.normal([[0], [1]], 1, (2, 20))) for name in NAMES}


FIGURES = {
    "roc": lambda: plotting.roc_curves(scores(1), title=TITLE),
    "roc of all": lambda: plotting.roc_curves(scores(1), title=TITLE, most=None),
    "small scores": lambda: plotting.score_histograms(
        {name: {"digits 0,1,2,3,4": s[0], "uniform_noise": s[1]} for name, s in scores(1e-7).items()},
        title=TITLE,
        most=4,
    ),
    "large scores": lambda: plotting.score_histograms({name: {LONG: s[0]} for name, s in scores(1e5).items()}, most=2),
    "certified": lambda: plotting.certified_accuracy_curve({name * 3: ([0.5], [1]) for name in NAMES[:5]}, title=TITLE),
    "small": lambda: plotting.robust_accuracy_curve({"pgd": ([0.025], [0.5])}, title=TITLE, figure_size=(2.5, 2.5)),
    "steps": lambda: plotting.loss_over_steps(
        {name: ([1, 2, 3, 30, 40, 45, 50], np.arange(7)) for name in NAMES}, label=TITLE
    ),
    "spread": lambda: plotting.spread_curve(
        {name: ([640, 650, 1000, 150528], np.ones((4, 2))) for name in NAMES[:3]}, labels=(TITLE, TITLE), title=TITLE
    ),
    "bars": lambda: plotting.bar_chart(
        {name: {LONG: [1.0, 2.0], "far": [1.0]} for name in NAMES}, label=TITLE, title=TITLE
    ),
    "grid": lambda: plotting.image_grid(
        np.zeros((4, 8, 8, 1), np.float32), titles=[LONG] * 4, row_labels=[LONG, "image"], columns=2, title=TITLE
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_or_covers_another(name, monkeypatch):
    figure, drawn, draw = FIGURES[name](), [], Text.draw

    def recorded(text, renderer):
        drawn.append(text)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", recorded)
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in drawn if text.get_text() and text.get_visible()}
    assert len(boxes) > 5
    width, height = figure.bbox.size
    for text, box in boxes.items():
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text
    for (first, a), (second, b) in itertools.combinations(boxes.items(), 2):
        assert a.x0 >= b.x1 or b.x0 >= a.x1 or a.y0 >= b.y1 or b.y0 >= a.y1, (first, second)
    for axes in figure.axes:
        assert min(axes.get_window_extent().size) > 0.7 * figure.dpi, "the axes have no room"


def test_36_curves_differ_in_dash_or_marker():
    styles = [plotting.line_style(i) for i in range(36)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 36


def test_drawn_curves_differ_in_dash_or_marker():
    axes = plotting.roc_curves(scores(1), most=None).axes[0]
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert len(lines) == 28
    # The dashes of a line, in points, and not its style: Matplotlib names all custom dashes "--".
    assert len({(str(line._unscaled_dash_pattern), line.get_marker()) for line in lines}) == 28


@pytest.mark.parametrize(
    ("text", "inches", "lines"),
    [
        ("certified accuracy", 9.0, ["certified accuracy"]),
        ("certified accuracy", 0.8, ["certified", "accuracy"]),
        ("uniform_noise", 0.7, ["uniform_", "noise"]),
        ("a\nb", 9.0, ["a", "b"]),
        ("", 1.0, [""]),
    ],
)
def test_text_is_broken_where_it_reads_best(text, inches, lines):
    assert _canvas.wrapped(text, inches, 10.0).split("\n") == lines


def test_a_long_word_is_broken_anywhere_and_nothing_is_lost():
    lines = _canvas.wrapped(string.ascii_lowercase, 0.5, 10.0).split("\n")
    assert "".join(lines) == string.ascii_lowercase
    assert all(_canvas.inches_of(line, 10.0) <= 0.5 for line in lines)
