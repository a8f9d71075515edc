"""Methods without a claim to measure: a test holds them to their equations, their theorem, or a reference."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import robustjax


class Verified(NamedTuple):
    """A row of the catalogue.

    Attributes:
      method: its name.
      paper: authors and year; further papers with their ``arXiv:ID``.
      arxiv: id, or None for a paper that is not on arXiv.
      functions: names below ``robustjax``.
      command: after ``python -m``, of an experiment that uses it; None where there is none.
      statement: what it computes or promises.
    """

    method: str
    paper: str
    arxiv: str | None
    functions: tuple[str, ...]
    command: str | None
    statement: str

    @property
    def test(self) -> str:
        """The file that verifies it: tests mirror the module of the first function."""
        function: Any = functools.reduce(getattr, self.functions[0].split("."), robustjax)
        return "/".join(["tests", *(part.lstrip("_") for part in function.__module__.split(".")[1:])]) + "_test.py"


VERIFIED = (
    Verified("APGD, targeted APGD", "Croce, Hein 2020; l1: Croce, Hein 2021, arXiv:2103.01208", "2003.01690",
             ("attacks.apgd", "attacks.apgd_targeted", "losses.difference_of_logits_ratio",
              "losses.targeted_difference_of_logits_ratio"), "experiments.adversarial --attacks apgd_ce",
             "A projected gradient attack whose step size adapts, on cross-entropy or a difference of logits ratio."),
    Verified("AutoAttack", "Croce, Hein 2020", "2003.01690",
             ("attacks.autoattack",), "experiments.adversarial --attacks autoattack",
             "An ensemble without parameters to choose; never weaker than its parts."),
    Verified("Carlini-Wagner", "Carlini, Wagner 2017", "1608.04644",
             ("attacks.carlini_wagner", "losses.margin"),
             "experiments.adversarial --norms l2 --attacks carlini_wagner",
             "Finds l2 changes near the smallest."),
    Verified("DeepFool", "Moosavi-Dezfooli, Fawzi, Frossard 2016", "1511.04599",
             ("attacks.deepfool",), "experiments.adversarial --norms l2 --attacks deepfool",
             "Small changes from linearised boundaries, quickly."),
    Verified("Expectation over transformation", "Athalye et al. 2018", "1707.07397",
             ("attacks.expectation_over_transformation",), "experiments.adversarial --smoothed --sigma 0.5",
             "Attacks random models by the mean gradient over draws."),
    Verified("FAB", "Croce, Hein 2020", "1907.02044",
             ("attacks.fab",), "experiments.adversarial --attacks fab",
             "Finds a nearest point across the boundary, by projections onto linearised boundaries."),
    Verified("FGSM", "Goodfellow, Shlens, Szegedy 2015", "1412.6572",
             ("attacks.fgsm",), "experiments.adversarial --attacks fgsm",
             "One step along the gradient, the largest that the norm allows."),
    Verified("Momentum iterative", "Dong et al. 2018", "1710.06081",
             ("attacks.momentum_iterative",), "experiments.adversarial --attacks momentum_iterative",
             "Accumulates normalised gradients from step to step, for examples that transfer to other models."),
    Verified("PGD", "Madry et al. 2018; l1 step: Tramer, Boneh 2019, arXiv:1904.13000", "1706.06083",
             ("attacks.pgd",), "experiments.adversarial --attacks pgd_40",
             "Projected gradient steps on the loss from random starts; more steps and restarts find higher losses."),
    Verified("Square", "Andriushchenko et al. 2020", "1912.00049",
             ("attacks.square",), "experiments.adversarial --attacks square",
             "Random search over squares: an attack that needs no gradient."),
    Verified("Clopper-Pearson bound", "Clopper, Pearson 1934, Biometrika 26", None,
             ("certification.binomial_lower_bound",), "experiments.smoothing --num-estimation 100000 --alpha 0.001",
             "The bound exceeds the probability with probability at most alpha, whatever the probability."),
    Verified("Floating-point-sound sampler", "Voracek, Hein 2022", "2207.07209",
             ("certification.gaussian",), "experiments.smoothing --grid 16",
             "Noise rounded to a lattice does not depend on the image, so that no classifier can read the image's last "
             "bits from it; the cost is small."),
    Verified("Randomized smoothing, certification", "Cohen, Rosenfeld, Kolter 2019", "1902.02918",
             ("certification.certify", "certification.sample_counts", "certification.certificate_from_counts"),
             "experiments.smoothing --dataset cifar10 --data-dir DIR --model resnet20 --sigma 0.25 --skip 20",
             "With probability at least 1 - alpha for each image, no l2 change smaller than the radius alters the "
             "smoothed classifier's label."),
    Verified("Randomized smoothing, prediction", "Cohen, Rosenfeld, Kolter 2019; the test of two selected classes: "
             "Hung, Fithian 2016, arXiv:1610.03944", "1902.02918",
             ("certification.predict", "certification.prediction_from_counts", "certification.sign_test_p_value"), None,
             "A class other than the smoothed classifier's is returned with probability at most alpha."),
    Verified("Temperature scaling", "Guo et al. 2017", "1706.04599",
             ("scoring.temperature_scaling", "scoring.fit_temperature"),
             "experiments.ood --detectors temperature_scaling", "One temperature, fitted by likelihood, calibrates."),
    Verified("Average certified radius", "Zhai et al. 2020 (MACER)", "2001.02378",
             ("metrics.average_certified_radius", "metrics.certified_accuracy"), "experiments.smoothing",
             "One number for the curve of certified accuracy: the area below it."),
    Verified("Detection metrics", "Hendrycks, Gimpel 2017; both readings of FPR@95TPR: Liang, Li, Srikant 2018, "
             "arXiv:1706.02690, Zhang et al. 2023, arXiv:2306.09301", "1610.02136",
             ("metrics.auroc", "metrics.aupr", "metrics.fpr_at_tpr", "metrics.detection_error",
              "metrics.detection_metrics"), None,
             "AUROC, AUPR, the false positive rate at a true positive rate, and the detection error, of scores with "
             "ties."),
    Verified("Expected calibration error",
             "Guo et al. 2017; equal-mass bins: Nguyen, O'Connor 2015, arXiv:1508.05154", "1706.04599",
             ("metrics.expected_calibration_error", "metrics.maximum_calibration_error"), "experiments.ood",
             "Mean and largest gap between confidence and accuracy, over bins of equal width or equal mass."),
    Verified("High-probability certified accuracy", "Cohen, Rosenfeld, Kolter 2019, appendix", "1902.02918",
             ("metrics.certified_accuracy_lower_bound",), None,
             "A lower bound that, with probability 1 - rho, allows for the certificates that are wrong."),
    Verified("Selective risk", "Geifman, Uziel, El-Yaniv 2019", "1805.08206", ("metrics.aurc",), None,
             "Area under the curve of risk against coverage: the mean over all orders of tied scores."),
)  # fmt: skip
