"""The conventions of the literature for each data set: splits for selection, normalisation, image size."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from robustjax import _arguments
from robustjax.data import _own
from robustjax.data._dataset import Dataset, is_floating


class Splits(NamedTuple):
    """The parts of a data set; each is a split for :func:`robustjax.data.load`.

    Attributes:
      train: fits the parameters.
      validation: the end of the training split; every choice is made on it.
      test: gives the reported numbers; nothing is selected on it.
    """

    train: str
    validation: str
    test: str


class ChannelStatistics(NamedTuple):
    """Normalisation constants, one number per channel, in the units of images in [0, 1].

    Attributes:
      mean: ``(channels,)``, subtracted from images.
      std: ``(channels,)``, divides images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


# The smoothing literature does not normalise MNIST. CIFAR-10 and ImageNet: Cohen et al. (2019).
_PUBLISHED = {
    "digits": ChannelStatistics((0.0,), (1.0,)),
    "mnist": ChannelStatistics((0.0,), (1.0,)),
    "cifar10": ChannelStatistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet2012": ChannelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# Data sets whose images differ in size: ImageNet, at the size of its models, and sets that these are tested on.
_IMAGE_SIZES = dict.fromkeys(
    (
        "imagenet2012", "imagenet2012_fewshot", "imagenet2012_subset", "imagenet_a", "imagenet_r", "imagenet_sketch",
        "imagenet_v2", "dtd",
    ),
    224,
)  # fmt: skip


def image_size(name: str) -> int | None:
    """Default height and width for data sets whose images differ in size; None where there is no convention."""
    return _IMAGE_SIZES.get(_base(name))


@_arguments.checked
def splits(name: str, *, validation: float = 0.1) -> Splits:
    """Names the parts of a data set to train on, to select on and to report.

    Args:
      name: as for :func:`robustjax.data.load`.
      validation: fraction of the training split that is held out, in (0, 1).

    Returns:
      The three splits. The labels of ImageNet's test split are not public; as usual, its validation split serves as
      the test split. So does that of ``"arrays:FILE.npz"`` and ``"folder:PATH"`` where they have no test split.

    Raises:
      ValueError: if ``validation`` is outside (0, 1), or a file or folder is no data set.

    Example:
      >>> data.splits("mnist")
      Splits(train='train[:90%]', validation='train[90%:]', test='test')
    """
    percent = round(100 * (1 - validation), 4)
    if not 0 < percent < 100:
        raise ValueError(f"validation must lie strictly between 0 and 1, got {validation}.")
    test = "validation" if _base(name) == "imagenet2012" else "test"
    if (own := _own.parsed(name)) is not None:
        stored = _own.splits(own)
        test = next((split for split in ("test", "val", "validation") if split in stored), "test")
    return Splits(f"train[:{percent:g}%]", f"train[{percent:g}%:]", test)


@_arguments.checked
def channel_statistics(dataset: Dataset) -> ChannelStatistics:
    """Returns the published mean and standard deviation of each channel or, for other data sets, measures them.

    Constants are published for digits and mnist (0 and 1), cifar10 and imagenet2012. Other data sets are measured on up
    to 10,000 images, evenly spaced over the split, with the pixels of all images pooled.

    Args:
      dataset: the training split.

    Returns:
      The mean that a model subtracts and the standard deviation that it divides by.

    Raises:
      ValueError: if a channel is constant, so that it cannot be divided by its standard deviation.

    Example:
      >>> data.channel_statistics(data.load("digits", "train"))
      ChannelStatistics(mean=(0.0,), std=(1.0,))

    Reference:
      Cohen, Rosenfeld and Kolter (2019), Certified Adversarial Robustness via Randomized Smoothing, arXiv:1902.02918.
    """
    if (published := _PUBLISHED.get(_base(dataset.name))) is not None:
        return published
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), 10_000)).astype(int)
    total, squares, white = np.zeros(dataset.image_shape[-1]), np.zeros(dataset.image_shape[-1]), 1
    for ids in np.array_split(chosen, -(-len(chosen) // 256)):
        images, _ = dataset.read(ids)
        if is_floating(images):
            total += images.sum((0, 1, 2), dtype=np.float64)
            squares += np.square(images, dtype=np.float64).sum((0, 1, 2))
        else:  # sums of the stored integers are exact, also in float64: they lie below 2**53
            white = dataset.white
            total += images.sum((0, 1, 2), dtype=np.int64)
            squares += np.square(images, dtype=np.uint16).sum((0, 1, 2), dtype=np.int64)
    pixels = len(chosen) * dataset.image_shape[0] * dataset.image_shape[1]
    mean = total / pixels / white
    std = np.sqrt(np.maximum(squares / pixels / white**2 - mean**2, 0.0))
    if not (std > 1e-6).all():
        raise ValueError(f"Every channel of {dataset.name} must vary, got standard deviations {std.tolist()}.")
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()))


def _base(name: str) -> str:
    return re.split("[:/]", name)[0]
