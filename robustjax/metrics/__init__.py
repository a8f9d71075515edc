"""Numbers computed from scores, labels and certificates."""

from robustjax.metrics._certified import average_certified_radius as average_certified_radius
from robustjax.metrics._certified import certified_accuracy as certified_accuracy
from robustjax.metrics._certified import certified_accuracy_lower_bound as certified_accuracy_lower_bound
