"""Images, files and rows that strangers could send, made by code, each with what should become of it."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from distal.pool.decode import MAX_BYTES

READABLE = "ok"
RNG_SEED = 7
SIDE = 24

Expected = dict[str, str]
"""By sample_id: `READABLE`, or a regular expression of the reason why not."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo() -> Image.Image:
    """Colours that change from pixel to pixel and are no noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return Image.fromarray(np.stack([x * 10, y * 10, (x * y) % 251], axis=-1).astype(np.uint8))


@cache
def valid() -> dict[str, bytes]:
    """An image of each kind that is decoded, by a file name."""
    image = photo()
    frames = [image.rotate(90 * i) for i in range(3)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 40}
    clear = image.convert("RGBA")
    clear.putalpha(image.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.asarray(image)[..., 0].astype(np.uint16) << 8) + 3)
    return {
        "rgb.png": encoded(image, "PNG"),
        "grey.png": encoded(image.convert("L"), "PNG"),
        "bits.png": encoded(image.convert("1"), "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "palette.png": encoded(image.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "16-bit.png": encoded(deep, "PNG"),
        "animated.png": encoded(frames[0], "PNG", **animated),
        "rgb.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(image, "JPEG", exif=turned),
        "several.jpg": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "rgb.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(clear, "WEBP", lossless=True),
        "animated.webp": encoded(frames[0], "WEBP", **animated),
        "rgb.bmp": encoded(image, "BMP"),
        "palette.gif": encoded(image.quantize(16), "GIF"),
        "animated.gif": encoded(frames[0].quantize(16), "GIF", **{**animated, "append_images": frames[1:]}),
        "raw.tif": encoded(image, "TIFF"),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encoded(image.convert("L"), "TIFF", compression="tiff_adobe_deflate"),
        "16-bit.tif": encoded(deep, "TIFF"),
        "rgb.ppm": encoded(image, "PPM"),
        "grey.pgm": encoded(image.convert("L"), "PPM"),
    }


@cache
def bad() -> dict[str, tuple[bytes, str]]:
    """Bytes that are no image that can be used, by a file name, with the reason."""
    image, good = photo(), valid()
    large = r"\d[\d,]* pixels"
    lab = Image.frombytes("LAB", image.size, image.tobytes())
    return {
        "empty.png": (b"", "not an image of a known format"),
        "text.jpg": (b"<html>not found</html>", "not an image of a known format"),
        "zip.png": (b"PK\x03\x04" + bytes(100), "not an image of a known format"),
        "postscript.jpg": (postscript(), "not an image of a known format"),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
        "icon.png": (encoded(image, "ICO", sizes=[(16, 16)]), "not an image of a known format"),
        **{f"half-{name}": (data[: len(data) // 2], ".") for name, data in good.items() if name not in HALF_IS_ENOUGH},
        "float.tif": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), r"32-bit pixels \(mode F\)"),
        "int.tif": (encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), r"32-bit pixels \(mode I\)"),
        "lab.tif": (encoded(lab, "TIFF"), "conversion from LAB to "),
        "nothing.png": (png_of_size(0, 0), "."),
        "nothing.ppm": (b"P6 0 7 255\n", "."),
        "large.png": (png_of_size(8000, 8000), f"8000x8000: {large}; at most 50,000,000 are decoded"),
        "huge.png": (png_of_size(2**31 - 1, 2**31 - 1), large),
        "large.jpg": (jpeg_of_size(8000, 8000), f"8000x8000: {large}"),
        "huge.jpg": (jpeg_of_size(65500, 65500), large),
        "scans.jpg": (many_scans(good["progressive.jpg"]), "a JPEG of more than 100 scans"),
        "huge.gif": (good["palette.gif"][:6] + b"\xff\xff\xff\xff" + good["palette.gif"][10:], large),
        "frame.gif": (gif_with_a_large_frame(good["palette.gif"]), large),
        "huge.bmp": (good["rgb.bmp"][:18] + struct.pack("<ii", 40_000, 40_000) + good["rgb.bmp"][26:], large),
        "huge.ppm": (b"P6 100000 100000 255\n", large),
        "canvas.webp": (webp_with_a_large_canvas(), large),
        "tile.tif": (tiff_with_a_large_tile(), r"tiles of 3,600,000,000 pixels; at most 50,000,000"),
        "text.png": (png_with(b"zTXt", b"a\0\0" + deflated_zeros()), "too large"),
        "profile.png": (png_with(b"iCCP", b"a\0\0" + deflated_zeros()), "too large"),
        "tags.tif": (tiff([(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 2**31, 8)]), "."),
    }


HALF_IS_ENOUGH = {"animated.png", "several.jpg", "animated.webp", "animated.gif"}  # the first frame may be complete


def postscript() -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def png_with(kind: bytes, data: bytes) -> bytes:
    """A small PNG with one more chunk after its header."""
    good = encoded(photo(), "PNG")
    return good[:33] + chunk(kind, data) + good[33:]


@cache
def deflated_zeros() -> bytes:
    """100 MB in 100 kB."""
    return zlib.compress(bytes(100_000_000), 1)


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(), "JPEG"))
    where = data.index(b"\xff\xc0") + 5
    data[where : where + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(progressive: bytes) -> bytes:
    """The last scan of a JPEG once more, again and again: each takes the time of a whole image."""
    last = progressive.rindex(b"\xff\xda")
    return progressive[:last] + progressive[last:-2] * 1000 + b"\xff\xd9"


def gif_with_a_large_frame(good: bytes) -> bytes:
    where = re.search(rb",\0\0\0\0" + struct.pack("<HH", SIDE, SIDE), good)
    assert where
    return good[: where.start() + 5] + struct.pack("<HH", 65_000, 65_000) + good[where.end() :]


def webp_with_a_large_canvas() -> bytes:
    """A frame of a few pixels on a canvas as large as the format allows."""
    frame = encoded(photo(), "WEBP", lossless=True)[12:]
    side, small = (16_383 - 1).to_bytes(3, "little"), (SIDE - 1).to_bytes(3, "little")
    body = riff(b"VP8X", b"\x02\0\0\0" + side * 2) + riff(b"ANIM", bytes(6))
    body += riff(b"ANMF", bytes(6) + small * 2 + b"\x28\0\0" + b"\0" + frame)
    return riff(b"RIFF", b"WEBP" + body)


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def tiff(tags: list[tuple[int, int, int, int]]) -> bytes:
    """A TIFF of (tag, type, count, value)."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + body + bytes(200)


