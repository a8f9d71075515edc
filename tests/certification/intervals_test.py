"""Interval bounds against closed forms, brute force and attacks; certificates and their promises."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from robustjax import attacks, models
from robustjax._intervals import margin_bounds
from robustjax.certification import intervals

RNG = np.random.default_rng(0)
W1 = RNG.normal(size=(4, 5)).astype(np.float32)
B1 = RNG.normal(size=5).astype(np.float32)
W2 = RNG.normal(size=(5, 3)).astype(np.float32)
X = RNG.uniform(0.1, 0.9, (3, 4)).astype(np.float32)
R = np.float32(0.1)
compiled_bounds, compiled_margins = (
    jax.jit(f, static_argnums=0, static_argnames=names)
    for f, names in ((intervals.bounds, ()), (margin_bounds, "outward"))
)


def two_layers(x):
    return jax.nn.relu(x @ W1 + B1[None]) @ W2


def inside(lower, upper, count):
    """Corners and interior points of a box."""
    share = RNG.uniform(size=(count, *lower.shape))
    share = np.where(np.arange(count).reshape(-1, *(1,) * lower.ndim) % 2, share, share > 0.5)
    return (lower + share * (upper - lower)).astype(np.float32)


def assert_contains(bounds, values, slack=1e-5):
    assert np.isfinite(bounds.lower).all()
    assert (np.asarray(bounds.lower) <= values.min(0) + slack).all()
    assert (values.max(0) <= np.asarray(bounds.upper) + slack).all()


def test_one_affine_layer_is_exact():
    bounds = compiled_bounds(lambda x: x @ W1 + B1[None], X - R, X + R)
    centre = X.astype(np.float64) @ W1 + B1
    radius = np.full_like(X, R, np.float64) @ np.abs(W1)
    np.testing.assert_allclose(bounds.lower, centre - radius, atol=1e-5)
    np.testing.assert_allclose(bounds.upper, centre + radius, atol=1e-5)


def test_a_network_that_only_increases_is_exact():
    network = lambda x: jnp.tanh(jax.nn.relu(x @ jnp.abs(W1)) @ jnp.abs(W2))
    bounds = compiled_bounds(network, X - R, X + R)
    np.testing.assert_allclose(bounds.lower, network(X - R), atol=1e-6)
    np.testing.assert_allclose(bounds.upper, network(X + R), atol=1e-6)


def test_two_layers_are_their_twin():
    def layer(low, high, weights, bias):
        plus, minus = np.maximum(weights, 0), np.minimum(weights, 0)
        return low @ plus + high @ minus + bias, high @ plus + low @ minus + bias

    x = X.astype(np.float64)
    hidden = [np.maximum(end, 0) for end in layer(x - R, x + R, W1, B1)]
    low, high = layer(hidden[0], hidden[1], W2, 0.0)
    bounds = compiled_bounds(two_layers, X - R, X + R)
    np.testing.assert_allclose(bounds.lower, low, atol=1e-5)
    np.testing.assert_allclose(bounds.upper, high, atol=1e-5)
    labels = np.array([0, 1, 2])
    margins = compiled_margins(two_layers, X - R, X + R, labels)
    for i, y in enumerate(labels):  # the two last layers are one, with weights w_y - w_j
        merged = layer(hidden[0][i], hidden[1][i], W2[:, [y]] - W2, 0.0)[0]
        np.testing.assert_allclose(margins[i], merged, atol=1e-5)
    assert (margins > low[np.arange(3), labels][:, None] - high + 1e-3).any()


def tail(x):
    """Affine behind two activations of which one is a quotient, and through a stopped gradient."""
    hidden = jax.nn.relu(x @ W1 + B1[None])
    both = jnp.concatenate([jax.lax.stop_gradient(hidden), 2 / (1 + hidden)], axis=1)
    both = 3.0 - (both + both[:, ::-1]) / 2
    return both @ np.concatenate([W2, -W2[::-1]]) - both.mean(1, keepdims=True)


def test_the_last_layers_are_bounded_as_one_and_soundly():
    labels = np.array([0, 1, 2])
    low, high = X - 2 * R, X + 2 * R
    margins = np.asarray(compiled_margins(tail, low, high, labels))
    logits = np.asarray(jax.jit(jax.vmap(tail))(inside(low, high, 10_000)))
    reached = (logits[:, np.arange(3), labels][..., None] - logits).min(0)
    assert (margins <= reached + 1e-5).all()
    bounds = compiled_bounds(tail, low, high)
    apart = bounds.lower[np.arange(3), labels][:, None] - bounds.upper
    off_diagonal = np.arange(3) != labels[:, None]
    assert (margins > apart)[off_diagonal].all()


def test_a_quotient_by_the_input_is_not_affine():
    logits_fn = lambda x: jnp.concatenate([-2 / (0.2 + x), 0 * x], axis=1)
    low, high = np.full((1, 1), 0.1, np.float32), np.full((1, 1), 0.9, np.float32)
    np.testing.assert_allclose(compiled_margins(logits_fn, low, high, np.array([0])), [[0, -2 / 0.3]], rtol=1e-5)


def test_jit_and_vmap_over_weights():
    network = lambda weights: intervals.bounds(lambda x: jax.nn.relu(x @ weights), X - R, X + R)
    weights = jnp.stack([W1, -W1])
    together = jax.jit(jax.vmap(network))(weights)
    for i in range(2):
        np.testing.assert_allclose(together.lower[i], network(weights[i]).lower, atol=1e-6)


@jax.custom_vjp
def reflected(x):
    return 2 - x


reflected.defvjp(lambda x: (reflected(x), None), lambda _, gradient: (-gradient,))


@jax.custom_jvp
def halved_below(x):
    return jnp.maximum(x, 0) - 0.5 * jnp.maximum(-x, 0)


halved_below.defjvp(lambda x, dx: (halved_below(x[0]), dx[0]))


def unusual(x):
    """Steps that no model here has, each where it has bounds."""
    a = jnp.concatenate([x, 1 - x, x[:, ::-1] / -2.0], axis=1)
    a = halved_below(reflected(a) - 1.8)
    a = jnp.pad(a, ((0, 0), (1, 2)))[:, 1:-1]
    b = jax.nn.gelu(a - 0.4) + jax.nn.silu(a) + jax.nn.relu6(3 * a) + jnp.abs(a - 0.3)
    c = jnp.square(b - 0.5) + (b - 0.5) ** 3 + b * b + (b - 0.2) ** 2
    d = 1 / (1 + jnp.exp(-b)) + 2.0 / (1.0 + c * c) + (2 + b) ** -2
    e = (d - d.mean(1, keepdims=True)) * jax.lax.rsqrt(jnp.square(d).sum(1, keepdims=True) + 0.1)
    f = jnp.where(jnp.arange(e.shape[1])[None] % 2 == 0, e, jax.nn.sigmoid(-e))
    g = jnp.log(jnp.sqrt(jnp.abs(f) + 1.0)) * jnp.clip(f, -0.2, 0.3) + jax.checkpoint(jnp.tanh)(
        jax.lax.stop_gradient(f)
    )
    return jnp.squeeze(g[:, None].max(1, keepdims=True), 1)


def layers(x):
    """A small network of today: attention over rows, layer norm, and JAX's activations."""
    query, key = x @ W1[:, :4], x @ W1[:, 1:]
    hidden = x + jax.nn.softmax(query @ key.T, axis=-1) @ x
    centred = hidden - hidden.mean(-1, keepdims=True)
    hidden = 2 * centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 0.1) - 1
    increasing = jax.nn.softplus, jax.nn.elu, jax.nn.selu, jax.nn.celu, jax.nn.leaky_relu, jax.nn.log_sigmoid
    of_two = jnp.maximum(hidden, x), jax.lax.erfc(hidden) - jnp.power(jnp.abs(hidden) + 0.1, 1.7), 1.5**hidden
    return jnp.stack([*(f(hidden) for f in increasing), jax.nn.log_softmax(hidden, 0), *of_two])


