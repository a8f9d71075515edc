"""The claim of Gaussian augmentation on digits, both sides in one run, over three seeds."""

import sys

import numpy as np
import pytest

from experiments import smoothing


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "least", "gain", "least_clean"), [(0.25, 0.46, 0.07, 0.96), (0.5, 0.37, 0.15, 0.92)])
def test_training_with_noise_certifies_more(sigma, least, gain, least_clean, tmp_path):
    """200 test images, n = 5,000. The bars were fixed beforehand, from runs of another net in another framework."""
    acr, clean = np.zeros((2, 3)), np.zeros((2, 3))
    for side, train_sigma in enumerate((sigma, 0.0)):
        for seed in range(3):
            config = smoothing.Config(
                sigma=sigma,
                train_sigma=train_sigma,
                num_images=200,
                num_estimation=5000,
                seed=seed,
                name=f"{side}-{seed}",
                results_dir=str(tmp_path),
            )
            summary = smoothing.run(config)
            acr[side, seed], clean[side, seed] = summary["average_certified_radius"], summary["standard_accuracy"]
    for name, values in (("ACR", acr), ("standard accuracy", clean)):
        sides = [f"{side.mean():.3f} (sd {side.std(ddof=1):.3f})" for side in values]
        sys.stdout.write(f"sigma {sigma}: {name} with noise {sides[0]}, without {sides[1]}\n")
    assert acr[0].mean() >= least
    assert acr[0].mean() - acr[1].mean() >= gain
    assert clean[0].mean() >= least_clean
