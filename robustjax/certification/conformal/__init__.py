"""Conformal prediction: sets of labels that contain the true label with a given probability, also under attack.

The examples below continue with scores of 99 calibration inputs of two classes:

>>> from robustjax.certification import conformal
>>> rng = np.random.default_rng(0)
>>> labels = rng.integers(2, size=99)
>>> wrong = np.arange(2) != labels[:, None]
>>> calibration = rng.uniform(size=(99, 2)) / 2 + wrong / 2  # lower for the true labels
"""

from robustjax.certification.conformal._scores import ScoreFn as ScoreFn
from robustjax.certification.conformal._scores import aps as aps
from robustjax.certification.conformal._scores import ptt as ptt
from robustjax.certification.conformal._scores import raps as raps
from robustjax.certification.conformal._scores import thr as thr
from robustjax.certification.conformal._sets import conformal_quantile as conformal_quantile
from robustjax.certification.conformal._sets import prediction_sets as prediction_sets
from robustjax.certification.conformal._sets import rscp as rscp
from robustjax.certification.conformal._sets import rscp_plus as rscp_plus
from robustjax.certification.conformal._sets import split_conformal as split_conformal
from robustjax.certification.conformal._smoothed import SmoothedScores as SmoothedScores
from robustjax.certification.conformal._smoothed import smoothed_scores as smoothed_scores
