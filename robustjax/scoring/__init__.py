"""Scores for out-of-distribution inputs: a HIGHER score is always more out-of-distribution.

Each function returns a ``Detector``, a pair of ``fit`` and ``score``. Start with ``energy`` or ``msp``, which read only
logits and need no fit, ``mahalanobis`` or ``knn``, which read features, and ``react``, which wraps another detector.

The examples below share three classes of training rows and two test rows, the second of which is foreign:

>>> rng, labels = np.random.default_rng(0), np.arange(60) % 3
>>> features = 5 * np.eye(3, 6)[labels] + rng.normal(size=(60, 6))
>>> features = np.abs(features).astype(np.float32)
>>> head = scoring.Head(kernel=np.eye(6, 3, dtype=np.float32))
>>> train = scoring.Outputs(features @ head.kernel, features)
>>> rows = np.array([[5, 1, 1, 1, 1, 1], [1, 1, 1, 5, 5, 5]], np.float32)
>>> test = scoring.Outputs(rows @ head.kernel, rows)
"""

from robustjax.scoring._detector import Detector as Detector
from robustjax.scoring._detector import Head as Head
from robustjax.scoring._detector import make_detector as make_detector
from robustjax.scoring._ensemble import ensemble as ensemble
from robustjax.scoring._ensemble import model_ensemble as model_ensemble
from robustjax.scoring._head import fdbd as fdbd
from robustjax.scoring._head import gradnorm as gradnorm
from robustjax.scoring._head import nci as nci
from robustjax.scoring._head import nnguide as nnguide
from robustjax.scoring._head import she as she
from robustjax.scoring._inputs import odin as odin
from robustjax.scoring._layers import CoveredBins as CoveredBins
from robustjax.scoring._layers import WeightedLayers as WeightedLayers
from robustjax.scoring._layers import mahalanobis_ensemble as mahalanobis_ensemble
from robustjax.scoring._layers import nac as nac
from robustjax.scoring._layers import neuron_states as neuron_states
from robustjax.scoring._logits import Temperature as Temperature
from robustjax.scoring._logits import energy as energy
from robustjax.scoring._logits import entropy as entropy
from robustjax.scoring._logits import fit_temperature as fit_temperature
from robustjax.scoring._logits import generalized_entropy as generalized_entropy
from robustjax.scoring._logits import kl_matching as kl_matching
from robustjax.scoring._logits import max_logit as max_logit
from robustjax.scoring._logits import msp as msp
from robustjax.scoring._logits import temperature_scaling as temperature_scaling
from robustjax.scoring._mahalanobis import MahalanobisState as MahalanobisState
from robustjax.scoring._mahalanobis import RelativeMahalanobisState as RelativeMahalanobisState
from robustjax.scoring._mahalanobis import add_class as add_class
from robustjax.scoring._mahalanobis import mahalanobis as mahalanobis
from robustjax.scoring._mahalanobis import nearest_class as nearest_class
from robustjax.scoring._mahalanobis import relative_mahalanobis as relative_mahalanobis
from robustjax.scoring._neighbours import knn as knn
from robustjax.scoring._shaping import ash as ash
from robustjax.scoring._shaping import dice as dice
from robustjax.scoring._shaping import feature_normalized as feature_normalized
from robustjax.scoring._shaping import react as react
from robustjax.scoring._shaping import scale as scale
from robustjax.scoring._shaping import vra as vra
from robustjax.scoring._subspace import ResidualState as ResidualState
from robustjax.scoring._subspace import VimState as VimState
from robustjax.scoring._subspace import residual as residual
from robustjax.scoring._subspace import vim as vim
from robustjax.typing import Outputs as Outputs
