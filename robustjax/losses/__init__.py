"""Per-example losses, and objectives: what a training step minimises."""

from robustjax.losses._classification import cross_entropy as cross_entropy
from robustjax.losses._objectives import Augment as Augment
from robustjax.losses._objectives import Aux as Aux
from robustjax.losses._objectives import GaussianAugmentation as GaussianAugmentation
from robustjax.losses._objectives import Objective as Objective
from robustjax.losses._objectives import Standard as Standard
from robustjax.losses._objectives import gaussian_augmentation as gaussian_augmentation
from robustjax.losses._objectives import standard as standard
