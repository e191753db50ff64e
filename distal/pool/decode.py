"""Encoded image bytes to pixels. The one place that decodes.

The bytes are those of strangers. So only the formats of one list reach a decoder, what a header announces is checked
before any of it is decoded, and whatever a decoder raises is the reason why one image is unreadable.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distal.errors import one_line

Channels = Literal["grey", "rgb"]

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
"""The suffixes of image files, and the formats that are decoded, whatever a file is called.

None of their decoders starts another program, as that of EPS does. MPO, which cameras write, is a kind of JPEG.
"""

MAX_PIXELS = 50_000_000
"""Pixels of an image that is decoded: what cameras have, and 0.2 to 0.85 GB while it is decoded (4 bytes a pixel for
a JPEG, 17 for a WEBP), which there is for each CPU."""

MAX_BYTES = 8 * MAX_PIXELS
"""Bytes of an encoded image: those of `MAX_PIXELS` of four channels and 16 bits without any compression."""

_MAX_SCANS = 100
"""Passes over a JPEG: a progressive one has about ten, and each takes as long as an image, however few its bytes."""

_MAX_REASON = 200  # characters

_MODE: dict[Channels, str] = {"grey": "L", "rgb": "RGB"}
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}
_START_OF_SCAN = b"\xff\xda"
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_BAND_PIXELS = 2**20


class Unreadable(Exception):
    """An image that cannot be decoded; the message is the reason kept in the quarantine."""


def decode(data: bytes) -> Image.Image:
    """Decode an image and turn it upright as its EXIF orientation says.

    Raises:
        Unreadable: truncated, not an image, of a format that is not in `FORMATS`, or larger than the limits above.
    """
    with _unreadable():
        _check_bytes(data)
        image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
        _check_header(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what Pillow warns of (odd metadata, many pixels) from the terminal: every image is used or has a reason.

    Filters are the process's own, so this stands around threads and not inside them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _unreadable() -> Iterator[None]:
    """Turn whatever a decoder raises into Unreadable: on damaged input that is anything, MemoryError included."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _check_bytes(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise Unreadable(f"{len(data):,} bytes; at most {MAX_BYTES:,} are decoded")
    if data.startswith(b"\xff\xd8") and data.count(_START_OF_SCAN) > _MAX_SCANS:
        raise Unreadable(f"a JPEG of more than {_MAX_SCANS} scans")


def _check_header(image: Image.Image) -> None:
    """Refuse what would take much memory to decode; so far only the header has been read."""
    if 0 in image.size:
        raise Unreadable(f"{image.width}x{image.height} pixels: there are none")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))  # decoded whole, however small the image is
    if max(image.width * image.height, tile) > MAX_PIXELS:
        what = "tiles of" if tile > MAX_PIXELS else f"{image.width}x{image.height}:"
        n_pixels = max(image.width * image.height, tile)
        raise Unreadable(f"{what} {n_pixels:,} pixels; at most {MAX_PIXELS:,} are decoded")


def is_grey(image: Image.Image) -> bool:
    """Whether the image has one channel of brightness and no colour."""
    return image.mode in _GREY_MODES


def pixels(image: Image.Image, channels: Channels, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image as (H, W, C) uint8, resized to `size` = (H, W) when it has another.

    Transparent pixels are laid on black, 16-bit brightness is scaled to 8 bits, colour in a grey pool becomes its luma.

    Raises:
        Unreadable: 32-bit pixels, whose range is not known, or colours that cannot be turned into those asked for.
    """
    if image.mode in ("I", "F") and image.format != "PNG":  # a PNG has at most 16 bits
        raise Unreadable(f"32-bit pixels (mode {image.mode}) have no known range; convert to 8 or 16 bits")
    height, width = size
    with _unreadable():
        image = _recoloured(image, _MODE[channels])
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image, dtype=np.uint8).reshape(height, width, -1)


def _recoloured(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode L or RGB. No copy is made of one that is."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.endswith("A") or "transparency" in image.info:
        return _on_black(image, mode)
    return image if image.mode == mode else image.convert(mode)


def _on_black(image: Image.Image, mode: str) -> Image.Image:
    """A transparent image on black, some rows at a time: whole, it would be in memory four times."""
    result = Image.new(mode, image.size)
    n_rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, n_rows):
        band = image.crop((0, top, image.width, min(top + n_rows, image.height))).convert("RGBA")
        black = Image.new("RGBA", band.size, (0, 0, 0, 255))
        result.paste(Image.alpha_composite(black, band).convert(mode), (0, top))
    return result


def _reason(error: Exception) -> str:
    """Short, and the same whenever the image is decoded: it is a part of the pool's content hash."""
    text = one_line(error)
    if text.startswith("cannot identify image file"):  # Pillow goes on with the address of the buffer
        return "not an image of a known format"
    text = re.sub(r" at 0x[0-9a-f]+", "", text).encode(errors="backslashreplace").decode()
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON - 3]}..."
