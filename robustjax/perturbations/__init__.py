"""Functions from inputs to inputs that use no gradient: noise and the usual training augmentations.

Start with ``gaussian_noise``, ``random_crop`` and ``mixup``; ``compose`` applies several in turn.
"""

from robustjax.perturbations._augment import compose as compose
from robustjax.perturbations._augment import random_crop as random_crop
from robustjax.perturbations._augment import random_horizontal_flip as random_horizontal_flip
from robustjax.perturbations._keys import image_keys as image_keys
from robustjax.perturbations._mixing import Mixed as Mixed
from robustjax.perturbations._mixing import cutmix as cutmix
from robustjax.perturbations._mixing import mixup as mixup
from robustjax.perturbations._noise import gaussian_noise as gaussian_noise
from robustjax.perturbations._normal import standard_normal as standard_normal
from robustjax.perturbations._normal import threefry_2x32 as threefry_2x32
