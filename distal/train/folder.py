"""A directory of checkpoints that something else writes: which file has which `checkpoint_index`.

An index is given once, in `checkpoints.json` of the cycle: in natural order (`epoch2` before `epoch10`) to the files
present at the first look, then in the order of appearance. A file is taken once its size and time have stood still
and it loads; one that changes afterwards is refused.

Equal weights are taken once. Files that training overwrites (`last.ckpt`, `best.pt`, names without a number) are taken
last, when no more checkpoints will come; most of them then repeat the weights of another file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distal.artifacts import checkpoints
from distal.errors import ModelError, RunConflict, shown
from distal.model.weights import (
    ANYWHERE,
    LIGHTNING,
    SAFETENSORS,
    STATE_DICT,
    Location,
    Unreadable,
    check_fits,
    deserialize,
    find_weights,
    unsafe_classes,
    within,
)
from distal.records import CheckpointRef
from distal.storage import names_in, read_json, read_regular, sha256, write_json

if TYPE_CHECKING:
    from distal.model.weights import StateDict

_SETTLED_S = 2.0  # seconds without a change before a file is read
_BROKEN_S = 60.0  # seconds without a change after which a file that does not load is broken, not half written
_SUFFIXES = (".pt", ".pth", LIGHTNING, SAFETENSORS)
_VERSION = re.compile(r"-v\d+$")
_OVERWRITTEN = re.compile(r"(?i)(?<![a-z])(best|last|latest|final|current)(?![a-z])")
# Of a file at most: 16 times the network, for states of optimizers and averages, and 256 MiB.
_ROOM = (16, 2**28)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was taken.

    Attributes:
        index: None for a file that repeats earlier weights.
        path: below the directory.
        size, mtime_ns: while they stay the same, it is not hashed again.
        sha256: of the file.
        weights_sha256: of the weights in it.
        key, prefix: of the weights; see `CheckpointRef`.
        step: optimizer steps taken, where the file records them.
    """

    index: int | None
    path: str
    size: int
    mtime_ns: int
    sha256: str
    weights_sha256: str
    key: str | None = None
    prefix: str = ""
    step: int | None = None


