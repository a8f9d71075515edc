"""Weights of published PyTorch checkpoints in the architectures of this room."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from robustjax import _arguments, _paths, _validate
from robustjax.models._resnet import _ResNet
from robustjax.models._torch import missing
from robustjax.models._wide_resnet import _WideResNet

_INSIDE = ("state_dict", "model_state_dict", "model")
_MEANS, _STDS = ("means", "mean", "mu"), ("sds", "std", "sigma")
_PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@_arguments.checked
def load_torch_weights(model: nnx.Module, weights: Mapping[str, Any] | str | os.PathLike) -> nnx.Module:
    """Returns the model with the weights of a PyTorch checkpoint; outputs equal PyTorch's up to rounding.

    Whose checkpoints fit:

    - ``resnet20``, ``resnet56``, ``resnet110``: ``cifar_resnet.py`` of Cohen et al., with projections (option B). A
      network whose shortcuts pad with zeros (option A of He et al.) lacks their tensors.
    - ``resnet18``, ``resnet50``: torchvision, so also the ImageNet model of Cohen et al. A network of these widths
      for CIFAR, with a 3x3 convolution and no pooling at its start, has another ``conv1.weight``.
    - ``wide_resnet``: ``WideResNet`` of TRADES and RobustBench. Networks with Swish (Gowal et al.) have other names.

    Names may have a prefix, such as ``module.`` or ``1.module.``; ``shortcut`` and ``linear`` are read as
    ``downsample`` and ``fc``. ``num_batches_tracked`` is ignored, and ``sub_block1``, which TRADES saves and does not
    use. A last layer without bias gets zeros. Most checkpoints, Cohen's too, do not hold the normalisation: build the
    model with its ``mean`` and ``std``. Where the checkpoint holds them (``0.means``, ``0.sds``; ``mu``, ``sigma``),
    the model's must be the same.

    Args:
      model: a module of ``resnet18``, ``resnet20``, ``resnet50``, ``resnet56``, ``resnet110`` or ``wide_resnet``, or
        its shapes (``nnx.eval_shape``); it is not changed.
      weights: arrays or tensors by name, also inside a mapping's ``"state_dict"``; or a file of these:
        ``.safetensors``, or ``.pt``, ``.pth`` or ``.tar``, of which PyTorch reads nothing but tensors and plain values.

    Returns:
      A new module, for ``models.functional``. Kernels are moved from OIHW to HWIO, and all is float32.

    Raises:
      ValueError: ``model`` is another module; ``weights`` lack a tensor, have one too many or one of another shape,
        which is named, or one that is not finite, or no file of tensors.
      ImportError: ``safetensors``, or PyTorch for its own files, is missing.
      FileNotFoundError: there is no such file.

    Example:
      >>> normalisation = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
      >>> module = models.resnet110(jax.random.key(0), **normalisation)  # doctest: +SKIP
      >>> module = models.load_torch_weights(module, "noise_0.25/checkpoint.pth.tar")  # doctest: +SKIP
      >>> model = models.functional(module)  # doctest: +SKIP

    Reference:
      Cohen et al., Certified Adversarial Robustness via Randomized Smoothing, 2019, arXiv:1902.02918;
      Croce et al., RobustBench: a standardized adversarial robustness benchmark, 2021, arXiv:2010.09670.
    """
    tensors = weights if isinstance(weights, Mapping) else _read(weights)
    for name in _INSIDE:
        tensors = tensors[name] if isinstance(tensors.get(name), Mapping) else tensors
    body = getattr(model, "body", None)
    if not isinstance(body, (_ResNet, _WideResNet)):
        raise ValueError(f"model must be a resnet or a wide_resnet of robustjax.models, got {_validate.short(model)}.")
    graph, state = nnx.split(model)
    leaves = nnx.to_flat_state(state)
    places = _places(body)
    wanted = {_name(path, places): path for path, _ in leaves}
    shapes = {path: tuple(variable.shape) for path, variable in leaves}
    found = _inside_prefix(tensors, wanted, model)
    if "fc.bias" not in found and "fc.weight" in found:
        found["fc.bias"] = ("fc.bias", np.zeros(shapes[wanted["fc.bias"]], np.float32))
    left = [name for short, (name, _) in found.items() if short not in wanted]
    if lost := [name for name in wanted if name not in found]:
        raise ValueError(f"weights must have the tensors of the model, got no {_some(lost)}; left over: {_some(left)}.")
    if left:
        raise ValueError(f"weights must have the tensors of the model alone, got also {_some(left)}.")
    values = {wanted[short]: _value(*named, shapes[wanted[short]]) for short, named in found.items()}
    new = [(path, variable.replace(jnp.asarray(values[path]))) for path, variable in leaves]
    return nnx.merge(graph, nnx.from_flat_state(new))


def _read(weights: str | os.PathLike) -> Mapping[str, Any]:
    path = _paths.path_of(weights=weights)
    if path.suffix == ".safetensors":
        try:
            import safetensors.numpy  # pyrefly: ignore[missing-import]
        except ImportError as error:
            raise missing("safetensors", error) from error
        try:
            return safetensors.numpy.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"weights must be a file of tensors, got {path}: {error}.") from error
    if path.suffix not in (".pt", ".pth", ".tar"):
        raise ValueError(f"weights must be a file .safetensors, .pt, .pth or .tar, got {_validate.short(weights)}.")
    try:
        import torch  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise missing("torch", error) from error
    with path.open("rb") as file:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of several kinds, by what is wrong
            what = str(error).split("\n")[0][:150]
            if isinstance(error, pickle.UnpicklingError):  # PyTorch's sentences tell how to run the file's code
                what = "it holds code, such as a whole module, or is damaged; save module.state_dict() instead."
            raise ValueError(f"weights must be a file of tensors and plain values, got {path}: {what}") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"weights must be a file of tensors by name, got {type(tensors).__name__} in {path}.")
    return tensors


def _places(body: Any) -> list[str]:
    """Where PyTorch has each block: stage, counted from 1, and number in the stage."""
    wide = isinstance(body, _WideResNet)
    widths = [(block.conv2 if wide else block.convs[-1]).kernel.shape[-1] for block in body.blocks]
    stages = enumerate(itertools.groupby(widths), 1)
    start = "block{}.layer.{}" if wide else "layer{}.{}"
    return [start.format(stage, index) for stage, (_, same) in stages for index, _ in enumerate(same)]


def _name(path: tuple[Any, ...], places: list[str]) -> str:
    """PyTorch's name of a leaf."""
    match path[:-1]:
        case ("head",):
            layer = "fc"
        case ("body", "stem"):
            layer = "conv1"
        case ("body", "norm"):
            layer = "bn1"
        case ("body", "blocks", block, ("convs" | "norms") as kind, number):
            layer = f"{places[block]}.{'conv' if kind == 'convs' else 'bn'}{number + 1}"
        case ("body", "blocks", block, "shortcut", kind):
            layer = f"{places[block]}.downsample.{['conv', 'norm'].index(kind)}"
        case ("body", "blocks", block, "shortcut"):
            layer = f"{places[block]}.convShortcut"
        case ("body", "blocks", block, kind):
            layer = f"{places[block]}.{kind.replace('norm', 'bn')}"
        case _:
            raise AssertionError(path)
    return f"{layer}.{_PARTS[path[-1]]}"


