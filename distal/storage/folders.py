"""Folders: listed without temporary files, swept, created once, removed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distal.storage.files import disk_errors, fsync, is_durable

_TEMPORARY = (".tmp", ".partial")  # ours, and Zarr's
_TEMPORARY_FOLDER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, without temporary files; empty if the folder does not exist."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except FileNotFoundError:
        return []


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, however deep; files removed meanwhile are left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def create_folder(made: Path, path: Path) -> bool:
    """Commit a folder under its name unless one exists: the first one stays. Returns whether this call did it."""
    with disk_errors(path):
        try:
            made.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        if is_durable():
            fsync(path.parent)
        return True


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """The path of a folder beside `path`, which is removed when the block ends."""
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield folder
    finally:
        remove_tree(folder)


def sweep(folder: Path, older_than: float = 600.0) -> int:
    """Remove the temporary files and folders of killed processes anywhere below a folder; returns how many.

    Args:
        older_than: seconds; younger files, and folders that hold one, may still be being written.
    """
    n = 0
    for path in [*_temporary_below(folder)]:
        with suppress(FileNotFoundError):
            if time.time() - _last_change(path) >= older_than:
                remove_tree(path) if path.is_dir() else path.unlink()
                n += 1
    return n


def _temporary_below(folder: Path) -> Iterator[Path]:
    """Temporary files and folders; a temporary folder is not searched."""
    for parent, folders, names in os.walk(folder):
        ours = [name for name in folders if _TEMPORARY_FOLDER.fullmatch(name) and not Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if name not in ours]
        yield from (Path(parent, name) for name in ours)
        yield from (Path(parent, name) for name in names if name.endswith(_TEMPORARY))


def _last_change(path: Path) -> float:
    """When a file, or anything in a folder, was last written."""
    return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))


def remove_tree(folder: Path) -> None:
    """Remove a folder with its content, if it exists."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
