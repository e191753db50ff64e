"""Chunks as they lie on the disk, some of them made to do harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import zstd

from distal.artifacts import arrays
from distal.artifacts.arrays import Array, content_size, create_array
from distal.errors import Damage

N = 2**16


@pytest.fixture
def array(tmp_path: Path) -> Array:
    return create_array(tmp_path / "a", (2, N), (1, N), "uint8", 255, ("checkpoint", "sample"))


def put(array: Array, frame: bytes) -> None:
    path = array.chunk_path(0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))


READ = """
import resource, sys
from pathlib import Path
from distal.artifacts.arrays import Array
from distal.errors import Damage
array = Array(Path(sys.argv[1]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)
try:
    array.read((slice(0, 1),))
except Damage as damage:
    print(damage)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory it has from /proc")
def test_a_small_chunk_of_a_gigabyte_is_refused_before_it_is_decoded(array: Array) -> None:
    frame = zstd.compress(bytes(10**9))
    assert len(frame) < 2**16
    put(array, frame)
    done = subprocess.run([sys.executable, "-c", READ, str(array.path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{array.path}: row 0, block 0 does not decode"), done.stderr


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstd.compress(bytes(N - 1)), id="too short"),
        pytest.param(zstd.compress(bytes(N + 1)), id="too long"),
        pytest.param(zstd.compress(bytes(N)) + zstd.compress(bytes(N)), id="two frames"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\x28\xb5\x2f\xfd", id="cut off"),
        # Single segment, content size of one byte plus 256, and the block of a frame that holds 10^6 bytes.
        pytest.param(
            b"\x28\xb5\x2f\xfd\x60" + (N - 256).to_bytes(2, "little") + zstd.compress(bytes(10**6))[9:], id="lies"
        ),
    ],
)
def test_what_a_chunk_holds_must_fit(array: Array, frame: bytes) -> None:
    put(array, frame)
    with pytest.raises(Damage, match="row 0, block 0 does not decode"):
        array.read((slice(0, 1),))


def test_too_little_memory_is_no_damage(array: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    put(array, zstd.compress(bytes(N)))
    monkeypatch.setattr(arrays.zstd, "decompress", exhausted)
    with pytest.raises(MemoryError):
        array.read((slice(0, 1),))


def test_a_chunk_that_does_not_compress_is_read(array: Array) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1, N), np.uint8)
    array.write((0, slice(0, N)), noise[0])
    assert np.array_equal(array.read((slice(0, 1),)), noise)


def test_a_file_larger_than_any_chunk_is_not_read(array: Array) -> None:
    array.write((0, slice(0, N)), np.zeros(N, np.uint8))
    with array.chunk_path(0, 0).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no space
    with pytest.raises(Damage, match=r"more than [\d,]+ bytes"):
        array.read((slice(0, 1),))


@given(st.integers(0, 2**18))
def test_the_size_that_a_frame_says(n: int) -> None:
    assert content_size(zstd.compress(bytes(n))) == n


@given(st.binary(max_size=32))
def test_any_bytes_have_a_size_or_none(data: bytes) -> None:
    size = content_size(b"\x28\xb5\x2f\xfd" + data)
    assert size is None or 0 <= size < 2**64
    assert content_size(b"PK\x03\x04" + data) is None
