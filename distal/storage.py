"""The one seam to the disk: a file is complete or absent.

Local and shared file systems are supported: a write goes to a temporary file beside its target and is moved
there with `os.replace`. Nothing is appended to or changed in place. Every record carries a format version and the
hash of what it says, so that a changed byte is noticed.

The promise covers killed processes. It covers a power loss too when the configuration says `durable: true`: then
every file is on the disk before it counts.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fsspec.core import split_protocol

from distal import machine
from distal.errors import ConfigError, Damage, DiskFull, UnknownFormat, one_line
from distal.hashing import digest
from distal.records import JsonObject

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 3
"""Format version that every artifact carries; an unknown one is refused."""

SEAL = "record_sha256"
DURABLE = "DISTAL_DURABLE"
"""Environment variable, so that the processes that Ray starts know it, too."""

TEMPORARY = (".tmp", ".partial")  # ours, and Zarr's
TEMPORARY_FOLDER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
PIECE_BYTES = 2**20
MAX_JSON_BYTES, MAX_YAML_BYTES = 2**28, 2**22
"""A longer record is none of ours: what is decided at a barrier has some bytes per block."""

_PARQUET_FORMAT, _PARQUET_SEAL = b"distal.format", b"distal.sha256"
_NO_SEAL = b"0" * 64

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV}
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


def is_relative(location: str) -> bool:
    """Whether a path, or a `file://` URL, starts at the working directory."""
    return not Path(split_protocol(location)[1]).expanduser().is_absolute()


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


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file that somebody else wrote.

    Opening a FIFO would wait for its writer and opening a device may do anything, so the kind is checked before the
    file is opened, and again afterwards: another file may have taken its place meanwhile.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `max_bytes` bytes; `strerror` says which.
    """
    _require_regular(path, path.stat(), max_bytes)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        _require_regular(path, status, max_bytes)
        data = file.read(status.st_size + 1)
        if len(data) > status.st_size:  # it grows, or has no size at all, as in /proc
            data = _read_on(file, data, max_bytes)
    if len(data) > max_bytes:
        raise _too_large(path, max_bytes)
    return data


def _read_on(file: BinaryIO, data: bytes, max_bytes: int) -> bytes:
    """`data`, and what follows, up to one byte more than `max_bytes`: in pieces, as a read takes its memory at once."""
    grown = bytearray(data)
    while len(grown) <= max_bytes and (piece := file.read(min(PIECE_BYTES, max_bytes - len(grown) + 1))):
        grown += piece
    return bytes(grown)


