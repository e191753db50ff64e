from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from distal.pool.decode import Channels, Unreadable, decode, is_grey, pixels, quiet


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


@pytest.mark.parametrize(("limit", "readable"), [(24, True), (23, False)])
def test_images_have_a_limit(monkeypatch: pytest.MonkeyPatch, limit: int, readable: bool) -> None:
    """Checked before anything is decoded: what follows the header is cut off here."""
    monkeypatch.setattr("distal.pool.decode.MAX_PIXELS", limit)
    if readable:
        assert decode(encoded(COLOUR)).size == (6, 4)
    else:
        with pytest.raises(Unreadable, match=f"6x4: 24 pixels; at most {limit} are decoded"):
            decode(encoded(COLOUR)[:45])


def test_encoded_images_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(COLOUR)
    monkeypatch.setattr("distal.pool.decode.MAX_BYTES", len(data))
    assert decode(data).size == (6, 4)
    with pytest.raises(Unreadable, match=f"{len(data) + 1} bytes; at most {len(data)} are decoded"):
        decode(data + b"\0")


def test_pillows_own_limit_is_no_warning(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 13)  # 24 pixels are a warning, 27 an error
    with quiet():
        assert decode(encoded(COLOUR)).size == (6, 4)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Unreadable, match="exceeds limit"):
        decode(encoded(COLOUR))


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), SyntaxError("not a TIFF"), struct.error("x")]
)
def test_whatever_a_decoder_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(Unreadable, match=str(error) or "MemoryError"):
        decode(encoded(COLOUR))


def test_a_reason_is_short_and_can_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise ValueError(f"in <a decoder at 0x7f00aa>: \udcff\n{'long ' * 200}")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(Unreadable) as caught:
        decode(encoded(COLOUR))
    assert str(caught.value).encode().startswith(b"in <a decoder>: \\udcff long long")
    assert len(str(caught.value)) == 200


def test_colours_that_cannot_be_turned_into_grey() -> None:
    lab = Image.frombytes("LAB", (2, 2), bytes(range(12)))
    with pytest.raises(Unreadable, match="conversion from LAB to"):
        pixels(decode(encoded(lab, "TIFF")), "grey", (2, 2))


@pytest.mark.parametrize("channels", ["grey", "rgb"])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key"])
def test_transparency_in_bands_is_that_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, channels: Channels, kind: str
) -> None:
    """Against Pillow's own composition, some rows at a time; the last band is a smaller one."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (37, 11, 3), dtype=np.uint8))
    if kind == "palette":
        data = encoded(colour.quantize(200), transparency=rng.bytes(200))
    elif kind == "key":
        data = encoded(colour, transparency=colour.getpixel((3, 5)))
    else:
        clear = colour.convert(kind)
        clear.putalpha(Image.fromarray(rng.integers(0, 256, (37, 11), dtype=np.uint8)))
        data = encoded(clear)
    whole = decode(data).convert("RGBA")
    black = Image.new("RGBA", whole.size, (0, 0, 0, 255))
    expected = np.asarray(Image.alpha_composite(black, whole).convert("L" if channels == "grey" else "RGB"))
    monkeypatch.setattr("distal.pool.decode._BAND_PIXELS", 50)
    assert np.array_equal(pixels(decode(data), channels, (37, 11)), expected.reshape(37, 11, -1))
