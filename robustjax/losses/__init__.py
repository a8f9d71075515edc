"""Per-example losses, and objectives: what a training step minimises."""

from robustjax.losses._adversarial import difference_of_logits_ratio as difference_of_logits_ratio
from robustjax.losses._adversarial import kl_divergence as kl_divergence
from robustjax.losses._adversarial import margin as margin
from robustjax.losses._adversarial import targeted_difference_of_logits_ratio as targeted_difference_of_logits_ratio
from robustjax.losses._classification import cross_entropy as cross_entropy
from robustjax.losses._classification import logit_norm as logit_norm
from robustjax.losses._classification import soft_cross_entropy as soft_cross_entropy
from robustjax.losses._objectives import Augment as Augment
from robustjax.losses._objectives import Aux as Aux
from robustjax.losses._objectives import CutMix as CutMix
from robustjax.losses._objectives import GaussianAugmentation as GaussianAugmentation
from robustjax.losses._objectives import LogitNorm as LogitNorm
from robustjax.losses._objectives import Mixup as Mixup
from robustjax.losses._objectives import Objective as Objective
from robustjax.losses._objectives import Standard as Standard
from robustjax.losses._objectives import gaussian_augmentation as gaussian_augmentation
from robustjax.losses._objectives import standard as standard
from robustjax.losses._outliers import EnergyBounded as EnergyBounded
from robustjax.losses._outliers import OutlierExposure as OutlierExposure
from robustjax.losses._outliers import energy_bounded as energy_bounded
from robustjax.losses._outliers import outlier_exposure as outlier_exposure
