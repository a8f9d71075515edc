"""Data sets by name: scikit-learn's digits, every data set that TFDS has prepared on disk, and a user's own."""

from __future__ import annotations

import difflib
import importlib.util
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from robustjax import _arguments, _paths
from robustjax.data import _conventions, _folder, _own, _pictures, _slices
from robustjax.data._dataset import Dataset

_DIGITS_TRAIN, _DIGITS_TEST = 1297, 500
_RECORDS_PER_READ = 1024  # bounds the encoded bytes in memory while a whole split is decoded


@_arguments.checked
def load(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None, *, image_size: int | None = None
) -> Dataset:
    """Opens a split of a data set of labelled images; images are read on demand.

    Args:
      name: ``"digits"``, the 1,797 images of 8x8 pixels that come with scikit-learn (after one fixed permutation the
        first 1,297 are the train split, the other 500 the test split), or a TFDS name with ``image`` and ``label``
        features, as in ``"mnist"``, ``"mnist:3.0.1"`` and ``"cifar10_corrupted/fog_1"``; or your own data, which need
        no TFDS:

        - ``"arrays:FILE.npz"``, a file that ``np.savez`` wrote, with ``images`` and ``labels`` as
          :func:`robustjax.data.from_arrays` takes them; or with ``train_images``, ``train_labels``, ``test_images`` and
          ``test_labels``; or with ``x_train``, ``y_train``, ``x_test`` and ``y_test``, as Keras names them.
        - ``"folder:PATH"``, PNG and JPEG files as :func:`robustjax.data.from_folder` takes them, with a sub-folder for
          each class, perhaps within sub-folders ``train``, ``test``, ``val`` or ``validation``.

        Where such data have no splits of their own, one fixed permutation makes them: the first 4/5 (rounded down) are
        the train split, the others the test split, and ``all`` is the one after the other.
      split: in the TFDS syntax: ``"train"``, ``"train[:90%]"``, ``"test[:500]"``, ``"train+test"``.
      data_dir: folder of the prepared TFDS data sets; by default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
        TensorFlow is not needed to read them, only to prepare them: ``python -m robustjax.data.prepare NAME``.
      image_size: height and width of the images, in pixels, made as ImageNet models are evaluated: the shorter side is
        resized to 256/224 of it (bilinear), then the centre is cropped. None keeps the stored size. For data sets whose
        images differ in size, None means 224 for imagenet2012, its relatives (imagenet2012_subset, imagenet_v2, ...)
        and dtd; others need a size. The images of digits and arrays keep theirs.

    Returns:
      The data set, of :class:`robustjax.typing.Batch` with images in [0, 1].

    Raises:
      FileNotFoundError: if the data set is not prepared in ``data_dir``, or your file or folder is missing.
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
    if _own.parsed(name) is not None:
        return _own.load(name, split, image_size)
    return _prepared(name, split, data_dir, image_size)


def _digits(split: str) -> Dataset:
    rows = _own.permuted(_DIGITS_TRAIN + _DIGITS_TEST, _DIGITS_TEST)
    slices = _slices.ranges("digits", split, {key: len(ids) for key, ids in rows.items()})
    order = np.concatenate([rows[key][start:stop] for key, start, stop in slices])
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
    if image.np_dtype != np.uint8 or image.shape[-1] not in _pictures.MODES:
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

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = np.empty((len(ids), *shape), np.uint8), np.empty(len(ids), np.int64)
        for start in range(0, len(ids), _RECORDS_PER_READ):
            for i, record in enumerate(records.__getitems__(ids[start : start + _RECORDS_PER_READ].tolist()), start):
                fields = example.FromString(record).features.feature
                # Decoded here: TFDS would decode every feature, and use OpenCV if it happens to be installed.
                picture = Image.open(io.BytesIO(fields["image"].bytes_list.value[0]))
                images[i] = _pictures.pixels(picture, shape[-1], image_size)
                labels[i] = fields["label"].int64_list.value[0]
        return images, labels

    return Dataset(name, split, getattr(label, "num_classes", None) or 0, shape, len(records), read)


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Finds the prepared files, without the code that made them."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    folder = _data_dir(data_dir)
    if data_dir is not None and not folder.is_dir():
        raise ValueError(f"data_dir must be a folder, got {str(data_dir)!r}.")
    try:
        base = str(naming.parse_builder_name_kwargs(name)[0])
    except ValueError:
        raise ValueError(
            "name must look like mnist, mnist:3.0.1 or cifar10_corrupted/fog_1, arrays:FILE.npz or folder:PATH, "
            f"got {name!r}.{_hint(name)}"
        ) from None
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if base not in known:
            wanted = folder.joinpath(*re.split("[:/]", name))
            wanted = (wanted if ":" in name else wanted / "VERSION") / "dataset_info.json"
            close = difflib.get_close_matches(base, dict.fromkeys(["digits", *there, *known]) - {base: None}.keys())
            versions = sorted(path.parent.name for path in (folder / base).glob("*/dataset_info.json"))
            raise ValueError(
                f"Unknown data set {name!r}: neither digits, nor a name of TFDS, nor is it prepared in {folder}, where "
                f"{wanted} was looked for"
                + (f" and {', '.join(versions)} found." if versions else ".")
                + (_hint(str(folder / base)) or _hint(name))
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


def _hint(path: str) -> str:
    """How to name a file or folder that is a data set of the user's own; empty if it is none."""
    try:
        place = _paths.path_of(name=path)
        if place.is_file() and place.suffix == ".npz":
            return f" For that file pass arrays:{path}."
        if place.is_dir() and _folder.stored(place):
            return f" For the images in {path} pass folder:{path}."
    except (OSError, ValueError):  # no path, or a folder without images
        pass
    return ""


def _ranges(name: str, split: str, infos: Mapping[str, Any]) -> list[_slices.Slice]:
    """The slices of the stored splits that ``split`` stands for, read as TFDS itself will: it also knows shards."""
    import tensorflow_datasets as tfds

    def parsed(split: str, sizes: Mapping[str, int]) -> list[_slices.Slice]:
        found = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        return [(s.splitname, s.from_ or 0, sizes[s.splitname] if s.to is None else s.to) for s in found]

    return _slices.ranges(name, split, {key: info.num_examples for key, info in infos.items()}, parsed)


def _data_dir(data_dir: str | os.PathLike[str] | None) -> epath.Path:
    return _paths.path_of(data_dir=data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _command(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    place = _data_dir(data_dir)
    return f'`pip install "robustjax[tfds]"` and `python -m robustjax.data.prepare {name} --data-dir {place}`'
