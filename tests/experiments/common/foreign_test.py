import pytest

from experiments.common import foreign


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("omniglot", "omniglot", True),
        ("omniglot@small1", "omniglot", True),
        ("omniglot@small1", "omniglot:3.0.0@small1", True),
        ("omniglot@small1", "omniglot@small2", False),
        ("omniglot@train", "omniglot", False),
        ("mnist@train[:50%]", "mnist@test + train[50%:]", True),
        ("mnist@all", "mnist", True),
        ("mnist", "fashion_mnist", False),
        ("cifar10_corrupted/fog_1", "cifar10_corrupted/fog_2", False),
        ("textures", "textures", True),
        ("textures", "uniform_noise", False),
    ],
)
def test_which_sets_share_images(one, other, share):
    pair = [foreign.parsed(name) for name in (one, other)]
    assert foreign.overlap(*pair) == foreign.overlap(*pair[::-1]) == share


@pytest.mark.data
def test_outliers_are_another_part_of_the_set_that_is_tested(data_dir):
    settings = {"classes": (), "near": ("omniglot@small2",), "far": ("omniglot@small2[:100]",)}
    sets = foreign.open_sets("mnist", data_dir, **settings, outliers="omniglot@small1[:50]", max_images=10, seed=0)
    assert sets.outliers is not None
    assert len(sets.outliers) == 50
    assert {name: (of.dataset.split, len(of.dataset)) for name, of in sets.foreign.items()} == {
        "omniglot@small2": ("small2", 3120),
        "omniglot@small2[:100]": ("small2[:100]", 100),
    }
    with pytest.raises(ValueError, match="split must be one of the data set's.*got 'small3'.*omniglot has small1"):
        foreign.open_sets(
            "mnist", data_dir, **{**settings, "far": ("omniglot@small3",)}, outliers=None, max_images=10, seed=0
        )
