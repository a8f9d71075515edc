import dataclasses

import pytest

from experiments import _classifier
from robustjax import training


def test_recipes_are_those_of_the_literature_unless_named():
    assert _classifier.recipe_of("mnist", None) == training.RECIPES["mnist"]
    assert _classifier.recipe_of("mnist:3.0.1", "mnist_short") == training.RECIPES["mnist_short"]
    with pytest.raises(ValueError, match="recipe must be named for the data set 'svhn_cropped', one of digits, mnist"):
        _classifier.recipe_of("svhn_cropped", None)


def test_the_learning_rate_is_the_one_given():
    recipe = _classifier.recipe_of("mnist", None, 0.1)
    assert recipe == dataclasses.replace(training.RECIPES["mnist"], learning_rate=0.1)
    assert recipe.learning_rate_schedule(10)(0) == pytest.approx(0.1)
