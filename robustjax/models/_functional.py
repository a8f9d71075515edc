"""Turns a Flax module into pure functions and plain dictionaries; no Flax type leaves this room."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Shaped

from robustjax import _arguments, _validate
from robustjax.typing import Apply, ModelState, Outputs


class Functional(NamedTuple):
    """A model as pure functions and the arrays they start from.

    Attributes:
      apply: ``apply(state, x, *, train=False) -> (outputs, state)``. With ``train`` the batch is normalised by its own
        statistics, and the returned state holds the updated running statistics; without, the state is unchanged.
      outputs: ``outputs(state, x) -> outputs``, which is ``apply`` without training.
      state: the initial arrays, copied from the module and therefore free to be donated.
      activations: ``activations(state, x, offsets=None) -> {name: array}``, the output of every submodule at inference,
        by its path: ``"body/conv1"``, ``"body/blocks/0"``, ``"head"``. Under ``jit``, unused outputs are not computed.
        ``offsets`` maps names to arrays that are added to the outputs of these submodules, broadcast over axes of size
        1: the gradient with respect to an offset at zero is the gradient with respect to the activation, and with
        offsets ``(batch, 1, 1, channels)`` its sum over space. A submodule that is called several times returns its
        last output.
    """

    apply: Apply
    outputs: Callable[[ModelState, Array], Outputs]
    state: ModelState
    activations: Callable[..., dict[str, Array]]


def _plain(tree: Any) -> Any:
    # Checkpoints allow only string keys, but nnx.List has integer keys.
    return {str(name): _plain(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


class _Tap:
    """Replaces a submodule: adds the offset of its name, if there is one, and records the output."""

    def __init__(self, module: nnx.Module, name: str, offsets: Mapping[str, Array], noted: dict[str, Array]):
        self._module, self._name, self._offsets, self._noted = module, name, offsets, noted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._module(*args, **kwargs)
        if self._name in self._offsets:
            output = output + self._offsets[self._name].astype(output.dtype)
        if isinstance(output, jax.Array) and jnp.issubdtype(output.dtype, jnp.floating):
            self._noted[self._name] = output
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@functools.cache  # equal architectures get the same functions, so that jit does not trace them again
def _pure_functions(training: nnx.GraphDef, inference: nnx.GraphDef) -> tuple[Callable, Callable, Callable]:
    def apply(state: ModelState, x: Shaped[Array, "..."], *, train: bool = False) -> tuple[Outputs, ModelState]:
        module = nnx.merge(training if train else inference, *map(nnx.restore_int_paths, state))
        outputs = module(x)
        if not train:
            return outputs, state
        return outputs, state._replace(batch_stats=_plain(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))

    def outputs(state: ModelState, x: Shaped[Array, "..."]) -> Outputs:
        return apply(state, x)[0]

    def activations(
        state: ModelState, x: Shaped[Array, "..."], offsets: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        module = nnx.merge(inference, *map(nnx.restore_int_paths, state))
        offsets = {} if offsets is None else offsets
        noted: dict[str, Array] = {}
        modules = dict(nnx.iter_modules(module))
        for path, child in modules.items():
            if path and callable(child):
                tap = _Tap(child, "/".join(map(str, path)), offsets, noted)
                setattr(modules[path[:-1]], str(path[-1]), tap)  # in an nnx.List too, whose items are attributes
        module(x)
        if unknown := sorted(set(offsets) - set(noted)):
            raise ValueError(f"offsets must name submodules among {', '.join(noted)}, got {unknown[0]!r}.")
        return noted

    return apply, outputs, activations


@_arguments.checked
def functional(module: nnx.Module) -> Functional:
    """Makes pure functions of a Flax module that maps images to ``Outputs``.

    The functions hold no arrays, and neither take nor return Flax types. Modules of equal architecture give the same
    functions, which can therefore be static arguments of ``jax.jit``.

    Args:
      module: a module whose variables are all ``nnx.Param`` or ``nnx.BatchStat``; it is not changed.

    Returns:
      The pure functions and the module's state: nested dictionaries with string keys.

    Raises:
      ValueError: if the module has other kinds of variables, such as the random state of a dropout layer.

    Example:
      >>> model = models.functional(models.mlp(jax.random.key(0), hidden=(16,), image_shape=(8, 8, 1)))
      >>> outputs = model.outputs(model.state, jnp.ones((2, 8, 8, 1)))
      >>> outputs.logits.shape, outputs.features.shape
      ((2, 10), (2, 16))
      >>> logits_fn = jax.tree_util.Partial(lambda state, x: model.outputs(state, x).logits, model.state)
    """
    training, inference = (
        nnx.view(module, use_running_average=average, raise_if_not_found=False) for average in (False, True)
    )
    graph, params, batch_stats, rest = nnx.split(training, nnx.Param, nnx.BatchStat, ...)
    if rest:
        names = sorted("/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
        raise ValueError(f"module must hold only nnx.Param and nnx.BatchStat variables, got {', '.join(names)}.")
    state = ModelState(*(_plain(nnx.to_pure_dict(part)) for part in (params, batch_stats)))
    apply, outputs, activations = _pure_functions(graph, nnx.graphdef(inference))
    # An abstract module (nnx.eval_shape) has shapes in place of arrays, and those need no copy.
    state = jax.tree.map(lambda a: jax.device_put(a, may_alias=False) if isinstance(a, jax.Array) else a, state)
    return Functional(apply, outputs, state, activations)


@_arguments.checked
def num_parameters(params: Any) -> int:
    """Counts the scalars in a tree of arrays or of shapes.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``, such as ``state.params``.

    Returns:
      The sum of their sizes.

    Raises:
      ValueError: something in the tree has no size.

    Example:
      >>> model = models.functional(models.mlp(jax.random.key(0), hidden=(16,), image_shape=(8, 8, 1)))
      >>> models.num_parameters(model.state.params)  # 64 * 16 + 16 + 16 * 10 + 10
      1210
    """
    for leaf in (leaves := jax.tree.leaves(params)):
        if not hasattr(leaf, "size"):
            raise ValueError(f"params must be a tree of arrays or shapes, got {_validate.short(leaf)} in it.")
    return sum(leaf.size for leaf in leaves)
