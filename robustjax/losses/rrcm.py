"""Pre-training that makes the features of an image agree at all noise levels (rRCM).

Images are in [0, 1] everywhere. Noise levels t refer to images in [-1, 1], as in the paper: t is twice the standard
deviation of the noise on images in [0, 1].
"""

from robustjax.losses._rrcm import consistency_pretraining as consistency_pretraining
from robustjax.losses._rrcm import noise_levels as noise_levels
from robustjax.losses._rrcm import precondition as precondition
from robustjax.losses._rrcm import preconditioned as preconditioned
from robustjax.losses._rrcm import pretrained_model as pretrained_model
from robustjax.losses._rrcm import pretraining_state as pretraining_state
