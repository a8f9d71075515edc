"""Objectives for denoisers beside their equations; what training with them converges to, where that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from robustjax import losses, training
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(12, 3)).astype(np.float32)
X = RNG.uniform(size=(5, 2, 2, 3)).astype(np.float32)
BATCH = Batch(jnp.asarray(X), jnp.asarray([0, 1, 2, 0, 1]), jnp.arange(5))
KEY = jax.random.key(4)
CLASSIFIER = {"params": {"kernel": jnp.asarray(KERNEL)}, "batch_stats": {}}


def shrink(state, x, *, train=False):
    """The denoiser ``factor * x``."""
    return state.params["factor"] * x, state


def classify(state, x):
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["kernel"], features)


def state_of(factor, **batch_stats):
    return ModelState({"factor": jnp.float32(factor)}, batch_stats)


def noisy_of(sigma):
    """What the objectives with a sigma draw from KEY."""
    return X + sigma * np.asarray(jax.random.normal(jax.random.split(KEY)[1], X.shape), np.float64)


def test_denoising_is_its_equation():
    loss, aux = losses.denoising.mse(sigma=0.3)(KEY, shrink, state_of(0.7), BATCH)
    assert float(loss) == pytest.approx(((0.7 * noisy_of(0.3) - X) ** 2).mean(), rel=1e-5)
    assert set(aux.metrics) == {"loss"}


def test_denoising_learns_what_wiener_found():
    objective, optimizer = losses.denoising.mse(sigma=0.5), optax.adam(0.02)
    step, state = training.make_step(objective, optimizer), training.init(KEY, state_of(1.0), optimizer)
    batch = Batch(jnp.tile(BATCH.image, (40, 1, 1, 1)), jnp.tile(BATCH.label, 40), jnp.arange(200))
    factors = []
    for _ in range(200):
        state, _ = step(shrink, state, batch)
        factors.append(float(state.model.params["factor"]))
    power = (X.astype(np.float64) ** 2).mean()
    assert np.mean(factors[100:]) == pytest.approx(power / (power + 0.25), abs=0.01)


def test_stability_is_its_equation():
    loss, aux = losses.denoising.stability(classify=classify, sigma=0.3)(
        KEY, shrink, state_of(0.7, classifier=CLASSIFIER, mean=jnp.ones(2)), BATCH
    )
    log_p = special.log_softmax((0.7 * noisy_of(0.3)).reshape(5, -1) @ KERNEL.astype(np.float64), -1)
    answers = (X.reshape(5, -1) @ KERNEL).argmax(-1)
    assert len(set(answers)) > 1
    assert float(loss) == pytest.approx(-log_p[np.arange(5), answers].mean(), rel=1e-5)
    assert float(aux.metrics["accuracy"]) == pytest.approx((log_p.argmax(-1) == np.asarray(BATCH.label)).mean())
    assert set(aux.state.batch_stats) == {"classifier", "mean"}


def test_stability_trains_the_denoiser_and_leaves_the_classifier():
    objective, optimizer = losses.denoising.stability(classify=classify, sigma=0.3), optax.sgd(0.1)
    step = training.make_step(objective, optimizer)
    state, metrics = step(shrink, training.init(KEY, state_of(0.7, classifier=CLASSIFIER), optimizer), BATCH)
    assert state.model.params["factor"] != 0.7
    np.testing.assert_array_equal(state.model.batch_stats["classifier"]["params"]["kernel"], KERNEL)
    other = {"params": {"kernel": -CLASSIFIER["params"]["kernel"]}, "batch_stats": {}}
    _, others = step(shrink, training.init(KEY, state_of(0.7, classifier=other), optimizer), BATCH)
    assert metrics["loss"] != others["loss"]  # the arrays are arguments


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_who_knows_the_images_predicts_the_noise(schedule):
    share = losses.denoising.alphas_bar(50, schedule=schedule)
    seen = []

    def apply(state, noisy, time, *, train=False):
        seen.append(np.asarray(time))
        left = share[time].reshape(-1, 1, 1, 1)
        noise = (np.asarray(noisy, np.float64) - np.sqrt(left) * (2 * X - 1)) / np.sqrt(1 - left)
        return jnp.asarray(state.params["factor"] * noise, jnp.float32), state

    objective = losses.denoising.diffusion(num_steps=50, schedule=schedule)
    assert float(objective(KEY, apply, state_of(1.0), BATCH)[0]) < 1e-6
    for seed in range(40):
        objective(jax.random.key(seed), apply, state_of(1.0), BATCH)
    times = np.concatenate(seen)
    assert (times.min(), times.max()) == (0, 49)
    assert np.bincount(times // 10, minlength=5).min() > 20  # of 205, in fifths


def test_who_predicts_nothing_pays_the_variance_of_the_noise():
    big = Batch(jnp.ones((64, 8, 8, 3)), jnp.zeros(64, jnp.int32), jnp.arange(64))
    loss, aux = losses.denoising.diffusion()(KEY, lambda s, x, t, *, train: (0 * x, s), state_of(1.0), big)
    assert float(loss) == pytest.approx(1, abs=0.05)  # 12,288 squares: a standard error of 0.013
    assert set(aux.metrics) == {"loss"}


def test_schedules_are_the_published_ones():
    linear, cosine = losses.denoising.alphas_bar(schedule="linear"), losses.denoising.alphas_bar()
    assert linear[0] == pytest.approx(1 - 1e-4)
    assert linear[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    a = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:-1], a[1:-1] / a[0], rtol=1e-9)
    assert cosine[-1] == pytest.approx(cosine[-2] / 1000)  # 1 - beta is not below 0.001
    finer = losses.denoising.alphas_bar(4000, schedule="linear")  # another number of steps, the same path
    np.testing.assert_allclose(np.log(finer[3::4][100:500]), np.log(linear[100:500]), rtol=0.01)
    for share in (linear, cosine, losses.denoising.alphas_bar(2), losses.denoising.alphas_bar(21, schedule="linear")):
        assert share.dtype == np.float64
        assert (np.diff(share) < 0).all()
        assert 0 < share[-1] < share[0] < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.denoising.mse(sigma=0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: losses.denoising.stability(classify=classify, sigma=-1.0), "sigma must be positive"),
        (lambda: losses.denoising.stability(classify=classify)(KEY, shrink, state_of(1.0), BATCH), "'classifier', got"),
        (lambda: losses.denoising.diffusion(schedule="sine"), "schedule must be cosine or linear, got 'sine'"),
        (lambda: losses.denoising.diffusion(num_steps=1), "num_steps must be an integer of at least 2, got 1"),
        (lambda: losses.denoising.alphas_bar(20, schedule="linear"), "num_steps must be .* of at least 21, got 20"),
        (
            lambda: losses.denoising.mse()(KEY, lambda s, x, train: (classify(ModelState(**CLASSIFIER), x), s),
                                       state_of(1.0), BATCH),
            r"apply must return images of shape \(5, 2, 2, 3\), got Outputs",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
