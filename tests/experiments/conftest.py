"""One tiny run of each product, made once per worker and shared by all tests that only look at it or resume it."""

import pytest

from experiments import adversarial, ood, smoothing
from experiments.common import runtimes
from robustjax import attacks

SMOOTHING = {"model": "mlp", "num_epochs": 10, "num_images": 6, "num_estimation": 300, "sigma": 0.3}
OOD = {"model": "mlp", "num_epochs": 5, "seeds": 2, "detectors": ("msp", "energy", "knn", "react+energy")}
ONE = runtimes.Runtime(mesh="data=1")  # programs for one device compile sooner
ADVERSARIAL = {"model": "mlp", "num_epochs": 2, "num_images": 12, "epsilons": (0.05, 0.3)}


@pytest.fixture(scope="session")
def smoothing_run(tmp_path_factory):
    """The config and the summary."""
    config = smoothing.Config(results_dir=str(tmp_path_factory.mktemp("results")), **SMOOTHING)
    return config, smoothing.run(config)


@pytest.fixture(scope="session")
def ood_run(tmp_path_factory):
    """The config and the rows."""
    config = ood.Config(**OOD, results_dir=str(tmp_path_factory.mktemp("results")))
    return config, ood.run(config)


def three_parts(autoattack, num_classes):
    """Attacks that are compiled already, under names of AutoAttack's; the whole one is tested in tests/attacks."""
    settings = {"epsilon": autoattack.epsilon, "norm": autoattack.norm}
    fgsm, pgd = attacks.fgsm(**settings), attacks.pgd(**settings, steps=20)
    return {"apgd-ce": fgsm, "apgd-t": pgd, "square": fgsm}


@pytest.fixture(scope="session")
def adversarial_run(tmp_path_factory):
    """The config and the rows."""
    names = ("fgsm", "pgd_20", "autoattack")
    config = adversarial.Config(**ADVERSARIAL, attacks=names, results_dir=str(tmp_path_factory.mktemp("results")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr("experiments.common.sanity.STEPS", (1, 4))
        patch.setattr(attacks.autoattack, "attacks", three_parts)
        return config, adversarial.run(config, ONE)
