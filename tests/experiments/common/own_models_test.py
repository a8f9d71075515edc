"""A user's own model: where it is looked for, what it may be, and what is said of what it is not."""

import functools
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments import smoothing
from experiments.common import classifiers, detectors, own_models
from robustjax import models
from robustjax.typing import Outputs

X = np.random.default_rng(0).random((6, 8, 8, 1), np.float32)
KERNEL = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ KERNEL


def of(logits):
    return lambda x: logits


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_own_module", raising=False)
    text = "def build():\n    return 17\ndef other(key):\n    return 18\nbroken = 3\n"
    (tmp_path / "my_own_module.py").write_text(text)
    (tmp_path / "fails.py").write_text("def build():\n    weights = {}\n    return weights['kernel']\n")
    (tmp_path / "unfinished.py").write_text("def build(:\n")
    (tmp_path / "needs.py").write_text("import no_such_thing\n")


@pytest.mark.usefixtures("my_module")
def test_a_function_of_the_current_folder_is_called():
    assert own_models.imported("my_own_module:build") == 17


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (":build", ValueError, "model must be MODULE:FUNCTION, such as my_module:build, got ':build'"),
        ("no_module_of_mine:build", ValueError, "there is no module 'no_module_of_mine' in "),
        ("my_own_module:bild", ValueError, "my_own_module has no 'bild'; its functions are build, other"),
        ("my_own_module:other", ValueError, "must be a function without arguments, but missing .*'key'"),
        ("my_own_module:broken", ValueError, "'my_own_module:broken' must be a function"),
        (
            "fails:build",
            ValueError,
            r"'fails:build' must return a model, got KeyError in .*fails.py, line 3: 'ke",
        ),
        (
            "unfinished:build",
            ValueError,
            r"can be imported, got SyntaxError in .*unfinished.py, line 1: invalid",
        ),
        (
            "needs:build",
            ImportError,
            "model 'needs:build': No module named 'no_such_thing'",
        ),  # the user's module is there, and is at fault
    ],
)
def test_what_is_not_there_is_named(name, error, message):
    with pytest.raises(error, match=message):
        own_models.imported(name)


def test_functions_pairs_and_outputs_give_the_same_logits():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, use_bias=False)(x.reshape(len(x), -1))

    variables = {"params": {"Dense_0": {"kernel": KERNEL}}}
    of_features = lambda x: Outputs(linear(x), x.reshape(len(x), -1))
    for model in (linear, (Net(), variables), functools.partial(Net().apply, variables), of_features):
        functional = own_models.functional_of(model, X)
        logits, features = functional.outputs(functional.state, X)
        np.testing.assert_allclose(logits, linear(X), rtol=1e-5)
        assert features.shape == (6, 64 if model is of_features else 0)
    half = own_models.functional_of(lambda x: linear(x).astype(jnp.bfloat16), X)
    assert half.outputs(half.state, X).logits.dtype == jnp.float32
    assert jax.tree.leaves(own_models.functional_of((Net(), variables), X).state)[0].shape == (64, 3)
    own = models.functional(models.mlp(jax.random.key(0), hidden=(4,), image_shape=(8, 8, 1)))
    assert own_models.functional_of(own, X) is own
    with pytest.raises(ValueError, match="must be one of robustjax's own to be trained"):
        functional.apply(functional.state, X, train=True)
    with pytest.raises(ValueError, match="to show the outputs of its layers"):
        functional.activations(functional.state, X)


def test_haiku_with_a_state_is_applied_without_it():
    hk = pytest.importorskip("haiku")

    def net(x):
        mean = hk.get_state("mean", (1, 64), init=jnp.zeros)
        return (x.reshape(len(x), -1) - mean) @ hk.get_parameter("w", (64, 3), init=hk.initializers.Constant(KERNEL))

    transformed = hk.transform_with_state(net)
    pair = transformed.init(jax.random.key(0), X)
    state = jax.tree.map(lambda a: a + 1, pair[1])  # as after a training: it changes the answers
    want, _ = transformed.apply(pair[0], state, None, X)
    for module in (transformed, hk.without_apply_rng(transformed)):
        functional = own_models.functional_of((module, (pair[0], state)), X)
        np.testing.assert_allclose(functional.outputs(functional.state, X).logits, want, rtol=1e-5)
        assert len(jax.tree.leaves(functional.state)) == len(jax.tree.leaves((pair[0], state)))
    with pytest.raises(ValueError, match=r"model must be \(transformed, \(params, state\)\) where"):
        own_models.functional_of((transformed, pair[0]), X)


@pytest.mark.parametrize("run", [{"run": "evaluate", "model": "my:build"}, {"run": "ood", "model": "my:build"}])
def test_a_run_without_a_model_is_named(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "digits", **run}))
    with pytest.raises(ValueError, match=f"a run of {run['run']}, which keeps no model; pass --model my:build instead"):
        own_models.of_run(str(tmp_path))


