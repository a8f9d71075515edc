"""Out-of-distribution detectors on one classifier, compared by AUROC on near and far sets.

python -m experiments.claims.detectors
python -m experiments.claims.detectors --dataset mnist --data-dir DIR --far fashion_mnist omniglot cifar10
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from robustjax import plotting

from .. import ood
from ..common import checks, settings
from ..common import detectors as named
from . import _frame

GROUPS = ("near", "far")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Model):
    """Settings of the measurement; the images are those of experiments.ood."""

    classes: tuple[int, ...] = ()
    """In-distribution labels. Default: as in experiments.ood, like the settings below."""
    near: tuple[str, ...] = ()
    """Near sets."""
    far: tuple[str, ...] = ()
    """Far sets."""
    detectors: tuple[str, ...] = (*named.ALL, "feature_normalized+mahalanobis")
    """Detectors to compare; a claim is left out where its detectors are."""

    def __post_init__(self):
        super().__post_init__()
        checks.distinct(self, "detectors")
        self.run_of(1, "results")

    def run_of(self, seeds: int, results_dir: str, training: Any = "standard", outliers: str | None = None):
        """The run of ``seeds`` models with one training."""
        given = settings.shared(self, ood.Config) | {"training": training, "outliers": outliers, "name": training}
        return ood.Config(**given, seeds=seeds, results_dir=results_dir)


def measure(config: Config, seed: int, place: _frame.Place) -> _frame.Numbers:
    """Adds a seed to a run of experiments.ood that all seeds share."""
    rows = ood.run(config.run_of(seed + 1, str(place.folder.parent / "runs")), place.runtime)
    return numbers_of([row for row in rows if row["seed"] == seed])


def numbers_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the sets of a group, by detector."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["detector"] for row in rows):
        for group in GROUPS:
            of_group = [row for row in rows if (row["detector"], row["group"]) == (name, group)]
            metrics = {"AUROC": "auroc", "FPR": "fpr_ood_positive"} if of_group else {}
            found.setdefault(name, {}).update(
                {f"{metric} {group}": float(np.mean([row[of] for row in of_group])) for metric, of in metrics.items()}
            )
    return found


def aurocs(config: Any, results: _frame.Results) -> Any:
    """AUROC on near and far sets."""
    shown = lambda of_arm: {name: values for name, values in of_arm.items() if name.startswith("AUROC")}
    return plotting.bar_chart({arm: shown(of_arm) for arm, of_arm in results.items()}, label="AUROC", start=0.5)


def _claim(
    functions: str, method: str, statement: str, arms: str, others: str | float, groups: str = "near far"
) -> _frame.Claim:
    """Every arm has a higher AUROC than every other, on each group of sets that the run has."""
    ours, theirs = arms.split(), others.split() if isinstance(others, str) else [others]

    def bars(config: Any) -> tuple[_frame.Bar, ...]:
        if not {arm for arm in (*ours, *theirs) if isinstance(arm, str)} <= {*config.detectors}:
            return ()
        has_near = config.dataset == "digits" or config.near or config.classes
        shown = [group for group in groups.split() if group == "far" or has_near]
        return tuple(_frame.Bar(f"AUROC {g}", arm, ">", other) for arm in ours for other in theirs for g in shown)

    source = named.NAMED[ours[0].split("+")[0]]
    scoring = tuple(f"scoring.{name}" for name in functions.split())
    return _frame.Claim(method, source.paper, source.arxiv, scoring, statement, bars)


CLAIMS = (
    _claim("msp", "MSP", "The maximum softmax probability is lower for foreign inputs.", "msp", 0.5),
    _claim("entropy", "Entropy", "Predictions of foreign inputs are more uncertain.", "entropy", 0.5),
    _claim("max_logit", "Max logit", "Better than MSP: the logits say more before the softmax than after it.",
           "max_logit", "msp"),
    _claim("energy", "Energy", "Better than MSP.", "energy", "msp"),
    _claim("generalized_entropy", "GEN", "Better than entropy and MSP.", "generalized_entropy", "entropy msp"),
    _claim("kl_matching", "KL matching",
           "Better than MSP: distance of a prediction from the typical predictions of each class.",
           "kl_matching", "msp"),
    _claim("odin", "ODIN", "Better than MSP, by a temperature and a step on the input.", "odin", "msp"),
    _claim("mahalanobis add_class", "Mahalanobis",
           "Better than MSP: distance from class-conditional Gaussians with one covariance.", "mahalanobis", "msp"),
    _claim("mahalanobis_ensemble", "Mahalanobis ensemble",
           "Weighing the distances of all layers, with a step on the input, is better than the last layer only.",
           "mahalanobis_ensemble", "mahalanobis"),
    _claim("relative_mahalanobis", "Relative Mahalanobis", "Better than Mahalanobis on near sets.",
           "relative_mahalanobis", "mahalanobis", "near"),
    _claim("feature_normalized", "Mahalanobis++", "Features of one length help Mahalanobis distances.",
           "feature_normalized+mahalanobis", "mahalanobis"),
    _claim("knn", "k-NN", "The distance to the k-th nearest normalised training feature is better than Mahalanobis.",
           "knn", "mahalanobis"),
    _claim("vim residual", "ViM, residual",
           "Logits and the residual outside the principal subspace are better together than each.",
           "vim", "residual energy"),
    _claim("gradnorm", "GradNorm",
           "Better than MSP: gradients towards the uniform distribution are smaller for foreign inputs.",
           "gradnorm", "msp"),
    _claim("she", "SHE", "Better than MSP: inner product with the stored pattern of the predicted class.",
           "she", "msp"),
    _claim("nnguide", "NNGuide", "Neighbours guide the energy.", "nnguide", "energy"),
    _claim("fdbd", "fDBD", "Better than MSP: foreign features lie closer to decision boundaries.", "fdbd", "msp"),
    _claim("nci", "NCI", "Better than MSP: features of known inputs are near the weights of their class.",
           "nci", "msp"),
    _claim("nac neuron_states", "NAC", "Better than MSP: states of neurons that training did not cover are foreign.",
           "nac", "msp"),
    _claim("react", "ReAct", "Clipping features helps the energy.", "react+energy", "energy"),
    _claim("dice", "DICE", "Keeping the largest contributions helps the energy.", "dice+energy", "energy"),
    _claim("ash", "ASH", "Pruning activations helps the energy.", "ash_s+energy ash_b+energy ash_p+energy", "energy"),
    _claim("scale", "SCALE", "Scaling without pruning is better than ASH.", "scale+energy", "ash_s+energy"),
    _claim("vra", "VRA", "Removing low and clipping high activations helps the energy.", "vra+energy", "energy"),
)  # fmt: skip

STUDY = _frame.Study(
    measure=measure, config=Config(),
    tiny=Config(model="mlp", num_epochs=1, far=("uniform_noise",), detectors=("msp", "energy")),
    numbers=[_frame.Column(name, name) for name in ("AUROC near", "FPR near", "AUROC far", "FPR far")],
    claims=CLAIMS,
    figure=aurocs, in_folder=True,
)  # fmt: skip

if __name__ == "__main__":
    _frame.main(STUDY, __doc__)
