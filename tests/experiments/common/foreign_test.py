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


@pytest.mark.parametrize(("place", "name"), [("outliers", "outliers"), ("far", "near and far")])
def test_a_file_in_place_of_a_set_is_named(place, name):
    settings = {"classes": (), "near": ("textures",), "far": ("uniform_noise",), "outliers": None}
    settings[place] = "/x/images.npz" if place == "outliers" else ("/x/images.npz",)
    with pytest.raises(ValueError, match=f"^{name} must look like mnist, .*, got '/x/images.npz'"):
        foreign.open_sets("digits", None, **settings, max_images=1, seed=0)


@pytest.mark.data
def test_prepared_sets_are_opened_in_the_shape_of_the_known_images(data_dir):
    settings = {"near": ("fashion_mnist",), "far": ("omniglot", "cifar10"), "outliers": None}
    sets = foreign.open_sets("mnist", data_dir, classes=(), **settings, max_images=10, seed=0)
    found = {name: (of.group, len(of.dataset), of.dataset.image_shape) for name, of in sets.foreign.items()}
    assert found == {
        "fashion_mnist": ("near", 8000, (28, 28, 1)),
        "omniglot": ("far", 5840, (28, 28, 1)),
        "cifar10": ("far", 10_000, (28, 28, 1)),
    }


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
