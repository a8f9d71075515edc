"""Image files as pixels, by Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from etils import epath

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def pixels(picture: Any, channels: int, image_size: int | None) -> np.ndarray:
    """A picture as ``(height, width, channels)`` uint8.

    With ``image_size`` the shorter side is resized to 256/224 of it (bilinear), and the centre is cropped.
    """
    picture = picture.convert(MODES[channels])
    if image_size is not None:
        from PIL import Image

        shorter = round(image_size * 256 / 224)
        width, height = (shorter * edge // min(picture.size) for edge in picture.size)
        left, top = round((width - image_size) / 2), round((height - image_size) / 2)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        picture = picture.crop((left, top, left + image_size, top + image_size))
    return np.atleast_3d(np.asarray(picture))


def opened(path: epath.Path) -> Any:
    """The picture of a file, decoded, upright as its EXIF data say, and opaque.

    Raises:
      ValueError: the file is damaged, is transparent somewhere, or has more than 8 bits per channel.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    data = path.read_bytes()
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} must be an image, but Pillow knows none that begins as it does.") from error
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} must be an image, but it is damaged: {said}.") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(
            f"{path} must have 8 bits per channel, got the mode {picture.mode} of Pillow: convert it first, as only "
            "you know which of its values is white."
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA" if is_colour(picture) else "LA")
        if (least := np.asarray(picture)[..., -1].min()) < 255:
            raise ValueError(
                f"{path} must be opaque, got pixels of alpha {least} of 255: put it on a background first, or save it "
                "without its alpha channel."
            )
    return picture


def is_colour(picture: Any) -> bool:
    """Whether a picture is stored in colour; a palette counts as colours."""
    return picture.mode not in ("1", "L", "LA")
