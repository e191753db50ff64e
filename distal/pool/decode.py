"""Encoded image bytes to pixels. The one place that decodes."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distal.errors import one_line

Channels = Literal["grey", "rgb"]

_MODE: dict[Channels, str] = {"grey": "L", "rgb": "RGB"}
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason kept in the quarantine."""


def decode(data: bytes) -> Image.Image:
    """Decode an image and turn it upright as its EXIF orientation says.

    Raises:
        Unreadable: truncated, not an image, of an unknown format, or larger than Pillow's pixel limit.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise  # says nothing about the image
    except Exception as error:  # decoders raise anything on damaged input, and each reason is kept
        raise Unreadable(_reason(error)) from error


def is_grey(image: Image.Image) -> bool:
    """Whether the image has one channel of brightness and no colour."""
    return image.mode in _GREY_MODES


def pixels(image: Image.Image, channels: Channels, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image as (H, W, C) uint8, resized to `size` = (H, W) when it has another.

    Transparent pixels are laid on black, 16-bit brightness is scaled to 8 bits, colour in a grey pool becomes its luma.

    Raises:
        Unreadable: 32-bit pixels, whose range is not known.
    """
    if image.mode in ("I", "F") and image.format != "PNG":  # a PNG has at most 16 bits
        raise Unreadable(f"32-bit pixels (mode {image.mode}) have no known range; convert to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert(_MODE[channels])
    height, width = size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8).reshape(height, width, -1)


def _reason(error: Exception) -> str:
    text = one_line(error)
    # Pillow prints the address of the buffer, which would differ from run to run.
    return "not an image of a known format" if text.startswith("cannot identify image file") else text