def choices(x):
    """Conditions on the input, and on what is known."""
    a = x @ W1[:, :4]
    halves = jnp.where((a > 0.1) & ~(a >= 0.6) | (x < 0.2), a, 0.2 * x - 1), jnp.where(jnp.isfinite(a), a, 7.0)
    others = jnp.nan_to_num(a), (a > 0).astype(a.dtype) * x, jnp.sort(a, -1), jax.nn.hard_silu(a)
    branches = [lambda a: -a, lambda a: jnp.tanh(2 * a), lambda a: a]
    taken = [jax.lax.switch(which, branches, x) for which in (2, jnp.argmax(jnp.asarray(W1[0, :3])))]
    return jnp.stack([*halves, *others, *taken])


def moves(x):
    """What moves and repeats elements."""
    y = jax.lax.optimization_barrier(jnp.tile(x, (1, 2)))
    y = jax.lax.dynamic_update_slice(y, x @ W1[:, :3], (1, 3)).at[0, 2:4].set(3 * x[1, :2])
    y = y.at[jnp.array([0, 1]), jnp.array([3, 3])].add(-x[:2, 0])
    step = lambda carry, row: (jnp.tanh(carry + row), 2 * carry)
    scans = [jax.lax.scan(step, x[0], x, reverse=reverse) for reverse in (False, True)]
    y = jnp.concatenate([y.ravel(), *(part.ravel() for part in jax.tree.leaves(scans))])
    return jax.lax.fori_loop(0, 2, lambda _, y: 0.9 * y - jnp.roll(y, 1), y)


