"""Numbers computed from scores, labels and certificates.

``certified_accuracy`` and ``average_certified_radius`` summarise certificates, ``detection_metrics`` summarises scores
of a detector, and ``expected_calibration_error`` summarises probabilities.
"""

from robustjax.metrics._bootstrap import BootstrapInterval as BootstrapInterval
from robustjax.metrics._bootstrap import bootstrap_interval as bootstrap_interval
from robustjax.metrics._calibration import Reliability as Reliability
from robustjax.metrics._calibration import aurc as aurc
from robustjax.metrics._calibration import brier_score as brier_score
from robustjax.metrics._calibration import expected_calibration_error as expected_calibration_error
from robustjax.metrics._calibration import maximum_calibration_error as maximum_calibration_error
from robustjax.metrics._calibration import negative_log_likelihood as negative_log_likelihood
from robustjax.metrics._calibration import reliability as reliability
from robustjax.metrics._certified import average_certified_radius as average_certified_radius
from robustjax.metrics._certified import certified_accuracy as certified_accuracy
from robustjax.metrics._certified import certified_accuracy_lower_bound as certified_accuracy_lower_bound
from robustjax.metrics._detection import DetectionMetrics as DetectionMetrics
from robustjax.metrics._detection import aupr as aupr
from robustjax.metrics._detection import auroc as auroc
from robustjax.metrics._detection import detection_error as detection_error
from robustjax.metrics._detection import detection_metrics as detection_metrics
from robustjax.metrics._detection import detection_metrics_on_device as detection_metrics_on_device
from robustjax.metrics._detection import fpr_at_tpr as fpr_at_tpr
from robustjax.metrics._detection import ranks as ranks
