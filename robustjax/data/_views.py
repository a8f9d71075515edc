"""Data sets made from others: a choice of classes, another image shape, permuted pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from robustjax import _arguments, _validate
from robustjax.data._dataset import Dataset, is_floating

_READ = 4096  # images decoded at once to learn their labels
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, by ITU-R 601


@_arguments.checked
def select_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """Keeps the images of some classes and renumbers these classes: the known classes of open-set protocols.

    Reads all labels once.

    Args:
      dataset: labelled images.
      classes: distinct labels to keep; ``classes[j]`` becomes label j.

    Returns:
      The images with these labels, in their order, with ``len(classes)`` classes.

    Raises:
      ValueError: if ``classes`` is empty, holds other values than integers, names a class twice, or names one that the
        data set lacks or has no image of.

    Example:
      >>> even = data.select_classes(data.load("digits", "test"), [0, 2, 4, 6, 8])
      >>> even.num_classes, np.unique(even[:].label).tolist()
      (5, [0, 1, 2, 3, 4])
    """
    if not all(isinstance(c, (int, np.integer)) and not isinstance(c, bool) for c in classes):
        raise ValueError(f"classes must be integers, got {list(classes)}.")
    classes = [int(c) for c in classes]
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be one or more distinct labels, got {classes}.")
    if dataset.num_classes and not all(0 <= c < dataset.num_classes for c in classes):
        raise ValueError(f"classes must lie in 0, ..., {dataset.num_classes - 1} of {dataset.name}, got {classes}.")
    blocks = np.array_split(np.arange(len(dataset)), max(1, -(-len(dataset) // _READ)))
    labels = np.concatenate([dataset.read(block)[1] for block in blocks])
    missing = [c for c in classes if not (labels == c).any()]
    if missing:
        raise ValueError(f"classes must each have an image in {dataset.name} {dataset.split}, but {missing} have none.")
    kept = np.flatnonzero(np.isin(labels, classes))
    renumbered = np.zeros(max(classes) + 1, np.int64)
    renumbered[classes] = np.arange(len(classes))

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = dataset.read(kept[ids])
        return images, renumbered[labels]

    names = tuple(dataset.class_names[c] for c in classes) if dataset.class_names else ()
    return dataclasses.replace(dataset, num_classes=len(classes), size=len(kept), read=read, class_names=names)


@_arguments.checked
def match_images(dataset: Dataset, image_shape: Sequence[int], *, invert: bool = False) -> Dataset:
    """Converts images to the shape that a model takes: first grey or colour, then resized as a whole.

    Colour becomes grey by ITU-R 601 luma, grey becomes colour by repetition; pixels are averaged where the image
    shrinks and interpolated linearly where it grows. Images that are stored as integers become 256 levels.

    Args:
      dataset: images with 1 or 3 channels.
      image_shape: the wanted height, width and channels (1 or 3).
      invert: whether to swap black and white, as for Omniglot, whose strokes are black, beside MNIST.

    Returns:
      The same images and labels; the data set itself if nothing has to change.

    Raises:
      ValueError: if a shape is not as above.

    Example:
      >>> digits = data.match_images(data.load("digits", "test"), (28, 28, 3))
      >>> digits[:4].image.shape
      (4, 28, 28, 3)
    """
    from PIL import Image

    height, width, channels = _validate.image_shape(image_shape)
    shape = (height, width, channels)
    _validate.at_least(1, height=height, width=width)
    if channels not in (1, 3) or dataset.image_shape[-1] not in (1, 3):
        raise ValueError(f"image_shape must have 1 or 3 channels on both sides, got {dataset.image_shape} and {shape}.")
    if shape == dataset.image_shape and not invert:
        return dataset
    grows = height > dataset.image_shape[0] or width > dataset.image_shape[1]
    filter_ = Image.Resampling.BILINEAR if grows else Image.Resampling.BOX

    def convert(image: np.ndarray) -> np.ndarray:
        if is_floating(image):
            planes = image.astype(np.float32)
            if planes.shape[-1] > channels:
                planes = planes @ _LUMA[:, None]
            pictures = (Image.fromarray(plane) for plane in np.moveaxis(planes, -1, 0))
            resized = [np.asarray(picture.resize((width, height), filter_)) for picture in pictures]
            planes = np.clip(np.broadcast_to(np.stack(resized, axis=-1), shape), 0, 1)  # sums may round past 1
            return 1 - planes if invert else planes
        levels = np.rint(image * (255 / dataset.white)).astype(np.uint8)
        picture = Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).convert(
            "L" if channels == 1 else "RGB"
        )
        levels = np.asarray(picture.resize((width, height), filter_)).reshape(shape)
        return 255 - levels if invert else levels

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = dataset.read(ids)
        return np.stack([convert(image) for image in images]) if len(ids) else np.zeros((0, *shape), np.uint8), labels

    return dataclasses.replace(dataset, image_shape=shape, white=255, read=read)


@_arguments.checked
def permute_pixels(dataset: Dataset, *, seed: int) -> Dataset:
    """Permutes the pixels of every image at random: the same grey levels and colours, but no shapes.

    Args:
      dataset: any images.
      seed: of the permutations, in ``[0, 2**32)``; the permutation of an image also depends on its position.

    Returns:
      The data set with its pixels permuted and its labels kept.

    Example:
      >>> digits = data.load("digits", "test")
      >>> shuffled = data.permute_pixels(digits, seed=0)
      >>> np.sort(shuffled[7].image.ravel()).tolist() == np.sort(digits[7].image.ravel()).tolist()
      True
    """
    _validate.at_least(0, seed=seed, below=2**32)
    height, width, channels = dataset.image_shape

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = dataset.read(ids)
        orders = [np.random.default_rng([seed, int(i)]).permutation(height * width) for i in ids]
        pixels = [image.reshape(-1, channels)[order] for image, order in zip(images, orders, strict=True)]
        return np.stack(pixels).reshape(images.shape) if len(ids) else images, labels

    return dataclasses.replace(dataset, name=f"{dataset.name} permuted", read=read)


@_arguments.checked
def synthetic(name: str, image_shape: Sequence[int], size: int, *, seed: int = 0) -> Dataset:
    r"""Makes images of no class, for use as far out-of-distribution inputs.

    Args:
      name: ``"uniform_noise"``, each value uniform; ``"gaussian_noise"``, each value normal around 1/2 with standard
        deviation 1/4, clipped; or ``"textures"``, for each channel the mean of three plane waves
        :math:`(1 + \cos(2 \pi k \cdot p + \phi)) / 2` of random direction and phase, with 1 to 8 periods in the image.
      image_shape: height, width and channels.
      size: number of images.
      seed: in ``[0, 2**32)``; an image depends only on the seed and its position.

    Returns:
      Images in 256 levels, all with label 0 and without classes.

    Raises:
      ValueError: if the name is unknown or a number is out of range.

    Example:
      >>> noise = data.synthetic("uniform_noise", (8, 8, 1), 100)
      >>> noise[:2].image.shape
      (2, 8, 8, 1)
    """
    height, width, channels = _validate.image_shape(image_shape)
    shape = (height, width, channels)
    _validate.at_least(1, height=height, width=width, channels=channels, size=size)
    _validate.at_least(0, seed=seed, below=2**32)
    rows, columns = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")

    def waves(random: np.random.Generator) -> np.ndarray:
        periods, angle, phase = random.uniform((1, 0, 0), (8, np.pi, 2 * np.pi), (channels, 3, 3)).transpose(2, 0, 1)
        along = np.cos(angle)[..., None, None] * rows + np.sin(angle)[..., None, None] * columns
        image = np.cos(2 * np.pi * periods[..., None, None] * along + phase[..., None, None])
        return np.moveaxis((1 + image) / 2, 1, 0).mean(0).transpose(1, 2, 0)

    draw = {
        "uniform_noise": lambda random: random.uniform(size=shape),
        "gaussian_noise": lambda random: np.clip(0.5 + 0.25 * random.standard_normal(shape), 0, 1),
        "textures": waves,
    }
    if name not in draw:
        raise ValueError(f"name must be one of {', '.join(draw)}, got {name!r}.")

    def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [np.rint(255 * draw[name](np.random.default_rng([seed, int(i)]))) for i in ids]
        return np.asarray(images).reshape(len(ids), *shape).astype(np.uint8), np.zeros(len(ids), np.int64)

    return Dataset(name, "all", 0, shape, size, read)
