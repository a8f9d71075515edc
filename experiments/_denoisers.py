"""The base classifiers of experiments.denoised, each trained when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
from etils import epath
from rich.console import Console

from experiments.common import classifiers, runtimes
from robustjax import certification, data, losses, models, perturbations, training
from robustjax.typing import AnyArray, LogitsFn, ModelState

METHODS = {
    "none": "a classifier that never saw noise, as it is",
    "denoising": "the same behind a denoiser, trained on the squared error",
    "stability": "the same behind a denoiser, trained on what the classifier answers without noise",
    "diffusion": "the same behind one step of a diffusion model",
    "gaussian": "a classifier trained with the noise",
    "consistency": "a classifier trained with the noise and for answers that agree",
    "rrcm": "the same, after some of the passes went into features that agree at all levels of noise, without labels",
}
"""What is smoothed, by name."""


class Trained:
    """The models of one seed; those whose checkpoints are in ``folder`` are not trained again."""

    def __init__(
        self,
        config: Any,
        seed: int,
        train: data.Dataset,
        folder: epath.Path,
        console: Console,
        runtime: runtimes.Runtime,
        watch: runtimes.Watch,
    ):
        self._config, self._seed, self._data, self._folder, self._console = config, seed, train, folder, console
        self._runtime, self._watch = runtime, watch
        self._recipe = classifiers.recipe_of(config.dataset, config.recipe)
        epochs = config.denoiser_epochs or (200 if config.dataset == "digits" else 10)
        # The rate of Salman et al.
        self._denoiser_recipe = training.Recipe(
            algorithm="adam",
            learning_rate=1e-3,
            schedule="cosine",
            batch_size=128,
            num_epochs=epochs,
            augment=self._recipe.augment,
        )

    def logits_fn(self, method: str) -> LogitsFn:
        """The base classifier of a method."""
        sigma = self._config.sigma
        if method == "gaussian":
            return self._trained_classifier(method, losses.smoothing.gaussian_augmentation(sigma=sigma)).logits_fn()
        consistency = losses.smoothing.consistency(sigma=sigma, weight=self._config.consistency_weight)
        if method == "consistency":
            return self._trained_classifier(method, consistency).logits_fn()
        if method == "rrcm":
            return self._rrcm(consistency).logits_fn()
        classifier = self._standard
        logits_fn = classifier.logits_fn()
        if method == "none":
            return logits_fn
        if method == "diffusion":
            network = self._network(models.noise_predictor, method)
            objective = losses.denoising.diffusion()
            noise_fn = self._fit(method, network, objective)
            return certification.diffusion_denoised(logits_fn, noise_fn, losses.denoising.alphas_bar(), sigma=sigma)
        network = self._network(models.denoiser, method)
        objective: Any = losses.denoising.mse(sigma=sigma)
        if method == "stability":
            objective = losses.denoising.stability(classify=classifier.functional.outputs, sigma=sigma)
            state = network.state._replace(batch_stats={"classifier": classifier.state._asdict()})
            network = network._replace(state=state)
        return certification.denoised(logits_fn, self._fit(method, network, objective))

    def place(self, rows: AnyArray) -> AnyArray:
        """Rows as the devices of this process share them."""
        return self._standard.place(rows)

    @functools.cached_property
    def _standard(self) -> classifiers.Classifier:
        return self._trained_classifier("standard", losses.standard())

    def _key(self, name: str) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self._seed), zlib.crc32(name.encode()))

    def _train(self, name: str, functional: Any, objective: Any, recipe: training.Recipe, num_epochs: int | None):
        return classifiers.train(
            self._folder / name,
            functional,
            self._data,
            key=self._key(f"{name} training"),
            objective=objective,
            recipe=recipe,
            num_epochs=num_epochs,
            seed=self._seed,
            log=lambda message: self._console.print(message, soft_wrap=True),
            runtime=self._runtime,
            watch=functools.partial(self._watch, f"{name} of seed {self._seed}"),
        )[0]

    def _trained_classifier(self, name: str, objective: losses.Objective) -> classifiers.Classifier:
        # All classifiers of a seed begin alike.
        functional = classifiers.build(self._config.model, self._data, dtype="float32", key=self._key("classifier"))
        return self._train(name, functional, objective, self._recipe, self._config.num_epochs)

    def _rrcm(self, fine_tuning: losses.Objective) -> classifiers.Classifier:
        """Pre-trained for a share of the epochs, and fine-tuned for the others."""
        functional = classifiers.build(self._config.model, self._data, dtype="float32", key=self._key("classifier"))
        shape = (1, *self._data.image_shape)
        features = jax.eval_shape(functional.outputs, functional.state, jax.ShapeDtypeStruct(shape, "float32")).features
        start = losses.rrcm.pretraining_state(self._key("rrcm"), functional.state, num_features=features.shape[-1])
        crops = functools.partial(perturbations.random_crop, padding=max(1, shape[1] // 8))
        views = classifiers.augmentation() if self._recipe.augment else crops
        num_epochs = self._config.num_epochs or self._recipe.num_epochs
        first = min(max(1, round(self._config.pretraining_share * num_epochs)), num_epochs - 1)
        trained = self._train(
            "rrcm_pretraining", functional._replace(state=start),
            losses.rrcm.consistency_pretraining(augment=views, largest=2 * self._config.pretraining_sigma),
            dataclasses.replace(self._recipe, augment=False), first,
        )  # fmt: skip
        at_sigma = functional._replace(
            state=losses.rrcm.pretrained_model(trained.state),
            apply=losses.rrcm.preconditioned(functional.apply, self._config.sigma),
            outputs=losses.rrcm.preconditioned(functional.outputs, self._config.sigma),
        )
        return self._train("rrcm", at_sigma, fine_tuning, self._recipe, num_epochs - first)

    def _network(self, make: Any, name: str) -> models.ImageFunctional:
        height, width, _ = self._data.image_shape
        settings = {"width": self._config.denoiser_width, "depth": self._config.denoiser_depth}
        fold = 2 if height % 2 == width % 2 == 0 else 1
        return models.image_functional(make(self._key(name), image_shape=self._data.image_shape, fold=fold, **settings))

    def _fit(self, name: str, network: models.ImageFunctional, objective: Any) -> jax.tree_util.Partial:
        """The trained network as a function of images."""
        state = self._train(name, network, objective, self._denoiser_recipe, None).state
        return jax.tree_util.Partial(network.outputs, ModelState(state.params, {}))
