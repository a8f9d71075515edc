"""Adversarial training: objectives that search for adversarial inputs, or weights, before they compute the loss.

The attack sees the model with its running batch statistics (``train=False``), and no gradient flows through it: weights
and images are under ``stop_gradient``. The forward passes of the loss use the statistics of their own images and update
the running statistics, with the clean images first where an objective has both. A trained model thus keeps an average
over all images that its loss has seen.

An objective with an attack is the composition of two methods, ``examples`` and ``loss``; :func:`awp` acts between the
two. The metric ``robust_accuracy`` is the accuracy on adversarial images, ``accuracy`` the accuracy on clean images.

The examples share an attack that turns the answer for the second image:

>>> attack = attacks.pgd(epsilon=0.2, steps=2, keep="last")
"""

from robustjax.losses._adversarial_training import AdversarialObjective as AdversarialObjective
from robustjax.losses._adversarial_training import Adversary as Adversary
from robustjax.losses._adversarial_training import Examples as Examples
from robustjax.losses._adversarial_training import adversarial_training as adversarial_training
from robustjax.losses._adversarial_training import awp as awp
from robustjax.losses._adversarial_training import entropy_regularization as entropy_regularization
from robustjax.losses._adversarial_training import logit_pairing as logit_pairing
from robustjax.losses._adversarial_training import mart as mart
from robustjax.losses._adversarial_training import trades as trades
