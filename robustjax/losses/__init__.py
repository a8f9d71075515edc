"""Per-example losses, and objectives: what a training step minimises.

Start with ``cross_entropy``, a loss, and ``standard``, the objective that minimises it; ``augmented`` puts a
perturbation before an objective. A large family of objectives has a module of its own, such as
:mod:`robustjax.losses.smoothing`.

The examples below share the logits of two examples of class 0, the second of which is misclassified:

>>> logits, labels = jnp.array([[3.0, 1.0, 0.0, -1.0], [1.0, 2.0, 0.0, -1.0]]), jnp.array([0, 0])

and a linear classifier of 2x2 images, which tells dark images (class 0) from light ones, with a batch of two images:

>>> from robustjax.typing import Batch, ModelState, Outputs
>>> def apply(state, x, *, train=False):
...     features = x.reshape(len(x), -1) - 0.5
...     return Outputs(features @ state.params["kernel"], features), state
>>> state = ModelState({"kernel": jnp.tile(jnp.array([[-1.0, 1.0]]), (4, 1))}, {})
>>> image = jnp.array([[0.1, 0.3, 0.2, 0.2], [0.7, 0.5, 0.6, 0.6]]).reshape(2, 2, 2, 1)
>>> batch = Batch(image, jnp.array([0, 1]), jnp.arange(2))
>>> key = jax.random.key(0)
"""

from robustjax.losses import adversarial as adversarial
from robustjax.losses import denoising as denoising
from robustjax.losses import outliers as outliers
from robustjax.losses import rrcm as rrcm
from robustjax.losses import smoothing as smoothing
from robustjax.losses._adversarial import boosted_cross_entropy as boosted_cross_entropy
from robustjax.losses._adversarial import difference_of_logits_ratio as difference_of_logits_ratio
from robustjax.losses._adversarial import entropy as entropy
from robustjax.losses._adversarial import kl_divergence as kl_divergence
from robustjax.losses._adversarial import margin as margin
from robustjax.losses._adversarial import targeted_difference_of_logits_ratio as targeted_difference_of_logits_ratio
from robustjax.losses._classification import cross_entropy as cross_entropy
from robustjax.losses._classification import normalized_cross_entropy as normalized_cross_entropy
from robustjax.losses._classification import soft_cross_entropy as soft_cross_entropy
from robustjax.losses._conformal import conformal_training as conformal_training
from robustjax.losses._conformal import soft_quantile as soft_quantile
from robustjax.losses._intervals import interval_training as interval_training
from robustjax.losses._mixing import adaptive_cross_entropy as adaptive_cross_entropy
from robustjax.losses._mixing import mixing_training as mixing_training
from robustjax.losses._multimodal import multimodal_margin as multimodal_margin
from robustjax.losses._multimodal import multimodal_radius as multimodal_radius
from robustjax.losses._multimodal import unimodal_margin as unimodal_margin
from robustjax.losses._objectives import Augment as Augment
from robustjax.losses._objectives import Aux as Aux
from robustjax.losses._objectives import Objective as Objective
from robustjax.losses._objectives import augmented as augmented
from robustjax.losses._objectives import cutmix as cutmix
from robustjax.losses._objectives import logit_norm as logit_norm
from robustjax.losses._objectives import mixup as mixup
from robustjax.losses._objectives import standard as standard
from robustjax.losses._prototypes import prototype_margin as prototype_margin
from robustjax.losses._prototypes import prototype_radius as prototype_radius
from robustjax.losses._rrcm import info_nce as info_nce
from robustjax.losses._scheduled import at_step as at_step
from robustjax.losses._scheduled import ramp as ramp
from robustjax.losses._scheduled import scheduled as scheduled
