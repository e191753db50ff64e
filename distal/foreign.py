"""A directory of checkpoints that something else writes: which file has which `checkpoint_index`.

An index is given once, in `checkpoints.json` of the cycle: in natural order (`epoch2` before `epoch10`) to the files
that are there when it is first looked at, then in the order of appearance. A file counts once its size and time have
stood still and it loads; one that changes afterwards is refused.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distal import checkpoints
from distal.errors import ModelError, RunConflict, one_line
from distal.records import CheckpointRef
from distal.storage import names_in, read_json, sha256, write_json

if TYPE_CHECKING:
    from distal.checkpoints import StateDict

SETTLED_S = 2.0  # seconds that a file must have stood still
BROKEN_S = 60.0  # seconds after which a file that stands still and does not load is not being written any more
SUFFIXES = (".pt", ".pth", checkpoints.SAFETENSORS)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file with an index; `mtime_ns` saves hashing it again."""

    index: int
    path: str
    size: int
    mtime_ns: int
    sha256: str


class ForeignCheckpoints:
    """The checkpoints of a directory.

    Args:
        record: `checkpoints.json`.
        folder, pattern: where they are, and which files are checkpoints.
        check: raises ModelError when weights do not fit the network; called with the file's name and the state_dict.

    Raises:
        ModelError: no such directory.
        RunConflict: a file with an index has changed.
    """

    def __init__(
        self,
        record: Path,
        folder: Path,
        pattern: str,
        check: Callable[[str, StateDict], None] = lambda name, state: None,
    ) -> None:
        if not folder.is_dir():
            raise ModelError(f"checkpoints.path: {folder}: no such directory")
        self._record, self._folder, self._pattern, self._check = record, folder, pattern, check
        self._entries = known(record)
        self._kept = False
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}  # size and time of a new file, and since when
        self._refuse_changed()

    @property
    def refs(self) -> list[CheckpointRef]:
        """Those that have an index, in order."""
        return [CheckpointRef(e.index, e.index + 1, self._folder / e.path, e.sha256) for e in self._entries]

    def look(self, *, patient: bool) -> bool:
        """Give an index to new files that are complete.

        Args:
            patient: whether a file that does not load may still be on its way for `BROKEN_S` seconds.

        Returns:
            Whether every file that is there has an index.

        Raises:
            ModelError: a file does not load, or is no state_dict of plain tensors, or does not fit the network.
            RunConflict: a file with an index has changed.
        """
        self._refuse_changed()
        taken = {entry.path for entry in self._entries}
        waiting = False
        for name in matching(self._folder, self._pattern):
            if name in taken:
                continue
            still_s = self._still_s(name)
            entry = None
            if still_s >= SETTLED_S:
                entry = self._take_up(name, patient=patient and still_s < BROKEN_S)
            if entry is None:  # its turn has not come; nor has that of later ones, or their order would be by chance
                waiting = True
                break
            self._entries.append(entry)
            if self._kept:
                self.keep()
        return not waiting

    def keep(self) -> None:
        """Write the indices down, those given so far and those to come. Until then nothing is written."""
        self._kept = True
        write_json(self._record, {"checkpoints": [_as_record(entry) for entry in self._entries]})

    def settle(self) -> None:
        """Look until every file that is there has an index."""
        while not self.look(patient=False):
            time.sleep(0.1)

    def _still_s(self, name: str) -> float:
        """Seconds for which a file has not changed, as far as is known."""
        try:
            stat = (self._folder / name).stat()
        except FileNotFoundError:
            return 0.0
        now, state = time.monotonic(), (stat.st_size, stat.st_mtime_ns)
        if name not in self._seen or self._seen[name][0] != state:
            # A file that is old is complete. Clocks of other machines may differ by seconds, not by a minute.
            age = time.time() - stat.st_mtime
            self._seen[name] = state, now - (age if age > BROKEN_S else 0.0)
        return now - self._seen[name][1]

    def _take_up(self, name: str, *, patient: bool) -> Entry | None:
        path = self._folder / name
        if path.suffix not in SUFFIXES:
            raise ModelError(
                f"checkpoints.pattern: {self._pattern!r} matches {name}; checkpoints are {', '.join(SUFFIXES)} files"
            )
        data = path.read_bytes()
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) != self._seen[name][0] or len(data) != stat.st_size:
            return None
        try:
            state = checkpoints.deserialize(data, path.suffix)
        except Exception as error:
            if patient:
                return None
            raise ModelError(
                f"{path}: truncated, or not a state_dict of plain tensors ({one_line(error)[:200]}); save "
                "model.state_dict() alone, or remove the file"
            ) from error
        self._check(name, state)
        return Entry(len(self._entries), name, stat.st_size, stat.st_mtime_ns, sha256(data))

    def _refuse_changed(self) -> None:
        for position, entry in enumerate(self._entries):
            path = self._folder / entry.path
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # whoever needs it will say so; rows that are scored do not
            if (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns):
                continue
            if stat.st_size != entry.size or sha256(path.read_bytes()) != entry.sha256:
                raise RunConflict(
                    f"{path}: changed after it became checkpoint {entry.index}; write every checkpoint to a file of "
                    "its own, and put the old one back or give another run directory (run=...)"
                )
            self._entries[position] = replace(entry, mtime_ns=stat.st_mtime_ns)  # copied or touched


