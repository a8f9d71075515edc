"""A user's own model: any callable, a module with its weights, a PyTorch module, or the run folder of an experiment."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import robustjax
from robustjax import _callables, _validate, data, models
from robustjax._precision import in_float32
from robustjax.typing import AnyArray, Outputs

from . import classifiers, files, folders, runtimes, settings

WANTED = (
    "a function of images (n, height, width, channels) that returns logits (n, classes) or robustjax.typing.Outputs, a "
    "pair (module, variables), a torch.nn.Module, or a run folder"
)


def imported(name: str) -> Any:
    """What the function of ``MODULE:FUNCTION`` returns; modules of the current folder can be imported.

    Raises:
      ValueError: there is no such module or function, or the function needs arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"model must be MODULE:FUNCTION, such as my_module:build, got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ImportError(f"model {name!r}: {error}") from error  # the module is there, and needs another
        raise ValueError(
            f"model {name!r}: there is no module {error.name!r} in {os.getcwd()} or among the installed packages."
        ) from error
    except Exception as error:
        raise ValueError(f"model {name!r} must be in a module that can be imported, got {_raised(error)}.") from error
    build = getattr(module, function_name, None)
    if build is None:
        there = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(
            f"model {name!r}: the module {module_name} has no {function_name!r}; its functions are "
            f"{', '.join(there) or 'none'}."
        )
    try:
        inspect.signature(build).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"model {name!r} must be a function without arguments, but {error}.") from error
    try:
        return build()
    except Exception as error:
        raise ValueError(f"model {name!r} must return a model, got {_raised(error)}.") from error


def _raised(error: Exception) -> str:
    """What a user's code raised and in which of its lines: the last outside of installed packages, and of ours."""
    packages = tuple(map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))
    ours = ("<frozen", *packages, os.path.dirname(__file__), *robustjax.__path__)
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}, line {error.lineno}"
    else:
        where = f"{lines[-1].filename}, line {lines[-1].lineno}" if lines else "its code"
    first, *_ = *str(error.msg if isinstance(error, SyntaxError) else error).splitlines(), ""
    return f"{type(error).__name__} in {where}: {first[:300]}".rstrip(": .")


def functional_of(model: Any, example: AnyArray) -> models.Functional:
    """The model as pure functions and arrays; its answers to ``example``, a few images, are checked.

    Logits alone become ``Outputs`` with features ``(n, 0)``.

    Raises:
      ValueError: the model is none of those in ``WANTED``, or returns something else for these images.
    """
    if isinstance(model, models.Functional):
        return model
    if _callables.is_torch(model):
        model = models.from_torch(model, example)  # pyrefly: ignore
    elif isinstance(model, tuple) and len(model) == 2 and hasattr(model[0], "apply"):
        model = _applied(*model)
    if not callable(model):
        raise ValueError(f"model must be {WANTED}; got {_validate.short(model)}.")
    state: Any = _validate.as_pytree(model=model)
    for count in (len(example), len(example) + 1):  # a model may take one number of images only
        shape = (count, *example.shape[1:])
        try:
            found: Any = jax.eval_shape(_outputs, state, jax.ShapeDtypeStruct(shape, jnp.float32))
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("model "):
                raise
            raise ValueError(
                f"model must be a function that JAX can trace, for any number of images, but for {shape}: "
                f"{_raised(error)}."
            ) from error
        shapes = [getattr(part, "shape", None) for part in found]
        logits, features = (of if of is not None and len(of) == 2 else (0, 0) for of in shapes)
        if logits[0] != count or logits[1] < 2 or features[0] != count:
            told = shapes[0] if features[0] in (0, count) else f"{shapes[0]} with features {shapes[1]}"
            raise ValueError(
                f"model must return logits ({count}, classes >= 2) for images {shape}, alone or in "
                f"robustjax.typing.Outputs, got {told}."
            )
    return models.Functional(_apply, _outputs, state, _activations)


def _applied(module: Any, variables: Any) -> Any:
    """A module of Linen or Haiku with its variables: parameters and state of Haiku's ``transform_with_state``.

    Raises:
      ValueError: parameters or state are missing.
    """
    parameters = list(inspect.signature(module.apply).parameters)
    none = (None,) if "rng" in parameters else ()  # Haiku's transform, without without_apply_rng
    if parameters[:2] != ["params", "state"]:
        return functools.partial(module.apply, variables, *none)
    if not isinstance(variables, (tuple, list)) or len(variables) != 2:
        raise ValueError(
            "model must be (transformed, (params, state)) where haiku.transform_with_state made it, got "
            f"(transformed, {_validate.short(variables)})."
        )
    return functools.partial(_without_state, module.apply, *variables, *none)


def _without_state(apply: Any, *args: Any) -> Any:
    return apply(*args)[0]


def classifier_of(model: Any, example: AnyArray, runtime: runtimes.Runtime = runtimes.HERE) -> classifiers.Classifier:
    """A user's model as a classifier, on the devices of this process; errors as of ``functional_of``."""
    functional, mesh = functional_of(model, example), runtime.local_mesh()
    return classifiers.Classifier(functional, runtimes.on_mesh(functional.state, mesh), mesh)


