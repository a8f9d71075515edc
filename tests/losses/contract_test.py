"""What every objective promises; a new one joins with one line in OBJECTIVES."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import attacks, losses
from robustjax.typing import Batch, ModelState, Outputs

RNG = np.random.default_rng(0)
ATTACK = attacks.fgsm(epsilon=0.1)
CLASSIFIER = {"params": {"kernel": jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)}, "batch_stats": {}}


def classify(state, x):
    features = x.reshape(x.shape[0], -1)
    return Outputs(features @ state.params["kernel"], features)


def negative(key, images):
    del key
    return 1 - images


OBJECTIVES = {
    "adversarial.adversarial_training": lambda: losses.adversarial.adversarial_training(attack=ATTACK),
    "adversarial.awp": lambda: losses.adversarial.awp(objective=losses.adversarial.mart(attack=ATTACK)),
    "adversarial.entropy_regularization": losses.adversarial.entropy_regularization,
    "adversarial.logit_pairing": lambda: losses.adversarial.logit_pairing(attack=ATTACK),
    "adversarial.mart": lambda: losses.adversarial.mart(attack=ATTACK),
    "adversarial.trades": lambda: losses.adversarial.trades(attack=attacks.pgd(epsilon=0.1, steps=2, loss=kl)),
    "augmented": lambda: losses.augmented(negative, losses.smoothing.gaussian_augmentation()),
    "conformal_training": lambda: losses.conformal_training(num_noise=2),
    "cutmix": lambda: losses.cutmix(num_classes=3),
    "denoising.diffusion": losses.denoising.diffusion,
    "denoising.mse": losses.denoising.mse,
    "denoising.stability": lambda: losses.denoising.stability(classify=classify),
    "interval_training": lambda: losses.interval_training(epsilon=0.1),
    "logit_norm": losses.logit_norm,
    "mixing_training": lambda: losses.mixing_training(attack=ATTACK),
    "mixup": lambda: losses.mixup(num_classes=3),
    "multimodal_margin": losses.multimodal_margin,
    "multimodal_radius": lambda: losses.multimodal_radius(constants=((1.0,) * 3,) * 2),
    "outliers.energy_bounded": lambda: losses.outliers.energy_bounded(m_in=-3.0, m_out=-1.0),
    "outliers.outlier_exposure": losses.outliers.outlier_exposure,
    "prototype_margin": losses.prototype_margin,
    "prototype_radius": losses.prototype_radius,
    "rrcm.consistency_pretraining": lambda: losses.rrcm.consistency_pretraining(num_levels=3),
    "scheduled": lambda: losses.scheduled(losses.smoothing.stability(), weight=losses.ramp(end=2.0, steps=4)),
    "smoothing.consistency": losses.smoothing.consistency,
    "smoothing.gaussian_augmentation": losses.smoothing.gaussian_augmentation,
    "smoothing.macer": lambda: losses.smoothing.macer(num_noise=2),
    "smoothing.smoothadv": lambda: losses.smoothing.smoothadv(steps=2, num_noise=2),
    "smoothing.smoothmix": lambda: losses.smoothing.smoothmix(steps=2),
    "smoothing.stability": losses.smoothing.stability,
    "standard": losses.standard,
}
TAKES_OUTLIERS = {name for name in OBJECTIVES if name.split(".")[0] in ("outliers", "denoising", "rrcm")}
GIVES_IMAGES = {"denoising.diffusion", "denoising.mse", "denoising.stability"}
NEEDS_TWO = {"conformal_training", "rrcm.consistency_pretraining"}  # one half calibrates; one row agrees with itself
NEEDS_FLOAT32 = {"interval_training"}


def kl(logits, clean):
    return losses.kl_divergence(logits, clean)


def params():
    """Of a model of two modalities, and beside them those of a network of prototypes."""
    shapes = {"body": (16, 6), "weights": (2, 3), "bias": (3,), "components": (4, 16), "reasoning": (3, 1, 8)}
    drawn = {name: jnp.asarray((0.5 * RNG.normal(size=shape)).astype(np.float32)) for name, shape in shapes.items()}
    return {**drawn, "log_scale": jnp.float32(1.0)}


STATE = ModelState(params(), {"classifier": CLASSIFIER})


@functools.cache
def state_of(name):
    """The same for all, with the parts that pre-training needs."""
    if not name.startswith("rrcm."):
        return STATE
    model = ModelState(STATE.params, {})
    return losses.rrcm.pretraining_state(jax.random.key(0), model, num_features=6, width=4, dim=3)


def to_logits(state, x, *, train=False, dtype=jnp.float32):
    """A layer in ``dtype``, and outputs of it: the objective raises them to float32."""
    hidden = jnp.tanh(x.reshape(x.shape[0], -1).astype(dtype) @ state.params["body"].astype(dtype))
    scores = hidden.astype(jnp.float32)
    logits = (state.params["weights"][None] * scores.reshape(-1, 2, 3)).sum(1) + state.params["bias"][None]
    return Outputs(logits.astype(dtype), scores.astype(dtype)), state


def to_images(state, x, *time, train=False, dtype=jnp.float32):
    return x.astype(dtype) * state.params["bias"].sum().astype(dtype), state


def found(name):
    """Loss, metrics and gradient, by one program; and how often it was traced for two equal objectives."""
    traces, size = [], 2 if name in NEEDS_TWO or name in TAKES_OUTLIERS else 1
    image = jnp.asarray(RNG.uniform(0.2, 0.8, (size, 4, 4, 1)), jnp.float32)
    batch = Batch(image, jnp.asarray([1, -1] if name in TAKES_OUTLIERS else [1, 2])[:size], jnp.arange(size))
    model = to_images if name in GIVES_IMAGES else to_logits
    apply = functools.partial(model, dtype=jnp.float32 if name in NEEDS_FLOAT32 else jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(objective, key, state):
        traces.append(name)
        loss = lambda params: objective(key, apply, state._replace(params=params), batch)
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return value, aux.metrics, gradient

    state = state_of(name)
    first, _ = (run(OBJECTIVES[name](), jax.random.key(1), state) for _ in range(2))
    return first, len(traces)


def test_every_public_objective_is_here():
    rooms = {"": losses} | {f"{name}.": room for name, room in vars(losses).items() if inspect.ismodule(room)}
    public = {
        f"{prefix}{name}"
        for prefix, room in rooms.items()
        for name, value in vars(room).items()
        if not f"{prefix}{name}".startswith("_")
        and inspect.isclass(value)
        and list(inspect.signature(value.__call__).parameters)[1:] == ["key", "apply", "state", "batch"]
    }
    assert len(public) > 25
    assert public | {"scheduled"} == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_image_and_a_bfloat16_model_give_a_finite_loss_and_gradient(name):
    """With an outlier beside it, label -1, where outliers are allowed; and equal settings share a trace."""
    (loss, metrics, gradient), traces = found(name)
    assert loss.dtype == jnp.float32
    assert loss.shape == ()
    assert metrics["loss"] == loss
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, metrics, gradient)))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    make = OBJECTIVES[name]
    assert make() == make()
    assert hash(make()) == hash(make())
    assert traces == 1
