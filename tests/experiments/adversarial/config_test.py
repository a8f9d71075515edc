"""Settings of the adversarial experiment: what they mean, and what is refused before anything is written."""

import pytest
import tyro

from experiments import adversarial
from experiments.common import adversaries


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"certify_intervals": True, "norms": ("l2",)},
            "certify_intervals must be for linf and a model that is not smoothed, got l2",
        ),
        ({"training": "intervals", "norms": ("l2",)}, "train_norm must be linf for intervals training, got l2"),
        ({"attacks": ("pdg_20",)}, r"attacks must be known names, got 'pdg_20'. Did you mean pgd_20"),
        (
            {
                "attacks": (
                    "fgsm",
                    "fgsm",
                )
            },
            "attacks must be given once each",
        ),
        ({"attacks": ("carlini_wagner",)}, "must be defined for linf, got 'carlini_wagner', which is for l2"),
        ({"attacks": ("square",), "smoothed": True}, "attacks on a smoothed model must be among .*got 'square'"),
        ({"smoothed": True, "norms": ("linf",)}, "norms must be l2 for a model smoothed with Gaussian noise"),
        ({"norms": ("l2", "l2")}, "norms must be given once each, got l2 l2"),
        ({"norms": ("l3",)}, "norms must be one of linf, l2, l1, got 'l3'"),
        ({"norms": ("l2", "l1"), "epsilons": (0.1,)}, "epsilons must be left out with several norms, got 2 norms"),
        ({"epsilons": (-0.1,)}, "epsilons must be positive and finite, got -0.1"),
        ({"epsilons": (0.0,)}, "epsilons must be positive and finite, got 0.0"),
        ({"epsilons": (0.1, 0.1 + 1e-9)}, "epsilons must be given once each, got 0.1 0.1"),
        ({"attacks": ("fgsm,pgd_20",)}, "attacks must be separated by spaces, not commas, got 'fgsm,pgd_20'"),
        ({"dataset": "svhn", "train_epsilon": 0.1}, "epsilons must be given for the data set 'svhn' in linf"),
        ({"dataset": "svhn", "epsilons": (0.1,)}, "train_epsilon must be given for the data set 'svhn' in linf"),
        ({"train_epsilon": float("nan")}, "train_epsilon must be positive and finite, got nan"),
        ({"training": "magic"}, "training must be one of standard, pgd, trades"),
        ({"train_steps": 0}, "train_steps must be an integer of at least 1, got 0"),
        ({"num_images": 0}, "num_images must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1, got 0"),
        ({"sigma": 0.0}, "sigma must be positive and finite, got 0.0"),
        ({"beta": -1.0}, "beta must be at least 0 and finite, got -1.0"),
        ({"seed": -1}, "seed must lie in"),
        ({"name": "a/b"}, "name must be the name of a folder"),
        ({"model": "alexnet"}, "must be one of mlp, lenet, cnn"),
        ({"recipe": "none"}, "recipe must be one of digits, mnist"),
        (
            {"model": "my:build", "training": "trades"},
            "^training cannot be combined with checkpoint or a model of your",
        ),
        ({"checkpoint": "no/such/run", "beta": 1.0}, "^beta cannot be combined with checkpoint or a model of your own"),
        ({"checkpoint": "no/such/run"}, r"checkpoint must be the folder of a run, but no/such/run/config.json cannot"),
    ],
)
def test_a_bad_setting_is_named_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        adversarial.run(adversarial.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_every_norm_has_its_own_radii():
    config = adversarial.Config(norms=("l2", "linf")).resolved()
    assert config.radii() == {"l2": (0.25, 0.5, 1.0), "linf": (0.1, 0.2, 0.3)}
    assert (config.train_norm, config.train_epsilon) == ("l2", 0.75)
    assert adversarial.Config(dataset="mnist", norms=("l2",)).resolved().radii() == {"l2": (1.0, 1.5, 2.0)}
    assert adversarial.Config(smoothed=True).resolved().norms == ("l2",)
    for names, smoothed in ((adversaries.DEFAULT, False), (adversaries.DEFAULT_SMOOTHED, True)):
        jobs = adversarial.Config(smoothed=smoothed, norms=("l2",)).resolved().jobs()
        assert jobs == [("l2", epsilon, name) for name in names for epsilon in (0.25, 0.5, 1.0)]
    parsed = tyro.cli(adversarial.Config, args=["--epsilons", "0.3", "8/255", "--train-epsilon", "2/255"])
    assert parsed.resolved().radii() == {"linf": (8 / 255, 0.3)}
    assert parsed.folder().name == "digits-cnn-pgd-linf-2_255"
    for wrong in ("small", "1/0", "0.1,0.2"):
        with pytest.raises(SystemExit):
            tyro.cli(adversarial.Config, args=["--epsilons", wrong])