def matching(folder: Path, pattern: str) -> list[str]:
    """Names of the checkpoints of a directory, in natural order; empty when there is no such directory."""
    return sorted((name for name in names_in(folder) if fnmatch.fnmatchcase(name, pattern)), key=_natural)


def check_fits(name: str, state: object, template: StateDict) -> None:
    """Raise ModelError, naming the first key that is missing, unexpected or of another shape."""
    import torch

    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        kinds = sorted({type(value).__name__ for value in state.values()}) if isinstance(state, dict) else []
        found = f"holds {', '.join(kinds)}" if kinds else f"is a {type(state).__name__}"
        raise ModelError(f"{name}: not a state_dict of plain tensors (it {found}); save model.state_dict() alone")
    missing = [key for key in template if key not in state]
    unexpected = [key for key in state if key not in template]
    if missing or unexpected:
        told = [f"{what} {keys[0]}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise ModelError(f"{name}: its keys do not fit model.name: {', '.join(told)}{_hint(missing, unexpected)}")
    for key, value in template.items():
        if state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            raise ModelError(
                f"{name}: {key} has values that are not finite: training diverged; leave the file out with "
                "checkpoints.pattern, or remove it"
            )
        if state[key].shape != value.shape:
            hint = ""
            if state[key].shape[1:] == value.shape[1:]:
                hint = f"; set model.num_classes={state[key].shape[0]} if these are its classes"
            elif key.startswith("conv1."):
                hint = "; set model.stem"
            raise ModelError(
                f"{name}: {key} has shape {tuple(state[key].shape)}, the network needs {tuple(value.shape)}{hint}"
            )


def _hint(missing: list[str], unexpected: list[str]) -> str:
    """When all keys differ by one prefix, which."""
    for key in unexpected:
        prefix = key.removesuffix(missing[0]) if missing and key.endswith(missing[0]) else ""
        if prefix and all(prefix + wanted in unexpected for wanted in missing):
            return f"; every key begins with {prefix!r}: save it without that prefix"
    return ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers by value: epoch2 before epoch10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def known(record: Path) -> list[Entry]:
    """The files that have an index, in order."""
    try:
        return [Entry(**entry) for entry in read_json(record, required=("checkpoints",))["checkpoints"]]
    except FileNotFoundError:
        return []


def _as_record(entry: Entry) -> dict[str, object]:
    return {name: getattr(entry, name) for name in Entry.__slots__}
