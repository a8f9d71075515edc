"""Every argument of every public function: what it cannot be is refused by its name, before anything is computed."""

import dataclasses
import functools
import inspect
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import robustjax
from robustjax import attacks, certification, data, losses, models, scoring, training
from robustjax.typing import Batch, ModelState, Outputs

ROOMS = robustjax.__all__

BAD = {
    "nothing": None,
    "an object": object(),
    "text": "no such thing",
    "a list": [[7.5] * 300] * 3,
    "texts": np.array(["a", "b"]),
    "complex": np.array([1j, 1.0]),
    "of six axes": np.zeros((1,) * 6),
    "empty": np.zeros(0),
    "NaN": float("nan"),
    "NaNs": np.full(4, np.nan, np.float32),
    "negative": -1,
}

# What an argument takes all the same, by its name, or by its function's and its own; and why.
EXEMPT = {
    ("title", "label", "norm", "splits.name", "Dataset.name", "Dataset.split"): ("text", "any words"),
    ("from_arrays.name", "from_arrays.split", "from_folder.name", "from_folder.split"): ("text", "any words"),
    ("folder", "data_dir", "from_folder.path"): (
        "text",
        "a folder need not exist yet; where it must, FileNotFoundError names it",
    ),
    ("spread_curve.labels", "Dataset.class_names"): ("texts", "words"),
    ("mean", "start", "end", "m_out", "bias", "train_bias", "prediction_sets.threshold"): ("negative", "a real number"),
    ("hidden", "layers", "radii", "first", "second", "variance"): (
        "empty",
        "none of them is a possible number of them",
    ),
    ("mean",): ("empty", "none of them is a possible number of them"),
    ("thr.uniforms",): (("empty", "NaNs"), "this score does not read it"),
    (
        "soft_quantile.values",
        "surrogate_loss.y",
        "precondition.t",
        "detection_metrics_on_device.scores_in",
        "detection_metrics_on_device.scores_out",
    ): ("NaNs", "values on a device are not read"),
    ("precondition.t", "radius.probability"): ("empty", "a batch may be empty"),
    ("num_parameters.params",): (("texts", "complex", "of six axes", "empty", "NaNs"), "any tree of arrays"),
    ("replicate.tree",): (tuple(BAD), "any tree; JAX names what is no array"),
}
TRADES = losses.adversarial.trades(attack=attacks.pgd(epsilon=0.1, loss=losses.kl_divergence))
RECORDS = ("PrototypeNetwork", "preconditioned")  # made by functions: JAX fills them with whatever a tree map returns


def public():
    """Functions and settings that are called with arguments, by their full names."""
    found = {}

    def walk(module):
        for name, value in vars(module).items():
            if name.startswith("_") or hasattr(value, "main"):  # a command is run, not called
                continue
            if inspect.ismodule(value) and value.__name__.startswith(module.__name__ + "."):
                walk(value)
            elif getattr(value, "__module__", "").startswith("robustjax") and (
                inspect.isfunction(value) or dataclasses.is_dataclass(value)
            ):
                found.setdefault(id(value), (f"{module.__name__.removeprefix('robustjax.')}.{name}", value))

    walk(robustjax)
    return {
        name: value
        for name, value in found.values()
        if inspect.signature(value).parameters and not name.endswith(RECORDS)
    }


def dense(state, x, *, train=False):
    x = x.reshape(len(x), -1)
    return Outputs(x, x), state


