"""Certifies one classifier behind several denoisers, beside classifiers that were trained for the noise.

A classifier that never saw noise is smoothed as it is, behind a denoiser, and behind one step of a diffusion model;
beside it are classifiers that were trained for the noise, one of them after rRCM's pre-training. All see the same noisy
copies.

    python -m experiments.claims.denoised
    python -m experiments.claims.denoised --methods none denoising gaussian --sigma 0.25
    python -m experiments.claims.denoised --dataset mnist --data-dir DIR --recipe mnist_short --num-images 100
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from robustjax import attacks, certification, data, losses, metrics, models, perturbations, plotting, training
from robustjax.typing import LogitsFn, ModelState

from .. import _small, smoothing
from ..common import certificates, checks, classifiers, files, runtimes, settings, smoothers, subsets, tables
from . import _frame

Method = Literal["none", "denoising", "stability", "diffusion", "gaussian", "consistency", "rrcm"]
METHODS: dict[Method, str] = {
    "none": "a classifier that never saw noise, as it is",
    "denoising": "the same behind a denoiser, trained on the squared error",
    "stability": "the same behind a denoiser, trained on the classifier's answers without noise",
    "diffusion": "the same behind one step of a diffusion model",
    "gaussian": "a classifier trained with the noise",
    "consistency": "a classifier trained with the noise and for answers that agree",
    "rrcm": "the same, after some of the passes went into features that agree at all levels of noise, without labels",
}
"""What is smoothed, by name."""
ACR = "average_certified_radius"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training, settings.Splits):
    """Settings of the measurement; radii and sigma are in units of [0, 1] pixels, l2."""

    methods: tuple[Method, ...] = tuple(METHODS)
    """What is smoothed."""
    denoiser_epochs: int | None = None
    """Passes for each denoiser and the diffusion model; None: 200 for the digits, else 10."""
    denoiser_width: int = 32
    """Units of each of their hidden layers."""
    denoiser_depth: int = 6
    """Their layers."""
    consistency_weight: float = 5.0
    """Weight of the divergence between answers in consistency and rrcm."""
    pretraining_share: float = 0.25
    """Share of the passes of rrcm that are pre-training, without labels."""
    pretraining_sigma: float = 40.0
    """Largest noise of pre-training, in units of [0, 1] pixels."""
    sigma: float = 0.5
    """Standard deviation of the smoothing noise, and of the noise in training."""
    num_selection: int = 100
    """Noisy copies of each image that select its class."""
    num_estimation: int = 1000
    """Noisy copies of each image that bound the probability of the class."""
    alpha: float = 0.001
    """Probability, for each image, that its certificate is wrong."""
    batch_size: int | None = None
    """Noisy copies in one call of the model; None: 200 on a CPU, 1000 on an accelerator."""
    num_images: int = 200
    """Certify at most N images, evenly spaced."""
    num_attacked: int = 10
    """Attack at most N of the certified images inside their radii; not one may be fooled."""
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Radii of the table."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "denoiser_epochs", "denoiser_width", "num_selection", "num_estimation")
        checks.at_least(1, self, "batch_size", "num_images")
        checks.at_least(2, self, "denoiser_depth")
        checks.at_least(0, self, "num_attacked")
        checks.positive(self, "sigma")
        checks.probability(self, "alpha", "pretraining_share")
        checks.not_negative(self, "radii")
        checks.distinct(self, "methods", "radii")
        if not self.methods:
            raise ValueError(f"methods must name one or more of {', '.join(METHODS)}.")
        if "rrcm" in self.methods and self.num_epochs == 1:
            raise ValueError("num_epochs must be at least 2 with rrcm, which is pre-trained in some of them, got 1.")
        losses.smoothing.consistency(weight=self.consistency_weight)
        losses.rrcm.consistency_pretraining(largest=2 * self.pretraining_sigma)
        classifiers.recipe_of(self.dataset, self.recipe)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The models of one seed, each trained when it is asked for, unless its checkpoints are there."""

    config: Config
    seed: int
    dataset: data.Dataset
    place: _frame.Place

    def logits_fn(self, method: str) -> LogitsFn:
        """The base classifier of a method."""
        sigma = self.config.sigma
        if method == "none":
            return self.standard.logits_fn()
        consistency = losses.smoothing.consistency(sigma=sigma, weight=self.config.consistency_weight)
        if method == "rrcm":
            return self._rrcm(consistency).logits_fn()
        noisy = {"gaussian": losses.smoothing.gaussian_augmentation(sigma=sigma), "consistency": consistency}
        if method in noisy:
            return self._classifier(method, noisy[method]).logits_fn()
        height, width, _ = shape = self.dataset.image_shape
        make = models.noise_predictor if method == "diffusion" else models.denoiser
        network = models.image_functional(
            make(
                self._key(method), image_shape=shape, fold=2 if height % 2 == width % 2 == 0 else 1,
                width=self.config.denoiser_width, depth=self.config.denoiser_depth,
            )
        )  # fmt: skip
        objective: Any = losses.denoising.diffusion() if method == "diffusion" else losses.denoising.mse(sigma=sigma)
        if method == "stability":
            classify, state = self.standard.functional.outputs, {"classifier": self.standard.state._asdict()}
            objective = losses.denoising.stability(classify=classify, sigma=sigma)
            network = network._replace(state=network.state._replace(batch_stats=state))
        recipe = training.Recipe(  # the rate of Salman et al.
            algorithm="adam", learning_rate=1e-3, schedule="cosine", batch_size=128, augment=self._recipe.augment,
            num_epochs=self.config.denoiser_epochs or (200 if self.config.dataset == "digits" else 10),
        )  # fmt: skip
        state = ModelState(self._train(method, network, objective, recipe, None).state.params, {})
        images_fn, classify = jax.tree_util.Partial(network.outputs, state), self.standard.logits_fn()
        if method == "diffusion":
            return certification.diffusion_denoised(classify, images_fn, losses.denoising.alphas_bar(), sigma=sigma)
        return certification.denoised(classify, images_fn)

    @functools.cached_property
    def standard(self) -> classifiers.Classifier:
        """The classifier that never saw noise."""
        return self._classifier("standard", losses.standard())

    @functools.cached_property
    def _recipe(self) -> training.Recipe:
        return classifiers.recipe_of(self.config.dataset, self.config.recipe)

    def _key(self, name: str) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(name.encode()))

    def _train(self, name: str, functional: Any, objective: Any, recipe: training.Recipe, num_epochs: int | None):
        key = self._key(f"{name} training")
        return _small.train(self.place, self.seed, self.dataset, name, functional, objective, recipe, key, num_epochs)

    def _untrained(self) -> models.Functional:
        """The classifier with which all trainings of a seed begin."""
        return classifiers.build(self.config.model, self.dataset, dtype="float32", key=self._key("classifier"))

    def _classifier(self, name: str, objective: losses.Objective) -> classifiers.Classifier:
        return self._train(name, self._untrained(), objective, self._recipe, self.config.num_epochs)

    def _rrcm(self, fine_tuning: losses.Objective) -> classifiers.Classifier:
        """Pre-trained for a share of the epochs, and fine-tuned for the others."""
        functional, shape, sigma = self._untrained(), (1, *self.dataset.image_shape), self.config.sigma
        features = jax.eval_shape(functional.outputs, functional.state, jax.ShapeDtypeStruct(shape, "float32")).features
        start = losses.rrcm.pretraining_state(self._key("rrcm"), functional.state, num_features=features.shape[-1])
        crops = functools.partial(perturbations.random_crop, padding=max(1, shape[1] // 8))
        views = classifiers.augmentation() if self._recipe.augment else crops
        num_epochs = self.config.num_epochs or self._recipe.num_epochs
        first = min(max(1, round(self.config.pretraining_share * num_epochs)), num_epochs - 1)
        pretraining = losses.rrcm.consistency_pretraining(augment=views, largest=2 * self.config.pretraining_sigma)
        recipe = dataclasses.replace(self._recipe, augment=False)  # views are augmented already
        trained = self._train("rrcm_pretraining", functional._replace(state=start), pretraining, recipe, first)
        at_sigma = functional._replace(
            state=losses.rrcm.pretrained_model(trained.state),
            apply=losses.rrcm.preconditioned(functional.apply, sigma),
            outputs=losses.rrcm.preconditioned(functional.outputs, sigma),
        )
        return self._train("rrcm", at_sigma, fine_tuning, self._recipe, num_epochs - first)


_forward = jax.jit(lambda logits_fn, x: logits_fn(x))


def is_broken(
    config: Config, keys: Sequence[jax.Array], logits_fn: LogitsFn, image: np.ndarray, label: np.ndarray, radius: float,
    *, steps: int = 20, draws: int = 16, answer_draws: int = 1000,
) -> bool:  # fmt: skip
    """Whether PGD inside its certified radius changes the smoothed answer to one image: keys of attack and answer."""
    measure = certification.gaussian(config.sigma)
    attack = attacks.pgd(epsilon=radius * 0.999, norm="l2", steps=steps, samples=draws)
    x_adv = attack(keys[0], smoothers.noisy(logits_fn, measure), image, label)
    common = {"num_samples": answer_draws, "alpha": config.alpha, "batch_size": config.batch_size}
    answer = certification.predict(keys[1], logits_fn, x_adv, measure, **common)
    return answer[0] not in (certification.ABSTAIN, label[0])


def certified(
    config: Config, key: jax.Array, logits_fn: LogitsFn, test: data.Dataset, place: _frame.Place, method: str
) -> dict[str, Any]:
    """The numbers of a method: certificates, each kept on disk, attacks inside some radii, and the cost of a copy.

    ``key`` is the same for all methods, which see the same noise.
    """
    certify_key, attack_key, answer_key = jax.random.split(key, 3)
    ids, folder = subsets.evenly(len(test), config.num_images), place.folder / "certificates" / method
    certify = smoothers.procedure(
        (logits_fn,), certification.gaussian(config.sigma), num_selection=config.num_selection,
        num_estimation=config.num_estimation, alpha=config.alpha, batch_size=config.batch_size,
    )  # fmt: skip
    smoothing.certify_images(
        folder, certify_key, certify, test, ids, radius=config.sigma, mesh=place.runtime.local_mesh(), watch=place.watch
    )
    if jax.process_index() != 0:
        return {}
    _, label, certificate, _, seconds = certificates.read(folder)
    image = test[ids].image
    attacked = np.flatnonzero(certificate.radius > 0)[: config.num_attacked]
    broken = 0
    for row in attacked:
        keys, one = (attack_key, jax.random.fold_in(answer_key, ids[row])), slice(row, row + 1)
        broken += is_broken(
            config, keys, logits_fn, np.asarray(image[one]), certificate.label[one], float(certificate.radius[row])
        )
    clean = np.asarray(_forward(logits_fn, image)).argmax(-1)
    cost = _forward.lower(logits_fn, image[:1]).cost_analysis() or {}
    at = metrics.certified_accuracy(certificate, label, config.radii)
    return {
        ACR: metrics.average_certified_radius(certificate, label),
        **{f"certified_accuracy_{r:g}": value for r, value in zip(config.radii, at, strict=True)},
        **({"flops_per_copy": cost["flops"]} if "flops" in cost else {}),  # not every device says
        "abstained": certificate.abstained.mean(),
        "clean_accuracy": (clean == label).mean(),
        "seconds_per_image": seconds.mean(),
        "attacked": len(attacked),
        "broken": broken,
        "radius": certificate.radius,
        "correct": certificate.label == label,
    }


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Trains and certifies all methods with one seed, or does what is left of it."""
    train, test = config.images()
    trained = Trained(config, seed, train, place)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # the same noise for all methods
    found: dict[str, dict[str, Any]] = {}
    for method in config.methods:
        path, logits_fn = place.folder / f"{method}.npz", trained.logits_fn(method)
        classifiers.keep_to(place.folder / method, logits_fn, [train, test])
        if not path.exists():
            numbers = certified(config, key, logits_fn, test, place, method)
            if jax.process_index() == 0:
                files.write_arrays(path, numbers)
                place.log(f"Seed {seed}: {method} certified.")
            runtimes.barrier(f"{method} of seed {seed}")
        if jax.process_index() == 0:
            found[method] = files.read_arrays(path)
    return found


def columns(config: Config) -> Sequence[_frame.Column]:
    """What is certified, and what it costs."""
    return [
        _frame.Column(ACR, "ACR"),
        *(_frame.Column(f"certified_accuracy_{r:g}", f"{r:g}") for r in config.radii),
        _frame.Column("abstained", "abstain"),
        _frame.Column("clean_accuracy", "clean"),
        _frame.Column("flops_per_copy", "Mflop/copy", lambda v: f"{v.mean() / 1e6:.2f}"),
        _frame.Column("seconds_per_image", "s/image", lambda v: f"{v.mean():.3f}"),
        _frame.Column("broken", "fooled inside", lambda v: f"{v.sum():.0f}"),
    ]


def curves(config: Config, results: _frame.Results):
    """Certified accuracy of each method, over the images of all seeds."""
    of = {method: (np.ravel(r["radius"]), np.ravel(r["correct"])) for method, r in results.items()}
    return {"certified_accuracy": plotting.certified_accuracy_curve(of)}


def details(config: Config, results: _frame.Results) -> Sequence[tables.Table | str]:
    """What the methods are, their ACR beside that of others, and whether a certificate was broken."""
    broken, attacked = (sum(of[name].sum() for of in results.values()) for name in ("broken", "attacked"))
    beside = [name for name in ("none", "gaussian") if name in results]
    rows = [[m, *(tables.mean_and_sd(of[ACR] - results[name][ACR]) for name in beside)] for m, of in results.items()]
    paired = [tables.Table("ACR less that of the same seed", ["method", *beside], rows)] if beside else []
    images = len(results[config.methods[0]]["radius"][0])
    return [
        *paired,
        f"{'pass' if not broken else 'WARNING'}: PGD inside certified radii changed the smoothed answer of "
        f"{broken:.0f} of {attacked:.0f} images.",
        f"Certified accuracy at radii, of {images} images with {config.num_estimation:,} copies of each.",
        "\n".join(f"- {method}: {METHODS[method]}." for method in config.methods),
    ]


def bars(relation: Any, *pairs: tuple[Method, Method]) -> Callable[[Config], tuple[_frame.Bar, ...]]:
    """Of the ACR of each pair of methods, and that no attack breaks a radius of the first."""
    acr = (_frame.Bar(ACR, one, relation, other) for one, other in pairs)
    arms = dict.fromkeys(one for one, _ in pairs)
    return _frame.among("methods", *acr, *(_frame.Bar("broken", arm, "<=", 0) for arm in arms))


STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(
        train_split="train[:64]", methods=("none", "denoising"), model="mlp", num_epochs=1, denoiser_epochs=1,
        denoiser_width=4, denoiser_depth=2, sigma=0.25, num_selection=20, num_estimation=40, batch_size=20,
        num_images=20, num_attacked=0,
    ),
    numbers=columns,
    claims=(
        _frame.Claim(
            "Denoised smoothing", "Salman et al. 2020", "2003.01908",
            ("certification.denoised", "losses.denoising.mse", "losses.denoising.stability", "models.denoiser"),
            "A denoiser makes a classifier that never saw noise certifiable, and one trained on the classifier's "
            "answers more than one trained on the squared error.",
            bars(">", ("denoising", "none"), ("stability", "denoising")),
        ),
        _frame.Claim(
            "Denoised smoothing beside training with noise", "Salman et al. 2020", "2003.01908",
            ("certification.denoised", "losses.denoising.stability"),
            "A classifier behind a denoiser comes near one that is trained with the noise.",
            bars(">=", ("stability", "gaussian")),  # the paper does not say what is near
        ),
        _frame.Claim(
            "Diffusion-denoised smoothing", "Carlini et al. 2022", "2206.10550",
            ("certification.diffusion_denoised", "losses.denoising.diffusion", "losses.denoising.alphas_bar",
             "models.noise_predictor"),
            "One step of a diffusion model serves as denoiser at every sigma.",
            bars(">", ("diffusion", "none")),
        ),
        _frame.Claim(
            "rRCM", "Lei et al. 2025", "2501.13094",
            ("losses.rrcm.consistency_pretraining", "losses.rrcm.preconditioned", "losses.info_nce"),
            "Features that agree at all levels of noise give larger radii with one forward pass.",
            bars(">", ("rrcm", "gaussian"), ("rrcm", "consistency"), ("rrcm", "diffusion")),
        ),
    ),
    figure=curves, details=details, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
