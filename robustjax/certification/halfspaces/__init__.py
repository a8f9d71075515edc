"""Testable learning of half-spaces: a learner of noisy labels that says when its answer is not to be trusted."""

from robustjax.certification.halfspaces._learner import Result as Result
from robustjax.certification.halfspaces._learner import learn as learn
from robustjax.certification.halfspaces._learner import surrogate_loss as surrogate_loss
from robustjax.certification.halfspaces._learner import tester_learner as tester_learner
from robustjax.certification.halfspaces._testers import Statistics as Statistics
from robustjax.certification.halfspaces._testers import disagreement_bound as disagreement_bound
from robustjax.certification.halfspaces._testers import null_thresholds as null_thresholds
from robustjax.certification.halfspaces._testers import statistics as statistics
