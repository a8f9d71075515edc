"""PyTorch modules as JAX functions, translated by torchax."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import io
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robustjax import _arguments, _validate
from robustjax.models import _torch_operators
from robustjax.typing import AnyArray

_TOLERANCE = 1e-4


@_arguments.checked
def from_torch(module: Any, example: Float[AnyArray, "batch ..."] | Sequence[int]) -> jax.tree_util.Partial:
    r"""Makes a JAX function of a PyTorch module: images NHWC outside, NCHW inside, its weights the function's leaves.

    .. math:: f_w(x) = \mathrm{moveaxis}\bigl(g_w(\mathrm{moveaxis}(x, -1, 1))\bigr)

    The function is certified, attacked, compiled and differentiated as any other; also by its weights. It computes in
    float32, on JAX's device. It is made of a copy of the module in evaluation mode: neither the module nor its mode
    changes, and later training does not reach the function. Modules of the same structure give functions that share
    compiled programs.

    Of equal maxima in a window of ``max_pool2d`` the first has the gradient, as in PyTorch; our own networks share it.
    A number that the module draws (dropout is off) is the same in each call. Values that Python reads from a weight or
    an input cannot be traced. The first call imports torchax, which names PyTorch's spare device ``"jax"``; its other
    changes of global settings are undone.

    Args:
      module: a ``torch.nn.Module`` that takes one float32 tensor and returns one; it normalises images itself.
      example: inputs on which the function is checked, or their shape, for uniform noise in [0, 1]: images
        ``(batch, height, width, channels)``, or inputs that have not four axes and pass unchanged, ``(batch, dim)``.

    Returns:
      ``x -> outputs``, a ``jax.tree_util.Partial`` of a mapping from PyTorch's names to weights. Outputs of four axes
      are moved to NHWC too, such as a denoiser's; others pass unchanged, ``(batch, classes)``.

    Raises:
      ValueError: ``module`` is no module, or fails on ``example`` in PyTorch or in JAX (the operator that torchax
        lacks is named), or has outputs there that are not finite, or that differ from PyTorch's by more than 1e-4, of
        the largest output where that exceeds 1.
      ImportError: torchax is missing, or does not fit PyTorch.

    Example:
      >>> module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))  # doctest: +SKIP
      >>> logits_fn = models.from_torch(module, (2, 8, 8, 1))  # doctest: +SKIP
      >>> attack = attacks.pgd(epsilon=0.1, norm="linf")
      >>> adversarial = attack(jax.random.key(0), logits_fn, x, labels)  # doctest: +SKIP
    """
    torch = sys.modules.get("torch")  # without which there is no module
    if torch is None or not isinstance(module, torch.nn.Module):
        raise ValueError(f"module must be a torch.nn.Module, got {_validate.short(module)}.")
    if isinstance(example, Sequence):
        if not example or min(example) < 1:
            raise ValueError(f"example must be inputs or their shape (batch, ...), got {tuple(example)}.")
        example = np.random.default_rng(0).random(tuple(example))
    x = np.asarray(example, np.float32)
    _validate.floating(x.ndim, example=x)
    environment = _environment()
    twin = _twin(module)
    name = type(module).__name__
    try:
        with torch.no_grad():
            want = twin(torch.from_numpy((np.moveaxis(x, -1, 1) if x.ndim == 4 else x).copy()))
    except Exception as error:
        hint = " with channels last" if x.ndim == 4 else ""
        raise ValueError(f"module must take example, inputs {x.shape}{hint}, got {_reason(name, error)}.") from error
    if not isinstance(want, torch.Tensor):
        raise ValueError(f"module must return one tensor, got {type(want).__name__} from {name}: wrap it.")
    forward, weights = _extract(twin, environment)
    function = jax.tree_util.Partial(forward, weights)
    try:
        with jax.default_matmul_precision("highest"):  # what differs is the translation, not a device's rounding
            got = np.asarray(function(jnp.asarray(x)))
    except Exception as error:
        wanted = f"module must be one that torchax translates ({_versions()})"
        raise ValueError(f"{wanted}, got {_reason(name, error)}.") from error
    want = np.asarray(want)
    want = np.moveaxis(want, 1, -1) if want.ndim == 4 else want
    _compare(got, want)
    return function


def _compare(got, want):
    if lost := want.size - np.isfinite(want).sum():
        raise ValueError(f"module must return finite outputs for example, got {lost} that are not.")
    wanted = "module must compute in JAX what it does in PyTorch"
    if got.shape != want.shape:
        raise ValueError(f"{wanted}, got outputs {got.shape} instead of {want.shape} ({_versions()}).")
    gap, largest = (float(np.abs(values).max(initial=0)) for values in (got - want, want))
    if not gap <= _TOLERANCE * max(1, largest):
        raise ValueError(
            f"{wanted}, got outputs that differ by {gap:.2g} where the largest is {largest:.2g} ({_versions()})."
        )


def _reason(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"from {name} {type(error).__name__}: {said if len(said) <= 120 else said[:117] + '...'}"


def _versions() -> str:
    found = []
    for package in ("torch", "torchax", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def missing(package: str, error: Exception) -> ImportError:
    """The error of an optional package that cannot be imported."""
    return ImportError(
        f'{package} must be importable, got {_reason(package, error)} ({_versions()}); pip install "robustjax[torch]".'
    )


@functools.cache
def _environment() -> Any:
    import torch  # pyrefly: ignore[missing-import]

    fast, variable = torch.backends.mha.get_fastpath_enabled(), "ENABLE_RUNTIME_UPTIME_TELEMETRY"
    before, options = os.environ.get(variable), getattr(jax.config, "jax_pjrt_client_create_options", None)
    try:
        import torchax.tensor  # pyrefly: ignore[missing-import]

        environment, aten = torchax.tensor.Environment(), torch.ops.aten
        for operator, replaced in (
            (aten.convolution, _torch_operators.convolution),
            (aten.conv2d, _torch_operators.convolution),
            (torch.nn.functional.max_pool2d, _torch_operators.max_pool),
            (aten.avg_pool2d, _torch_operators.avg_pool),
            (aten._adaptive_avg_pool2d, _torch_operators.adaptive_avg_pool),
        ):
            known = environment._ops[operator]
            environment._ops[operator] = dataclasses.replace(known, func=replaced(known.func))
        return environment
    except (ImportError, AttributeError) as error:  # AttributeError: an operator that this PyTorch has no more
        raise missing("torchax", error) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if before is None:
            os.environ.pop(variable, None)
        if options:
            jax.config.update("jax_pjrt_client_create_options", options)


def _twin(module):
    """A copy of the module for evaluation, in float32 on the host."""
    # What a layer has computed of its parameters, as weight normalisation does, PyTorch does not copy.
    computed = {id(t): t.detach().clone() for t in _tensors(module).values() if not t.is_leaf}
    try:
        twin = copy.deepcopy(module, computed)
    except Exception as error:
        reason = _reason(type(module).__name__, error)
        raise ValueError(f"module must be one that copy.deepcopy copies, got {reason}.") from error
    twin = twin.cpu().float().eval()
    for part in twin.modules():
        if "num_batches_tracked" in part._buffers:
            part.num_batches_tracked = None  # read in training alone
    return twin


def _tensors(module) -> dict[str, Any]:
    """Parameters, buffers and attributes of a module, each tensor by its first name."""
    import torch  # pyrefly: ignore[missing-import]

    found, names = {}, set()
    for path, part in module.named_modules():
        for name, value in [*part._parameters.items(), *part._buffers.items(), *vars(part).items()]:
            if isinstance(value, torch.Tensor) and id(value) not in names:
                names.add(id(value))
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _extract(twin, environment) -> tuple[_Forward, dict[str, Array]]:
    """The pure function of the twin, and those of its tensors that it is differentiable by."""
    import torch  # pyrefly: ignore[missing-import]

    tensors = _tensors(twin)
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    constants = {name: tensor.numpy() for name, tensor in tensors.items() if name not in floating}

    def forward(weights, x):
        every = environment.j2t_iso({**weights, **jax.tree.map(jnp.asarray, constants)})
        key = jax.random.key(0)  # else torchax keeps the traced key of the last draw
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # an operator of its own, which torchax lacks
        try:
            with (
                warnings.catch_warnings(),
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
                torch.no_grad(),
                environment.override_property(prng=key),
                environment,
                torch.device("jax"),  # of tensors that the module makes
            ):
                warnings.filterwarnings("ignore", "Explicitly requested dtype")  # int64, where JAX has int32
                y = torch.func.functional_call(twin, every, (environment.j2t_iso(x),))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return environment.t2j_iso(y)

    order = {id(tensor): index for index, tensor in enumerate(floating.values())}
    weights = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in floating.items()}
    return _Forward(_layout(twin, order), forward), weights


def _layout(twin, weights: Mapping[int, int]) -> Any:
    """A value that is equal for modules of the same structure; ``weights`` are ids of tensors whose values vary."""
    import torch  # pyrefly: ignore[missing-import]

    parts = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, torch.Tensor):
                content = weights.get(id(value))
                content = value.detach().numpy().tobytes() if content is None else content
                return tuple(value.shape), str(value.dtype), content
            if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                parts.append(value)  # itself, not its name: a notebook defines a class again
                return len(parts)
            return None

    file = io.BytesIO()
    try:
        Pickler(file).dump(twin)
    except Exception:  # something that cannot be pickled: equal to itself alone
        return object()
    return file.getvalue(), tuple(parts)


@dataclasses.dataclass(frozen=True)
class _Forward:
    layout: Any = dataclasses.field(repr=False)
    run: Callable = dataclasses.field(compare=False)

    def __call__(self, weights: Mapping[str, AnyArray], x: AnyArray) -> Array:
        return _call(self, weights, x)


@functools.partial(jax.jit, static_argnums=0)
def _call(forward, weights, x):
    x = jnp.asarray(x, jnp.float32)
    y = forward.run(weights, jnp.moveaxis(x, -1, 1) if x.ndim == 4 else x)
    return jnp.moveaxis(y, 1, -1) if y.ndim == 4 else y
