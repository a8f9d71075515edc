"""The border: pure functions that agree with the module, leave no trace and keep their dtypes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import models
from robustjax.typing import ModelState, Outputs

SHAPE = (6, 7, 3)
SETTINGS = {"cnn": {}, "wide_resnet": {"depth": 10, "width": 1}}  # without batch statistics, and with


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(3), (5, *SHAPE))


@pytest.fixture(scope="module")
def make(build):
    return functools.cache(lambda name, **settings: build(name, image_shape=SHAPE, **SETTINGS[name], **settings))


@pytest.fixture(scope="module", params=SETTINGS)
def model(request, make):
    return make(request.param)


jitted = functools.cache(jax.jit)
applied = functools.cache(functools.partial(jax.jit, static_argnames="train"))


def test_state_is_plain_dictionaries_with_string_keys(model):
    def check(tree):
        if isinstance(tree, jax.Array):
            return
        assert type(tree) is dict
        for name, value in tree.items():
            assert type(name) is str
            check(value)

    assert type(model.state) is ModelState
    check(model.state.params)
    check(model.state.batch_stats)


def test_functions_agree_with_the_module(x):
    module = models.mlp(jax.random.key(0), image_shape=SHAPE, hidden=(4,))
    model = models.functional(module)
    chex.assert_trees_all_equal(model.outputs(model.state, x), module(x))


def test_inference_leaves_the_state(model, x):
    state = jax.eval_shape(lambda state: state, model.state)
    seen = []
    jax.eval_shape(lambda state, x: seen.append((model.apply(state, x)[1], state)), state, x)
    assert seen[0][0] is seen[0][1]


def test_inference_is_deterministic(model, x):
    apply = applied(model.apply)
    chex.assert_trees_all_equal(apply(model.state, x)[0], apply(model.state, x, train=False)[0])
    chex.assert_trees_all_equal(apply(model.state, x)[0], jitted(model.outputs)(model.state, x))


def test_an_image_does_not_see_its_batch_at_inference(model, x):
    outputs = jitted(model.outputs)
    others = outputs(model.state, x.at[1:].add(1.0)).logits
    np.testing.assert_allclose(others[0], outputs(model.state, x).logits[0], rtol=1e-5)
    assert np.abs(others[1:] - outputs(model.state, x).logits[1:]).max() > 1e-3


def test_jit_equals_eager(make, x):
    model = make("cnn")  # eagerly, each operation is a program
    eager = model.apply(model.state, x, train=True)
    chex.assert_trees_all_close(eager, applied(model.apply)(model.state, x, train=True), rtol=1e-3, atol=1e-4)


def test_logits_are_the_head_of_the_features(model, x):
    outputs = jitted(model.outputs)(model.state, x)
    head = model.state.params["head"]
    want = np.asarray(outputs.features, np.float64) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(outputs.logits, want, rtol=1e-5, atol=1e-5)


def test_training_moves_batch_statistics_by_momentum(make, x):
    model = make("wide_resnet")
    _, after = applied(model.apply)(model.state, x, train=True)
    kernel = model.state.params["body"]["stem"]["kernel"]
    stem = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    old, new = (state.batch_stats["body"]["blocks"]["0"]["norm1"] for state in (model.state, after))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * np.mean(stem, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * np.var(stem, (0, 1, 2)), rtol=1e-5)
    chex.assert_trees_all_equal(after.params, model.state.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(model.state, after)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), model.state.batch_stats, after.batch_stats)
    assert all(jax.tree.leaves(moved))


def test_training_normalises_by_the_batch(make, x):
    # A positive factor on what is normalised cancels, but only with the batch's own statistics.
    model = make("wide_resnet")
    params = jax.tree.map(lambda a: a, model.state.params)
    params["body"]["blocks"]["1"]["conv1"]["kernel"] *= 3.0
    states = model.state, model.state._replace(params=params)
    training = [applied(model.apply)(state, x, train=True)[0].logits for state in states]
    inference = [jitted(model.outputs)(state, x).logits for state in states]
    np.testing.assert_allclose(*training, rtol=1e-3, atol=1e-3)  # the 1e-5 added to the variance does not cancel
    assert np.abs(inference[0] - inference[1]).max() > 0.1


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.25), ((0.49, 0.48, 0.45), (0.2, 0.21, 0.22))])
def test_normalisation_equals_normalised_images(make, x, mean, std):
    plain, inside = make("cnn"), make("cnn", mean=mean, std=std)
    assert jax.tree.structure(plain.state) == jax.tree.structure(inside.state)  # constants, not parameters
    outside = jnp.asarray((np.asarray(x, np.float64) - mean) / std, jnp.float32)
    got, want = jitted(inside.outputs)(inside.state, x), jitted(plain.outputs)(plain.state, outside)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_bfloat16_computes_coarsely_and_keeps_float32_outside(make, x, name):
    full, half = make(name), make(name, dtype=jnp.bfloat16)
    want = jitted(full.outputs)(full.state, x)
    got = jitted(half.outputs)(half.state, x)
    _, state = applied(half.apply)(half.state, x, train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((got, half.state, state))} == {jnp.dtype("float32")}
    error = np.abs(got.logits - want.logits).max() / np.abs(want.logits).max()
    assert 1e-5 < error < 0.05  # eight bits of mantissa: neither float32 in disguise nor wrong


def test_bfloat16_rounds_after_the_normalisation(build):
    # A step of 2^-10 between neighbouring grey values is lost in bfloat16 near 1 unless the mean is taken off first.
    model = build("mlp", hidden=(), image_shape=SHAPE, mean=1.0, std=2**-10, dtype=jnp.bfloat16)
    x = jnp.full((1, *SHAPE), 1 + 2**-10)
    np.testing.assert_array_equal(model.outputs(model.state, x).features, np.ones((1, 126)))


def test_gradient_is_finite_and_reaches_every_parameter(model, x):
    def loss(params, state):
        outputs, state = model.apply(state._replace(params=params), x, train=True)
        return jnp.square(outputs.logits).mean(), state

    gradient, state = jax.jit(jax.grad(loss, has_aux=True))(model.state.params, model.state)
    chex.assert_tree_all_finite((gradient, state))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_vmap_over_an_ensemble(make, x):
    model = make("cnn")
    members = [jax.tree.map(lambda a, s=scale: a * s, model.state) for scale in (1.0, 0.7)]
    together = jax.jit(jax.vmap(model.outputs, (0, None)))(jax.tree.map(lambda *a: jnp.stack(a), *members), x)
    for index, member in enumerate(members):
        got = jax.tree.map(lambda a, i=index: a[i], together)
        chex.assert_trees_all_close(got, jitted(model.outputs)(member, x), rtol=1e-4, atol=1e-4)


def test_state_can_be_donated_and_the_module_survives(x):
    module = models.mlp(jax.random.key(0), image_shape=SHAPE, hidden=(4,))
    want = module(x).logits
    model = models.functional(module)
    step = jax.jit(lambda state: model.apply(state, x, train=True)[1], donate_argnums=0)
    state = step(step(model.state))
    chex.assert_tree_all_finite(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model.state))
    np.testing.assert_array_equal(module(x).logits, want)


def test_equal_architectures_are_traced_once(x):
    traced = []

    @functools.partial(jax.jit, static_argnames="apply")
    def logits(apply, state, x):
        traced.append(apply)
        return apply(state, x)[0].logits

    for seed, std in ((0, 1.0), (1, 1.0), (2, 0.5)):
        model = models.functional(models.mlp(jax.random.key(seed), image_shape=SHAPE, hidden=(4,), std=std))
        logits(model.apply, model.state, x)
    assert len(traced) == 2  # the third has another constant


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (SHAPE, "float32", r"x must have shape \(batch, 6, 7, 3\), got \(6, 7, 3\)\."),
        ((2, 7, 6, 3), "float32", r"x must have shape \(batch, 6, 7, 3\), got \(2, 7, 6, 3\)\."),
        ((2, 6, 7, 1), "float32", r"x must have shape \(batch, 6, 7, 3\), got \(2, 6, 7, 1\)\."),
        ((2, 6, 7, 3), "uint8", r"x must be floating point, got uint8 of shape \(2, 6, 7, 3\)\."),
    ],
)
def test_bad_images_are_named_while_tracing(make, shape, dtype, message):
    model = make("cnn")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.outputs, model.state, jax.ShapeDtypeStruct(shape, dtype))


def test_random_state_is_refused():
    class Dropping(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x):
            features = self.dropout(x)
            return Outputs(self.head(features), features)

    with pytest.raises(ValueError, match=r"only nnx.Param and nnx.BatchStat variables, got dropout/rngs/"):
        models.functional(Dropping())


def test_num_parameters_counts_scalars():
    assert models.num_parameters({"a": jnp.zeros((2, 3)), "b": {"c": jax.ShapeDtypeStruct((), jnp.float32)}}) == 7
    assert models.num_parameters({}) == 0


# Paths that must be there, with the shapes that 16 x 16 images give (height, width, channels; or width).
ACTIVATIONS = {
    "lenet": {"body/conv1": (12, 12, 20), "body/conv2": (2, 2, 50), "body/dense": (500,), "body": (500,), "head": (4,)},
    "resnet20": {
        "body/stem": (16, 16, 16),
        "body/norm": (16, 16, 16),
        "body/blocks/0": (16, 16, 16),
        "body/blocks/3/shortcut/conv": (8, 8, 32),
        "body/blocks/8/norms/1": (4, 4, 64),
        "body": (64,),
        "head": (4,),
    },
    "wide_resnet": {"body/blocks/2/conv2": (4, 4, 64), "body/norm": (4, 4, 64), "body": (64,), "head": (4,)},
}


NAMES = [pytest.param(n, marks=pytest.mark.slow) if n == "resnet20" else n for n in ACTIVATIONS]  # as wide_resnet


@pytest.fixture(scope="module", params=NAMES)
def seen(request, build):
    """Name, model, images, outputs and activations of each architecture; two programs are compiled for each."""
    settings = SETTINGS.get(request.param, {})
    model = build(request.param, image_shape=(16, 16, 1), num_classes=4, **settings)
    x = jax.random.uniform(jax.random.key(4), (3, 16, 16, 1))
    activations = jax.jit(model.activations)(model.state, x)
    return request.param, model, x, jitted(model.outputs)(model.state, x), activations


def test_activations_are_what_the_submodules_give(seen):
    name, model, x, outputs, activations = seen
    got = {path: array.shape[1:] for path, array in activations.items()}
    assert ACTIVATIONS[name].items() <= got.items()
    blocks = {"lenet": 0, "resnet20": 9 * 5 + 2 * 3, "wide_resnet": 3 * 5 + 2}  # with two projections, of 3 or 1 parts
    assert len(activations) == blocks[name] + (5 if name == "lenet" else 4)
    np.testing.assert_allclose(activations["head"], outputs.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(activations["body"], outputs.features, rtol=1e-5, atol=1e-5)
    first, padding = ("conv1", "VALID") if name == "lenet" else ("stem", "SAME")
    layer = model.state.params["body"][first]
    conv = jax.lax.conv_general_dilated(x, layer["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    want = np.asarray(conv) + np.asarray(layer.get("bias", 0.0))
    np.testing.assert_allclose(activations[f"body/{first}"], want, rtol=1e-5, atol=1e-5)


def test_unused_activations_are_not_computed(make, x):
    model = make("cnn")
    first = jax.jit(lambda state, x: model.activations(state, x)["body/conv1"])
    flops = [jax.jit(f).lower(model.state, x).compile().cost_analysis()["flops"] for f in (first, model.outputs)]
    assert 0 < flops[0] < 0.5 * flops[1]


def test_gradient_of_an_offset_is_the_gradient_of_the_activation(make, x):
    model = make("cnn")

    @jax.jit
    def program(state, x, offset, *of_conv):
        def head(offset, of_conv):
            return model.activations(state, x, {"body": offset, "body/conv1": of_conv})["head"]

        logits = head(offset, of_conv[0])
        return logits, [jax.grad(lambda *at: head(*at).sum(), argnums=(0, 1))(offset, at) for at in of_conv]

    offset = jax.random.normal(jax.random.key(5), (5, 128))
    channel, full = jnp.zeros((5, 1, 1, 32)), jnp.zeros((5, *SHAPE[:2], 32))
    logits, ((gradient, of_channel), (_, of_units)) = program(model.state, x, offset, channel, full)
    # All that follows "body" is the head, and that is linear.
    kernel = model.state.params["head"]["kernel"]
    want = jitted(model.outputs)(model.state, x).logits + offset @ kernel
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(kernel.sum(1), gradient.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_channel, of_units.sum((1, 2), keepdims=True), rtol=1e-4, atol=1e-5)
    assert np.any(of_units)


def test_activations_are_a_stable_function(build, make, x):
    model = make("wide_resnet", dtype=jnp.bfloat16)
    assert build("wide_resnet", image_shape=SHAPE, dtype=jnp.bfloat16, **SETTINGS["wide_resnet"]).activations is (
        model.activations
    )
    shapes = jax.eval_shape(model.activations, model.state, x)
    assert {str(shapes[path].dtype) for path in ("body/stem", "body/norm")} == {"bfloat16"}
    assert {str(shapes[path].dtype) for path in ("body", "head")} == {"float32"}


def test_an_offset_without_a_submodule_is_named(build):
    model = build("mlp", image_shape=SHAPE, hidden=(4,))
    with pytest.raises(ValueError, match=r"offsets must name submodules among body/dense/0, body, head, got 'bdy'\."):
        jax.eval_shape(model.activations, model.state, jnp.zeros((1, *SHAPE)), {"bdy": jnp.zeros((1, 4))})


def test_normalisation_is_folded_into_convolutions_at_inference(build):
    model = build("resnet20", image_shape=(8, 8, 3))
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    folded, plain = jax.jit(lambda state, x: (model.outputs(state, x).logits, model.activations(state, x)["head"]))(
        model.state, x
    )
    np.testing.assert_allclose(folded, plain, rtol=0, atol=1e-5 * np.abs(plain).max())

    def products_of_images(functions):
        text = str(jax.make_jaxpr(functions)(model.state, x))
        return sum(" = mul " in line and "f32[2," in line.split(" = ")[0] for line in text.splitlines())

    assert products_of_images(lambda state, x: model.outputs(state, x).logits) == 0
    assert products_of_images(lambda state, x: model.activations(state, x)["head"]) > 20


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_head_is_computed_in_float32_everywhere(build, platform):
    model = build("mlp", image_shape=(4, 4, 1), hidden=(8,), dtype=jnp.bfloat16)
    traced = jax.jit(model.outputs).trace(model.state, jnp.ones((2, 4, 4, 1)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert ["HIGHEST" in line for line in products] == [False, True]
