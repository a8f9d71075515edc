"""The settings of an adversarial run."""

from __future__ import annotations

import builtins
import dataclasses
from typing import Literal

from etils import epath

from ..common import adversaries, checks, folders, settings
from ..common.command_line import Number

Norm = Literal["linf", "l2", "l1"]
SAME = ("norms", "epsilons", "attacks", "batch_size", "certify_intervals")
"""May differ when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Product, settings.Splits):
    """Settings of a run; every radius is in units of [0, 1] pixels, in its norm."""

    num_epochs: int | None = None
    """Passes over the training images. None: as in the recipe, but 25 for adversarial training on digits."""
    training: Literal[*adversaries.TRAINING] | None = None  # pyrefly: ignore
    """Training objective; pgd is adversarial training. None: pgd, or with --smoothed gaussian (noise of --sigma)."""
    train_norm: Norm | None = None
    """Norm of the adversarial training images. None: the first of --norms."""
    train_epsilon: Number | None = None
    """Radius of the adversarial training images, such as 0.15 or 8/255. None: by data set and norm."""
    train_steps: int = 10
    """Steps of PGD in adversarial training."""
    beta: float = 6.0
    """Weight of the divergence between clean and adversarial predictions in trades and mart."""
    norms: tuple[Norm, ...] = ()
    """Norms of the attacks. Default: linf, or l2 with --smoothed."""
    epsilons: tuple[Number, ...] = ()
    """Radii of the attacks in the only norm, such as 0.1 8/255. Default: by data set and norm."""
    attacks: tuple[str, ...] = ()
    """Attacks of --list. Default: fgsm pgd_20 pgd_40 autoattack, or fgsm pgd_20 with --smoothed."""
    num_images: int | None = None
    """Maximum number of images to attack, evenly spaced. None: all, but 64 of digits."""
    batch_size: int | None = None
    """Images that are attacked at once. None: equal blocks of at most 256 on a CPU, 1000 on an accelerator."""
    smoothed: bool = False
    """Attack the smoothed classifier, with gradients averaged over noise, and compare with its certificates."""
    sigma: float = 0.5
    """Standard deviation of the noise of --smoothed and of gaussian training."""
    samples: int = 16
    """Noisy copies behind each gradient with --smoothed."""
    certify_intervals: bool = False
    """Also verify by interval bounds, in linf; these are informative only after --training intervals."""
    seed: int = 0
    """Seed of initialisation, batch order, training and attacks."""
    list: bool = False
    """List all attacks with their references, and exit."""

    def __post_init__(self):
        super().__post_init__()
        checks.at_least(1, self, "train_steps", "num_images", "batch_size", "samples")
        checks.positive(self, "sigma", "train_epsilon", "epsilons")
        checks.not_negative(self, "beta")
        checks.seed(self)
        checks.distinct(self, "norms", "attacks", "epsilons")
        for name, known in (("norms", adversaries.NORMS), ("training", adversaries.TRAINING)):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values or known[0],):
                if value not in known:
                    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        norms = self.norms or (("l2",) if self.smoothed else ("linf",))
        if self.smoothed and norms != ("l2",):
            raise ValueError(f"norms must be l2 for a model smoothed with Gaussian noise, got {' '.join(norms)}.")
        if self.certify_intervals and (self.smoothed or norms != ("linf",)):
            what = "a smoothed model" if self.smoothed else " ".join(norms)
            raise ValueError(f"certify_intervals must be for linf and a model that is not smoothed, got {what}.")
        if self.epsilons and len(norms) > 1:
            raise ValueError(f"epsilons must be left out with several norms, got {len(norms)} norms.")
        if self.training == "intervals" and (self.train_norm or norms[0]) != "linf" and not self.is_trained:
            raise ValueError(f"train_norm must be linf for intervals training, got {self.train_norm or norms[0]}.")
        self.without_effect("training", "train_norm", "train_epsilon", "train_steps", "beta", "num_epochs", "recipe")
        adversaries.check(self.attacks, norms, smoothed=self.smoothed)

    def resolved(self) -> Config:
        """The same settings with everything that their defaults stand for, except ``attacks`` and ``epsilons``."""
        training = None if self.is_trained else self.training or ("gaussian" if self.smoothed else "pgd")
        digits, adversarial = self.dataset == "digits", training in adversaries.ADVERSARIAL
        norms = self.norms or (("l2",) if self.smoothed else ("linf",))
        found: dict = {"norms": norms, "training": training}
        found["num_epochs"] = self.num_epochs or (25 if adversarial and digits else None)
        found["num_images"] = self.num_images or (64 if digits else None)
        if training in adversaries.WITHIN:
            norm = self.train_norm or norms[0]
            found["train_norm"] = norm
            found["train_epsilon"] = adversaries.default("train_epsilon", self.train_epsilon, self.dataset, norm)
        return dataclasses.replace(self, **found)

    def jobs(self) -> builtins.list[tuple[str, float, str]]:
        """Norm, radius and attack of each attack to run, of a resolved config."""
        names = self.attacks or (adversaries.DEFAULT_SMOOTHED if self.smoothed else adversaries.DEFAULT)
        radii = self.radii()
        return [(n, e, name) for name in names for n in radii if n in adversaries.ATTACKS[name].norms for e in radii[n]]

    def radii(self) -> dict[str, tuple[float, ...]]:
        """The radii of each norm, of a resolved config."""
        found = {norm: adversaries.default("epsilons", self.epsilons, self.dataset, norm) for norm in self.norms}
        return {norm: tuple(sorted(epsilons)) for norm, epsilons in found.items()}

    def folder(self) -> epath.Path:
        """The run folder."""
        config = self.resolved()
        parts = [config.data_name, config.model_name]
        if config.checkpoint is not None:
            parts.append(f"of-{config.origin}")
        elif config.training in adversaries.WITHIN:
            radius = adversaries.text_of(config.train_epsilon or 0.0).replace("/", "_")
            parts.append(f"{config.training}-{config.train_norm}-{radius}")
        elif not config.is_trained:
            parts.append(f"gaussian-{config.sigma:g}" if config.training == "gaussian" else str(config.training))
        if config.smoothed:
            parts.append(f"smoothed-{config.sigma:g}")
        name = "-".join(parts) if config.name is None else config.name
        return folders.run_folder(config.results_dir, "adversarial", name)
