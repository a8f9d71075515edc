"""Objectives that train a base classifier for randomized smoothing, which asks it about noisy images.

All of them see noisy copies of an image. ``f_i`` are the logits of the copy with noise ``d_i``, ``p_i`` their softmax,
and ``p`` is the mean of the ``p_i``. Noise is drawn and added in float32 and not clipped, exactly as in certification.
"""

from robustjax.losses._objectives import gaussian_augmentation as gaussian_augmentation
from robustjax.losses._smoothing import consistency as consistency
from robustjax.losses._smoothing import macer as macer
from robustjax.losses._smoothing import smoothadv as smoothadv
from robustjax.losses._smoothing import smoothmix as smoothmix
from robustjax.losses._smoothing import stability as stability
