import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from experiments import smoothing
from experiments.common import classifiers, runtimes
from robustjax import data, training


def test_recipes_are_those_of_the_literature_unless_named():
    assert classifiers.recipe_of("mnist", None) == training.RECIPES["mnist"]
    assert classifiers.recipe_of("mnist:3.0.1", "mnist_short") == training.RECIPES["mnist_short"]
    with pytest.raises(ValueError, match="recipe must be named for the data set 'svhn_cropped', one of digits, mnist"):
        classifiers.recipe_of("svhn_cropped", None)


@pytest.mark.parametrize("name", ["dataset", "model"])
def test_what_is_unknown_is_named_by_its_setting(name):
    settings = {"model": "mlp", "dataset": "digits", name: "images.npz"}
    wanted = {"dataset": "dataset must look like mnist, .*", "model": "model must be one of mlp, lenet, .*, resnet50, "}

    def build():
        train, _ = smoothing.Config(image_size=12, **settings).images()
        assert train.image_shape == (12, 12, 1)
        classifiers.build(settings["model"], train, dtype="float32", key=jax.random.key(0))

    with pytest.raises(ValueError, match=f"^{wanted[name]}got '?.*images.npz'"):
        build()


def test_the_learning_rate_is_the_one_given():
    recipe = classifiers.recipe_of("mnist", None, 0.1)
    assert recipe == dataclasses.replace(training.RECIPES["mnist"], learning_rate=0.1)
    assert recipe.learning_rate_schedule(10)(0) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def classifier():
    functional = classifiers.build("mlp", data.load("digits", "test"), dtype="float32", key=jax.random.key(0))
    return classifiers.Classifier(functional, functional.state)


MESH = {"data": 4, "noise": 2}


def on(classifier, mesh):
    return classifier._replace(state=runtimes.on_mesh(classifier.state, mesh), mesh=mesh)


@pytest.mark.parametrize(("batch_size", "size"), [(5, 8), (8, 8), (500, 504)])
def test_outputs_and_accuracy_are_the_same_over_all_axes_of_a_mesh(classifier, batch_size, size):
    dataset, mesh = data.load("digits", "test[:37]"), training.make_mesh(MESH)
    images = dataset.arrays().image
    many_devices = on(classifier, mesh)
    assert classifiers._in_batches(many_devices, (8, 8, 1), batch_size)[0] == size
    alone = classifiers.outputs_of(classifier, images)
    spread = classifiers.outputs_of(many_devices, images, batch_size)
    for one, many in zip(alone, spread, strict=True):
        assert isinstance(many, np.ndarray)
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    right = alone.logits.argmax(-1) == dataset.arrays().label
    ids = np.arange(0, 37, 2)
    for either in (classifier, many_devices):
        assert either.accuracy(dataset, ids, batch_size) == right[ids].mean()


def test_each_device_has_its_share_of_a_batch(classifier):
    shapes = []

    def outputs(state, x):
        jax.debug.inspect_array_sharding(x, callback=lambda sharding: shapes.append(sharding.shard_shape(x.shape)))
        return classifier.functional.outputs(state, x)

    noting = on(classifier, training.make_mesh(MESH))._replace(
        functional=classifier.functional._replace(outputs=outputs)
    )
    classifiers.outputs_of(noting, np.zeros((20, 8, 8, 1), np.float32), 16)
    assert shapes == [(2, 8, 8, 1)]


def test_large_images_go_through_in_smaller_batches(classifier, monkeypatch):
    monkeypatch.setattr(classifiers, "BLOCK_BYTES", 3 * 4 * 64)
    for either, size in ((classifier, 3), (on(classifier, training.make_mesh(MESH)), 24)):
        assert classifiers._in_batches(either, (8, 8, 1), 500)[0] == size
    assert classifiers._in_batches(classifier, (80, 80, 1), 500)[0] == 1


def test_the_model_of_a_run_is_its_fine_tuned_one(classifier, tmp_path, monkeypatch):
    for name in ("checkpoints", "fine_tuning"):
        (tmp_path / "seed-0" / name).mkdir(parents=True)
    seen = []
    monkeypatch.setattr(training, "restore_model", lambda folder, state, log: seen.append(folder.name))
    classifiers.restored(str(tmp_path), classifier.functional)
    assert seen == ["fine_tuning"]


def test_a_run_keeps_to_the_model_it_began_with(classifier, tmp_path):
    other = classifier._replace(state=jax.tree.map(lambda a: a + 1, classifier.state))
    digits, folder = data.load("digits", "test"), epath.Path(tmp_path)
    for _ in range(2):
        classifiers.keep_to(folder, classifier.state, [digits])
    with pytest.raises(ValueError, match="checkpoint must hold the model that the run in .* began with"):
        classifiers.keep_to(folder, other.state, [digits])
    for others in (["train"], ["test[1:]"], ["test", "train"]):
        with pytest.raises(ValueError, match="data_dir must hold the images that the run in .* began with"):
            classifiers.keep_to(folder, classifier.state, [data.load("digits", split) for split in others])
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint must hold the model"):
        classifiers.keep_to(folder, classifier.state, [digits])
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.json cannot be read \(.*\); pass --overwrite"):
        classifiers.keep_to(folder, classifier.state, [digits])


def test_keys_of_a_model_are_digested_by_their_bits():
    one, other = (classifiers.digest([jax.random.key(seed)]) for seed in (0, 1))
    assert one == classifiers.digest([jax.random.key_data(jax.random.key(0))]) != other
