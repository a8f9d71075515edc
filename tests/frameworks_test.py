"""One small network in every framework, with the same weights: what is computed of it does not change."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from robustjax import attacks, certification, models, scoring
from robustjax.certification import conformal, intervals

KEY = jax.random.key(0)
X = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(4)
MEASURE = certification.gaussian(0.25)
TRACED = []


def relu(x):
    """An activation that counts how often a program is made of it."""
    TRACED.append(x.shape)
    return jax.nn.relu(x)


def weights(seed):
    rng, shapes = np.random.default_rng(seed), {"w1": (64, 16), "b1": (16,), "w2": (16, 10), "b2": (10,)}
    return {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}


def logits_of(w, x):
    hidden = relu(x.reshape(len(x), -1) @ w["w1"] + w["b1"][None])
    return hidden @ w["w2"] + w["b2"][None]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))


def linen(w):
    params = {f"Dense_{i}": {"kernel": w[f"w{i + 1}"], "bias": w[f"b{i + 1}"]} for i in range(2)}
    return {"params": params}


class Nnx(nnx.Module):
    def __init__(self, w):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(16, epsilon=0, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.activation = relu
        for layer, i in ((self.first, "1"), (self.last, "2")):
            layer.kernel[...], layer.bias[...] = w[f"w{i}"], w[f"b{i}"]

    def __call__(self, x):
        return self.last(self.dropout(self.activation(self.norm(self.first(x.reshape(len(x), -1))))))

    def logits(self, x):
        return self(x)


def in_evaluation(w):
    module = Nnx(w)
    module.eval()
    return module


class Equinox(eqx.Module):
    mlp: eqx.nn.MLP
    name: str = "an MLP"
    nothing: None = None

    def __call__(self, x):
        return jax.vmap(self.mlp)(x.reshape(len(x), -1))


def mlp(w):
    module = eqx.nn.MLP(64, 10, 16, 1, activation=relu, key=KEY)
    where = lambda m: [getattr(layer, part) for layer in m.layers for part in ("weight", "bias")]
    return eqx.tree_at(where, module, [w["w1"].T, w["b1"], w["w2"].T, w["b2"]])


class Stateful(eqx.Module):
    """With batch normalisation, whose statistics are in a state of its own."""

    mlp: eqx.nn.MLP
    norm: eqx.nn.BatchNorm

    def __call__(self, x, state):
        return self.norm(self.mlp(x.reshape(-1)), state)


def with_state(w, *, inference):
    module, state = eqx.nn.make_with_state(lambda: Stateful(mlp(w), eqx.nn.BatchNorm(10, "b", mode="ema", eps=0)))()
    many = lambda m, x, s: jax.vmap(m, axis_name="b", in_axes=(0, None), out_axes=(0, None))(x, s)
    small = jnp.concatenate([jnp.ones((1, 8, 8, 1)), jnp.zeros((1, 8, 8, 1))])
    state = many(module, small, state)[1]  # the first call sets the statistics
    state = state.set(module.norm.ema_state_index, (jnp.zeros(10), jnp.ones(10)))
    return eqx.nn.inference_mode(module, value=inference), state


def of_state(module, x, state):
    return jax.vmap(module, axis_name="b", in_axes=(0, None), out_axes=(0, None))(x, state)[0]


def stateful(w, *, inference=True):
    module, state = with_state(w, inference=inference)
    return functools.partial(of_state, module, state=state)


def haiku_logits(x):
    hidden = relu(hk.Linear(16)(x.reshape(len(x), -1)))
    return hk.Linear(10)(hidden)


HAIKU = hk.without_apply_rng(hk.transform(haiku_logits))

FRAMEWORKS = {
    "plain function": lambda w: lambda x: logits_of(w, x),
    "Partial": lambda w: jax.tree_util.Partial(logits_of, w),
    "functools.partial": lambda w: functools.partial(logits_of, w),
    "normalized": lambda w: models.normalized(functools.partial(logits_of, w), mean=0.0, std=1.0),
    "Linen": lambda w: functools.partial(Linen().apply, linen(w), train=False),
    "Linen in Partial": lambda w: jax.tree_util.Partial(functools.partial(Linen().apply, linen(w)), train=False),
    "NNX": in_evaluation,
    "NNX method": lambda w: in_evaluation(w).logits,
    "Equinox": lambda w: Equinox(mlp(w)),
    "Equinox, filter_jit": lambda w: eqx.filter_jit(Equinox(mlp(w))),
    "Equinox, jax.jit": lambda w: jax.jit(Equinox(mlp(w))),
    "Equinox with state": stateful,
    "Haiku": lambda w: functools.partial(
        HAIKU.apply, {f"linear{i}": {"w": w[f"w{j}"], "b": w[f"b{j}"]} for i, j in (("", 1), ("_1", 2))}
    ),
}


def results(model):
    """By function, what is made of a model."""
    certificate = certification.certify(KEY, model, X, MEASURE, num_selection=10, num_estimation=90, batch_size=20)
    scores = conformal.smoothed_scores(KEY, model, X, MEASURE, num_samples=10, batch_size=10).mean
    return {
        "label": certificate.label,
        "radius": certificate.radius,
        "smoothed": np.asarray(scores),
        "sets": np.asarray(scores) <= 0.9,
        "pgd": np.asarray(attacks.pgd(epsilon=0.1, steps=2)(KEY, model, X, LABELS)),
        "odin": np.asarray(scoring.odin(model).score((), X)),
        "margin": np.asarray(intervals.certify(model, X, epsilon=0.01).margin),
    }


@functools.cache
def wanted(seed):
    return results(FRAMEWORKS["Partial"](weights(seed)))


@pytest.mark.parametrize("name", ["plain function", "Linen", "NNX", "Equinox", "Equinox, filter_jit", "Haiku"])
def test_results_are_the_same_and_new_weights_trace_nothing(name):
    assert (wanted(0)["label"] >= 0).any()
    assert 0 < wanted(0)["sets"].mean() < 1
    one, other = (FRAMEWORKS[name](weights(seed)) for seed in (0, 1))
    found = [results(one)]
    traced = len(TRACED)
    if name != "plain function":  # whose weights are constants
        found.append(results(other))
        assert len(TRACED) == traced
        assert not np.array_equal(found[0]["odin"], found[1]["odin"])
    for seed, of_seed in enumerate(found):
        for function, value in of_seed.items():
            atol = 1e-3 if function == "margin" else 1e-5  # each operation adds its room for rounding
            np.testing.assert_allclose(value, wanted(seed)[function], rtol=1e-4, atol=atol, err_msg=function)


@pytest.mark.parametrize(
    "name",
    ["functools.partial", "normalized", "Linen in Partial", "NNX method", "Equinox, jax.jit", "Equinox with state"],
)
def test_other_spellings_give_the_same_and_trace_nothing_either(name):
    one, other = (FRAMEWORKS[name](weights(seed)) for seed in (0, 1))
    first = attacks.fgsm(epsilon=0.1)(KEY, one, X, LABELS)
    traced = len(TRACED)
    second = attacks.fgsm(epsilon=0.1)(KEY, other, X, LABELS)
    assert len(TRACED) == traced
    for seed, found in enumerate((first, second)):
        same = attacks.fgsm(epsilon=0.1)(KEY, FRAMEWORKS["Partial"](weights(seed)), X, LABELS)
        np.testing.assert_allclose(found, same, atol=1e-6)


@pytest.mark.parametrize("name", ["NNX", "Equinox"])
def test_the_other_functions_take_them_too(name):
    found = []
    for model in (FRAMEWORKS["Partial"](weights(0)), FRAMEWORKS[name](weights(0))):
        sequential = certification.certify_sequential(KEY, model, X, MEASURE, max_samples=100, batch_size=20)
        accuracy = attacks.robust_accuracy(KEY, attacks.pgd(epsilon=0.1, steps=2), model, X, LABELS)
        predicted = certification.predict(KEY, model, X, MEASURE, num_samples=100, batch_size=20)
        assert not attacks.diagnose(KEY, model, X, LABELS).warnings
        found.append((*sequential, accuracy, predicted))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_function_of_layers_may_hold_a_module():
    scores = []
    for name in ("Partial", "Equinox"):
        layers_fn = functools.partial(lambda model, x: {"logits": model(x)}, FRAMEWORKS[name](weights(0)))
        detector = scoring.nac(layers_fn, num_bins=4)
        scores.append(detector.score(detector.fit(X), X))
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:AutoAttack")
@pytest.mark.parametrize("name", ["NNX", "Equinox"])
def test_autoattack_takes_them(name):
    labels = np.asarray(logits_of(weights(0), X).argmax(-1))
    attack = attacks.autoattack(epsilon=0.02)
    one, other = (attack.evaluate(KEY, FRAMEWORKS[kind](weights(0)), X, labels) for kind in ("Partial", name))
    assert one.per_attack == other.per_attack


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Nnx, "logits_fn must not change its own arrays when it is called"),
        (lambda w: functools.partial(lambda model, x: model(x), Nnx(w)), "logits_fn must not change its own arrays"),
        (lambda w: (lambda model: lambda x: model(x))(Nnx(w)), "logits_fn must not change its own arrays"),
        (lambda w: stateful(w, inference=False), "logits_fn must answer each input by itself"),
    ],
    ids=["NNX", "NNX in a partial", "NNX in a closure", "Equinox"],
)
def test_a_model_in_training_mode_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        certification.predict(KEY, make(weights(0)), X, MEASURE, num_samples=100, batch_size=20)


def test_a_refused_module_keeps_its_arrays():
    module = Nnx(weights(0))
    with pytest.raises(ValueError, match="leave the training mode, as model.eval"):
        attacks.fgsm(epsilon=0.1)(KEY, module, X, LABELS)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(module))
    np.testing.assert_array_equal(module.norm.mean[...], np.zeros(16))
