"""Testable learning of half-spaces: learning from noisy labels, with a test of whether the answer can be trusted.

The examples below learn a half-space of three dimensions from 3000 labels, a tenth of which are wrong:

>>> from robustjax.certification import halfspaces
>>> rng, normal = np.random.default_rng(0), np.array([1.0, 0.0, 0.0], np.float32)
>>> inputs = rng.normal(size=(3000, 3)).astype(np.float32)
>>> targets = (np.sign(inputs @ normal) * np.where(rng.uniform(size=3000) < 0.1, -1, 1)).astype(np.float32)
"""

from robustjax.certification.halfspaces._learner import Result as Result
from robustjax.certification.halfspaces._learner import learn as learn
from robustjax.certification.halfspaces._learner import surrogate_loss as surrogate_loss
from robustjax.certification.halfspaces._learner import tester_learner as tester_learner
from robustjax.certification.halfspaces._testers import Statistics as Statistics
from robustjax.certification.halfspaces._testers import disagreement_bound as disagreement_bound
from robustjax.certification.halfspaces._testers import null_thresholds as null_thresholds
from robustjax.certification.halfspaces._testers import statistics as statistics