@functools.cache
def good():
    """A valid value for each required argument, by its name, or by its function's and its own."""
    key, half, image = jax.random.key(0), jnp.full((4, 2), 0.5), jnp.full((4, 2, 2, 1), 0.5)
    logits_fn = lambda x: x.reshape(len(x), -1)
    labels, counts, probabilities = jnp.zeros(4, jnp.int32), np.full((4, 2), 5), np.full((4, 2), 0.5, np.float32)
    state = ModelState({"kernel": jnp.ones((2, 2))}, {})
    digits = data.synthetic("textures", (2, 2, 1), 20)
    components = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    of_components = functools.partial(models.prototypes.classifier, key, components, jnp.array([0, 1]), num_classes=2)
    network = models.prototypes.network(models.functional(of_components(reasoning="rbf")).state.params)
    smoothed = certification.conformal.SmoothedScores(half, half * 0, jnp.full(4, 9))
    certificate = certification.Certificate(np.zeros(4, int), np.ones(4), np.ones(4), np.zeros(4, bool))
    module = models.mlp(key, hidden=(), image_shape=(2, 2, 1))
    gaussian = scoring.MahalanobisState(jnp.zeros(2), jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2), jnp.zeros((2, 2)))
    optimizer = optax.sgd(0.1)
    sharp = dict(a=(np.linspace(0, 1, 3), np.ones(3)))
    mesh = training.make_mesh()
    return {
        "key": key,
        "x": image,
        "labels": labels,
        "images": image,
        "logits_fn": logits_fn,
        "fn": logits_fn,
        "std": 0.5,
        "logits": half,
        "reference_logits": half,
        "label_probabilities": half,
        "targets": labels + 1,
        "sigma": 0.5,
        "epsilon": 0.1,
        "measure": certification.gaussian(0.5),
        "attack": attacks.fgsm(epsilon=0.1),
        "alpha": 0.1,
        "num_classes": 2,
        "dataset": digits,
        "batch_size": 2,
        "seed": 0,
        "name": "textures",
        "split": "train",
        "size": 3,
        "image_shape": (2, 2, 1),
        "classes": [0],
        "shape": (2,),
        "module": module,
        "num_inputs": 4,
        "network": network,
        "components": components,
        "log_detections": half,
        "params": state.params,
        "objective": losses.standard(),
        "augment": lambda key, x: x,
        "step": jnp.array(0),
        "model": state,
        "end": 1.0,
        "steps": 2,
        "constants": jnp.ones((2, 2)),
        "classify": lambda state, x: dense(state, x)[0],
        "queries": half,
        "keys": half,
        "t": jnp.ones(4),
        "state": state,
        "num_features": 4,
        "values": jnp.ones(4),
        "rank": 1,
        "scores": half,
        "successes": 5,
        "trials": 9,
        "selection_counts": counts,
        "num_samples": 9,
        "estimation_counts": counts,
        "counts": counts,
        "height": 2,
        "width": 2,
        "probabilities": probabilities,
        "uniforms": np.full(4, 0.5, np.float32),
        "threshold": 0.5,
        "holdout_scores": np.ones(4),
        "score": scoring.msp().score,
        "calibration": smoothed,
        "test": smoothed,
        "kernel": jnp.ones((3, 3, 1, 1)),
        "image_size": 4,
        "lipschitz": 1.0,
        "denoiser_fn": lambda x: x,
        "noise_fn": lambda x, t: x,
        "alphas_bar": np.linspace(0.9, 0.1, 9),
        "mean": 0.5,
        "variance": 0.1,
        "logits_fns": (logits_fn, logits_fn),
        "probability": np.full((2, 2), 0.5),
        "grid": None,
        "weights": jnp.array([1.0, 0.0]),
        "y": jnp.ones(4),
        "theta": 0.5,
        "eta": 0.1,
        "dimension": 2,
        "norm": "l2",
        "function": lambda x: x,
        "lower": half,
        "upper": half,
        "standard_logits": half,
        "robust_logits": half,
        "standard": dense,
        "robust": dense,
        "first": 0.9,
        "second": 0.1,
        "scale": 0.5,
        "half_width": 0.5,
        "detector": scoring.energy(),
        "features": half,
        "layers_fn": lambda x: {},
        "activations_fn": lambda x, m: {"a": x.reshape(len(x), -1), "head": x.reshape(len(x), -1)},
        "fit": None,
        "fitted_on": lambda state: (None, None),
        "layers": ["a"],
        "metric": np.mean,
        "samples": np.ones(4),
        "errors": np.array([0, 1, 0, 0]),
        "certificate": certificate,
        "radii": [0.1],
        "scores_in": np.ones(4, np.float32),
        "scores_out": np.ones(4, np.float32),
        "label": "a",
        "curves": sharp,
        "i": 0,
        "apply": dense,
        "num_steps": 1,
        "optimizer": optimizer,
        "learning_rate": 0.1,
        "num_epochs": 1,
        "axes": None,
        "mesh": mesh,
        "tree": state,
        "batch": Batch(image, labels, labels),
        "folder": "/tmp/none",
        "template": state,
        "batches": data.batches(digits, 2, seed=0),
        "outlier_batches": data.batches(digits, 2, seed=0),
        "image": image,
        "bias": jnp.zeros(2),
        "white": 255,
        "read": lambda indices: None,
        "factors": (0.4, 1.1),
        "functions": lambda key, x: x,
        "detectors": scoring.msp(),
        "attacks": attacks.fgsm(epsilon=0.1),
        "num": 3,
        "number": 0,
        "steps_per_epoch": 2,
        "count": (jnp.zeros(2, jnp.uint32),) * 2,
        "perturbations.threefry_2x32.key": (jnp.zeros((), jnp.uint32),) * 2,
        "certification.conformal.prediction_sets.scores": probabilities,
        "certification.conformal.conformal_quantile.scores": np.ones(4),
        "certification.conformal.split_conformal.calibration": np.full((20, 2), 0.5),
        "certification.conformal.split_conformal.labels": np.zeros(20, int),
        "certification.conformal.split_conformal.scores": probabilities,
        "certification.multimodal.radius.scores": jnp.ones((4, 2, 2)),
        "certification.multimodal.radius.weights": jnp.ones((2, 2)),
        "certification.multimodal.pair_radii.scores": jnp.ones((4, 2, 2)),
        "certification.multimodal.pair_radii.weights": jnp.ones((2, 2)),
        "certification.multimodal.lipschitz_constants.kernel": jnp.ones((2, 3, 2)),
        "certification.halfspaces.disagreement_bound.x": half,
        "certification.halfspaces.learn.x": jnp.ones((9, 2)),
        "certification.halfspaces.learn.y": jnp.ones(9),
        "certification.halfspaces.statistics.x": half,
        "certification.halfspaces.surrogate_loss.x": half,
        "certification.halfspaces.tester_learner.x": jnp.ones((9, 2)),
        "certification.halfspaces.tester_learner.y": jnp.ones(9),
        "losses.unimodal_margin.scores": jnp.ones((4, 2, 2)),
        "losses.multimodal_radius.constants": ((1.0, 1.0),),
        "metrics.aurc.scores": np.ones(4),
        "plotting.bar_chart.values": {"a": {"b": [1.0]}},
        "plotting.score_histograms.scores": {"a": {"in": np.ones(3)}},
        "plotting.roc_curves.scores": {"a": (np.ones(3), np.ones(3))},
        "plotting.spread_curve.labels": ("a", "b"),
        "plotting.spread_curve.curves": {"a": (np.arange(1.0, 4.0), np.ones((2, 3)))},
        "plotting.loss_over_steps.curves": {"a": (np.arange(1, 4), np.ones(3))},
        "scoring.fit_temperature.labels": labels,
        "scoring.add_class.state": gaussian,
        "scoring.nearest_class.state": gaussian,
        "models.create.name": "mlp",
        "certification.prototypes.radius.x": image,
        "models.create.settings": {},
        "models.from_torch.example": half,
        "models.load_torch_weights.model": module,
        "models.load_torch_weights.weights": {},
        "data.load.name": "digits",
        "data.from_folder.path": folder_of_images(),
        "plotting.reliability_diagram.curves": {"a": (np.ones(1),) * 3},
        "data.splits.name": "digits",
        "certification.in_norm.measure": certification.gaussian(0.5),
        "losses.adversarial.awp.objective": losses.adversarial.adversarial_training(attack=attacks.fgsm(epsilon=0.1)),
        "certification.mixing.mixture.network": dense,
        "certification.mixing.mixture.init.standard": state,
        "certification.mixing.mixture.init.robust": state,
        "certification.mixing.mixture.init.network": state,
        "certification.sign_test_p_value.first": 5,
        "training.fit.state": training.init(key, state, optimizer),
        "losses.scheduled.ramps": {},
        "data.Dataset.size": 3,
        "metrics.detection_metrics_on_device.scores_in": jnp.ones(4),
    }


