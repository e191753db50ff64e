"""Folders of numbered names, where a number is given once and the largest one counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distal.storage.folders import names_in

_Content = TypeVar("_Content")


@dataclass(frozen=True)
class Numbered:
    """The numbered files, or folders, of a folder.

    Attributes:
        digits: at least so many, padded with zeros.
        suffix: the end of each name.
    """

    folder: Path
    digits: int
    suffix: str = ""

    def numbers(self) -> list[int]:
        """The numbers given so far, in order; other names are ignored."""
        name = re.compile(rf"\d{{{self.digits},}}{re.escape(self.suffix)}", re.ASCII)
        names = [found for found in names_in(self.folder) if name.fullmatch(found)]
        return sorted({int(found.removesuffix(self.suffix)) for found in names})

    def last(self) -> int | None:
        """The largest number, None before the first."""
        return max(self.numbers(), default=None)

    def path(self, number: int) -> Path:
        """The path of a number."""
        return self.folder / f"{number:0{self.digits}d}{self.suffix}"

    def append(
        self,
        create: Callable[[Path, _Content], bool],
        content: Callable[[int | None], _Content | None],
        first: int = 1,
    ) -> int | None:
        """Create the next file exclusively; several processes may try at once.

        The number is chosen before `content` is called. A writer that checks there that it may
        still write, and is paused right after, finds its number taken and checks again.

        Args:
            create: `create_bytes` or `create_json`.
            content: makes the content, given the number before; None: append nothing.
            first: the number of the first file.

        Returns:
            The number of the new file; None when nothing was appended.
        """
        while True:
            last = self.last()
            made = content(last)
            if made is None:
                return None
            number = first if last is None else last + 1
            if create(self.path(number), made):
                return number
