"""Pure JAX functions that answer one question: how far can this model's answer be trusted?

The examples in the docstrings begin with these lines, and with the lines that the docstring of their room adds:

>>> import jax
>>> import jax.numpy as jnp
>>> import numpy as np
>>> from robustjax import attacks, certification, data, losses, metrics, models, perturbations, scoring, training
>>> np.set_printoptions(precision=2, suppress=True)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from robustjax import attacks as attacks
from robustjax import certification as certification
from robustjax import data as data
from robustjax import losses as losses
from robustjax import metrics as metrics
from robustjax import perturbations as perturbations
from robustjax import plotting as plotting
from robustjax import scoring as scoring
from robustjax import typing as typing

if TYPE_CHECKING:
    from robustjax import models as models
    from robustjax import training as training

__version__ = "0.1.0"

__all__ = [
    "attacks", "certification", "data", "losses", "metrics", "models", "perturbations", "plotting", "scoring",
    "training", "typing",
]  # fmt: skip

_LATE = ("models", "training")
"""Imported when they are first used, because Flax and Optax take longer to import than all the rest."""


def __getattr__(name: str) -> ModuleType:
    if name in _LATE:
        return importlib.import_module(f"robustjax.{name}")
    raise AttributeError(f"module 'robustjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
