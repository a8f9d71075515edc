"""Functions that are taken apart: what is an argument of a program, what is a part of it, which programs are equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import _validate, attacks, certification

X = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
WEIGHTS = jnp.asarray([2.0, 3.0, 4.0])


def apart(function):
    return _validate.as_pytree(None, logits_fn=function)


def arrays(function):
    return jax.tree.leaves(apart(function))


def same_program(one, other):
    return jax.tree.structure(apart(one)) == jax.tree.structure(apart(other))


def scaled(weights, x, *, power=1.0, negative=False):
    return (-1 if negative else 1) * (x * weights) ** power


@jax.tree_util.register_pytree_node_class
class Module:
    """With an array, a number, a function and text among its leaves."""

    def __init__(self, *parts):
        self.parts = parts

    def tree_flatten(self):
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _, parts):
        return cls(*parts)

    def __call__(self, x):
        weights, number, function, _ = self.parts
        return function(x * weights[None] + number)

    def method(self, x):
        return self(x) + 1


class Unhashable:
    def __init__(self, weights):
        self.weights = weights

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, x):
        return x * self.weights


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x * WEIGHTS[None], 0),
        (jax.tree_util.Partial(scaled, WEIGHTS[None], power=2.0), 2),
        (functools.partial(scaled, WEIGHTS[None], power=2.0), 1),
        (jax.tree_util.Partial(scaled, WEIGHTS[None], negative=True), 1),
        (jax.tree_util.Partial(functools.partial(scaled, WEIGHTS[None]), power=2.0), 2),
        (functools.partial(functools.partial(scaled, WEIGHTS[None]), negative=True), 1),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "text"), 1),
        (Module(WEIGHTS, np.float32(0.5), jax.nn.relu, None), 2),
        (Module(WEIGHTS, 0.5, functools.partial(jnp.multiply, jnp.float32(2)), {"a": object()}), 2),
        (Module(WEIGHTS, 0.5, jax.tree_util.Partial(jnp.multiply, 2.0), {"a"}), 2),
        (Module(WEIGHTS, 0.5, jax.nn.relu, np.array(["text"])), 1),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "text").method, 1),
        (jax.jit(Module(WEIGHTS, 0.5, jax.nn.relu, "text").method), 1),
        (Unhashable(WEIGHTS[None]), 0),
        (Unhashable(WEIGHTS[None]).__call__, 0),
    ],
)
def test_arrays_are_arguments_and_the_function_is_the_same(function, count):
    assert len(arrays(function)) == count
    compiled = jax.jit(lambda function, x: function(x))(apart(function), X)
    np.testing.assert_allclose(compiled, getattr(function, "__wrapped__", function)(X), rtol=1e-6)
    assert same_program(function, function)
    again = apart(function)
    assert apart(again) is again


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (functools.partial(scaled, WEIGHTS), functools.partial(scaled, WEIGHTS + 1), True),
        (functools.partial(scaled, WEIGHTS, power=1.0), functools.partial(scaled, WEIGHTS, power=2.0), False),
        (functools.partial(scaled, WEIGHTS, power=1), functools.partial(scaled, WEIGHTS, power=1.0), False),
        (functools.partial(scaled, WEIGHTS, negative=1), functools.partial(scaled, WEIGHTS, negative=True), False),
        (functools.partial(scaled, WEIGHTS, power=0.0), functools.partial(scaled, WEIGHTS, power=-0.0), False),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "a"), Module(WEIGHTS + 1, 0.5, jax.nn.relu, "a"), True),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "a"), Module(WEIGHTS, 0.5, jax.nn.relu, "b"), False),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "a"), Module(WEIGHTS, 0.5, jax.nn.tanh, "a"), False),
        (Module(WEIGHTS, 0.5, jax.nn.relu, {"a"}), Module(WEIGHTS, 0.5, jax.nn.relu, {"a"}), False),
        (Module(WEIGHTS, 0.5, jax.nn.relu, "a"), Module(WEIGHTS, 0.5, jax.nn.relu, "a").method, False),
        (Unhashable(WEIGHTS), Unhashable(WEIGHTS), False),
    ],
)
def test_programs_are_equal_if_all_but_the_arrays_is(one, other, same):
    assert same_program(one, other) == same


def test_a_static_field_that_cannot_be_compared_makes_all_of_a_function_static():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["shift"])
    class Shifted:
        def __init__(self, weights, shift):
            self.weights, self.shift = weights, shift

        def __call__(self, x):
            return x * self.weights + self.shift

    one, other = (Shifted(WEIGHTS[None], np.full((1, 3), shift, np.float32)) for shift in (0, 1))
    call = jax.jit(lambda function, x: function(x))
    for function in (one, other, one):
        np.testing.assert_allclose(call(apart(function), X), function(X))


def test_arrays_do_not_outlive_a_function():
    """A program stays in JAX's caches, and must not hold the first weights that it was made for."""
    weights = np.ones(3, np.float32)
    default = lambda x, w=weights: x * w
    program = apart(functools.partial(scaled, weights, power=2.0)).func
    held = [value for value in vars(program).values() if isinstance(value, np.ndarray)]
    assert not held
    assert all(p.default is not weights for p in apart(default).func.__signature__.parameters.values())


def test_what_a_function_appends_to_a_list_is_left_to_it():
    """As under jit: the function is traced once, and results are right."""
    seen = []

    def noting(x):
        seen.append(x)
        return x + 1

    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(apart(noting), X), X + 1)
    assert len(seen) == 1


@pytest.mark.parametrize("keeps", [True, False])
def test_a_function_that_changes_its_own_arrays_is_refused(keeps):
    class Counting(Module):
        def __call__(self, x):
            if not keeps:
                self.parts = (self.parts[0] + 1, *self.parts[1:])
            return x * self.parts[0][None]

    jax.tree_util.register_pytree_node_class(Counting)
    function = apart(Counting(WEIGHTS))
    if keeps:
        np.testing.assert_array_equal(function(X), X * WEIGHTS[None])
    else:
        with pytest.raises(ValueError, match="logits_fn must not change its own arrays when it is called"):
            jax.jit(lambda f, x: f(x))(function, X)
        assert not isinstance(function.args[0][0], jax.core.Tracer)


class Linear(type("Module", (), {"__module__": "torch.nn.modules.module", "__call__": lambda *_: None})):
    """As PyTorch's own class, which a user has inherited from."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Linear(), r"logits_fn must be a function of JAX arrays, got the PyTorch module Linear: .*models.from_torch\("),
        (None, "logits_fn must be a function of inputs, got None"),
        (functools.partial(scaled), "logits_fn must be a function of 1 argument, got functools.partial"),
    ],
)
def test_what_cannot_be_called_with_inputs_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        _validate.as_pytree(logits_fn=function)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda x: np.asarray(x).sum((1, 2)), "TracerArrayConversionError"),
        (lambda x: x.reshape(len(x), -1) @ jnp.ones((5, 3)), "TypeError: dot_general requires"),
    ],
    ids=["NumPy", "another input size"],
)
def test_a_model_that_cannot_be_traced_is_named(model, reason):
    x, key = np.full((2, 4, 4, 1), 0.5, np.float32), jax.random.key(0)
    message = rf"logits_fn must be a function that JAX can trace, for inputs \(\d+, 4, 4, 1\), got {reason}"
    with pytest.raises(ValueError, match=message):
        certification.certify(key, model, x, certification.gaussian(0.5), num_estimation=100)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(epsilon=0.1)(key, model, x, np.zeros(2, np.int32))
