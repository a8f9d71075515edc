"""Data sets by name: scikit-learn's digits, and every data set that TFDS has prepared on disk."""

from __future__ import annotations

import difflib
import importlib.util
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from robustjax import _arguments, _paths
from robustjax.data import _conventions
from robustjax.data._dataset import Dataset

_DIGITS_TRAIN, _DIGITS_TEST = 1297, 500
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_RECORDS_PER_READ = 1024  # bounds the encoded bytes in memory while a whole split is decoded


@_arguments.checked
def load(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None, *, image_size: int | None = None
) -> Dataset:
    """Opens a split of a data set of labelled images; images are read on demand.

    Args:
      name: ``"digits"``, the 1,797 images of 8x8 pixels that come with scikit-learn (after one fixed permutation the
        first 1,297 are the train split, the other 500 the test split), or a TFDS name with ``image`` and ``label``
        features, as in ``"mnist"``, ``"mnist:3.0.1"`` and ``"cifar10_corrupted/fog_1"``.
      split: in the TFDS syntax: ``"train"``, ``"train[:90%]"``, ``"test[:500]"``, ``"train+test"``.
      data_dir: folder of the prepared TFDS data sets; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        TensorFlow is not needed to read them, only to prepare them: ``python -m robustjax.data.prepare NAME``.
      image_size: height and width of the images, in pixels, made as ImageNet models are evaluated: the shorter side is
        resized to 256/224 of it (bilinear), then the centre is cropped. None keeps the stored size. For data sets whose
        images differ in size, None means 224 for imagenet2012, its relatives (imagenet2012_subset, imagenet_v2, ...)
        and dtd; others need a size.

    Returns:
      The data set, of :class:`robustjax.typing.Batch` with images in [0, 1].

    Raises:
      FileNotFoundError: if the data set is not prepared in ``data_dir``.
      ValueError: if the name is unknown, ``data_dir`` is not a folder, the split is malformed, missing or empty, or the
        data set has no labelled images, is stored in a format without random access, or needs ``image_size``.

    Example:
      >>> digits = data.load("digits", "test")
      >>> len(digits), digits.image_shape
      (500, (8, 8, 1))
      >>> print(digits[:5].label)
      [0 9 6 9 8]
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}.")
    if name == "digits":
        if image_size is not None:
            raise ValueError(f"image_size must be None for digits, whose images are 8x8, got {image_size}.")
        return _digits(split)
    return _prepared(name, split, data_dir, image_size)


def _digits(split: str) -> Dataset:
    import tensorflow_datasets as tfds

    sizes = {"train": _DIGITS_TRAIN, "test": _DIGITS_TEST}
    infos = {key: tfds.core.SplitInfo(name=key, shard_lengths=[size], num_bytes=0) for key, size in sizes.items()}
    starts = {"train": 0, "test": _DIGITS_TRAIN}
    chosen = [np.arange(start, stop) + starts[key] for key, start, stop in _ranges("digits", split, infos)]
    order = np.random.RandomState(0).permutation(_DIGITS_TRAIN + _DIGITS_TEST)[np.concatenate(chosen)]
    spec: Any = importlib.util.find_spec("sklearn")
    table = os.path.join(os.path.dirname(spec.origin), "datasets", "data", "digits.csv.gz")
    rows = np.loadtxt(table, np.uint8, delimiter=",")[order]  # as load_digits does, whose import takes seconds
    images, labels = rows[:, :-1].reshape(-1, 8, 8, 1), rows[:, -1]
    return Dataset("digits", split, 10, (8, 8, 1), len(order), lambda ids: (images[ids], labels[ids]), white=16)


def _prepared(name: str, split: str, data_dir: str | os.PathLike[str] | None, image_size: int | None) -> Dataset:
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    example: Any = vars(tf_example_pb2)["Example"]  # generated code, which type checkers cannot see into
    builder = _builder(name, data_dir)
    infos, features = builder.info.splits, dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    integer = label is not None and not label.shape and np.issubdtype(label.np_dtype, np.integer)
    if not isinstance(image, tfds.features.Image) or not integer:
        found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(features.items()))
        raise ValueError(f"{name} must have the features image (Image) and label (an integer), got {found}.")
    if image.np_dtype != np.uint8 or image.shape[-1] not in _MODES:
        raise ValueError(f"The images of {name} must be uint8 with 1, 3 or 4 channels, got {image}.")
    if image_size is None and None in image.shape:
        image_size = _conventions.image_size(name)
    if image_size is None and None in image.shape:
        raise ValueError(f"The images of {name} differ in size: pass image_size, for example image_size=224.")
    shape = image.shape if image_size is None else (image_size, image_size, image.shape[-1])

    ranges = _ranges(name, split, infos)
    missing = [path for key, _, _ in ranges for path in infos[key].filepaths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing: prepare {name} again with {_command(name, data_dir)}.")
    records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    # Decoded here: TFDS would decode every feature, and use OpenCV if it happens to be installed.
    def decode(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert(_MODES[shape[-1]])
        if image_size is not None:
            shorter = round(image_size * 256 / 224)
            width, height = (shorter * edge // min(picture.size) for edge in picture.size)
            left, top = round((width - image_size) / 2), round((height - image_size) / 2)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            picture = picture.crop((left, top, left + image_size, top + image_size))
        return np.atleast_3d(np.asarray(picture))

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = np.empty((len(ids), *shape), np.uint8), np.empty(len(ids), np.int64)
        for start in range(0, len(ids), _RECORDS_PER_READ):
            for i, record in enumerate(records.__getitems__(ids[start : start + _RECORDS_PER_READ].tolist()), start):
                fields = example.FromString(record).features.feature
                images[i] = decode(fields["image"].bytes_list.value[0])
                labels[i] = fields["label"].int64_list.value[0]
        return images, labels

    return Dataset(name, split, getattr(label, "num_classes", None) or 0, shape, len(records), read)


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Finds the prepared files, without the code that made them."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    folder = _folder(data_dir)
    if data_dir is not None and not folder.is_dir():
        raise ValueError(f"data_dir must be a folder, got {str(data_dir)!r}.")
    try:
        base = str(naming.parse_builder_name_kwargs(name)[0])
    except ValueError:
        raise ValueError(f"name must look like mnist, mnist:3.0.1 or cifar10_corrupted/fog_1, got {name!r}.") from None
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        if base not in known:
            close = difflib.get_close_matches(base, ["digits", *known])
            raise ValueError(
                f"Unknown data set {name!r}: neither digits, nor a name of TFDS, nor a folder in {folder}."
                + (f" Did you mean {' or '.join(close)}?" if close else "")
            ) from None
        raise FileNotFoundError(
            f"{name} is not prepared in {folder}. Prepare it once with {_command(name, folder)}, or give its place "
            "with data_dir or the environment variable TFDS_DATA_DIR."
        ) from None
    stored = builder.info.file_format
    if stored is None or stored.value != "array_record":
        raise ValueError(
            f"{name} is stored in {builder.data_path} as {stored and stored.value}, which has no random access: "
            f"delete that folder and prepare it again with {_command(name, folder)}, or prepare it in another folder."
        )
    return builder


def _ranges(name: str, split: str, infos: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The slices ``(name, start, stop)`` of the stored splits that ``split`` stands for."""
    import tensorflow_datasets as tfds

    has = f"{name} has {', '.join(f'{key} ({info.num_examples:,} images)' for key, info in infos.items())}"
    try:
        slices = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"split must be one of the data set's, in the TFDS syntax (train, train[:90%], train+test), got {split!r}: "
            f"{str(error).splitlines()[-1]} {has}."
        ) from None
    ranges = [(s.splitname, s.from_ or 0, infos[s.splitname].num_examples if s.to is None else s.to) for s in slices]
    if any(start >= stop for _, start, stop in ranges):
        raise ValueError(f"split must hold at least one image, got {split!r}, which is empty: {has}.")
    return ranges


def _folder(data_dir: str | os.PathLike[str] | None) -> epath.Path:
    return _paths.path_of(data_dir=data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    return (
        f'`pip install "robustjax[tfds]"` and `python -m robustjax.data.prepare {name} --data-dir {_folder(data_dir)}`'
    )
