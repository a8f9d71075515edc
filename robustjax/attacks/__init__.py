"""Adversaries: configured attacks, called as ``attack(key, logits_fn, x, labels) -> x_adv``.

Start with ``pgd``, one attack of a known cost. ``autoattack`` is the evaluation that papers report, and
``robust_accuracy`` runs any attack over a data set. ``diagnose`` asks whether a model only hides its gradients.

Inputs whose rows are sharded over the devices of a mesh are attacked in place: each device attacks its own rows, and
the result has the same sharding. Shard x by ``jax.device_put(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))``.

The examples below attack a classifier that answers with the brightest of ten pixels. Its answer for the first image
changes at a distance of 0.1 in linf and 0.14 in l2, its answer for the second image at 0.2 and 0.28:

>>> def logits_fn(x):
...     return 10 * x.reshape(len(x), -1)
>>> x = jnp.full((2, 2, 5, 1), 0.5).at[:, 0, 0, 0].set(jnp.array([0.7, 0.9]))
>>> labels, key = jnp.array([0, 0]), jax.random.key(0)
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
