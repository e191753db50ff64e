"""Parquet tables with a format version and the hash of the file in their footer."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from distal.errors import Damage, one_line
from distal.storage.files import open_file, replace, temporary_file, write_bytes
from distal.storage.sealed import FORMAT, unknown_format

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_FORMAT, _SEAL = b"distal.format", b"distal.sha256"  # keys of the metadata of a file
_NO_SEAL = b"0" * 64


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    write_bytes(path, table_bytes(table))


def table_bytes(table: pa.Table) -> memoryview:
    """A Parquet file, with format version and hash."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table.cast(_with_format(table.schema)), buffer, write_page_checksum=True)
    _seal_parquet(buffer)
    return buffer.getbuffer()


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetWriter`; the file appears when the block ends without an error."""
    import pyarrow.parquet as pq

    with temporary_file(path) as temporary:
        with pq.ParquetWriter(temporary, _with_format(schema), write_page_checksum=True) as writer:
            yield writer
        with temporary.open("r+b") as file:
            _seal_parquet(file)
        replace(temporary, path)


def _with_format(schema: pa.Schema) -> pa.Schema:
    ours = {_FORMAT: str(FORMAT).encode(), _SEAL: _NO_SEAL}
    return schema.with_metadata({**(schema.metadata or {}), **ours})


def _seal_parquet(file: BinaryIO) -> None:
    """Put the hash of all other bytes into the footer: pages have checksums of their own, the footer has none."""
    place = _seal_place(file, _NO_SEAL)
    checksum = _sha256_without(file, place)
    file.seek(place)
    file.write(checksum)


def _seal_place(file: BinaryIO, seal: bytes) -> int:
    """The offset in the file at which the metadata of the footer holds the seal."""
    size = file.seek(-8, os.SEEK_END) + 8  # the end of a Parquet file: footer, its length, "PAR1"
    length = int.from_bytes(file.read(4), "little")
    start = file.seek(size - 8 - length)
    footer = file.read(length)
    return start + footer.index(seal, footer.rindex(_SEAL))


def _sha256_without(file: BinaryIO, place: int) -> bytes:
    """The hash, in hex, of all bytes but the seal at `place`."""
    size = file.seek(0, os.SEEK_END)
    checksum = hashlib.sha256()
    for begin, end in ((0, place), (place + len(_NO_SEAL), size)):
        file.seek(begin)
        while begin < end and (data := file.read(min(2**20, end - begin))):
            checksum.update(data)
            begin += len(data)
    return checksum.hexdigest().encode()


def check_parquet(path: Path) -> None:
    """Raise Damage when the bytes of a Parquet file have changed; raises like `read_table`."""
    import pyarrow.parquet as pq

    open_parquet(path).close()
    with open_file(path) as file:  # one handle: the name may lead to another file at any moment
        with parquet_errors(path):
            seal = (pq.read_metadata(file).metadata or {}).get(_SEAL, b"")
        try:
            place = _seal_place(file, seal)
        except ValueError:
            raise Damage(f"{path}: damaged (its footer has no checksum)") from None
        if seal != _sha256_without(file, place):
            raise Damage(f"{path}: damaged (its bytes have changed)")


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file whole.

    Raises:
        Damage: the file is missing, or is not valid Parquet.
        UnknownFormat: another version of distal wrote it.
    """
    check_parquet(path)
    with open_parquet(path) as file, parquet_errors(path):
        return file.read(columns=columns)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; raises like `read_table`.

    The file is not memory-mapped: mapped pages would stay in memory, some bytes for every row.
    """
    import pyarrow.parquet as pq

    try:
        open_file(path).close()
        with parquet_errors(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise Damage(f"{path}: missing") from None
    found = (file.schema_arrow.metadata or {}).get(_FORMAT, b"none").decode()
    if found != str(FORMAT):
        file.close()
        raise unknown_format(path, found)
    return file


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn the errors of pyarrow for invalid or changed bytes into Damage."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowInvalid as error:
        raise Damage(f"{path}: not a valid Parquet file ({one_line(error)})") from error
    except OSError as error:
        if error.errno is not None or isinstance(error, FileNotFoundError):
            raise
        raise Damage(f"{path}: damaged ({one_line(error)})") from error  # such as a page that fails its checksum