def model_of(
    config: settings.Product, train: data.Dataset, *, key: jax.Array, runtime: runtimes.Runtime, dtype: str = "float32"
) -> tuple[models.Functional, classifiers.Classifier | None]:
    """The untrained model of a product, and the classifier where nothing is trained: a user's own, or another run's."""
    if settings.is_own(config.model):
        few = train[:2].image
        own = classifier_of(imported(config.model), few, runtime)
        logits = classifiers.outputs_of(own, few).logits
        classifiers.check_each_row(own, few, logits)
        classes = logits.shape[1]
        if classes < train.num_classes:
            raise ValueError(
                f"model must return a logit for each of the {train.num_classes} classes of {config.dataset}, "
                f"got {classes}."
            )
        return own.functional, own
    functional = classifiers.build(config.model, train, dtype=dtype, key=key)
    of_run = None if config.checkpoint is None else classifiers.restored(config.checkpoint, functional, runtime)
    return functional, of_run


def of_run(
    checkpoint: str, runtime: runtimes.Runtime = runtimes.HERE, *, data_dir: str | None = None
) -> tuple[classifiers.Classifier, dict[str, Any]]:
    """The classifier of another run, and the settings of that run."""
    theirs = folders.settings_of(checkpoint)
    if "model" not in theirs or "dataset" not in theirs or settings.is_own(str(theirs["model"])):
        given = next((name for name in ("model", "checkpoint") if theirs.get(name)), None)
        advice = "" if given is None else f"; pass --{given} {theirs[given]} instead"
        raise ValueError(
            f"checkpoint must be the folder of a run that trains a classifier, got {checkpoint}, a run of "
            f"{theirs.get('run', 'another experiment')}, which keeps no model{advice}."
        )
    train = data.load(theirs["dataset"], theirs.get("train_split", "train"), data_dir or theirs.get("data_dir"))
    if theirs.get("classes"):
        train = data.select_classes(train, theirs["classes"])
    functional = classifiers.build(theirs["model"], train, dtype=theirs.get("dtype", "float32"), key=jax.random.key(0))
    return classifiers.restored(checkpoint, functional, runtime), theirs


def _outputs(model: Any, x: jax.Array) -> Outputs:
    found: Any = model(x)
    logits = found.logits if hasattr(found, "logits") else found  # Outputs, and what other libraries call so
    if not hasattr(logits, "shape"):
        raise ValueError(f"model must return logits or robustjax.typing.Outputs, got {type(logits).__name__}.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"model must return floating-point logits, got {logits.dtype}.")
    features = getattr(found, "features", None)
    return Outputs(in_float32(logits), logits[..., :0] if features is None else in_float32(features))


def _apply(state: Any, x: jax.Array, *, train: bool = False) -> tuple[Outputs, Any]:
    if train:
        raise ValueError("model must be one of robustjax's own to be trained, got a user's.")
    return _outputs(state, x), state


def _activations(*_: Any) -> dict[str, jax.Array]:
    raise ValueError("model must be one of robustjax's own to show the outputs of its layers, got a user's.")


def check_logits(logits: AnyArray, label: AnyArray, *, class_names: tuple[str, ...] = (), warn: bool = True) -> None:
    """Raises ValueError for logits that are not finite, or too few for the labels; may warn of probabilities."""
    finite = np.isfinite(logits).all(-1)
    if not finite.all():
        raise ValueError(f"model must return finite logits, got others for {(~finite).sum()} of {len(logits)} images.")
    if label.max() >= logits.shape[1]:
        most = int(label.max())
        name = f" ({class_names[most]})" if most < len(class_names) else ""
        raise ValueError(
            f"labels must be 0 to {logits.shape[1] - 1}, as many classes as the model has logits, got {most}{name}."
        )
    if warn and (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-3):
        runtimes.log(
            "WARNING: the model seems to return probabilities (rows are not negative and sum to 1). Return logits, or "
            "the logarithm of the probabilities: calibration, scores and gradients are wrong otherwise."
        )


def keep_to(folder: epath.Path, logits: AnyArray) -> None:
    """Binds the results in a folder to a user's model by its answers to some images: its code may change, too.

    Raises:
      ValueError: the folder holds results of another model.
    """
    if jax.process_index() != 0:
        return
    path, some = folder / "answers.npz", np.asarray(logits)
    if not path.exists():
        files.write_arrays(path, {"logits": some})
    theirs = files.read_arrays(path, "logits")["logits"]
    near = 0.01 * np.abs(some).max(initial=0.0)  # another machine rounds otherwise
    if theirs.shape != some.shape or not np.allclose(theirs, some, rtol=0.01, atol=near, equal_nan=True):
        raise ValueError(
            f"model must be the one that the run in {folder} began with, but its answers differ; choose another "
            "--name, or pass --overwrite to start again."
        )