class FolderCheckpoints:
    """The checkpoints of a directory.

    Args:
        record: `checkpoints.json`.
        folder, pattern: the directory, and which of its files are checkpoints.
        template: weights of the network they must fit.
        location: of the weights in a file.
        still_ours: called before the record is replaced; raises when another driver took the run over.

    Raises:
        ModelError: no such directory.
        RunConflict: a file with an index has changed.
    """

    def __init__(
        self,
        record: Path,
        folder: Path,
        pattern: str,
        template: StateDict,
        location: Location = ANYWHERE,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        if not folder.is_dir():
            raise ModelError(f"checkpoints.path: {folder}: no such directory")
        self._record, self._folder, self._pattern = record, folder, pattern
        self._template, self._location, self._still_ours = template, location, still_ours
        self._entries = known(record)
        self._kept = False
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}  # size and time of a new file, and since when
        self._published: dict[int, Path] = {}
        self._names: list[str] = []  # present at the last look
        self._refuse_changed()

    @property
    def refs(self) -> list[CheckpointRef]:
        """The checkpoints, in the order of their indices."""
        return [
            CheckpointRef(e.index, e.index + 1, self._folder / e.path, e.sha256, key=e.key, prefix=e.prefix)
            for e in self._entries
            if e.index is not None
        ]

    @property
    def repeated(self) -> list[tuple[str, str]]:
        """Files that repeat earlier weights, each with the earlier file."""
        first = {e.weights_sha256: e.path for e in reversed(self._entries)}
        return [(e.path, first[e.weights_sha256]) for e in self._entries if e.index is None]

    @property
    def n_taken(self) -> int:
        """Taken files counted towards `checkpoints.expect`: those with a number in their name, or all if none has."""
        names = [entry.path for entry in self._entries]
        return len(_lasting(names) or names)

    @property
    def n_there(self) -> int:
        """Files present at the last look, taken or not."""
        return len(self._names)

    def no_more(self, expected: int) -> bool:
        """Whether the last look saw all of the `expected` checkpoints."""
        return self.n_taken >= expected or (not _lasting(self._names) and len(self._names) >= expected)

    def look(self, *, patient: bool, closing: bool = False) -> bool:
        """Take new files that are complete.

        Args:
            patient: whether a file that does not load may still be incomplete, for `_BROKEN_S` seconds.
            closing: whether to take overwritten files as well, because no more will come.

        Returns:
            Whether every file present has been taken.

        Raises:
            ModelError: a file does not load, or is no state_dict of plain tensors, or does not fit the network.
            RunConflict: a file with an index has changed.
        """
        self._refuse_changed()
        taken = {entry.path for entry in self._entries}
        waiting = False
        self._names = matching(self._folder, self._pattern, self._published)
        for name in self._names if closing else _lasting(self._names):
            if name in taken or not (self._folder / name).exists():  # removed since, or a dangling link
                continue
            still_s = self._still_s(name)
            entry = None
            if still_s >= _SETTLED_S:
                entry = self._take(name, patient=patient and still_s < _BROKEN_S)
            if entry is None:  # later files wait as well, or their order would depend on timing
                waiting = True
                break
            self._entries.append(entry)
            if self._kept:
                self.keep()
        return not waiting

    def keep(self) -> None:
        """Record the indices from now on, first those given so far. Before, nothing is written.

        A late write of a superseded driver can drop indices that its successor gave. They are given again in the same
        order. If an index then belongs to another file, its hash differs from the one its row began with, and the run
        stops.
        """
        self._kept = True
        self._still_ours()
        write_json(self._record, {"checkpoints": [asdict(entry) for entry in self._entries]})

    def settle(self) -> None:
        """Look until every file present has been taken."""
        while not self.look(patient=False, closing=True):
            time.sleep(0.1)

    def _still_s(self, name: str) -> float:
        """Seconds since a file last changed, as far as can be seen."""
        try:
            stat = (self._folder / name).stat()
        except FileNotFoundError:
            return 0.0
        now, state = time.monotonic(), (stat.st_size, stat.st_mtime_ns)
        if name not in self._seen or self._seen[name][0] != state:
            # A file that is old is complete. Clocks of other machines may differ by seconds, not by a minute.
            age = time.time() - stat.st_mtime
            self._seen[name] = state, now - (age if age > _BROKEN_S else 0.0)
        return now - self._seen[name][1]

    def _take(self, name: str, *, patient: bool) -> Entry | None:
        path = self._folder / name
        if path.suffix not in _SUFFIXES:
            raise ModelError(
                f"checkpoints.pattern: {self._pattern!r} matches {name}; checkpoints are {', '.join(_SUFFIXES)} files"
            )
        if path.is_dir():
            raise ModelError(
                f"{path}: a folder: a sharded checkpoint; consolidate it into one file, or leave it out with "
                "checkpoints.pattern"
            )
        most = _ROOM[0] * sum(value.nbytes for value in self._template.values()) + _ROOM[1]
        try:
            data, stat = read_regular(path, most), path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ModelError(
                f"{path}: {error.strerror}; a checkpoint of model.name is a regular file of at most {most:,} bytes; "
                "leave it out with checkpoints.pattern"
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != self._seen[name][0] or len(data) != stat.st_size:
            return None
        try:
            value = deserialize(data, path.suffix)
        except Unreadable as error:
            if classes := unsafe_classes(data, path.suffix):
                raise ModelError(_cannot_read(path, self._pattern, self._location.key, classes)) from error
            if patient:
                return None
            raise ModelError(
                f"{path}: truncated, or not a state_dict of plain tensors ({error}); save "
                "model.state_dict() alone, or remove the file"
            ) from error
        key, prefix = find_weights(name, value, self._template, self._location)
        state = within(value, key, prefix)
        check_fits(name, state, self._template)
        weights = _weights_sha256(state)
        step = value.get("global_step") if isinstance(value, Mapping) and path.suffix == LIGHTNING else None
        if step is not None and type(step) is not int:
            raise ModelError(f"{path}: global_step is a {type(step).__name__}; Lightning writes an integer; remove it")
        self._refuse_backwards(name, step)
        known = any(entry.weights_sha256 == weights for entry in self._entries)
        index = None if known else sum(entry.index is not None for entry in self._entries)
        return Entry(index, name, stat.st_size, stat.st_mtime_ns, sha256(data), weights, key, prefix, step)

    def _refuse_backwards(self, name: str, step: int | None) -> None:
        """Refuse a file that training wrote before the last one: names that begin with a metric are in no order."""
        if step is None or not _is_numbered(name):
            return
        steps = ((e.step, e.path) for e in reversed(self._entries) if e.step is not None and _is_numbered(e.path))
        last, earlier = next(steps, (step, ""))
        if step < last:
            raise ModelError(
                f"{name} (global_step {step}) comes after {earlier} (global_step {last}) by name; rename them so that "
                'the epoch or step comes first: ModelCheckpoint(filename="{epoch}-{step}") in Lightning'
            )

    def _refuse_changed(self) -> None:
        for position, entry in reversed(list(enumerate(self._entries))):
            path = self._folder / entry.path
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # only rows still to be scored need it, and say so
            if (stat.st_size, stat.st_mtime_ns) == (entry.size, entry.mtime_ns):
                continue
            if stat.st_size != entry.size or sha256(read_regular(path, entry.size)) != entry.sha256:
                if entry.index is None:  # last.ckpt, written again
                    del self._entries[position]
                    continue
                raise RunConflict(
                    f"{path}: changed after it became checkpoint {entry.index}; write every checkpoint to a file of "
                    "its own, and put the old one back or give another run directory (run=...)"
                )
            self._entries[position] = replace(entry, mtime_ns=stat.st_mtime_ns)  # copied or touched


def matching(folder: Path, pattern: str, published: dict[int, Path] | None = None) -> list[str]:
    """Names of the checkpoints of a directory, in order; empty when there is no such directory.

    In natural order, overwritten files last. A version that Lightning appends (`-v1`) is not a number.

    Args:
        published: cache of published paths by index, so that no manifest is read twice.
    """
    published = {} if published is None else published
    names = [name for name in names_in(folder) if fnmatch.fnmatchcase(name, pattern)]
    for index in checkpoints.committed(folder):
        if index not in published:
            published[index] = checkpoints.read(folder, index).path
        path = published[index]
        if fnmatch.fnmatchcase(path.name, pattern):
            names.append(str(path.relative_to(folder)))
    return sorted(names, key=lambda name: (not _is_numbered(name), _natural(name)))


def _lasting(names: list[str]) -> list[str]:
    """Without the files that training overwrites."""
    return [name for name in names if _is_numbered(name)]


def versions(names: list[str]) -> list[str]:
    """Names to which Lightning appended a version (`-v1`) because the plain name, also in `names`, existed."""
    return [
        name
        for name in names
        if _VERSION.search(Path(name).stem) and _VERSION.sub("", Path(name).stem) + Path(name).suffix in names
    ]


def _weights_sha256(state: StateDict) -> str:
    """Equal for equal names, types, shapes and values, in whatever file and however they were stored."""
    import torch

    h = hashlib.sha256()
    for key in sorted(state):
        value = state[key].contiguous()
        h.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            h.update(value.flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _cannot_read(path: Path, pattern: str, key: str | None, classes: list[str]) -> str:
    """Advice for a pickle with code: a command that converts the files and leaves them as they are."""
    name = key or STATE_DICT
    code = (
        f"import pathlib, torch; f = pathlib.Path({str(path.parent)!r}); o = f / 'converted'; o.mkdir(exist_ok=True); "
        f"w = lambda c: c.state_dict() if hasattr(c, 'state_dict') else c[{name!r}] if {name!r} in c else c['model']; "
        "[torch.save(w(torch.load(p, map_location='cpu', weights_only=False)), o / (p.stem + '.pt')) "
        f"for p in f.glob({pattern!r}) if p.is_file()]"
    )
    return (
        f"{path}: holds an object of {shown(classes[0], most=100)}, and loading that runs code of "
        "its writer, which distal never does; save model.state_dict() alone, or, if you trust it, "
        f"convert with: python -c {shlex.quote(code)} and set "
        f"checkpoints.path={path.parent / 'converted'} checkpoints.pattern=*.pt "
        "checkpoints.key=null"
    )


def _is_numbered(name: str) -> bool:
    path = Path(name)
    stem = _VERSION.sub("", path.stem)
    return path.parent != Path() or (any(each.isdecimal() for each in stem) and not _OVERWRITTEN.search(stem))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, a longer name after its prefix: epoch2, epoch2-v1, epoch10."""
    path = Path(name)
    parts = re.split(r"(\d+)", str(path.with_suffix("")))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part] + [(-1, 0, path.suffix)]


def known(record: Path) -> list[Entry]:
    """The files taken so far, in order."""
    try:
        return [Entry(**entry) for entry in read_json(record, required=("checkpoints",))["checkpoints"]]
    except FileNotFoundError:
        return []
