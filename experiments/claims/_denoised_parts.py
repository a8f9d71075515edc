"""The base classifiers of the study of denoisers."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import TYPE_CHECKING, Any

import jax

from experiments.claims import _frame
from experiments.common import classifiers
from robustjax import certification, data, losses, models, perturbations, training
from robustjax.typing import LogitsFn, ModelState

if TYPE_CHECKING:
    from experiments.claims.denoised import Config


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
        if method == "gaussian":
            return self._classifier(method, losses.smoothing.gaussian_augmentation(sigma=sigma)).logits_fn()
        consistency = losses.smoothing.consistency(sigma=sigma, weight=self.config.consistency_weight)
        if method == "consistency":
            return self._classifier(method, consistency).logits_fn()
        if method == "rrcm":
            return self._rrcm(consistency).logits_fn()
        if method == "none":
            return self.standard.logits_fn()
        network = self._network(models.noise_predictor if method == "diffusion" else models.denoiser, method)
        if method == "diffusion":
            noise_fn = self._images_fn(method, network, losses.denoising.diffusion())
            return certification.diffusion_denoised(
                self.standard.logits_fn(), noise_fn, losses.denoising.alphas_bar(), sigma=sigma
            )
        objective: Any = losses.denoising.mse(sigma=sigma)
        if method == "stability":
            classify, state = self.standard.functional.outputs, {"classifier": self.standard.state._asdict()}
            objective = losses.denoising.stability(classify=classify, sigma=sigma)
            network = network._replace(state=network.state._replace(batch_stats=state))
        return certification.denoised(self.standard.logits_fn(), self._images_fn(method, network, objective))

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
        return classifiers.train(
            self.place.folder / name, functional, self.dataset, key=self._key(f"{name} training"), objective=objective,
            recipe=recipe, num_epochs=num_epochs, seed=self.seed, runtime=self.place.runtime, log=self.place.log,
            watch=functools.partial(self.place.watch, f"{name} of seed {self.seed}"),
        )[0]  # fmt: skip

    def _untrained(self) -> models.Functional:
        """The classifier with which all trainings of a seed begin."""
        return classifiers.build(self.config.model, self.dataset, dtype="float32", key=self._key("classifier"))

    def _classifier(self, name: str, objective: losses.Objective) -> classifiers.Classifier:
        return self._train(name, self._untrained(), objective, self._recipe, self.config.num_epochs)

    def _rrcm(self, fine_tuning: losses.Objective) -> classifiers.Classifier:
        """Pre-trained for a share of the epochs, and fine-tuned for the others."""
        functional, shape = self._untrained(), (1, *self.dataset.image_shape)
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
            apply=losses.rrcm.preconditioned(functional.apply, self.config.sigma),
            outputs=losses.rrcm.preconditioned(functional.outputs, self.config.sigma),
        )
        return self._train("rrcm", at_sigma, fine_tuning, self._recipe, num_epochs - first)

    def _network(self, make: Any, name: str) -> models.ImageFunctional:
        height, width, _ = self.dataset.image_shape
        settings = {"width": self.config.denoiser_width, "depth": self.config.denoiser_depth}
        fold = 2 if height % 2 == width % 2 == 0 else 1
        return models.image_functional(
            make(self._key(name), image_shape=self.dataset.image_shape, fold=fold, **settings)
        )

    def _images_fn(self, name: str, network: models.ImageFunctional, objective: Any) -> jax.tree_util.Partial:
        """The trained network as a function of images."""
        epochs = self.config.denoiser_epochs or (200 if self.config.dataset == "digits" else 10)
        recipe = training.Recipe(  # the rate of Salman et al.
            algorithm="adam", learning_rate=1e-3, schedule="cosine", batch_size=128, num_epochs=epochs,
            augment=self._recipe.augment,
        )  # fmt: skip
        state = self._train(name, network, objective, recipe, None).state
        return jax.tree_util.Partial(network.outputs, ModelState(state.params, {}))