def tiff_with_a_large_tile() -> bytes:
    """8 x 8 pixels in one tile of 60,000 x 60,000, compressed."""
    tags = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff([*tags, (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 150), (325, 4, 1, 50)])


def largest() -> bytes:
    """An image just within the limit that takes much memory: 49 million pixels with a palette and alpha."""
    row = np.arange(7000, dtype=np.uint8)
    return encoded(Image.fromarray(np.tile(row, (7000, 1))).convert("P"), "PNG", transparency=bytes(256))


def write_folder(root: Path) -> Expected:
    """A folder of all of them, of a link that leads out of it, and of what is no file."""
    root.mkdir(parents=True)
    expected: Expected = {}
    for name, data in valid().items():
        (root / name).write_bytes(data)
        expected[name] = READABLE
    for name, (data, reason) in bad().items():
        (root / f"bad-{name}").write_bytes(data)
        expected[f"bad-{name}"] = reason
    (root / "largest.png").write_bytes(largest())
    with (root / "sparse.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.mkfifo(root / "fifo.jpg")
    (root / "loop.png").symlink_to("loop.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / os.fsdecode(b"name-\xff.png")).write_bytes(valid()["rgb.png"])
    (root.parent / "away.png").write_bytes(valid()["rgb.png"])
    (root / "link.png").symlink_to("../away.png")
    (root / "folder.png").mkdir()
    (root / "notes.txt").write_text("not looked at")
    return expected | {
        "largest.png": READABLE,
        "link.png": READABLE,
        "sparse.png": r"the file cannot be read \(more than 400,000,000 bytes\)",
        "fifo.jpg": r"the file cannot be read \(not a regular file\)",
        "loop.png": r"the file cannot be read \(Too many levels of symbolic links\)",
        "broken.png": r"the file cannot be read \(No such file or directory\)",
        "name-\\xff.png": "its name is not UTF-8",
    }


def write_parquet(path: Path) -> Expected:
    """A table in the style of Hugging Face, with files beside it."""
    path.parent.mkdir(parents=True)
    os.mkfifo(path.parent / "fifo.jpg")
    (path.parent / "loop.png").symlink_to("loop.png")
    (path.parent / "beside.png").write_bytes(valid()["rgb.png"])
    rows: dict[str, tuple[dict[str, object] | None, str]] = {
        **{name: ({"bytes": data, "path": None}, READABLE) for name, data in valid().items()},
        **{f"bad-{name}": ({"bytes": data, "path": name}, reason) for name, (data, reason) in bad().items()},
        "null": (None, "no bytes"),
        "nothing": ({"bytes": None, "path": None}, "no bytes"),
        "beside": ({"bytes": None, "path": "beside.png"}, READABLE),
        "NUL": ({"bytes": None, "path": "a\0b"}, "embedded null byte"),
        "loop": ({"bytes": None, "path": "loop.png"}, "Too many levels of symbolic links"),
        "fifo": ({"bytes": None, "path": "fifo.jpg"}, "not a regular file"),
        "away": ({"bytes": None, "path": "/etc/hostname"}, "leads out of the folder|No such file"),
        "long": ({"bytes": None, "path": "a" * 5000}, "File name too long"),
    }
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([image for image, _ in rows.values()], kind)
    pq.write_table(pa.table({"sample_id": list(rows), "image": images}), path, row_group_size=40)
    return {name: reason for name, (_, reason) in rows.items()}
