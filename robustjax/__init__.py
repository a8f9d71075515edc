"""Pure JAX functions that answer one question: how far can this model's answer be trusted?

The examples in the docstrings begin with these lines, and with the lines that the docstring of their room adds:

>>> import jax
>>> import jax.numpy as jnp
>>> import numpy as np
>>> from robustjax import attacks, certification, data, losses, metrics, models, perturbations, scoring, training
>>> np.set_printoptions(precision=2, suppress=True)
"""

from robustjax import attacks as attacks
from robustjax import certification as certification
from robustjax import data as data
from robustjax import losses as losses
from robustjax import metrics as metrics
from robustjax import models as models
from robustjax import perturbations as perturbations
from robustjax import plotting as plotting
from robustjax import scoring as scoring
from robustjax import training as training
from robustjax import typing as typing

__version__ = "0.1.0"
