"""A directory of checkpoints that something else writes: which file has which `checkpoint_index`.

An index is given once, in `checkpoints.json` of the cycle: in natural order (`epoch2` before `epoch10`) to the files
that are there when it is first looked at, then in the order of appearance. A file counts once its size and time have
stood still and it loads; one that changes afterwards is refused.

Weights count once. What is written over and over (`last.ckpt`, `best.pt`, names without a number) comes last, when no
more will come, and then mostly has the weights of another file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import itertools
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distal.artifacts import checkpoints
from distal.errors import ModelError, RunConflict, shown
from distal.records import CheckpointRef
from distal.storage import names_in, read_json, read_regular, sha256, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from distal.artifacts.checkpoints import StateDict

SETTLED_S = 2.0  # seconds that a file must have stood still
BROKEN_S = 60.0  # seconds after which a file that stands still and does not load is not being written any more
SUFFIXES = (".pt", ".pth", checkpoints.LIGHTNING, checkpoints.SAFETENSORS)
VERSION = re.compile(r"-v\d+$")
WRITTEN_OVER = re.compile(r"(?i)(?<![a-z])(best|last|latest|final|current)(?![a-z])")
DEEPEST = 16  # mappings in one another in which weights are looked for
ROOM = (16, 2**28)  # of a file: times the bytes of the network, for states of optimizers and averages, and bytes on top
STATE_DICT = "state_dict"  # where Lightning has it, and many a script


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was taken up.

    Attributes:
        index: None when an earlier file has the same weights.
        path: below the directory.
        size, mtime_ns: as long as they stay, it need not be hashed again.
        sha256: of the file.
        weights_sha256: of the weights in it.
        key, prefix: where they are; see `CheckpointRef`.
        step: optimizer steps taken, where the file tells.
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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the weights are in each file: `checkpoints.key` and `strip_prefix`; None: to be found."""

    key: str | None = None
    prefix: str | None = None