def test_bounds_contain_what_is_reached():
    everything = lambda x: jnp.concatenate([f(x).ravel() for f in (unusual, layers, choices, moves)])
    low, high = X - R / 5, X + R / 5
    bounds = compiled_bounds(everything, low, high)
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        points = jnp.asarray(inside(low, high, 2_000), jnp.float64)
        reached = np.asarray(jax.jit(jax.vmap(everything))(points))
    assert_contains(bounds, reached)
    assert (bounds.upper - bounds.lower)[-100:].max() < 10  # what only moves, adds up and saturates


def activations(x):
    """Each has a minimum between -2 and -1/2, as a whole and in the words of users."""
    by_hand = x * jax.nn.sigmoid(x), -0.3 * (x * (1 + jax.lax.erf(x / np.sqrt(2)))), (2 * x) * jax.nn.sigmoid(x) / 4
    return jnp.stack([jax.nn.silu(x), jax.nn.gelu(x), jax.nn.gelu(x, approximate=False), *by_hand])


def test_activations_and_softmax_have_their_extrema():
    low = np.array([-6, -3, -2, -0.9, -0.5, 0.5], np.float32)
    high = np.array([-5, -1, 2, -0.6, 0.5, 0.9], np.float32)
    bounds = compiled_bounds(activations, low, high)
    with jax.enable_x64():
        grid = np.linspace(low.astype(float), high.astype(float), 2_001)
        values = np.asarray(jax.jit(jax.vmap(activations))(grid))
        corners = np.stack(np.meshgrid(*zip(low[2:5] * 2, high[2:5] * 2)), -1).reshape(-1, 3)
        shares = np.asarray(jax.nn.softmax(corners.astype(np.float64), -1))
    np.testing.assert_allclose(bounds.lower, values.min(0), atol=2e-6)
    np.testing.assert_allclose(bounds.upper, values.max(0), atol=2e-6)
    both = lambda x: jnp.stack([jax.nn.softmax(2 * x), jnp.exp(jax.nn.log_softmax(2 * x))])
    bounds = compiled_bounds(both, low[2:5], high[2:5])
    np.testing.assert_allclose(bounds.lower, np.stack([shares.min(0)] * 2), rtol=1e-5)
    np.testing.assert_allclose(bounds.upper, np.stack([shares.max(0)] * 2), rtol=1e-5)
    far = compiled_bounds(jax.nn.log_softmax, np.array([-40, 0, 1], np.float32), np.array([40, 0, 1], np.float32))
    assert (far.lower <= np.array([-41.3132, -39.9999, -38.9999])).all()  # -40 - ln(1 + e), and beside the largest
    assert (far.lower > -200).all()
    assert (far.upper <= 0).all()
    assert (far.upper >= np.array([-1e-6, -1.3133, -0.3133])).all()


