"""The rows of a source, and what every kind of source provides.

The content of a source is untrusted: an image that cannot be read is a row with the reason, and anything else that is
wrong is one SourceError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distal.pool.decode import MAX_BYTES
from distal.records import Block
from distal.storage import read_regular


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a source: `data` is None when there are no bytes to decode, and `error` then says why."""

    sample_id: str
    uri: str
    data: bytes | None
    label: int | None = None
    group_id: str | None = None
    error: str | None = None


class Source(Protocol):
    """Samples in a fixed order, with their class names if they have labels."""

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order."""
        ...

    def part(self, start: int, stop: int) -> Source:
        """What a task needs to read the samples [start, stop), by the same indices. It can be pickled."""
        ...

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Consecutive blocks, cut where one task should end and the next one begin."""
        ...


def is_below(path: str, folder: str) -> bool:
    """Whether a resolved path is a resolved folder, or in it."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def is_utf8(name: str) -> bool:
    """Whether a file name can be stored as text; other bytes are surrogates in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(path: str | Path) -> str:
    """A path as text that can be stored and printed: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def read_file(path: Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or the reason why there are none."""
    try:
        return read_regular(path, MAX_BYTES), None
    except OSError as error:
        return None, f"the file cannot be read ({error.strerror})"