def folder_of_images():
    (folder := pathlib.Path(tempfile.mkdtemp()) / "images" / "cat").mkdir(parents=True)
    Image.new("L", (2, 2)).save(folder / "1.png")
    return folder.parent


def call(name, function, argument, bad):
    """Calls the function with one bad argument, and with good ones where it has no default."""
    given, keywords = [], {}
    for p in inspect.signature(function).parameters.values():
        if p.name != argument and (p.default is not p.empty or p.kind is p.VAR_KEYWORD):
            continue
        value = bad if p.name == argument else good().get(f"{name}.{p.name}", good().get(p.name))
        if p.kind is p.VAR_POSITIONAL or p.kind is not p.KEYWORD_ONLY and p.default is p.empty:
            given.append(value)
        else:
            keywords[p.name] = value
    return function(*given, **keywords)


def fault(name, function, argument, bad):
    """What is wrong with how a bad value is refused; None if nothing is."""
    try:
        call(name, function, argument, bad)
    except ValueError as error:
        said = str(error)
        if not re.search(rf"\b{argument}\b", said.split(", got")[0]):
            return f"names something else: {said[:150]}"
        return f"{len(said)} characters: {said[:80]}" if len(said) > 300 else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return "taken"


def admitted(name, parameter, what):
    """Whether the annotation says that the value is a right one, or the table of exemptions does."""
    hint = str(parameter.annotation)
    if what in ("nothing", "an object") and (hint == "Any" or what == "nothing" and "None" in hint):
        return True
    if what in ("of six axes", "empty", "NaNs") and ("..." in hint or "*" in hint):  # any number of axes
        return True
    if what in ("a list", "of six axes") and "ArrayLike" in hint:  # of numbers, as any other
        return True
    names = {parameter.name, f"{name.split('.')[-1]}.{parameter.name}"}
    return any(names & {*keys} and (what == kinds or what in kinds) for keys, (kinds, _) in EXEMPT.items())