class ForeignCheckpoints:
    """The checkpoints of a directory.

    Args:
        record: `checkpoints.json`.
        folder, pattern: where they are, and which files are checkpoints.
        template: weights of the network that theirs must fit.
        layout: where in a file they are.
        still_ours: called before the record is replaced; raises when another driver has the run.

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
        layout: Layout = Layout(),
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        if not folder.is_dir():
            raise ModelError(f"checkpoints.path: {folder}: no such directory")
        self._record, self._folder, self._pattern = record, folder, pattern
        self._template, self._layout, self._still_ours = template, layout, still_ours
        self._entries = known(record)
        self._kept = False
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}  # size and time of a new file, and since when
        self._published: dict[int, Path] = {}
        self._names: list[str] = []  # there when it was last looked
        self._refuse_changed()

    @property
    def refs(self) -> list[CheckpointRef]:
        """Those that have an index, in order."""
        return [
            CheckpointRef(e.index, e.index + 1, self._folder / e.path, e.sha256, key=e.key, prefix=e.prefix)
            for e in self._entries
            if e.index is not None
        ]

    @property
    def repeated(self) -> list[tuple[str, str]]:
        """Files that were left out, each with the earlier one that has the same weights."""
        first = {e.weights_sha256: e.path for e in reversed(self._entries)}
        return [(e.path, first[e.weights_sha256]) for e in self._entries if e.index is None]

    @property
    def n_taken(self) -> int:
        """Files that count towards `checkpoints.expect`: those with a number that were taken up, or all if none has."""
        names = [entry.path for entry in self._entries]
        return len(_lasting(names) or names)

    @property
    def n_there(self) -> int:
        """Files that were there at the last look, taken up or not."""
        return len(self._names)

    def no_more(self, expected: int) -> bool:
        """Whether at the last look as many were there as will come."""
        return self.n_taken >= expected or (not _lasting(self._names) and len(self._names) >= expected)

    def look(self, *, patient: bool, closing: bool = False) -> bool:
        """Take up new files that are complete.

        Args:
            patient: whether a file that does not load may still be on its way for `BROKEN_S` seconds.
            closing: whether to take up those as well that are written over as long as more come.

        Returns:
            Whether every file that is there has been taken up.

        Raises:
            ModelError: a file does not load, or is no state_dict of plain tensors, or does not fit the network.
            RunConflict: a file with an index has changed.
        """
        self._refuse_changed()
        taken = {entry.path for entry in self._entries}
        waiting = False
        self._names = matching(self._folder, self._pattern, self._published)
        for name in self._names if closing else _lasting(self._names):
            if name in taken or not (self._folder / name).exists():  # removed since, or a link to what is
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
        """Write the indices down, those given so far and those to come. Until then nothing is written.

        A driver that is late all the same may take back indices that its successor gave. They are given again in the
        same order; should one belong to another file then, its weights are not those that its row was begun with, and
        the run stops.
        """
        self._kept = True
        self._still_ours()
        write_json(self._record, {"checkpoints": [asdict(entry) for entry in self._entries]})

    def settle(self) -> None:
        """Look until every file that is there has been taken up."""
        while not self.look(patient=False, closing=True):
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
        if path.is_dir():
            raise ModelError(
                f"{path}: a folder: a sharded checkpoint; consolidate it into one file, or leave it out with "
                "checkpoints.pattern"
            )
        most = ROOM[0] * sum(value.nbytes for value in self._template.values()) + ROOM[1]
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
            value = checkpoints.deserialize(data, path.suffix)
        except checkpoints.Unreadable as error:
            if objects := _objects(data, path.suffix):
                raise ModelError(_cannot_read(path, self._pattern, self._layout.key, objects)) from error
            if patient:
                return None
            raise ModelError(
                f"{path}: truncated, or not a state_dict of plain tensors ({error}); save "
                "model.state_dict() alone, or remove the file"
            ) from error
        key, prefix = find_weights(name, value, self._template, self._layout)
        state = checkpoints.within(value, key, prefix)
        check_fits(name, state, self._template)
        weights = _weights_sha256(state)
        step = value.get("global_step") if isinstance(value, Mapping) and path.suffix == checkpoints.LIGHTNING else None
        if step is not None and type(step) is not int:
            raise ModelError(f"{path}: global_step is a {type(step).__name__}; Lightning writes an integer; remove it")
        self._refuse_backwards(name, step)
        known = any(entry.weights_sha256 == weights for entry in self._entries)
        index = None if known else sum(entry.index is not None for entry in self._entries)
        return Entry(index, name, stat.st_size, stat.st_mtime_ns, sha256(data), weights, key, prefix, step)

    def _refuse_backwards(self, name: str, step: int | None) -> None:
        """Names that begin with a metric are in no order of training."""
        if step is None or not _is_numbered(name):
            return
        told = ((e.step, e.path) for e in reversed(self._entries) if e.step is not None and _is_numbered(e.path))
        last, earlier = next(told, (step, ""))
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
                continue  # whoever needs it will say so; rows that are scored do not
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

    In natural order, and those that are written over last. A version that Lightning appends (`-v1`) is no number.

    Args:
        published: what is known of published ones, so that no manifest is read twice.
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
    """Without those that are written over as long as training goes on."""
    return [name for name in names if _is_numbered(name)]


def versions(names: list[str]) -> list[str]:
    """Those that Lightning gave a version (`-v1`), because there was a file of that name, which is among them."""
    return [
        name
        for name in names
        if VERSION.search(Path(name).stem) and VERSION.sub("", Path(name).stem) + Path(name).suffix in names
    ]


def find_weights(name: str, value: object, template: StateDict, layout: Layout) -> tuple[str | None, str]:
    """Where in a file the weights are: key and prefix, as `CheckpointRef` has them.

    Args:
        value: what the file holds.
        template: weights of the network that they are for.

    Raises:
        ModelError: there is nothing under `layout.key`, or no key begins with `layout.prefix`, or several could be
            meant.
    """
    key = layout.key
    if key is None and isinstance(value, Mapping) and not _holds_tensors(value):
        if STATE_DICT in value:
            key = STATE_DICT
        elif len(fitting := _fitting(value, template)) == 1:
            key = fitting[0]
        else:
            known = f"; set checkpoints.key to {_some(fitting, 'or')}" if fitting else ", and none fits model.name"
            raise ModelError(f"{name}: not a state_dict of plain tensors (it has {_first(value)}){known}")
    try:
        state = checkpoints.within(value, key, "")
    except KeyError:
        fitting = _fitting(value, template)
        known = f"{_some(fitting, 'or')} would fit" if fitting else "nothing in it fits model.name: set it to null"
        raise ModelError(f"checkpoints.key: {name} has no {key!r}; {known}") from None
    if not isinstance(state, Mapping):
        return key, layout.prefix or ""
    if layout.prefix is not None:
        if not any(str(each).startswith(layout.prefix) for each in state):
            raise ModelError(
                f"checkpoints.strip_prefix: no key of {name} begins with {layout.prefix!r}: {_first(state)}"
            )
        return key, layout.prefix
    prefixes = _prefixes(state, template)
    if len(prefixes) > 1:
        raise ModelError(
            f"{name}: has weights for this network more than once, under {_some(prefixes, 'and')}; set "
            "checkpoints.strip_prefix to one of them"
        )
    return key, prefixes[0] if prefixes else ""


def _holds_tensors(value: Mapping[Any, object]) -> bool:
    import torch

    return bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def _fitting(value: object, template: StateDict) -> list[str]:
    """The keys, with dots between nested ones, below which there is everything that the network has."""
    found: list[str] = []
    fits: dict[int, bool] = {}  # of each mapping, looked at once: it may be held in many places, also by itself
    waiting: list[tuple[tuple[str, ...], object]] = [((), value)]
    while waiting:
        place, each = waiting.pop()
        if not isinstance(each, Mapping):
            continue
        is_new = id(each) not in fits
        if is_new:
            fits[id(each)] = bool(place) and _holds_tensors(each) and bool(_prefixes(each, template))
        if fits[id(each)]:
            found.append(".".join(place))
        elif is_new and len(place) < DEEPEST:
            waiting += [
                ((*place, name), inner) for name, inner in reversed(list(each.items())) if isinstance(name, str)
            ]
    return found


def _prefixes(state: Mapping[Any, object], template: StateDict) -> list[str]:
    """The prefixes under which there is everything that the network has; the empty one wins."""
    if all(key in state for key in template):
        return [""]
    first = next(iter(template))
    candidates = [str(key).removesuffix(first) for key in state if str(key).endswith(f".{first}")]
    return [prefix for prefix in candidates if all(prefix + key in state for key in template)]


def _first(keys: Mapping[Any, object]) -> str:
    shown = [_short(key) for key in itertools.islice(keys, 5)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")


def _some(names: Sequence[str], word: str) -> str:
    return f" {word} ".join(map(_short, names[:4]))


def _short(value: object) -> str:
    """A value from a stranger's file for a message."""
    return shown(value if isinstance(value, str | int) else type(value).__name__, most=100)


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