def _require_regular(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > max_bytes:
        raise _too_large(path, max_bytes)


def _too_large(path: Path, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically, making its folder if needed; an older file is replaced."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        _replace(temporary, path)


def require_writable(folder: Path) -> None:
    """Raise DistalError or OSError unless this process can write files in a folder, and create one exactly once."""
    probe = folder / f".probe-{uuid.uuid4().hex}.tmp"
    link = probe.with_name(f"{probe.name}.link.tmp")
    write_bytes(probe, b"")
    try:
        os.link(probe, link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise _no_links(folder, error) from error
    finally:
        for path in (probe, link):
            path.unlink(missing_ok=True)


def _no_links(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{folder}: its file system has no hard links ({error.strerror}), and distal needs them to let only one of two "
        "writers win; use a local disk, NFS (EFS, Azure Files over NFS), Lustre, CephFS or GPFS, not an SMB share or a "
        "mount of an object store (gcsfuse, blobfuse, s3fs)"
    )


def create_bytes(path: Path, data: bytes) -> bool:
    """Create a whole file, unless it is there: the first writer wins. Returns whether this call did it."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        if is_durable():
            _flush(temporary)
        try:
            os.link(temporary, path)  # unlike replace, link refuses an existing target, atomically
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise _no_links(path.parent, error) from error
            raise
        if is_durable():
            _flush(path.parent)
        return True


def create_folder(made: Path, path: Path) -> bool:
    """Move a folder to where it belongs, unless there is one: the first one stays. Returns whether this call did it."""
    with disk_errors(path):
        try:
            made.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        if is_durable():
            _flush(path.parent)
        return True


def link(source: Path, path: Path) -> None:
    """Give a file that is never changed another name, unless there is no such file, or the name is taken."""
    with disk_errors(path), suppress(FileNotFoundError, FileExistsError):
        make_folder(path.parent)
        os.link(source, path)
        if is_durable():
            _flush(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    if is_durable():
        _flush(temporary)
    temporary.replace(path)
    if is_durable():
        _flush(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    if not is_durable():
        folder.mkdir(parents=True, exist_ok=True)
        return
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush(folder.parent)


def be_durable(durable: bool) -> None:
    """Have this process, and those that Ray starts for it from now on, flush every file before it counts, or not."""
    os.environ[DURABLE] = "1" if durable else "0"


def is_durable() -> bool:
    """Whether files are on the disk before they count; see `durable` in the configuration."""
    return os.environ.get(DURABLE) == "1"


def flush(path: Path, root: Path) -> None:
    """Have a file that something else wrote, its name and those of the folders up to `root` on the disk, if durable."""
    if not is_durable():
        return
    _flush(path)
    for folder in path.parents:
        _flush(folder)
        if folder == root:
            break


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path):
        make_folder(path.parent)
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
        with pq.ParquetWriter(temporary, _with_format(schema), write_page_checksum=True) as writer:
            yield writer
        with temporary.open("r+b") as file:
            _seal_parquet(file)
        _replace(temporary, path)


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


def _seal_parquet(file: BinaryIO) -> None:
    """Put the hash of all other bytes into the footer: the pages have checksums of their own, the footer has none."""
    place, checksum = _parquet_seal(file)
    file.seek(place)
    file.write(checksum.encode())


def check_parquet(path: Path) -> None:
    """Raise Damage unless a Parquet file has the bytes that were written; raises like `read_table`."""
    open_parquet(path).close()
    with open_file(path) as file:
        try:
            place, checksum = _parquet_seal(file)
        except ValueError:
            raise Damage(f"{path}: damaged (its footer has no checksum)") from None
        file.seek(place)
        if file.read(64) != checksum.encode():
            raise Damage(f"{path}: damaged (its bytes have changed)")


def _parquet_seal(file: BinaryIO) -> tuple[int, str]:
    """Where the hash stands in a Parquet file, and the hash of all bytes but those. Raises ValueError without one."""
    size = file.seek(-8, os.SEEK_END) + 8
    footer = int.from_bytes(file.read(4), "little")
    start = file.seek(max(0, size - 8 - footer))
    place = start + file.read().rindex(_PARQUET_SEAL) + len(_PARQUET_SEAL) + 2  # type and length of a string of Thrift
    checksum = hashlib.sha256()
    for begin, end in ((0, place), (place + 64, size)):
        file.seek(begin)
        while begin < end and (data := file.read(min(2**20, end - begin))):
            checksum.update(data)
            begin += len(data)
    return place, checksum.hexdigest()


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file whole.

    Raises:
        Damage: the file is missing, or is not valid Parquet.
        UnknownFormat: it was written by a version with another format.
    """
    check_parquet(path)
    with open_parquet(path) as file, parquet_errors(path):
        return file.read(columns=columns)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; raises like `read_table`.

    It is not mapped: the pages of a mapped file stay in memory, some bytes for every row.
    """
    import pyarrow.parquet as pq

    try:
        open_file(path).close()
        with parquet_errors(path):
            file = pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise Damage(f"{path}: missing") from None
    found = (file.schema_arrow.metadata or {}).get(_PARQUET_FORMAT, b"none").decode()
    if found != str(FORMAT):
        file.close()
        raise _unknown(path, found)
    return file


def _with_format(schema: pa.Schema) -> pa.Schema:
    ours = {_PARQUET_FORMAT: str(FORMAT).encode(), _PARQUET_SEAL: _NO_SEAL}
    return schema.with_metadata({**(schema.metadata or {}), **ours})


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


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """A whole file.

    A run directory may come from anybody: a FIFO in place of a file would block for ever, a device never end.

    Args:
        limit: bytes that it may have; None: half of the memory.

    Raises:
        FileNotFoundError: no such file.
        Damage: it is no regular file, or larger than `limit`.
    """
    try:
        return read_regular(path, machine.memory_bytes() // 2 if limit is None else limit)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise Damage(f"{path}: {error.strerror}") from error
        raise


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; raises like `read_bytes`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without waiting for a writer of a FIFO
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damage(f"{path}: not a regular file")
    return os.fdopen(handle, "rb")


def write_json(path: Path, record: JsonObject) -> None:
    """Write a JSON record atomically, with the format version."""
    write_bytes(path, _json(record))


def create_json(path: Path, record: JsonObject) -> bool:
    """Create a JSON record unless it is there; returns whether this call did it."""
    return create_bytes(path, _json(record))


def _json(record: JsonObject) -> bytes:
    return (json.dumps(_sealed(record), indent=2) + "\n").encode()


def _sealed(record: JsonObject) -> JsonObject:
    return {"format": FORMAT, **record, SEAL: digest(record)}


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
        record = json.loads(read_bytes(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise Damage(f"{path}: not valid JSON ({one_line(error)[:200]})") from error
    return _checked(path, record, required)


def write_yaml(path: Path, record: JsonObject) -> None:
    """Write a YAML record atomically, with the format version."""
    write_bytes(path, _yaml(record))


def create_yaml(path: Path, record: JsonObject) -> bool:
    """Create a YAML record unless it is there; returns whether this call did it."""
    return create_bytes(path, _yaml(record))


def _yaml(record: JsonObject) -> bytes:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
            return True

    text: str = yaml.dump(_sealed(record), Dumper=Plain, sort_keys=False)
    return text.encode()


def read_yaml(path: Path, required: Sequence[str] = ()) -> JsonObject:
    """Read a record written by `write_yaml`; raises like `read_json`."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):  # a few of them in each other stand for more than any memory holds
                raise yaml.YAMLError("an alias, which no record has")
            return super().compose_node(parent, index)

    data = read_bytes(path, MAX_YAML_BYTES)
    try:
        record = yaml.load(data, Loader=Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damage(f"{path}: not valid YAML ({one_line(error)[:200]})") from error
    return _checked(path, record, required)


def _checked(path: Path, record: object, required: Sequence[str]) -> JsonObject:
    if not isinstance(record, dict):
        raise Damage(f"{path}: not a record (a mapping was expected)")
    found, seal = record.pop("format", None), record.pop(SEAL, None)
    if found != FORMAT:
        raise _unknown(path, found)
    try:
        found = digest(record)
    except (TypeError, ValueError, RecursionError) as error:  # dates, keys that are lists
        raise Damage(f"{path}: not a record ({one_line(error)[:200]})") from error
    if seal != found:
        raise Damage(f"{path}: what it says has changed since it was written; put back what was there")
    missing = [key for key in required if key not in record]
    if missing:
        raise Damage(f"{path}: {missing[0]} is missing")
    return record


def _unknown(path: Path, found: object) -> UnknownFormat:
    return UnknownFormat(
        f"{path}: format {found} is unknown; this version of distal reads format {FORMAT}; use the version that wrote "
        "it, or make it anew: build a pool again, start a run in another directory"
    )


def require_format(path: Path, found: object) -> None:
    """Raise UnknownFormat unless a format version is the one that is read here."""
    if found != FORMAT:
        raise _unknown(path, found)


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
    sealed = read_bytes(path)
    data = sealed[64:]
    if sealed[:64] != sha256(data).encode():
        raise Damage(f"{path}: its bytes have changed")
    return data


def check_sealed(path: Path) -> None:
    """Raise like `read_sealed` and `file_sha256`, of a file of any size: it is read in pieces."""
    with _open_to_hash(path) as file:
        seal = file.read(64)
        if seal != hashlib.file_digest(file, "sha256").hexdigest().encode():
            raise Damage(f"{path}: its bytes have changed")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file of any size, read in pieces; raises like `open_file`.

    Raises:
        OSError: next to nothing of a large file is on the disk. A stranger's may claim terabytes, which take hours.
    """
    with _open_to_hash(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_to_hash(path: Path) -> io.BufferedReader:
    file = open_file(path)
    status = os.fstat(file.fileno())
    if status.st_size > machine.memory_bytes() // 2 and status.st_blocks * 512 < status.st_size // 1000:
        file.close()
        raise OSError(errno.EFBIG, f"next to nothing of its {status.st_size:,} bytes is on the disk", str(path))
    return file


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, without temporary files; empty when there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except FileNotFoundError:
        return []


def sweep(folder: Path, older_than: float = 600.0) -> int:
    """Remove temporary files and folders that killed processes left anywhere below a folder; returns how many.

    Args:
        older_than: seconds; a younger one may be being written, as may a folder that holds a younger file.
    """
    n = 0
    for path in [*_temporary_below(folder)]:
        with suppress(FileNotFoundError):
            if time.time() - _last_change(path) >= older_than:
                remove_tree(path) if path.is_dir() else path.unlink()
                n += 1
    return n


def _temporary_below(folder: Path) -> Iterator[Path]:
    """Files by their names; folders as `temporary_folder` names them, and not what is in them."""
    for parent, folders, names in os.walk(folder):
        ours = [name for name in folders if TEMPORARY_FOLDER.fullmatch(name) and not Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if name not in ours]
        yield from (Path(parent, name) for name in ours)
        yield from (Path(parent, name) for name in names if name.endswith(TEMPORARY))


def _last_change(path: Path) -> float:
    """When a file, or anything in a folder, was last written."""
    return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, however deep; what goes away meanwhile is left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is removed in the end."""
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder and all it holds; nothing happens when it is not there."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