def test_sums_of_other_elements_make_no_softmax():
    def turned(x):
        e = jnp.exp(x)
        return jnp.stack([e / e.sum(0)[:, None], x - jnp.log(e.sum(0))[:, None]])

    square = np.array([[0.0, 2.0], [0.0, 0.0]], np.float32)
    assert_contains(compiled_bounds(turned, square, square), np.asarray(turned(jnp.asarray(square)))[None])


def test_a_number_as_a_condition_is_whether_it_is_not_0():
    as_condition = lambda x: x.astype(bool).astype(x.dtype)
    straight_through = jax.custom_jvp(as_condition)
    straight_through.defjvp(lambda x, dx: (as_condition(*x), *dx))
    low, high = np.array([[-1, 1], [-1, 0], [0, 1], [0, 0], [1, 2], [-2, -1]], np.float32).T
    for function in (as_condition, straight_through):
        bounds = compiled_bounds(function, low, high)
        np.testing.assert_array_equal(bounds.lower, [0, 0, 0, 0, 1, 1])
        np.testing.assert_array_equal(bounds.upper, [1, 1, 1, 0, 1, 1])


def test_what_may_be_undefined_stays_so():
    """Each step leaves its domain, or may, between 0.4 and 0.6; whatever is made of it has no bounds."""
    one, huge = jnp.ones(1), 1e38

    def steps(x):
        a = x - 0.5
        overflow = jnp.exp(200 * x) - jnp.exp(199 * x), (huge * x) * 50 * (x - x), jnp.exp(200 * x) @ one[None].T * a
        roots = jnp.sqrt(a), a**-0.5, jnp.power(a, 1.5), jax.lax.rsqrt(a), jnp.arccosh(0.5 + x), jnp.arcsin(0.5 + x)
        inverses = 1 / a, x / (x * a), 1 / a**2, jnp.maximum(a, -0.0) ** -1.0
        return jnp.stack([*roots, *inverses, jnp.log(a), jnp.log1p(-2 * x), *overflow])

    def healed(x):
        a = steps(x)
        known = jnp.where(jnp.arange(len(a))[:, None] >= 0, a, 0.0)
        asked = jnp.where(jnp.isnan(a), 0.0, a), jnp.where(a > 0, jnp.tanh(a), 0.5), jnp.nan_to_num(a, posinf=1.0)
        wide = jnp.concatenate([a, jnp.ones_like(a)], 1)
        together = (
            wide.max(1, keepdims=True),
            jnp.sort(wide)[:, :1],
            jax.lax.cummin(wide, 1)[:, 1:],
            (wide @ jnp.eye(2, 1)),
        )
        whole = jnp.clip(a, 0.0, 0.5), jnp.maximum(a, 1.0), jnp.minimum(a, 0.0), jax.nn.relu(a), jnp.sign(a), a * 0
        return jnp.stack([known, *asked, *together, *whole, jnp.tanh(a), jnp.power(jnp.abs(a), 0 * x[None])])

    row = lambda value: np.full((1,), value, np.float32)
    bounds = compiled_bounds(healed, row(0.4), row(0.6))
    unbounded = np.isinf(bounds.lower) & np.isinf(bounds.upper)
    assert unbounded.all(), np.argwhere(~unbounded)

    def model(x):  # NaN below 0.5, which argmax elects
        return jnp.stack([jnp.ones(len(x)), jnp.clip(jnp.sqrt(x[:, 0] - 0.5), 0.0, 0.5)], -1)

    certificate = intervals.certify(model, np.array([[0.52], [0.62]], np.float32), epsilon=0.1)
    np.testing.assert_array_equal(certificate.verified, [False, True])