def _objects(data: bytes, suffix: str) -> list[str]:
    """Classes of a pickle that are not plain values and that only trust in its writer would run."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if suffix == checkpoints.SAFETENSORS:
        return []
    try:
        checkpoints.check_sizes(data)
        return sorted(get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # not even a pickle: the caller tells what is wrong with it
        return []


def _cannot_read(path: Path, pattern: str, key: str | None, objects: list[str]) -> str:
    """What to do with a pickle of more than plain values; the command leaves the files as they are."""
    name = key or STATE_DICT
    code = (
        f"import pathlib, torch; f = pathlib.Path({str(path.parent)!r}); o = f / 'converted'; o.mkdir(exist_ok=True); "
        f"w = lambda c: c.state_dict() if hasattr(c, 'state_dict') else c[{name!r}] if {name!r} in c else c['model']; "
        "[torch.save(w(torch.load(p, map_location='cpu', weights_only=False)), o / (p.stem + '.pt')) "
        f"for p in f.glob({pattern!r}) if p.is_file()]"
    )
    return (
        f"{path}: holds an object of {_short(objects[0])}, and loading that runs code of its writer, which distal "
        f"never does; save model.state_dict() alone, or, if you trust it, convert with: python -c {shlex.quote(code)} "
        f"and set checkpoints.path={path.parent / 'converted'} checkpoints.pattern=*.pt checkpoints.key=null"
    )


def check_fits(name: str, state: object, template: StateDict) -> None:
    """Raise ModelError, naming the first key that is missing, unexpected or of another shape."""
    import torch

    if not isinstance(state, dict) or any(not isinstance(value, torch.Tensor) for value in state.values()):
        kinds = sorted({type(value).__name__ for value in state.values()}) if isinstance(state, dict) else []
        found = f"holds {', '.join(kinds)}" if kinds else f"is a {type(state).__name__}"
        raise ModelError(f"{name}: not a state_dict of plain tensors (it {found}); save model.state_dict() alone")
    if unnamed := [key for key in state if not isinstance(key, str)]:
        raise ModelError(
            f"{name}: not a state_dict: its keys must be names, and {_short(unnamed[0])} is a "
            f"{type(unnamed[0]).__name__}; save model.state_dict() alone"
        )
    missing = [key for key in template if key not in state]
    unexpected = [key for key in state if key not in template]
    if missing or unexpected:
        told = [
            f"{what} {_short(keys[0])}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
        ]
        raise ModelError(f"{name}: its keys do not fit model.name: {', '.join(told)}{_hint(missing, unexpected)}")
    for key, value in template.items():
        _check_fits(name, key, state[key], value)
    for key in template:  # only now: a value may be looked at whose place is one of the network's
        if not torch.isfinite(state[key]).all():
            raise ModelError(
                f"{name}: {key} has values that are not finite: training diverged; leave the file out with "
                "checkpoints.pattern, or remove it"
            )


def _check_fits(name: str, key: str, found: Tensor, wanted: Tensor) -> None:
    """Kind, shape and dtype of one tensor; not its values."""
    import torch

    if odd := checkpoints.oddity(found):
        raise ModelError(f"{name}: {key} is {odd}; save model.state_dict() alone, with plain tensors")
    if found.shape != wanted.shape:
        hint = ""
        if found.shape[1:] == wanted.shape[1:]:
            hint = f"; set model.num_classes={found.shape[0]} if these are its classes"
        elif key.startswith("conv1."):
            hint = "; set model.stem"
        raise ModelError(f"{name}: {key} has shape {tuple(found.shape)}, the network needs {tuple(wanted.shape)}{hint}")
    able = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    if not wanted.is_floating_point():  # such as a count of batches, which averaging makes a fraction
        able |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
    if found.dtype not in able and found.dtype != wanted.dtype:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (found.dtype, wanted.dtype)]
        raise ModelError(f"{name}: {key} is {dtypes[0]}, and the network needs {dtypes[1]}; save it as that")


def _hint(missing: list[str], unexpected: list[str]) -> str:
    """When all keys differ by one prefix, which."""
    for key in unexpected:
        prefix = key.removesuffix(missing[0]) if missing and key.endswith(missing[0]) else ""
        if prefix and all(prefix + wanted in unexpected for wanted in missing):
            return f"; every key begins with {_short(prefix)!r}: save it without that prefix"
    return ""


def _is_numbered(name: str) -> bool:
    path = Path(name)
    stem = VERSION.sub("", path.stem)
    return path.parent != Path() or (any(each.isdecimal() for each in stem) and not WRITTEN_OVER.search(stem))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers by value, and what is longer after what it begins with: epoch2, epoch2-v1, epoch10."""
    path = Path(name)
    parts = re.split(r"(\d+)", str(path.with_suffix("")))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part] + [(-1, 0, path.suffix)]


def known(record: Path) -> list[Entry]:
    """The files that have an index, in order."""
    try:
        return [Entry(**entry) for entry in read_json(record, required=("checkpoints",))["checkpoints"]]
    except FileNotFoundError:
        return []
