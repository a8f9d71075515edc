"""A tiny data set in the format of TFDS, written without TensorFlow."""

import io
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

_PACKAGE = "tensorflow_datasets.core.features."


def _image_feature(shape: tuple, dtype: str = "uint8") -> dict:
    dimensions = [str(-1 if edge is None else edge) for edge in shape]
    image = {"dtype": dtype, "encodingFormat": "png", "shape": {"dimensions": dimensions}}
    return {"image": image, "pythonClassName": _PACKAGE + "image_feature.Image"}


def _label_feature(num_classes: int | None) -> dict:
    if num_classes is None:
        tensor = {"dtype": "int64", "encoding": "none", "shape": {}}
        return {"tensor": tensor, "pythonClassName": _PACKAGE + "tensor_feature.Tensor"}
    label = {"numClasses": str(num_classes)}
    return {"classLabel": label, "pythonClassName": _PACKAGE + "class_label_feature.ClassLabel"}


def write(
    folder: pathlib.Path,
    splits: dict[str, list[np.ndarray]],
    *,
    shape: tuple | None = None,
    dtype: str = "uint8",
    num_classes: int | None = 3,
    keys: tuple[str, str] = ("image", "label"),
    file_format: str = "array_record",
    version: str = "1.0.0",
) -> pathlib.Path:
    """Writes images, whose labels are 0, 1, 2, 0, ..., as version ``version`` of ``folder``; returns the data_dir."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    target = folder / version
    target.mkdir(parents=True)
    first = next((images[0] for images in splits.values() if images), np.zeros((1, 1, 1)))
    features = {keys[0]: _image_feature(shape or first.shape, dtype), keys[1]: _label_feature(num_classes)}
    top = {"featuresDict": {"features": features}, "pythonClassName": _PACKAGE + "features_dict.FeaturesDict"}
    (target / "features.json").write_text(json.dumps(top))
    info = {"name": folder.name, "version": version, "moduleName": "__main__", "fileFormat": file_format, "splits": []}
    for split, images in splits.items():
        writer = ArrayRecordWriter(str(target / f"{folder.name}-{split}.{file_format}-00000-of-00001"), "group_size:1")
        for i, image in enumerate(images):
            example, encoded = tf_example_pb2.Example(), io.BytesIO()
            Image.fromarray(image.squeeze()).save(encoded, "png")
            example.features.feature[keys[0]].bytes_list.value.append(encoded.getvalue())
            example.features.feature[keys[1]].int64_list.value.append(i % (num_classes or 3))
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info["splits"].append(
            {"name": split, "filepathTemplate": template, "numBytes": "1", "shardLengths": [str(len(images))]}
        )
    (target / "dataset_info.json").write_text(json.dumps(info))
    return folder.parent


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., pathlib.Path]:
    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    """The data_dir and the images, as uint8, of a data set called tiny: 30 for training and 10 for testing, 6x5x3."""
    random = np.random.RandomState(0)
    images = {
        name: random.randint(0, 256, (size, 6, 5, 3)).astype(np.uint8) for name, size in [("train", 30), ("test", 10)]
    }
    folder = tmp_path_factory.mktemp("tfds") / "tiny"
    return str(write(folder, {name: list(stack) for name, stack in images.items()})), images
