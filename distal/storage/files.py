"""Whole files: complete or absent, created by one writer or replaced, read without trusting their kind or size."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fsspec.core import split_protocol

from distal import machine
from distal.errors import ConfigError, Damage, DiskFull

DURABLE = "DISTAL_DURABLE"
"""Environment variable, so that the processes that Ray starts inherit it."""

_PIECE_BYTES = 2**20
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
    """Turn "no space left" into one line that names the path; other errors pass."""
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
    """Write a whole file atomically, making its folder if needed; an existing file is replaced."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(data)
        replace(temporary, path)


def create_bytes(path: Path, data: bytes) -> bool:
    """Create a whole file unless it exists: the first writer wins. Returns whether this call created it."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(data)
        if is_durable():
            fsync(temporary)
        try:
            os.link(temporary, path)  # unlike replace, link refuses an existing target, atomically
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise _no_links(path.parent, error) from error
            raise
        if is_durable():
            fsync(path.parent)
        return True


def link(source: Path, path: Path) -> None:
    """Hard-link a file that never changes, unless there is no such file or the name is taken."""
    with disk_errors(path), suppress(FileNotFoundError, FileExistsError):
        make_folder(path.parent)
        os.link(source, path)
        if is_durable():
            fsync(path.parent)


def require_writable(folder: Path) -> None:
    """Check that a folder can be written to, and supports exclusive creation; raises DistalError or OSError."""
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
        f"{folder}: its file system has no hard links ({error.strerror}), and distal needs them so "
        "that only one of two writers wins; use a local disk, NFS (EFS, Azure Files over NFS), "
        "Lustre, CephFS or GPFS, not an SMB share or a mount of an object store (gcsfuse, "
        "blobfuse, s3fs)"
    )


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; an uncommitted file is removed when the block ends."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path):
        make_folder(path.parent)
        try:
            yield temporary
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def replace(temporary: Path, path: Path) -> None:
    """Commit a temporary file under its name, replacing an older file."""
    if is_durable():
        fsync(temporary)
    temporary.replace(path)
    if is_durable():
        fsync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents."""
    if not is_durable():
        folder.mkdir(parents=True, exist_ok=True)
        return
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def be_durable(durable: bool) -> None:
    """Set whether this process, and those Ray starts for it from now on, fsync every file before it is committed."""
    os.environ[DURABLE] = "1" if durable else "0"


def is_durable() -> bool:
    """Whether files are fsynced before they are committed; see `durable` in the configuration."""
    return os.environ.get(DURABLE) == "1"


def flush(path: Path, root: Path) -> None:
    """If durable, fsync a file that another library wrote, and the folders from it up to `root`."""
    if not is_durable():
        return
    fsync(path)
    for folder in path.parents:
        fsync(folder)
        if folder == root:
            break


def fsync(path: Path) -> None:
    """Fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Read a whole file of a run or pool.

    These may come from anybody: reading a FIFO would block for ever, reading a device never end.

    Args:
        limit: bytes at most; None: half of the memory.

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


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file that the user or another program wrote.

    Opening a FIFO would wait for its writer and opening a device may do anything, so the kind is checked before
    opening, and again afterwards, because the file may have been replaced in between.

    Raises:
        OSError: it cannot be read, is not a regular file, or has more than `max_bytes` bytes; `strerror` says which.
    """
    _require_regular(path, path.stat(), max_bytes)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        _require_regular(path, status, max_bytes)
        data = file.read(status.st_size + 1)
        if len(data) > status.st_size:  # it grows, or claims size 0, as in /proc
            data = _read_on(file, data, max_bytes)
    if len(data) > max_bytes:
        raise _too_large(path, max_bytes)
    return data


def _read_on(file: BinaryIO, data: bytes, max_bytes: int) -> bytes:
    """`data` and the rest, up to `max_bytes` + 1, in pieces: one large read would allocate all its memory at once."""
    grown = bytearray(data)
    while len(grown) <= max_bytes and (piece := file.read(min(_PIECE_BYTES, max_bytes - len(grown) + 1))):
        grown += piece
    return bytes(grown)


def _require_regular(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > max_bytes:
        raise _too_large(path, max_bytes)


def _too_large(path: Path, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; raises like `read_bytes`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # do not wait for the writer of a FIFO
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damage(f"{path}: not a regular file")
    return os.fdopen(handle, "rb")


def sha256(data: bytes | memoryview) -> str:
    """sha256 of `data` (hex)."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file of any size, read in pieces; raises like `open_file`.

    Raises:
        OSError: a large file is nearly all holes. It may claim terabytes, which would take hours to hash.
    """
    with open_to_hash(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_hash(path: Path) -> io.BufferedReader:
    """Open a file that will be read whole; raises OSError for a huge file that is nearly all holes."""
    file = open_file(path)
    status = os.fstat(file.fileno())
    if status.st_size > machine.memory_bytes() // 2 and status.st_blocks * 512 < status.st_size // 1000:
        file.close()
        raise OSError(errno.EFBIG, f"next to nothing of its {status.st_size:,} bytes is on the disk", str(path))
    return file