def _inside_prefix(tensors: Mapping[str, Any], wanted: Iterable[str], model: Any) -> dict[str, tuple[str, Any]]:
    """Names in the checkpoint, and tensors, by their names without a prefix."""
    stems = [name for name in tensors if name == "conv1.weight" or name.endswith(".conv1.weight")]
    if not stems:
        raise ValueError(f"weights must have conv1.weight, also after a prefix, got {_some(list(tensors))}.")
    prefix = min(stems, key=len).removesuffix("conv1.weight")
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        last = name.rpartition(".")[2]
        if last == "num_batches_tracked" or name.startswith(f"{prefix}sub_block1."):
            continue
        if short not in wanted and last in _MEANS + _STDS:
            setting = "mean" if last in _MEANS else "std"
            values = _numbers(tensor).reshape(-1)
            if values.shape != (model.image_shape[-1],) or not np.allclose(values, getattr(model, setting), atol=1e-6):
                said = tuple(round(float(value), 6) for value in values[:4])
                own = getattr(model, setting)
                raise ValueError(f"model must be built with the {setting} of {name}, {said}, got {own}.")
            continue
        short = short.replace(".shortcut.", ".downsample.")
        short = f"fc.{short.removeprefix('linear.')}" if short.startswith("linear.") else short
        # What stands outside, or is there twice, gets a name that nothing has, and is left over.
        found[short if name.startswith(prefix) and short not in found else f"/{name}"] = (name, tensor)
    return found


def _numbers(tensor: Any) -> np.ndarray:
    # NumPy does not know PyTorch's bfloat16.
    return np.asarray(tensor.detach().cpu().float() if hasattr(tensor, "detach") else tensor, np.float32)


def _value(name: str, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), (0,))
    there = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
    got = tuple(getattr(tensor, "shape", ()))
    if got != there:
        raise ValueError(f"weights must have {name} of shape {there}, got {got}.")
    value = _numbers(tensor)
    if not np.isfinite(value).all():
        raise ValueError(f"weights must be finite, got {(~np.isfinite(value)).sum()} numbers of {name} that are not.")
    return value.transpose(axes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(name[:60] for name in names[:2]) + more if names else "none"
