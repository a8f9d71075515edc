"""The border between Flax and the rest: a module becomes pure functions and plain dictionaries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Shaped

from robustjax.typing import Apply, ModelState, Outputs


class Functional(NamedTuple):
    """A model as pure functions and the arrays they start from.

    Attributes:
      apply: ``apply(state, x, *, train=False) -> (outputs, state)``. With ``train`` the batch is normalised by its own
        statistics and the returned state holds the moved running ones; without, the state comes back as it was.
      outputs: ``outputs(state, x) -> outputs``, which is ``apply`` without training.
      state: the initial arrays, copied from the module and therefore free to be donated.
    """

    apply: Apply
    outputs: Callable[[ModelState, Array], Outputs]
    state: ModelState


def _plain(tree: Any) -> Any:
    # Checkpoints know string keys only, while nnx.List counts in integers.
    return {str(name): _plain(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


@functools.cache  # equal architectures get the same functions, so that jit does not trace them again
def _pure_functions(training: nnx.GraphDef, inference: nnx.GraphDef) -> tuple[Callable, Callable]:
    def apply(state: ModelState, x: Shaped[Array, "..."], *, train: bool = False) -> tuple[Outputs, ModelState]:
        module = nnx.merge(training if train else inference, *map(nnx.restore_int_paths, state))
        outputs = module(x)
        if not train:
            return outputs, state
        return outputs, state._replace(batch_stats=_plain(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))))

    def outputs(state: ModelState, x: Shaped[Array, "..."]) -> Outputs:
        return apply(state, x)[0]

    return apply, outputs


def functional(module: nnx.Module) -> Functional:
    """Pure functions of a Flax module that maps images to ``Outputs``.

    The functions hold no arrays and no Flax type crosses them. Modules of equal architecture give the same functions,
    which can therefore be static arguments of ``jax.jit``.

    Args:
      module: a module whose variables are all ``nnx.Param`` or ``nnx.BatchStat``; it is left as it is.

    Returns:
      The pair of functions and the module's state: nested dictionaries with string keys.

    Raises:
      ValueError: if the module has variables of other kinds, such as the random state of a dropout layer.
    """
    training, inference = (
        nnx.view(module, use_running_average=average, raise_if_not_found=False) for average in (False, True)
    )
    graph, params, batch_stats, rest = nnx.split(training, nnx.Param, nnx.BatchStat, ...)
    if rest:
        names = sorted("/".join(map(str, path)) for path, _ in nnx.to_flat_state(rest))
        raise ValueError(f"module must hold only nnx.Param and nnx.BatchStat variables, got {', '.join(names)}.")
    state = ModelState(*(_plain(nnx.to_pure_dict(part)) for part in (params, batch_stats)))
    apply, outputs = _pure_functions(graph, nnx.graphdef(inference))
    # An abstract module (nnx.eval_shape) has shapes in place of arrays, and those need no copy.
    return Functional(apply, outputs, jax.tree.map(lambda a: a.copy() if isinstance(a, jax.Array) else a, state))


def num_parameters(params: Any) -> int:
    """Number of scalars in a tree of arrays, or of their shapes.

    Args:
      params: a tree of arrays or ``jax.ShapeDtypeStruct``, such as ``state.params``.

    Returns:
      The sum of their sizes.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params))
