"""The network that says how much a mixture of two classifiers trusts each of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from robustjax import _arguments, _validate
from robustjax.models._classifier import torch_init
from robustjax.models._initializers import zeros
from robustjax.typing import Outputs


class MixingNetwork(nnx.Module):
    """Perceptron with one logit; see :func:`mixing_network`."""

    def __init__(
        self,
        key: Key[Array, ""],
        *,
        num_inputs: int,
        hidden: Sequence[int],
        scale: float,
        bias: float,
        train_bias: float,
    ):
        _validate.key(key)
        _validate.at_least(1, num_inputs=num_inputs)
        _validate.positive(scale=scale)
        _validate.finite_number(bias=bias, train_bias=train_bias)
        if not len(hidden) or any(width < 1 for width in hidden):
            raise ValueError(f"hidden must be one or more positive widths, got {tuple(hidden)}.")
        rngs, widths = nnx.Rngs(params=key), (num_inputs, *hidden)
        self.scale, self.bias, self.train_bias = float(scale), float(bias), float(train_bias)
        self.input_norm = _norm(num_inputs, rngs)
        self.dense = nnx.List(
            [
                nnx.Linear(inputs, outputs, kernel_init=torch_init, bias_init=zeros, rngs=rngs)
                for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
            ]
        )
        self.head = nnx.Linear(widths[-1], 1, use_bias=False, kernel_init=torch_init, rngs=rngs)
        self.gamma_norm = _norm(1, rngs)

    def __call__(self, x: Float[Array, "batch inputs"]) -> Outputs:
        """Gamma of each image.

        Args:
          x: ``(batch, num_inputs)``, what the two classifiers make of it.

        Returns:
          ``logits (batch, 1)``, gamma; and ``features (batch, dim)``, the last hidden layer.
        """
        features = self.input_norm(x)
        for dense in self.dense:
            features = nnx.relu(dense(features))
        gamma, training = self.head(features), not self.gamma_norm.use_running_average
        if training:
            mean, std = jax.lax.stop_gradient((gamma.mean(), gamma.std()))
            gamma = jnp.clip(gamma, mean - 0.6 * std, mean + 0.6 * std)
        return Outputs(self.scale * self.gamma_norm(gamma) + (self.train_bias if training else self.bias), features)


@_arguments.checked
def mixing_network(
    key: Key[Array, ""],
    *,
    num_inputs: int,
    hidden: Sequence[int] = (64, 64),
    scale: float = 2.0,
    bias: float = 1.3,
    train_bias: float = 0.4,
) -> MixingNetwork:
    r"""Perceptron that tells attacked images from clean ones by what two classifiers make of them.

    .. math:: \gamma = s \cdot \mathrm{BatchNorm}(v^\top \phi(z)) + b

    Both normalisations have no parameters. In training :math:`v^\top \phi(z)` is clipped to 0.6 standard deviations
    around its mean over the batch, and the bias is another.

    The authors' is a residual network on feature maps of two depths; this one is for small classifiers, and sees their
    last features and log-probabilities. Scale, biases and clipping are theirs.

    Args:
      key: typed PRNG key of the initial parameters.
      num_inputs: features and classes of both classifiers, added up.
      hidden: widths of the hidden layers.
      scale: s, about the standard deviation of gamma.
      bias: b at inference, about the mean of gamma; above that of training, so that doubt goes to the robust
        classifier.
      train_bias: b in training.

    Returns:
      The module, ``x (batch, num_inputs) -> Outputs`` with gamma as ``logits (batch, 1)``; for
      :func:`robustjax.certification.mixing.mixture`.

    Raises:
      ValueError: if an argument is out of its range.

    Example:
      >>> gamma = lambda key, x: models.mixing_network(key, num_inputs=52)(x).logits  # 52 = 2 * (16 + 10)
      >>> jax.eval_shape(gamma, jax.random.key(0), jnp.ones((2, 52))).shape
      (2, 1)

    Reference:
      Bai et al. 2023, Improving the Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing,
      arXiv:2301.12554.
    """
    return MixingNetwork(key, num_inputs=num_inputs, hidden=hidden, scale=scale, bias=bias, train_bias=train_bias)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    settings = {"use_running_average": True, "momentum": 0.9, "epsilon": 1e-5}
    return nnx.BatchNorm(width, use_bias=False, use_scale=False, rngs=rngs, **settings)
