"""The one seam to the disk: a file is complete or absent.

Local and shared file systems are supported: a write goes to a temporary file beside its target and is moved
there with `os.replace`. Nothing is appended to or changed in place. Nothing here calls fsync: the promise
covers killed processes, not a power loss.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import split_protocol

from distal.errors import ConfigError, Damage, DiskFull, UnknownFormat, one_line
from distal.records import JsonObject

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
"""Format version that every JSON and YAML record carries; an unknown one is refused."""

_FULL = {errno.ENOSPC, errno.EDQUOT}


def local_path(location: str | os.PathLike[str], key: str = "path") -> Path:
    """An absolute local path for a path or a `file://` URL.

    `file://` is turned into a path here because fsspec's own local backend writes in place.

    Raises:
        ConfigError: for any other URL scheme.
    """
    protocol, rest = split_protocol(os.fspath(location))
    if protocol not in (None, "file", "local"):
        raise ConfigError(
            f"{key}: {os.fspath(location)!r} is a {protocol}:// URL; only local and shared file systems are "
            "supported so far; mount it and give a path"
        )
    return Path(os.path.abspath(Path(rest).expanduser()))  # noqa: PTH100 - `absolute` keeps ".."


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" into one line that names the place; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"{path}: {os.strerror(error.errno or 0).lower()}; everything committed so far stays valid; "
                "free some space and run the same command again"
            ) from error
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically, making its folder if needed; an older file is replaced."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        temporary.replace(path)


def create_bytes(path: Path, data: bytes) -> bool:
    """Create a whole file, unless it is there: the first writer wins. Returns whether this call did it."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        try:
            os.link(temporary, path)  # unlike replace, link refuses an existing target, atomically
        except FileExistsError:
            return False
        return True


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetWriter` whose file appears when the block ends without an error."""
    import pyarrow.parquet as pq

    with _temporary(path) as temporary:
        with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
            yield writer
        temporary.replace(path)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    write_bytes(path, buffer.getbuffer())


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file whole.

    Raises:
        Damage: the file is missing, or is not valid Parquet.
    """
    import pyarrow.parquet as pq

    try:
        with parquet_errors(path):
            return pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
    except FileNotFoundError:
        raise Damage(f"{path}: missing") from None


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for bytes that are not Parquet, or have changed, into Damage."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowInvalid as error:
        raise Damage(f"{path}: not a valid Parquet file ({one_line(error)})") from error
    except OSError as error:
        if error.errno is not None or isinstance(error, FileNotFoundError):
            raise
        raise Damage(f"{path}: damaged ({one_line(error)})") from error  # such as a page that fails its checksum


def write_json(path: Path, record: JsonObject) -> None:
    """Write a JSON record atomically, with the format version."""
    write_bytes(path, _json(record))


def create_json(path: Path, record: JsonObject) -> bool:
    """Create a JSON record unless it is there; returns whether this call did it."""
    return create_bytes(path, _json(record))


def _json(record: JsonObject) -> bytes:
    return (json.dumps({"format": FORMAT, **record}, indent=2) + "\n").encode()


def read_json(path: Path, required: Sequence[str] = ()) -> JsonObject:
    """Read a record written by `write_json`, without its format version.

    Args:
        required: keys that it must have.

    Raises:
        FileNotFoundError: no such file.
        Damage: the file is not a JSON object, or lacks a key.
        UnknownFormat: it was written by a version with another format.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise Damage(f"{path}: not valid JSON ({error})") from error
    return _checked(path, record, required)


def write_yaml(path: Path, record: JsonObject) -> None:
    """Write a YAML record atomically, with the format version."""
    import yaml

    write_bytes(path, yaml.safe_dump({"format": FORMAT, **record}, sort_keys=False).encode())


def read_yaml(path: Path, required: Sequence[str] = ()) -> JsonObject:
    """Read a record written by `write_yaml`; raises like `read_json`."""
    import yaml

    try:
        record = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise Damage(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from error
    return _checked(path, record, required)


def _checked(path: Path, record: object, required: Sequence[str]) -> JsonObject:
    if not isinstance(record, dict):
        raise Damage(f"{path}: not a record (a mapping was expected)")
    found = record.pop("format", None)
    if found != FORMAT:
        raise UnknownFormat(
            f"{path}: format {found!r} is unknown; this version reads format {FORMAT}; "
            "use the version of distal that wrote it"
        )
    missing = [key for key in required if key not in record]
    if missing:
        raise Damage(f"{path}: {missing[0]} is missing")
    return record


def sha256(data: bytes | memoryview) -> str:
    """sha256 of `data` (hex)."""
    return hashlib.sha256(data).hexdigest()


def write_sealed(path: Path, data: bytes) -> None:
    """Write a file atomically, with the sha256 of its bytes in front."""
    write_bytes(path, sha256(data).encode() + data)


def read_sealed(path: Path) -> bytes:
    """Read what `write_sealed` wrote.

    Raises:
        FileNotFoundError: no such file.
        Damage: the bytes are not those that were written.
    """
    sealed = path.read_bytes()
    data = sealed[64:]
    if sealed[:64] != sha256(data).encode():
        raise Damage(f"{path}: its bytes have changed")
    return data


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, without temporary files; empty when there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except FileNotFoundError:
        return []


def remove_tree(folder: Path) -> None:
    """Remove a folder and all it holds; nothing happens when it is not there."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
