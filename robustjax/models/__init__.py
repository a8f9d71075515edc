"""Image classifiers as Flax modules, and pure functions made of them.

``create`` builds a model by its name, and ``functional`` splits a model into pure functions and its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Key

from robustjax import _arguments
from robustjax.models import prototypes as prototypes
from robustjax.models._classifier import Classifier as Classifier
from robustjax.models._denoiser import ImageFunctional as ImageFunctional
from robustjax.models._denoiser import denoiser as denoiser
from robustjax.models._denoiser import image_functional as image_functional
from robustjax.models._denoiser import noise_predictor as noise_predictor
from robustjax.models._functional import Functional as Functional
from robustjax.models._functional import functional as functional
from robustjax.models._functional import num_parameters as num_parameters
from robustjax.models._mixing import mixing_network as mixing_network
from robustjax.models._multimodal import multimodal as multimodal
from robustjax.models._normalized import normalized as normalized
from robustjax.models._resnet import resnet18 as resnet18
from robustjax.models._resnet import resnet20 as resnet20
from robustjax.models._resnet import resnet50 as resnet50
from robustjax.models._resnet import resnet56 as resnet56
from robustjax.models._resnet import resnet110 as resnet110
from robustjax.models._small import cnn as cnn
from robustjax.models._small import lenet as lenet
from robustjax.models._small import mlp as mlp
from robustjax.models._small import strided_cnn as strided_cnn
from robustjax.models._torch import from_torch as from_torch
from robustjax.models._torch_weights import load_torch_weights as load_torch_weights
from robustjax.models._wide_resnet import wide_resnet as wide_resnet

MODELS: dict[str, Callable[..., Classifier]] = {
    "mlp": mlp,
    "lenet": lenet,
    "cnn": cnn,
    "strided_cnn": strided_cnn,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "wide_resnet": wide_resnet,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
"""Constructors by name."""


@_arguments.checked
def create(name: str, key: Key[Array, ""], **settings: Any) -> Classifier:
    """Builds a model by its name, for configurations.

    Args:
      name: one of ``MODELS``.
      key: typed PRNG key of the initial parameters.
      **settings: keyword arguments of that model.

    Returns:
      The module.

    Raises:
      ValueError: if no model has this name.

    Example:
      >>> module = models.create("mlp", jax.random.key(0), hidden=(), image_shape=(8, 8, 1))
      >>> module(jnp.ones((2, 8, 8, 1))).logits.shape
      (2, 10)
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}.")
    return MODELS[name](key, **settings)