def _logits(outputs, state, x):
    return outputs(state, jnp.asarray(x)).logits


def logits_of(module):
    functional = models.functional(module)
    return jax.tree_util.Partial(functools.partial(_logits, functional.outputs), functional.state)


@functools.cache
def model(name):
    count, shape, settings = {"mlp": (24, (4, 4, 1), {"hidden": (8, 8)}), "cnn": (3, (6, 6, 1), {})}[name]
    build = getattr(models, name)
    module = build(jax.random.key(3), image_shape=shape, mean=0.5, std=0.25, num_classes=4, **settings)
    return logits_of(module), RNG.uniform(size=(count, *shape)).astype(np.float32)


@pytest.mark.parametrize(("name", "count"), [("mlp", 2_000), ("cnn", 1_000)])
def test_margins_of_the_models_hold_all_that_is_reached(name, count):
    logits_fn, images = model(name)
    epsilon = 0.02
    certificate = intervals.certify(logits_fn, images, epsilon=epsilon)
    low, high = np.clip(images - epsilon, 0, 1), np.clip(images + epsilon, 0, 1)
    points = inside(low, high, count)
    logits = np.asarray(jax.jit(logits_fn)(points.reshape(-1, *images.shape[1:]))).reshape(count, len(images), 4)
    of_label = logits[:, np.arange(len(images)), certificate.label][..., None]
    others = np.where(np.arange(4) == np.asarray(certificate.label)[:, None], np.inf, of_label - logits)
    assert (certificate.margin <= others.min((0, 2))).all()
    assert (certificate.margin > -100).all()


def test_a_ball_of_radius_0_gives_the_margins_themselves():
    logits_fn, images = model("mlp")
    certificate = intervals.certify(logits_fn, images, epsilon=0.0)
    logits = np.asarray(jax.jit(logits_fn)(images))
    first, second = np.sort(logits)[:, :-3:-1].T
    np.testing.assert_array_equal(certificate.label, logits.argmax(-1))
    assert (certificate.margin < first - second).all()  # by the room for rounding
    np.testing.assert_allclose(certificate.margin, first - second, atol=2e-3)
    assert certificate.verified.all()
    wrong = intervals.certify(logits_fn, images, (certificate.label + 1) % 4, epsilon=0.0)
    assert not wrong.verified.any()
    for ours, expected in zip(intervals.certify(logits_fn, images, epsilon=0.0, batch_size=10), certificate):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_no_images_give_no_certificates():
    logits_fn, images = model("mlp")
    assert [a.shape for a in intervals.certify(logits_fn, images[:0], epsilon=0.1)] == [(0,)] * 3


def test_no_attack_breaks_what_is_verified():
    logits_fn, images = model("mlp")
    share = []
    for epsilon in (0.003, 0.01, 0.03):
        certificate = intervals.certify(logits_fn, images, epsilon=epsilon)
        attacked = attacks.pgd(epsilon=epsilon, steps=20)(jax.random.key(0), logits_fn, images, certificate.label)
        stands = np.asarray(logits_fn(attacked)).argmax(-1) == certificate.label
        assert stands[certificate.verified].all()
        share.append((float(certificate.verified.mean()), stands.mean()))
    assert share[0][0] > 0.5
    assert share[2][0] < share[2][1] < 1