@pytest.mark.parametrize("room", ROOMS)
def test_each_bad_argument_is_refused_by_its_name(room, unchecked):
    faults = []
    for name, function in public().items():
        if name.split(".")[0] != room:
            continue
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.VAR_KEYWORD:  # the names of others
                continue
            for what, bad in BAD.items():
                if not admitted(name, p, what) and (wrong := fault(name, function, p.name, bad)):
                    faults.append(f"{name}({p.name}={what}): {wrong}")
    assert not faults, "\n".join(faults)


HOOKS = ("perturb", "loss")  # of procedures that share their outside: called by __call__ alone


def calls():
    """The methods of settings that can be made of good values, by their full names."""
    for name, settings in public().items():
        if not inspect.isclass(settings):
            continue
        value = TRADES if name.endswith(".trades") else call(name, settings, None, None)
        for method, function in vars(settings).items():
            if inspect.isfunction(function) and (method == "__call__" or not method.startswith(("_", *HOOKS))):
                yield f"{name}.{method}", getattr(value, method)


def test_each_bad_argument_of_a_configured_procedure_is_refused_by_its_name(unchecked):
    faults, tried = [], 0
    for name, function in calls():
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.VAR_KEYWORD:
                continue
            for what, bad in BAD.items():
                if not admitted(name, p, what):
                    tried += 1
                    if wrong := fault(name, function, p.name, bad):
                        faults.append(f"{name}({p.name}={what}): {wrong}")
    assert tried > 1000
    assert not faults, "\n".join(faults)


def test_abstract_values_pass_and_signatures_stay():
    logits, labels = jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert jax.eval_shape(losses.margin, logits, labels).shape == (4,)
    assert models.num_parameters({"kernel": logits}) == 12
    assert jax.eval_shape(
        jax.vmap(losses.margin), jax.ShapeDtypeStruct((2, 4, 3), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.int32)
    ).shape == (2, 4)
    assert list(inspect.signature(losses.margin).parameters) == ["logits", "labels"]
    with pytest.raises(TypeError, match="labels"):
        losses.margin(np.zeros((4, 3), np.float32))
