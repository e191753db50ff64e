from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distal.pool.decode import Unreadable, decode, is_grey, pixels


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
COLOUR = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))


def test_png_pixels_are_exact() -> None:
    assert np.array_equal(pixels(decode(encoded(GREY)), "grey", (4, 6))[..., 0], np.asarray(GREY))
    assert np.array_equal(pixels(decode(encoded(COLOUR)), "rgb", (4, 6)), np.asarray(COLOUR))


def test_grey_in_a_colour_pool_is_repeated() -> None:
    image = pixels(decode(encoded(GREY)), "rgb", (4, 6))
    assert image.shape == (4, 6, 3)
    assert np.array_equal(image[..., 0], image[..., 2])


def test_colour_in_a_grey_pool_becomes_its_luma() -> None:
    image = pixels(decode(encoded(COLOUR)), "grey", (4, 6))[..., 0]
    red, green, blue = np.moveaxis(np.asarray(COLOUR, dtype=float), -1, 0)
    assert np.abs(image - (0.299 * red + 0.587 * green + 0.114 * blue)).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_unreadable(dtype: type) -> None:
    deep = Image.fromarray(np.array([[0, 70_000]], dtype=dtype))
    with pytest.raises(Unreadable, match=r"32-bit pixels \(mode [IF]\) have no known range; convert to 8 or 16 bits"):
        pixels(decode(encoded(deep, "TIFF")), "grey", (1, 2))


def test_other_sizes_are_resized() -> None:
    assert pixels(decode(encoded(COLOUR)), "rgb", (8, 5)).shape == (8, 5, 3)


def test_sixteen_bits_are_scaled_to_eight() -> None:
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    image = decode(encoded(deep))
    assert is_grey(image)
    assert pixels(image, "grey", (1, 3)).ravel().tolist() == [0, 1, 255]


def test_transparency_is_laid_on_black() -> None:
    clear = Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 255]]], dtype=np.uint8), "RGBA")
    assert pixels(decode(encoded(clear)), "rgb", (1, 2)).tolist() == [[[0, 0, 0], [200, 100, 50]]]


def test_a_palette_becomes_colours() -> None:
    palette = COLOUR.convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixels(decode(encoded(palette)), "rgb", (4, 6)).shape == (4, 6, 3)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter to be upright
    assert decode(encoded(COLOUR, "JPEG", exif=exif)).size == (4, 6)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(COLOUR)[:50], encoded(COLOUR, "JPEG")[:-30]])
def test_damage_has_a_reason_that_does_not_vary(data: bytes) -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(Unreadable) as caught:
            decode(data)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]
    assert "\n" not in reasons[0]


def test_an_image_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Unreadable, match="exceeds limit"):
        decode(encoded(COLOUR))