def test_a_tie_within_rounding_is_not_verified():
    """Four classes exceed the last by less than rounding errors, which grow with terms that cancel."""

    def logits_fn(x):
        x = x[:, :1]
        lost = x + 1e6 - 1e6, jax.nn.relu(x + 1e6 - 1e6), 1e6 * jnp.tanh(1e-6 * x + 1) - 1e6 * np.tanh(1) + 0.5
        return jnp.concatenate([1e3 * x + 1e-3 - 1e3 * x, *lost, 0 * x], 1)

    points = np.full((4, 1), 0.5, np.float32)
    margins = np.asarray(compiled_margins(logits_fn, points, points, np.arange(4), outward=True))[:, -1]
    assert (margins < 0).all()
    assert (margins > -2.0 * np.array([1, 100, 100, 100])).all()


def test_every_step_of_a_residual_network_is_known():
    module = nnx.eval_shape(lambda: models.resnet20(jax.random.key(0), image_shape=(8, 8, 3)))
    functional = models.functional(module)
    bounds = lambda state, x: intervals.bounds(lambda x: functional.outputs(state, x).logits, x, x)
    shapes = jax.eval_shape(bounds, functional.state, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert shapes.lower.shape == (2, 10)


def test_gradients_go_through_bounds_to_weights_and_input():
    width = lambda w, x: jnp.subtract(*intervals.bounds(lambda x: jnp.tanh(x @ w), x - R, x + R)[::-1]).sum()
    of_weights, of_input = jax.grad(width, (0, 1))(jnp.asarray(W1), jnp.asarray(X))
    for gradient, at in ((of_weights, 0), (of_input, 1)):
        step = RNG.normal(size=gradient.shape).astype(np.float32) * 1e-2
        ends = [width(*(a + sign * step if i == at else a for i, a in enumerate((W1, X)))) for sign in (1, -1)]
        assert (gradient * step).sum() == pytest.approx(float(ends[0] - ends[1]) / 2, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sin(x), "interval bounds are not known for primitive 'sin', at "),
        (jax.named_scope("stem")(lambda x: jnp.sin(x)), "'sin', in stem, at "),
        (lambda x: jax.lax.top_k(x, 2)[0], "not known for primitive 'top_k', at "),
        (
            lambda x: x[0][jnp.array(x[0] > 0, int)],
            "'convert_element_type', which gives int32 and not float32 or float64",
        ),
        (lambda x: x.astype(jnp.bfloat16), "'convert_element_type', which gives bfloat16 and not float32 or float64"),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: 2 * c, x), "for primitive 'while', at "),
        (lambda x: jax.lax.scan(lambda c, _: (c, c), x, None, length=0)[0], "for primitive 'scan', at "),
        (lambda x: jnp.lexsort(x), "for primitive 'sort' of several arrays, at "),
        (lambda x: (x, x), "function must return one array, got 2."),
    ],
)
def test_what_has_no_bounds_is_named(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda x: intervals.bounds(function, x, x), jnp.asarray(X))


def test_bad_input_is_named():
    logits_fn, images = model("mlp")
    for call, message in [
        (
            lambda: intervals.certify(logits_fn, images, epsilon=-0.1),
            "epsilon must be at least 0 and finite, got -0.1.",
        ),
        (lambda: intervals.certify(logits_fn, images, epsilon=0.1, batch_size=0), "batch_size must be an integer of"),
        (lambda: intervals.certify(logits_fn, images + 1, epsilon=0.1), "x must lie in [0, 1], got values from"),
        (
            lambda: intervals.certify(logits_fn, images, np.full(24, 4), epsilon=0.1),
            "labels must be 0 to 3, got values",
        ),
        (lambda: intervals.certify(lambda x: x, images, epsilon=0.1), "logits_fn must return (1, classes >= 2) for a"),
        (lambda: intervals.bounds(jnp.tanh, X + R, X), "lower must be at most upper everywhere"),
        (lambda: intervals.bounds(jnp.tanh, X, X[:2]), "upper must be float32 of shape (3, 4), got float32 of (2, 4)."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
