"""Classification by distances to prototypes: pure functions of arrays, and the module that trains them.

A network answers from how strongly it detects each of its components, which are images themselves. Its radius of
robustness is a formula, so that it stands here, where objectives can maximise it and certificates can report it.
"""

from robustjax.models._prototypes import PrototypeNetwork as PrototypeNetwork
from robustjax.models._prototypes import classifier as classifier
from robustjax.models._prototypes import log_detections as log_detections
from robustjax.models._prototypes import log_probabilities as log_probabilities
from robustjax.models._prototypes import network as network
from robustjax.models._prototypes import radius as radius
