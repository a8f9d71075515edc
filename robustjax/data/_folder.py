"""A user's own images as a folder of PNG and JPEG files, a sub-folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from robustjax import _arguments, _paths, _validate
from robustjax.data import _pictures
from robustjax.data._arrays import SPLITS
from robustjax.data._dataset import Dataset

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LOOKED_AT = 64  # images that decide whether a data set is in colour, and of one size


class Files(NamedTuple):
    """The image files of a folder."""

    folder: epath.Path
    names: list[str]  # CLASS/FILE, in the order of classes and files
    labels: np.ndarray  # (n,)


@_arguments.checked
def from_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    channels: int | None = None,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    split: str = "all",
) -> Dataset:
    """Opens a folder of images with a sub-folder for each class; images are read on demand.

    PNG and JPEG files count, whatever the case of their suffix; other files do not, nor does anything whose name begins
    with a dot. Images are turned upright as their EXIF data say, and decoded to 8 bits per channel.

    Args:
      path: the folder; ``~`` is the home folder, and URLs such as ``gs://bucket/images`` are read, too.
      image_size: height and width of the images, in pixels, made as ImageNet models are evaluated: the shorter side is
        resized to 256/224 of it (bilinear), then the centre is cropped. None keeps the stored size, which must be one.
      channels: 1 makes all images grey (by ITU-R 601 luma), 3 makes all colour. None: colour if one of up to 64 images,
        evenly spaced, is.
      class_names: the sub-folders in the order of their labels; None sorts them by name. Pass those of the training
        images where the test images lie in a folder of their own.
      name: what the data set is called in messages and reports; by default ``folder:PATH``.
      split: what this part of it is called.

    Returns:
      The data set, sorted by class and by name of file; its ``class_names`` are the sub-folders.

    Raises:
      ValueError: if the folder holds no images in sub-folders, if a sub-folder is not among ``class_names``, if images
        differ in size and ``image_size`` is None, or, when it is read, if an image is damaged, is transparent, or has
        16 bits. The message names the file.
      FileNotFoundError: if there is no such folder.

    Example:
      >>> import pathlib, tempfile
      >>> from PIL import Image
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> for label, colour in {"cat": "grey", "dog": "white"}.items():
      ...     (folder / label).mkdir()
      ...     Image.new("L", (8, 6), colour).save(folder / label / "1.png")
      >>> pets = data.from_folder(folder)
      >>> pets.class_names, pets.image_shape, pets[1].image.max().item()
      (('cat', 'dog'), (6, 8, 1), 1.0)
    """
    folder = _paths.path_of(path=path)
    inside = _inside(folder)
    if splits := [part for part in inside if part in SPLITS and _classes(folder / part)]:
        raise ValueError(
            f"path must hold a sub-folder for each class, got {folder} with the splits {', '.join(splits)}: pass "
            f"{str(folder / splits[0])!r}, or data.load('folder:{folder}', {splits[0]!r})."
        )
    files = _files(folder, inside, class_names)
    names = tuple(inside if class_names is None else class_names)
    given = {"image_size": image_size, "channels": channels, "class_names": names}
    return opened([files], [files], name=f"folder:{folder}" if name is None else name, split=split, **given)


def stored(folder: epath.Path) -> tuple[dict[str, Files], tuple[str, ...]]:
    """The splits of a folder and the names of its classes; ``all`` where its sub-folders are the classes.

    A folder has splits if one of its sub-folders train, test, val and validation holds sub-folders itself. Only these
    four are splits; a class of a split must be one of its training images, and may lack in the others.
    """
    inside = _inside(folder)
    splits = {part: names for part in SPLITS if part in inside and (names := _classes(folder / part))}
    if not splits:
        return {"all": _files(folder, inside, None)}, tuple(inside)
    classes = splits.get("train", sorted({name for names in splits.values() for name in names}))
    return {part: _files(folder / part, names, classes) for part, names in splits.items()}, tuple(classes)


def opened(
    parts: Sequence[Files],
    of: Sequence[Files],
    *,
    image_size: int | None,
    channels: int | None,
    class_names: tuple[str, ...],
    name: str,
    split: str,
) -> Dataset:
    """The images of parts of a data set, whose shape follows from images of the whole of it."""
    if image_size is not None:
        _validate.at_least(1, image_size=image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, or None to take those of the images, got {channels}.")
    everything = [(files.folder, file) for files in of for file in files.names]
    some = np.linspace(0, len(everything) - 1, min(len(everything), _LOOKED_AT)).astype(int)
    looked_at = {folder / file: _pictures.opened(folder / file) for folder, file in (everything[i] for i in some)}
    colour = {path: _pictures.is_colour(picture) for path, picture in looked_at.items()}
    depth = channels or (3 if any(colour.values()) else 1)
    first, picture = next(iter(looked_at.items()))
    width, height = picture.size if image_size is None else (image_size, image_size)
    shape = (height, width, depth)

    def decode(path: epath.Path, picture: Any) -> np.ndarray:
        if channels is None and depth == 1 and _pictures.is_colour(picture):
            raise ValueError(
                f"channels must be given where few images are in colour, as {path} is: images are taken as grey; "
                "channels=3 makes all colour, channels=1 all grey."
            )
        if image_size is None and picture.size != (width, height):
            raise ValueError(
                f"image_size must be given where images differ in size, for example image_size=224: {path} has "
                f"{picture.size[1]}x{picture.size[0]} pixels, {first} has {height}x{width}."
            )
        return _pictures.pixels(picture, depth, image_size)

    for path, picture in looked_at.items():
        decode(path, picture)
    paths = [(files.folder, file) for files in parts for file in files.names]
    labels = np.concatenate([files.labels for files in parts])

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(ids), *shape), np.uint8)
        for i, (folder, file) in enumerate(paths[j] for j in ids):
            images[i] = decode(folder / file, _pictures.opened(folder / file))
        return images, labels[ids]

    return Dataset(name, split, len(class_names), shape, len(paths), read, class_names=class_names)


def _inside(folder: epath.Path) -> list[str]:
    """The sub-folders of a folder, of which there must be one."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: it should be a folder with a sub-folder of images a class.")
    if not folder.is_dir():
        raise ValueError(f"path must be a folder with a sub-folder of images for each class, got the file {folder}.")
    if not (found := _classes(folder)):
        raise ValueError(
            f"path must hold a sub-folder of images for each class, got {folder} without sub-folders, with "
            f"{_listed([entry.name for entry in _entries(folder)])}."
        )
    return found