def test_answers_that_depend_on_the_batch_are_refused():
    def alone(x):
        return linear(x)

    def centred(x):
        return linear(x) - linear(x).mean(0, keepdims=True)

    for images in (X, X[:1]):
        for model in (alone, centred):
            classifier = own_models.classifier_of(model, images)
            logits = classifiers.outputs_of(classifier, images).logits
            if model is alone:
                classifiers.check_each_row(classifier, images, logits)
                continue
            with pytest.raises(ValueError, match="model must answer each input by itself, got other answers for the"):
                classifiers.check_each_row(classifier, images, logits)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (17, "model must be a function of images .*; got 17"),
        (of(jnp.ones((6, 3, 1))), r"logits \(6, classes >= 2\) for images \(6, 8, 8, 1\), .*, got \(6, 3, 1\)"),
        (of(jnp.ones((6, 3))), r"logits \(7, classes >= 2\) for images \(7, 8, 8, 1\), .*, got \(6, 3\)"),
        (of(jnp.ones((5, 3))), r"must return logits \(6, classes >= 2\) .*, got \(5, 3\)"),
        (of(jnp.ones((6, 1))), r"must return logits \(6, classes >= 2\) .*, got \(6, 1\)"),
        (of(Outputs(jnp.ones((6, 3)), jnp.ones((3, 6)))), r"got \(6, 3\) with features \(3, 6\)"),
        (of([jnp.ones((6, 3))]), "model must return logits or robustjax.typing.Outputs, got list"),
        (of(jnp.ones((6, 3), jnp.int32)), "model must return floating-point logits, got int32"),
        (lambda x: np.asarray(x), r"that JAX can trace, for any number of images, but for \(6, 8, 8, 1\): "),
        (lambda x: {}[x.ndim], r"but for \(6, 8, 8, 1\): KeyError in .*own_models_test.py, line \d+: 4"),
        (lambda x: x.reshape(7, -1), "that JAX can trace, for any number of images"),
    ],
)
def test_a_model_of_another_kind_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        own_models.functional_of(model, X)


def test_logits_are_checked(capsys):
    own_models.check_logits(linear(X), np.array([0, 2]))
    assert not capsys.readouterr().out
    own_models.check_logits(np.full((2, 4), 0.25), np.array([0, 1]))
    assert "WARNING: the model seems to return probabilities" in capsys.readouterr().out
    with pytest.raises(ValueError, match="labels must be 0 to 2, as many classes as the model has logits, got 3"):
        own_models.check_logits(linear(X), np.array([0, 3]))
    with pytest.raises(ValueError, match=r"got 3 \(dog\)"):
        own_models.check_logits(linear(X), np.array([0, 3]), class_names=("a", "b", "c", "dog"))
    with pytest.raises(ValueError, match="model must return finite logits, got others for 1 of 2 images"):
        own_models.check_logits(np.array([[0, 1.0], [np.nan, 1.0]]), np.array([0, 1]))


def test_results_are_bound_to_the_answers_of_a_function(tmp_path):
    kept = lambda model: own_models.keep_to(epath.Path(tmp_path), np.asarray(model(X)))
    kept(linear)
    kept(lambda x: linear(x) * 1.0001)  # rounding on another machine
    with pytest.raises(ValueError, match="model must be the one that the run in .* began with"):
        kept(lambda x: -linear(x))


def test_the_last_layer_is_found_from_features_and_logits():
    rng = np.random.default_rng(0)
    features, kernel, bias = (rng.normal(size=size).astype(np.float32) for size in ((40, 5), (5, 3), 3))

    def head_of(logits, features):
        rows = detectors.Labelled(features, np.zeros(len(features), int), Outputs(logits, features))
        return detectors.context_of(classifiers.Classifier(*[None] * 3), rows, rows).head

    head = head_of(features @ kernel + bias, features)
    np.testing.assert_allclose(head.kernel, kernel, atol=1e-5)
    np.testing.assert_allclose(head.bias, bias, atol=1e-5)
    assert head_of(np.tanh(features @ kernel + bias), features) is None  # not linear
    assert head_of(features[:8] @ kernel + bias, features[:8]) is None  # too few rows to tell
    assert head_of(features @ kernel, features[:, :0]) is None  # no features


@pytest.mark.usefixtures("my_module")
def test_a_product_refuses_a_model_of_fewer_classes(tmp_path):
    (tmp_path / "my_own_module.py").write_text("def build():\n    return lambda x: x.reshape(len(x), -1)[:, :5]\n")
    config = smoothing.Config(model="my_own_module:build", results_dir=str(tmp_path))
    with pytest.raises(ValueError, match="a logit for each of the 10 classes of digits, got 5"):
        smoothing.run(config)
