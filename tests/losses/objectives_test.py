import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses, perturbations
from robustjax.typing import Batch, ModelState, Outputs

SEEN = []


def apply(state, x, *, train=False):
    """A linear model that counts the batches it was trained on."""
    if not isinstance(x, jax.core.Tracer):
        SEEN.append(x)
    flat = x.reshape(x.shape[0], -1)
    stats = {"batches": state.batch_stats["batches"] + 1} if train else state.batch_stats
    return Outputs(flat @ state.params["w"], flat), state._replace(batch_stats=stats)


@pytest.fixture
def state():
    return ModelState({"w": jax.random.normal(jax.random.key(1), (12, 3))}, {"batches": jnp.float32(0)})


@pytest.fixture
def batch():
    image = jax.random.uniform(jax.random.key(2), (8, 2, 2, 3))
    return Batch(image, jnp.arange(8) % 3, jnp.arange(8))


def test_standard_is_the_mean_cross_entropy(state, batch):
    loss, aux = losses.standard()(jax.random.key(0), apply, state, batch)
    logits = batch.image.reshape(8, -1) @ state.params["w"]
    np.testing.assert_allclose(loss, losses.cross_entropy(logits, batch.label).mean(), rtol=1e-6)
    assert aux.metrics["loss"] == loss
    assert aux.metrics["accuracy"] == np.mean(np.argmax(logits, -1) == batch.label)
    assert aux.state.batch_stats["batches"] == 1
    assert aux.state.params is state.params


def test_gaussian_augmentation_is_the_standard_objective_on_noisy_images(state, batch):
    SEEN.clear()
    loss, aux = losses.smoothing.gaussian_augmentation(sigma=0.5)(jax.random.key(0), apply, state, batch)
    (noisy,) = SEEN
    noise = (noisy - batch.image) / 0.5
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert len(np.unique(noise)) == noise.size  # a draw of its own for every pixel of every image
    want, _ = losses.standard()(jax.random.key(0), apply, state, batch._replace(image=noisy))
    assert loss == want
    assert aux.metrics.keys() == {"loss", "accuracy"}


def test_an_augmented_objective_sees_augmented_images_and_a_key_of_its_own(state, batch):
    keys = []

    def augment(key, images):
        keys.append(key)
        return -images

    def objective(key, apply, state, batch):
        keys.append(key)
        return batch.image.sum(), losses.Aux(state, {})

    loss, aux = losses.augmented(augment, objective)(jax.random.key(0), apply, state, batch)
    assert loss == -batch.image.sum()
    assert aux.state is state
    assert len({tuple(jax.random.key_data(key).tolist()) for key in (*keys, jax.random.key(0))}) == 3


@pytest.mark.usefixtures("unchecked")
def test_what_is_augmented_must_be_functions():
    with pytest.raises(ValueError, match=r"augment must be a function of \(key, images\), got 'flip'"):
        losses.augmented("flip", losses.standard())
    with pytest.raises(ValueError, match=r"objective must be a function of \(key, apply, state, batch\), got None"):
        losses.augmented(perturbations.random_crop, None)


def test_noise_is_float32_for_bfloat16_images(state, batch):
    SEEN.clear()
    half = batch._replace(image=batch.image.astype(jnp.bfloat16))
    losses.smoothing.gaussian_augmentation(sigma=0.5)(jax.random.key(0), apply, state, half)
    assert SEEN[0].dtype == jnp.float32
    assert (SEEN[0] != SEEN[0].astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_logit_norm_is_the_mean_of_its_loss(state, batch):
    loss, aux = losses.logit_norm(tau=0.1)(jax.random.key(0), apply, state, batch)
    logits = batch.image.reshape(8, -1) @ state.params["w"]
    np.testing.assert_allclose(loss, losses.normalized_cross_entropy(logits, batch.label, tau=0.1).mean(), rtol=1e-6)
    assert aux.metrics["loss"] == loss
    assert aux.metrics["accuracy"] == np.mean(np.argmax(logits, -1) == batch.label)
    assert aux.state.batch_stats["batches"] == 1
    assert losses.logit_norm() == losses.logit_norm(tau=0.04)


MIXING = {"mixup": losses.mixup, "cutmix": losses.cutmix}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_the_cross_entropy_of_the_mixture(state, batch, name, monkeypatch):
    mixed = []

    def mix(key, images, labels, *, num_classes, alpha):
        mixed.append((images, labels, alpha))
        q = (jax.nn.one_hot(labels, num_classes) + jax.nn.one_hot(labels[::-1], num_classes)) / 2
        return perturbations.Mixed(images + 1, q)

    monkeypatch.setattr(perturbations, name, mix)
    loss, aux = MIXING[name](num_classes=3, alpha=0.2)(jax.random.key(0), apply, state, batch)
    ((images, labels, alpha),) = mixed
    assert (images == batch.image).all()
    assert (labels == batch.label).all()
    assert alpha == 0.2
    logits = np.asarray((1 + batch.image).reshape(8, -1) @ state.params["w"])
    pairs = [losses.cross_entropy(jnp.asarray(logits), y).mean() for y in (batch.label, batch.label[::-1])]
    np.testing.assert_allclose(loss, sum(pairs) / 2, rtol=1e-6)
    right = [logits.argmax(-1) == y for y in (batch.label, batch.label[::-1])]
    np.testing.assert_allclose(aux.metrics["accuracy"], np.mean(right), rtol=1e-6)
    assert aux.metrics["loss"] == loss
    assert aux.state.batch_stats["batches"] == 1


@pytest.mark.parametrize("name", MIXING)
def test_mixing_traces_once_and_draws_anew(state, batch, name):
    traces = []

    def counting(state, x, *, train=False):
        traces.append(x.shape)
        return apply(state, x, train=train)

    tall = batch._replace(image=batch.image.reshape(8, 4, 3, 1))  # in 2 x 2 pixels, CutMix has no box to paste
    run = jax.jit(lambda objective, key: objective(key, counting, state, tall)[0], static_argnums=0)
    values = {float(run(MIXING[name](num_classes=3), jax.random.key(seed))) for seed in range(5)}
    assert len(traces) == 1
    assert len(values) > 1


def test_settings_are_keywords():
    with pytest.raises(TypeError):
        losses.smoothing.gaussian_augmentation(0.5)


def test_bad_sigma():
    with pytest.raises(ValueError, match="sigma must be positive and finite, got -0.25"):
        losses.smoothing.gaussian_augmentation(sigma=-0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.logit_norm(tau=0.0), "tau must be positive and finite, got 0.0"),
        (lambda: losses.mixup(num_classes=3, alpha=-1.0), "alpha must be positive and finite, got -1.0"),
        (lambda: losses.cutmix(num_classes=3, alpha=0.0), "alpha must be positive and finite, got 0.0"),
        (lambda: losses.mixup(num_classes=1), "num_classes must be an integer of at least 2, got 1"),
        (lambda: losses.cutmix(num_classes=0), "num_classes must be an integer of at least 2, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_number_of_classes_that_is_not_the_models(state, batch):
    message = r"label_probabilities must be \(8, 3\) to match the logits, got shape \(8, 4\)"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: losses.mixup(num_classes=4)(key, apply, state, batch), jax.random.key(0))
