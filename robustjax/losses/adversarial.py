"""Adversarial training: objectives that look for bad inputs, or bad weights, before they take the loss.

Adversarial images are made for the running batch statistics (``train=False``), with weights and images under
``stop_gradient``: no gradient flows through the attack. The passes of the loss itself normalise by the statistics of
their own images and renew the running ones, clean images first where an objective has both: what a trained model
keeps is an average over all images that its loss has seen.

Objectives with an attack have two halves, ``examples`` and ``loss``, whose composition they are; :func:`awp` comes
between the two. Their metric ``robust_accuracy`` is that on adversarial images, ``accuracy`` that on clean ones.
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
