"""Settings that experiments inherit: their order, their defaults, their checks and what two configs share."""

import dataclasses

import pytest

from experiments.common import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(settings.Training, settings.Splits):
    num_epochs: int | None = 25
    sigma: float = 0.5


def test_a_config_inherits_fields_in_their_order_and_changes_defaults():
    names = ["dataset", "data_dir", "train_split", "test_split", "model", "num_epochs", "recipe", "sigma"]
    assert [field.name for field in dataclasses.fields(Config)] == names
    assert Config().num_epochs == 25
    with pytest.raises(ValueError, match="num_epochs must be an integer of at least 1, got 0"):
        Config(num_epochs=0)


def test_images_are_those_of_the_splits():
    train, test = Config(train_split="train[:64]").images()
    assert (len(train), test.name, len(test)) == (64, "digits", 500)
    assert len(Config(test_split="train[64:128]").images()[1]) == 64


def test_what_two_configs_share():
    assert settings.shared(Config(dataset="mnist"), settings.Model) == {
        "dataset": "mnist", "data_dir": None, "model": "cnn", "num_epochs": 25,
    }  # fmt: skip
