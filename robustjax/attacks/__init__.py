"""Adversaries: configured attacks, called as ``attack(key, logits_fn, x, labels) -> x_adv``."""

from robustjax.attacks._attack import Attack as Attack
from robustjax.attacks._compose import AtBudget as AtBudget
from robustjax.attacks._compose import MinimumNorm as MinimumNorm
from robustjax.attacks._compose import WorstOf as WorstOf
from robustjax.attacks._compose import at_budget as at_budget
from robustjax.attacks._compose import expectation_over_transformation as expectation_over_transformation
from robustjax.attacks._compose import robust_accuracy as robust_accuracy
from robustjax.attacks._compose import worst_of as worst_of
from robustjax.attacks._pgd import FGSM as FGSM
from robustjax.attacks._pgd import PGD as PGD
from robustjax.attacks._pgd import MomentumIterative as MomentumIterative
from robustjax.attacks._pgd import fgsm as fgsm
from robustjax.attacks._pgd import momentum_iterative as momentum_iterative
from robustjax.attacks._pgd import pgd as pgd
