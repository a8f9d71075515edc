"""Functions from arrays to matplotlib figures; they neither show nor save a figure.

Start with ``certified_accuracy_curve``, ``robust_accuracy_curve``, ``score_histograms``, ``reliability_diagram`` and
``image_grid``.

The examples begin with:

>>> from robustjax import plotting
"""

from robustjax.plotting._bars import bar_chart as bar_chart
from robustjax.plotting._canvas import COLOURS as COLOURS
from robustjax.plotting._canvas import line_style as line_style
from robustjax.plotting._curves import certified_accuracy_curve as certified_accuracy_curve
from robustjax.plotting._curves import loss_over_steps as loss_over_steps
from robustjax.plotting._curves import robust_accuracy_curve as robust_accuracy_curve
from robustjax.plotting._curves import spread_curve as spread_curve
from robustjax.plotting._detectors import roc_curves as roc_curves
from robustjax.plotting._detectors import score_histograms as score_histograms
from robustjax.plotting._grids import image_grid as image_grid
from robustjax.plotting._reliability import reliability_diagram as reliability_diagram
