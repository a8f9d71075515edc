"""Settings of the out-of-distribution experiment: what they mean, and what is refused before anything is written."""

import re

import pytest

from experiments import ood
from experiments.common import images

NOT_TESTED = "outliers must not share a stored split with a tested set"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detectors": ("mahalanobs",)}, r"got 'mahalanobs'. Did you mean .*mahalanobis"),
        ({"detectors": ("energy,knn",)}, "detectors must be separated by spaces, not commas, got 'energy,knn'"),
        ({"detectors": ("react",)}, r"must end in a detector, such as react\+energy"),
        ({"detectors": ("msp+energy",)}, r"must have only react, .* before \+"),
        ({"detectors": ("react+odin",)}, "a detector that reads outputs"),
        ({"detectors": ("msp", "msp")}, "detectors must be given once each, got msp msp"),
        ({"seeds": 0}, "seeds must be an integer of at least 1, got 0"),
        ({"open_set": 0}, "open_set must be 0 to 4, of mnist or cifar10"),
        ({"training": "outlier_exposure"}, "outliers must be given"),
        (
            {"outliers": "textures"},
            "outliers must be given for outlier_exposure and energy_bounded only",
        ),
        ({"dataset": "mnist", "open_set": 0, "training": "energy_bounded"}, "outliers must be given"),
        ({"training": "outlier_exposure", "outliers": "textures", "far": ("textures",)}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "uniform_noise"}, NOT_TESTED),  # which is there by default
        ({"training": "outlier_exposure", "outliers": "held_out"}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "digits@test[:9]"}, NOT_TESTED),
        ({"training": "outlier_exposure", "outliers": "omniglot@small1", "far": ("omniglot",)}, NOT_TESTED),
        ({"far": ("textures@train",)}, "textures has no splits, got 'textures@train'"),
        ({"far": ("omniglot@",)}, "must be NAME or NAME@SPLIT, such as omniglot@small1, got 'omniglot@'"),
        ({"far": ("@small1",)}, "must be NAME or NAME@SPLIT"),
        ({"far": ("digits@half",)}, "split must be one of the data set's"),
        ({"detectors": ("react+mahalanobis_ensemble",)}, "a detector that reads outputs"),
        ({"near": ("textures",), "far": ("textures",)}, "near and far must name each set once"),
        ({"near": ("held_out",)}, "held_out needs --classes"),
        ({"far": ("textures", "textures")}, "far must be given once each"),
        ({"classes": (0, 12)}, r"classes must lie in 0, \.\.\., 9"),
        (
            {"model": "my:build", "training": "mixup"},
            "^training cannot be combined with checkpoint or a model of your own",
        ),
        ({"name": "a/b"}, "name must be the name of a folder"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ood.run(ood.Config(**settings, results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_slices_have_files_of_their_own():
    splits = ["[:5]", "[5:]", "[:-5]", "[-5:]", "[:5%]", "[5%:]", "[5:6]", ""]
    files = {f"a/b:1@c{split}".translate(images.UNSAFE) for split in splits}
    assert len(files) == len(splits)
    assert all(re.fullmatch(r"[\w@+-]+", name) for name in files), files


@pytest.mark.parametrize("near", ["digits", "digits@train", "digits@train[:10]"])
def test_known_images_are_not_foreign(near, tmp_path):
    with pytest.raises(ValueError, match="near and far must be foreign to digits"):
        ood.run(ood.Config(near=(near,), results_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_brings_its_classes(tmp_path):
    (tmp_path / "config.json").write_text('{"dataset": "digits", "model": "cnn", "classes": [6, 7, 8]}')
    config = ood.Config(checkpoint=str(tmp_path))
    assert config.resolved().classes == (6, 7, 8)
    assert config.folder().name.endswith(f"-of-{tmp_path.name}")
    with pytest.raises(ValueError, match=r"classes must be the classes of checkpoint .*, \(6, 7, 8\), got \(0, 1\)"):
        ood.Config(checkpoint=str(tmp_path), classes=(0, 1)).resolved()
    with pytest.raises(ValueError, match="has model cnn, not mlp; pass --model cnn"):
        ood.Config(checkpoint=str(tmp_path), model="mlp").resolved()
    with pytest.raises(ValueError, match="classes must be at least two"):
        ood.Config(classes=(3,))
