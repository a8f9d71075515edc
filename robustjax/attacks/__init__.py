"""Adversaries: configured attacks, called as ``attack(key, logits_fn, x, labels) -> x_adv``.

Inputs whose rows are spread over the devices of a mesh are attacked where they lie, each device's by themselves, and so
lies what is found: ``x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))``.
"""

from robustjax.attacks._apgd import apgd as apgd
from robustjax.attacks._apgd import apgd_targeted as apgd_targeted
from robustjax.attacks._attack import Attack as Attack
from robustjax.attacks._attack import queries_of as queries_of
from robustjax.attacks._autoattack import Evaluation as Evaluation
from robustjax.attacks._autoattack import autoattack as autoattack
from robustjax.attacks._carlini_wagner import carlini_wagner as carlini_wagner
from robustjax.attacks._compose import MinimumNorm as MinimumNorm
from robustjax.attacks._compose import at_budget as at_budget
from robustjax.attacks._compose import expectation_over_transformation as expectation_over_transformation
from robustjax.attacks._compose import robust_accuracy as robust_accuracy
from robustjax.attacks._compose import worst_of as worst_of
from robustjax.attacks._deepfool import deepfool as deepfool
from robustjax.attacks._diagnose import Diagnosis as Diagnosis
from robustjax.attacks._diagnose import diagnose as diagnose
from robustjax.attacks._fab import fab as fab
from robustjax.attacks._pgd import fgsm as fgsm
from robustjax.attacks._pgd import momentum_iterative as momentum_iterative
from robustjax.attacks._pgd import pgd as pgd
from robustjax.attacks._square import square as square
