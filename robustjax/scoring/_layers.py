"""Detectors that read several layers of a model.

Their first argument is ``layers_fn(x) -> {name: array}``; ``fit`` and ``score`` take ``x``: any tree of arrays whose
first axis is the batch. ``x`` may be images that go through a model, or layers that were computed before, with
``lambda layers: layers`` as ``layers_fn``. Each array is ``(batch, ..., channels)`` and is averaged over the axes in
between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.scoring._detector import (
    BLOCK,
    Detector,
    checked_labels,
    fitted_shapes,
    make_detector,
    require,
    sharding_of_rows,
)
from robustjax.scoring._inputs import descend, of_inputs
from robustjax.scoring._mahalanobis import mahalanobis
from robustjax.typing import Outputs

Layers = Mapping[str, Array]
"""Arrays ``(batch, ..., channels)`` by the name of the layer."""

LayersFn = Callable[[Any], Layers]
"""From a tree of arrays with the batch as first axis to layers; each row independently."""


class CoveredBins(NamedTuple):
    """State of ``nac``.

    Attributes:
      covered: for each layer ``(bins, channels)``, in [0, 1], the coverage of each bin of the states of a neuron.
      kernel: ``(dim, classes)`` of the last layer, where the detector reads ``Outputs``; None where it reads layers.
    """

    covered: dict[str, Float[Array, "bins channels"]]
    kernel: Float[Array, "dim classes"] | None


class WeightedLayers(NamedTuple):
    """State of ``mahalanobis_ensemble``.

    Attributes:
      gaussians: for each layer, the state of ``mahalanobis``.
      weights: for each layer, the weight of its distance.
      bias: the constant of the weighted sum.
    """

    gaussians: dict[str, Any]
    weights: dict[str, Float[Array, ""]]
    bias: Float[Array, ""]


@jax.jit
def _pooled(layers_fn, x):
    layers = layers_fn(x)
    rows = jax.tree.leaves(x)[0].shape[0]
    if not isinstance(layers, Mapping) or not layers:
        got = "no layer" if isinstance(layers, Mapping) else type(layers).__name__
        raise ValueError(f"layers_fn must return a dictionary of arrays by layer, got {got}.")
    for name, layer in layers.items():
        if layer.ndim < 2 or layer.shape[0] != rows:
            raise ValueError(f"layers_fn must return ({rows}, ..., channels), got {layer.shape} for layer {name!r}.")
    return {name: a.astype(jnp.float32).mean(tuple(range(1, a.ndim - 1))) for name, a in layers.items()}


@_arguments.checked
def neuron_states(
    activations_fn: Callable[[Array, Mapping[str, Array]], Layers],
    x: Float[Array, "batch ..."],
    *,
    layers: Sequence[str],
    logits: str = "head",
) -> dict[str, Float[Array, "batch channels"]]:
    r"""Computes the states of the neurons of several layers: what each neuron adds to the decision.

    .. math:: v = z \odot \frac{\partial\, \mathrm{KL}(u \,\|\, p)}{\partial z}

    with u uniform and p the softmax of the logits. A neuron of a convolution is a channel: both z and the gradient are
    summed over space, as in the authors' code.

    Args:
      activations_fn: ``(x, offsets) -> {name: (batch, ..., channels)}``, which adds ``offsets[name]`` to the output of
        that layer, as ``functools.partial(model.activations, model.state)`` does.
      x: the images.
      layers: names of the layers.
      logits: name of the layer of the logits.

    Returns:
      For each layer ``(batch, channels)``, the input of ``nac``.

    Raises:
      ValueError: for a layer that does not exist.

    Example:
      >>> def activations_fn(x, offsets):
      ...     hidden = jax.nn.relu(x @ jnp.eye(4)) + offsets.get("hidden", 0)
      ...     return {"hidden": hidden, "head": hidden[:, :2]}
      >>> states = scoring.neuron_states(activations_fn, jnp.ones((3, 4)), layers=["hidden"])
      >>> states["hidden"].shape
      (3, 4)

    Reference:
      Liu et al., "Neuron activation coverage: rethinking out-of-distribution detection and generalization",
      arXiv:2306.02879.
    """
    activations_fn = _validate.as_pytree(2, activations_fn=activations_fn)
    shapes = jax.eval_shape(activations_fn, x, {})
    for argument, name in (*(("layers", name) for name in layers), ("logits", logits)):
        if name not in shapes:
            raise ValueError(f"{argument} must be among {', '.join(shapes)}, got {name!r}.")
    narrow = lambda shape: (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    offsets = {name: jnp.zeros(narrow(shapes[name].shape)) for name in layers}

    def divergence(offsets):  # up to the entropy of u
        activations = activations_fn(x, offsets)
        return -jax.nn.log_softmax(activations[logits]).mean(-1).sum(), activations

    gradients, activations = jax.grad(divergence, has_aux=True)(offsets)
    summed = {name: activations[name].astype(jnp.float32) for name in layers}
    summed = {name: z.sum(tuple(range(1, z.ndim - 1))) for name, z in summed.items()}
    return {name: z * gradients[name].reshape(z.shape) for name, z in summed.items()}


@_arguments.checked
def nac(
    layers_fn: LayersFn | None = None,
    *,
    steepness: float | Mapping[str, float] = 100.0,
    num_bins: int | Mapping[str, int] = 48,
    share: float | Mapping[str, float] = 0.05,
) -> Detector:
    r"""Scores by how little the training rows cover the states that the neurons are in (NAC-UE).

    .. math:: s = -\frac{1}{L} \sum_l \frac{1}{C_l} \sum_i \Phi_{li}(\sigma(\alpha v_{li})), \qquad
              \Phi_{li}(q) = \min\Bigl(1, \frac{n_{li}(q)}{r N}\Bigr)

    where v is the state of neuron i of layer l (see ``neuron_states``), :math:`\sigma` the logistic function and
    :math:`n_{li}(q)` the number of the N training rows that fall into the bin of q. The score is in [-1, 0]. The bins
    divide [0, 1] symmetrically and are finest around 1/2, where neurons without influence are. With h bins on each
    side, the edges below 1/2 are :math:`\ln(1 + j (\sqrt{1000} - 1) / h) / \ln 1000`. Bins and default values follow
    the authors' code for CIFAR-10, where M = 50 edges with a bin beyond 1 are 48 bins, and O = 50 of 1000 rows.

    Args:
      layers_fn: ``x -> {name: (batch, channels)}``, the states of the neurons of each layer. None for the features,
        whose gradient has a closed form, :math:`v = z \odot W (p - u)`.
      steepness: :math:`\alpha`, positive; one number, or a dictionary with a number for each layer.
      num_bins: even number of bins of each neuron; one number, or one for each layer.
      share: r, in (0, 1), the share of the training rows at which a bin is covered; one number, or one for each layer.

    Returns:
      The detector. Without ``layers_fn`` it reads ``Outputs``, and ``fit(outputs, head=head)`` needs the head; with it,
      ``fit(x)`` and ``score(state, x)`` take the argument of ``layers_fn``.

    Raises:
      ValueError: for settings out of their range; from ``fit`` and ``score``, for ``x`` that is not floating or not
        finite, or that gives other layers, or others beside other inputs.

    Example:
      >>> detector = scoring.nac()
      >>> state = detector.fit(train, head=head)
      >>> print(detector.score(state, test))
      [-1.  -0.5]

    Reference:
      Liu et al., "Neuron activation coverage: rethinking out-of-distribution detection and generalization",
      arXiv:2306.02879. Full coverage is a share of the rows here, and a count in the paper.
    """
    for value in _values(num_bins):
        _validate.at_least(2, num_bins=value)
        if value % 2:
            raise ValueError(f"num_bins must be even, got {value}.")
    for value in _values(steepness):
        _validate.positive(steepness=value)
    for value in _values(share):
        _validate.probability(share=value)
    if layers_fn is None:
        alpha, bins, r = _single("steepness", steepness), _single("num_bins", num_bins), _single("share", share)
        return _nac_of_features(float(alpha), int(bins), float(r))
    model = _validate.as_pytree(layers_fn=layers_fn)

    def setting(name, value, layer):
        if not isinstance(value, Mapping):
            return value
        if layer not in value:
            raise ValueError(f"{name} must have an entry for layer {layer!r}, got {', '.join(value)}.")
        return value[layer]

    def fit(x, labels=None, head=None):
        covered: dict[str, Array] = {}
        for layer, states in of_inputs(_pooled, model, x).items():
            pairs = ("steepness", steepness), ("share", share), ("num_bins", num_bins)
            alpha, r, bins = (setting(*pair, layer) for pair in pairs)
            if not states.shape[0]:
                raise ValueError("x must hold at least one row to fit on, got none.")
            covered[layer] = _cover((), states, alpha, r, num_bins=bins, sharding=sharding_of_rows(states))
        return CoveredBins(covered, None)

    def score(state, x):
        fitted_shapes(lambda state: state.covered.items(), state)
        slopes = {layer: setting("steepness", steepness, layer) for layer in state.covered}
        return of_inputs(_nac, (model, slopes, state.covered), x)

    return Detector(fit, score)


def _values(setting):
    return setting.values() if isinstance(setting, Mapping) else (setting,)


def _single(name, value):
    if isinstance(value, Mapping):
        raise ValueError(f"{name} must be a number without layers_fn, got one for each of {', '.join(value)}.")
    return value


@functools.cache
def _nac_of_features(steepness, num_bins, share):
    def fit(outputs, labels, head):
        require("nac", outputs=outputs, head=head)
        settings = {"states_fn": _of_features, "num_bins": num_bins, "sharding": sharding_of_rows(outputs)}
        return CoveredBins({"features": _cover(head.kernel, outputs, steepness, share, **settings)}, head.kernel)

    def score(state, outputs):
        return -_coverage(state.covered["features"], _of_features(state.kernel, outputs), steepness)

    return make_detector(fit, score, lambda state: state.kernel.shape[::-1])


def _of_features(kernel, outputs):
    from_uniform = jax.nn.softmax(outputs.logits) - 1 / outputs.logits.shape[1]
    return outputs.features * jnp.matmul(from_uniform, kernel.T, precision=jax.lax.Precision.HIGHEST)


def _at_bins(of_bin, states, steepness, num_bins):
    """``of_bin(i)`` for the bin i of each state. All edges are compared in turn: a binary search would gather."""
    half = np.log(np.linspace(1, math.sqrt(1000), num_bins // 2 + 1)) / np.log(1000)
    edges = np.concatenate([half[1:-1], [0.5], 1 - half[1:-1][::-1]])  # the inner ones: all states fall into a bin
    edges, q = jnp.asarray(edges, jnp.float32), jax.nn.sigmoid(steepness * states)
    at_least = lambda i, found: jnp.where(q >= edges[i], of_bin(i + 1), found)
    return jax.lax.fori_loop(0, num_bins - 1, at_least, jnp.broadcast_to(of_bin(0), q.shape), unroll=16)


@functools.partial(jax.jit, static_argnames=("states_fn", "num_bins", "sharding"))
def _cover(state, rows, steepness, share, *, num_bins, sharding, states_fn=None):
    """The coverage of each bin by the states of all rows, which are counted where they are, a block at a time."""

    def count(state, rows, steepness):
        total = jax.tree.leaves(rows)[0].shape[0]
        size, states_of = min(BLOCK, total), states_fn or (lambda _, states: states)
        channels = jax.eval_shape(states_of, state, rows).shape[1]

        def add(i, counts):
            start = jnp.minimum(i * size, total - size)
            new = (start + jnp.arange(size) >= i * size)[:, None]  # the last block repeats some rows
            block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), rows)
            bins = _at_bins(jnp.int32, states_of(state, block), steepness, num_bins)
            return counts.at[bins, jnp.arange(channels)[None]].add(new.astype(jnp.int32))

        return jax.lax.fori_loop(0, -(-total // size), add, jnp.zeros((num_bins, channels), jnp.int32))[None]

    if sharding is not None:
        specs = {"in_specs": (jax.P(), sharding.spec, jax.P()), "out_specs": sharding.spec}
        count = jax.shard_map(count, mesh=sharding.mesh, **specs, check_vma=False)
    counts = count(state, rows, steepness).sum(0).astype(jnp.float32)
    return jnp.minimum(counts / (share * jax.tree.leaves(rows)[0].shape[0]), 1)


def _coverage(covered, states, steepness):
    found = _at_bins(lambda i: covered[i][None], states, steepness, covered.shape[0])
    return jnp.where(jnp.isnan(states), jnp.nan, found).mean(-1)  # NaN would fall into the first bin


@jax.jit
def _nac(state, x):
    layers_fn, steepness, covered = state
    layers = _pooled(layers_fn, x)
    _check_layers(layers, covered)
    for name, states in layers.items():
        if states.shape[1] != covered[name].shape[1]:
            raise ValueError(
                f"layers_fn must return the {covered[name].shape[1]} fitted channels for layer {name!r}, got "
                f"{states.shape[1]}."
            )
    return -jnp.stack([_coverage(covered[name], states, steepness[name]) for name, states in layers.items()]).mean(0)


def _check_layers(layers, fitted):
    if sorted(layers) != sorted(fitted):
        raise ValueError(f"layers_fn must return the fitted layers {', '.join(fitted)}, got {', '.join(layers)}.")


@_arguments.checked
def mahalanobis_ensemble(layers_fn: LayersFn, *, epsilon: float = 0.0) -> Detector:
    r"""Scores by a weighted sum over layers of the Mahalanobis distance to the nearest class.

    .. math:: s(x) = b + \sum_l w_l\, M_l(x_l'), \qquad
              x_l' = x - \epsilon\, \mathrm{sign}(\nabla_x M_l(x)), \qquad
              M_l(x) = \min_c (z_l - \mu_{lc})^\top \Sigma_l^{-1} (z_l - \mu_{lc})

    with Gaussians of tied covariance fitted to the training rows of each class and layer, each layer after its own step
    that lowers its distance. The weights come from a logistic regression that separates known inliers from known
    outliers, so s is the log-odds of an outlier. Outliers are whatever the detector should notice. For adversarial
    inputs, clean and noisy images are inliers, and attacked images are outliers. Without outlier data, the authors also
    train on attacked images.

    Args:
      layers_fn: ``x -> {name: (batch, ..., channels)}``, averaged over the axes in between. All uses of one function
        share a compiled program, and arrays that it closes over become constants of it; see ``odin`` for how to pass
        them as arguments.
      epsilon: size of the step, in units of ``x``. The authors choose among 0, 0.0005, 0.001, 0.0014, 0.002, 0.005 and
        0.01, on held-out inliers and outliers.

    Returns:
      The detector, whose functions take ``x`` instead of outputs: ``fit(x, labels, inliers=..., outliers=...)`` and
      ``score(state, x)``. The distances of inliers and outliers are standardised for the regression, and the scales are
      multiplied back into the weights. Of ten L2 penalties, from 1e-4 to 1e4, five-fold cross-validation chooses the
      one with the highest likelihood.

    Raises:
      ValueError: for a negative ``epsilon``; from ``fit`` and ``score``, for ``x`` that is not floating or not finite,
        labels that do not fit it, a class without rows, fewer than five inliers or outliers, other layers, or others
        beside other inputs.

    Reference:
      Lee et al., "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
      arXiv:1807.03888. Their distances have a factor of 1/2 and are not standardised, and their penalty is chosen by
      accuracy, which is often the same for all ten.
    """
    _validate.not_negative(epsilon=epsilon)
    model = _validate.as_pytree(layers_fn=layers_fn)
    distances = functools.partial(_distances, descends=epsilon > 0)

    def fit(x, labels=None, head=None, *, inliers=None, outliers=None):
        require("mahalanobis_ensemble", labels=labels, inliers=inliers, outliers=outliers)
        layers = of_inputs(_pooled, model, x)
        rows = next(iter(layers.values())).shape[0]
        labels = checked_labels(labels, rows, np.iinfo(np.int32).max)
        logits = np.zeros((rows, max(2, int(np.max(labels)) + 1)), np.float32)  # needed only for the number of classes
        gaussians = {name: mahalanobis().fit(Outputs._make((logits, z)), labels) for name, z in layers.items()}
        known = [of_inputs(distances, (model, gaussians, epsilon), some) for some in (inliers, outliers)]
        weights, bias = _logistic_regression(*(np.stack([some[name] for name in layers], -1) for some in known))
        return WeightedLayers(gaussians, dict(zip(layers, weights)), bias)

    def score(state, x):
        fitted_shapes(lambda state: state.gaussians.items(), state)
        by_layer = of_inputs(distances, (model, state.gaussians, epsilon), x)
        return state.bias + sum(state.weights[name] * distance for name, distance in by_layer.items())

    return Detector(fit, score)


@functools.partial(jax.jit, static_argnames="descends")
def _distances(state, x, *, descends):
    layers_fn, gaussians, epsilon = state

    def distance(name, x):
        layers = _pooled(layers_fn, x)
        _check_layers(layers, gaussians)
        return mahalanobis().score(gaussians[name], Outputs(jnp.zeros((layers[name].shape[0], 2)), layers[name]))

    nearer = {name: descend(functools.partial(distance, name), x, epsilon) if descends else x for name in gaussians}
    return {name: distance(name, moved) for name, moved in nearer.items()}


def _logistic_regression(inliers, outliers):
    """Weights ``(layers,)`` and bias of the log-odds that a row of distances ``(rows, layers)`` is an outlier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = 5
    for name, rows in (("inliers", inliers), ("outliers", outliers)):
        if rows.shape[0] < folds:
            raise ValueError(f"{name} must be at least {folds} rows, got {rows.shape[0]}.")
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-6))
    strengths = {"logisticregression__C": np.logspace(-4, 4, 10)}
    search = GridSearchCV(pipeline, strengths, cv=folds, scoring="neg_log_loss")
    rows = np.concatenate([inliers, outliers]).astype(np.float64)
    search.fit(rows, np.repeat([0, 1], [inliers.shape[0], outliers.shape[0]]))
    scaler, regression = search.best_estimator_
    weights = regression.coef_[0] / scaler.scale_
    bias = regression.intercept_[0] - weights @ scaler.mean_
    return jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)