def _files(folder: epath.Path, found: Sequence[str], classes: Sequence[str] | None) -> Files:
    """The images of the sub-folders ``found``, each with an image, labelled by the order of ``classes``."""
    order = list(found if classes is None else classes)
    if foreign := [name for name in found if name not in order]:
        raise ValueError(
            f"class_names must name every sub-folder, got {folder / foreign[0]}, which is none of the {len(order)} "
            f"classes {', '.join(order[:10])}."
        )
    names, labels = [], []
    for label, name in enumerate(order):
        if name not in found:
            continue
        inside = [entry.name for entry in _entries(folder / name)]
        images = sorted(file for file in inside if file.lower().endswith(_SUFFIXES))
        if not images:
            raise ValueError(
                f"path must hold PNG or JPEG files for each class, got {folder / name} with {_listed(inside)}."
            )
        names += [f"{name}/{file}" for file in images]
        labels += [label] * len(images)
    return Files(folder, names, np.asarray(labels, np.int64))


def _classes(folder: epath.Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


def _entries(folder: epath.Path) -> list[epath.Path]:
    """What lies in a folder, except what is hidden."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except PermissionError as error:
        raise ValueError(f"path must be a folder that can be read, got {folder}: {error.strerror}.") from error


def _listed(names: Sequence[str]) -> str:
    """A few names and their number."""
    some = ", ".join(sorted(names)[:5])
    return (
        "nothing in it" if not names else f"{len(names):,} other files or folders ({some}{', ...' * (len(names) > 5)})"
    )
