"""Folders of images, with or without class sub-folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc

from distal.errors import SourceError
from distal.pool.decode import FORMATS
from distal.pool.rows import Row, is_below, is_utf8, read_file, readable
from distal.records import Block

_MAX_PATHS = 100  # over which links may lead to one folder


def find_files(root: Path, suffixes: Collection[str], follow_symlinks: bool = False) -> list[str]:
    """Files below a folder with one of some suffixes: relative paths with "/", in no order. Hidden ones are skipped.

    Links are followed, except to a folder that contains them. Bytes of a name that are not UTF-8 are kept as
    surrogates.

    Args:
        follow_symlinks: follow links that lead out of `root` as well.

    Raises:
        SourceError: a folder cannot be listed, links lead out of `root`, or they multiply its folders.
    """
    inside = os.path.realpath(root)
    found: list[str] = []
    outside: list[str] = []
    paths: Counter[tuple[int, int]] = Counter()
    status = root.stat()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((status.st_dev, status.st_ino),))]
    while waiting:
        folder, above = waiting.pop()
        for entry, identity in _list_folder(Path(root, folder)):
            name = f"{folder}{entry.name}"
            if identity is None and Path(name).suffix.lower() not in suffixes:
                continue
            if entry.is_symlink() and not is_below(os.path.realpath(entry.path), inside):
                outside.append(name)
                if not follow_symlinks:
                    continue
            if identity is None:
                found.append(name)
            elif identity not in above:
                paths[identity] += 1
                if paths[identity] > _MAX_PATHS:
                    raise SourceError(
                        f"{readable(Path(root, name))}: links lead to this folder over {_MAX_PATHS} paths"
                    )
                waiting.append((f"{name}/", (*above, identity)))
    if outside and not follow_symlinks:
        first = min(outside)
        target = os.path.realpath(Path(root, first))
        raise SourceError(
            f"{readable(root)}: {len(outside)} links lead out of this folder, such as {readable(first)} to "
            f"{readable(target)}; pack them as well with `distal pool build --follow-symlinks`, or remove them"
        )
    return found


def _list_folder(folder: Path) -> Iterator[tuple[os.DirEntry[str], tuple[int, int] | None]]:
    """The entries of a folder; a sub-folder, or a link to one, with its device and inode."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    status = entry.stat() if _is_folder(entry) else None
                    yield entry, None if status is None else (status.st_dev, status.st_ino)
    except OSError as error:
        raise SourceError(f"{readable(folder)}: this folder cannot be listed ({error.strerror})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: as a file it is a row with the reason
        return False


@dataclass
class FolderSource:
    """An image folder: class sub-folders, or flat and then without labels.

    Samples are ordered by their path, which is also their `sample_id`. Class names are the sub-folders, in
    sorted order. Files without the suffix of an image are skipped.

    Attributes:
        files: paths below `root`, sorted: 8 bytes each, and their letters.
        misnamed: names that are not UTF-8, as in `files`; these are not read.
        first: `sample_index` of the first one.
    """

    root: Path
    files: pa.Array
    classes: tuple[str, ...] | None = None
    misnamed: frozenset[str] = frozenset()
    first: int = 0

    @classmethod
    def of(cls, root: Path, found: list[str]) -> Self:
        """The images among the files of a folder.

        Raises:
            SourceError: there is none, some are in class folders and some beside them, or a class has no valid name.
        """
        misnamed = frozenset(readable(name) for name in found if not is_utf8(name))
        files = pa.array(map(readable, found) if misnamed else found, pa.large_string())
        files = files.take(pc.sort_indices(files))  # by bytes, which for UTF-8 is by letters
        if not len(files):
            raise SourceError(
                f"{root}: no Parquet file and no image in this folder (looked for {' '.join(sorted(FORMATS))})"
            )
        for name in misnamed:
            if pc.sum(pc.equal(files, name)).as_py() > 1:
                raise SourceError(
                    f"{root}: two files are called {name}, one of them by bytes that are not UTF-8; rename it"
                )
        nested = pc.match_substring(files, "/")
        n_nested = pc.sum(nested).as_py()
        if 0 < n_nested < len(files):
            flat, deep = (files[pc.index(nested, value).as_py()].as_py() for value in (False, True))
            raise SourceError(
                f"{root}: images both at the top ({flat}) and in sub-folders ({deep}); put all of them in class "
                "sub-folders, or none"
            )
        if not n_nested:
            return cls(root, files, misnamed=misnamed)
        classes = tuple(sorted(pc.unique(pc.replace_substring_regex(files, "(?s)/.*", "")).to_pylist()))
        for name in found if misnamed else ():
            if not is_utf8(name.partition("/")[0]):
                raise SourceError(
                    f"{root}: the name of the class folder {readable(name.partition('/')[0])} is not UTF-8; rename it"
                )
        return cls(root, files, classes, misnamed)

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order; a file that cannot be read has no data."""
        labels = {name: label for label, name in enumerate(self.classes or ())}
        for name in self._names(start, stop):
            bad = name in self.misnamed
            data, error = (None, "its name is not UTF-8") if bad else read_file(self.root / name)
            yield Row(name, str(self.root / name), data, labels.get(name.partition("/")[0]), error=error)

    def part(self, start: int, stop: int) -> Self:
        """The names of [start, stop) alone."""
        names = self._names(start, stop)  # copied: a slice of an array is pickled with the whole array
        return replace(
            self,
            files=pa.array(names, pa.large_string()),
            misnamed=self.misnamed.intersection(names),
            first=start,
        )

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """A task per block."""
        return [[block] for block in blocks]

    def _names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.files[start - self.first : max(0, stop - self.first)].to_pylist()
        return names
