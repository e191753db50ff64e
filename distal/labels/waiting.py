"""Labels from people: what is waited for, and the way out to annotators and back.

A batch is asked for by `distal run`, which writes `waiting.json` and ends. `export_labels` writes what is still open of
it; `import_labels` keeps the answers; the next `distal run` settles them and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import Assignments
from distal.artifacts.ledger import LABELED, Ledger, too_few, write_labels
from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.errors import RunConflict, SourceError, shown
from distal.hashing import mix64
from distal.labels import answers as kept
from distal.labels.answers import Added, Answer, Policy, Settled, settle
from distal.labels.formats import Format, Said, read_said, unsure_word, write_batch
from distal.pool import Pool
from distal.pool.images import write_png
from distal.pool.sample_files import find, label_reader, require_readable
from distal.records import JsonObject, Result
from distal.storage import read_json, write_json

SHOWN = 5  # of many mistakes


@dataclass(frozen=True)
class WaitingResult(Result):
    """A batch that people are to label.

    Attributes:
        state: waiting_for_labels.
        cycle: the cycle that selected it; -1 for the samples to start from.
        selection: the file with the batch.
        needed: answers after which the run goes on.
        asked, answered: samples of the batch, and those that are settled; None after a repair that took
            the batch away.
        ready: whether the run can go on.
        short: why the labels do not suffice for the first training, once enough is answered.
        conflicts: samples on which annotators disagree.
        next: what to do, in one line.
    """

    state: str
    run: Path
    cycle: int
    selection: Path
    needed: int
    asked: int | None
    answered: int | None
    ready: bool
    short: str | None
    conflicts: list[str]
    next: str


@dataclass(frozen=True)
class Waiting:
    """A batch that people have been asked for.

    Attributes:
        cycle: the cycle that selected it; -1 for the samples to start from.
        selection: the file with the batch.
        classes: names, in the order of their indices.
        needed: answers after which the run goes on.
        workers: the ranks that the first training needs labels for; 0 when earlier cycles have labels.
    """

    cycle: int
    selection: Path
    classes: tuple[str, ...]
    needed: int
    workers: int
    policy: Policy
    pool: Path
    pool_sha256: str

    @classmethod
    def read(cls, run: Run) -> Waiting | None:
        """What a run waits for; None when it does not."""
        names = tuple(field.name for field in fields(cls))
        try:
            record = read_json(run.waiting, required=names)
        except FileNotFoundError:
            return None
        paths = {"selection": run.path / record["selection"], "pool": Path(record["pool"])}
        waiting = cls(**{name: record[name] for name in names} | {**paths, "classes": tuple(record["classes"])})
        return None if waiting.dest(run).exists() else waiting

    def write(self, run: Run) -> None:
        """Say it to everybody. For the holder of the lease, who looks right before.

        A writer that is late all the same names a batch that has its labels: then the run waits for nothing, an import
        is refused, and the next `distal run` names the right one again.
        """
        paths = {"selection": str(self.selection.relative_to(run.path)), "pool": str(self.pool)}
        write_json(run.waiting, {**vars(self), **paths, "classes": list(self.classes)})

    def dest(self, run: Run) -> Path:
        """The file that the labels of this batch will be in."""
        return run.initial if self.cycle < 0 else run.cycle(self.cycle).labels

    def remade(self, run: Run) -> str | None:
        """After a repair, which batch the next `distal run` selects again, in one line; None when all are there."""
        for index in range(self.cycle + 1):
            if run.cycle(index).marker("select") is None:
                return f"{run.path}: the batch of cycle {index} is made again after a repair; call `distal run` first"
        return None

    def known(self, run: Run) -> Ledger:
        """What the label files of earlier batches say."""
        return run.ledger(before=self.cycle) if self.cycle >= 0 else Ledger.empty()

    def settled(self, run: Run) -> Settled:
        """What the answers come to that is in no label file yet, of this batch and of those before it.

        A label of a sample that was declined in an earlier batch is new; nothing is new for one that has a label.
        """
        known = self.known(run)
        labelled, declined = set(known.indices.tolist()), set(known.declined.tolist())
        settled = settle((a for a in kept.read(run.answers) if a.sample_index not in labelled), self.policy)
        new = [a for a in settled.answers if a.status == LABELED or a.sample_index not in declined]
        return Settled(new, settled.conflicts)

    def n_answered(self, settled: Settled) -> int:
        """How many of the batch are settled."""
        batch = set(Selection.read(self.selection).indices.tolist())
        return sum(answer.sample_index in batch for answer in settled.answers)

    def short(self, settled: Settled) -> str | None:
        """Why the labels do not suffice for the first training, once enough is answered; None when they do."""
        if not self.workers or self.n_answered(settled) < self.needed:
            return None
        return too_few([answer.label for answer in settled.answers if answer.label is not None], self.workers)

    def ready(self, settled: Settled) -> bool:
        """Whether the run can go on."""
        return self.n_answered(settled) >= self.needed and self.short(settled) is None

    def report(self, run: Run) -> WaitingResult:
        """What `distal run` reports while the run waits."""
        remade = self.remade(run)
        export = f"distal labels export {run.path} --format csv --out batch.csv"
        result = WaitingResult(
            state="waiting_for_labels",
            run=run.path,
            cycle=self.cycle,
            selection=self.selection,
            needed=self.needed,
            asked=None,
            answered=None,
            ready=False,
            short=None,
            conflicts=[],
            next=remade or f"{export}, then distal labels import",
        )
        if remade is not None:
            return result
        settled = self.settled(run)
        return replace(
            result,
            asked=len(Selection.read(self.selection)),
            answered=self.n_answered(settled),
            ready=self.ready(settled),
            short=self.short(settled),
            conflicts=settled.conflicts,
        )

    def collect(self, run: Run) -> bool:
        """Write the labels of the batch, when enough of it is answered; returns whether it is.

        Late answers to earlier batches are taken along.
        """
        settled = self.settled(run)
        if not self.ready(settled):
            return False
        rows = settled.answers
        write_labels(
            self.dest(run),
            np.array([row.sample_index for row in rows], np.int64),
            [row.sample_id for row in rows],
            [row.label for row in rows],
            [row.annotator for row in rows],
            [row.status for row in rows],
        )
        return True


def import_labels(path: Path, file: Path, *, annotator: str | None = None, allow_unasked: bool = False) -> JsonObject:
    """Keep what a file of annotators says. Nothing is kept when anything in it is wrong.

    Args:
        path: the run directory.
        annotator: who gave the answers that name nobody; None: the file, by its name, is an annotator of its own.
        allow_unasked: whether samples that no batch asked for are welcome.

    Returns:
        Among others `new`, the number of answers that were not known; `changed`, the samples whose annotator said
        something else before; and `too_late`, those that a trained cycle has with another label, which stays.

    Raises:
        SourceError: the file cannot be used, names a sample or a class that is not known, or contradicts itself.
        RunConflict: the run waits for no labels.
    """
    run = Run.open(path)
    waiting = _require_waiting(run)
    said = read_said(file, unsure_word(waiting.classes))
    pool = Pool.open(waiting.pool).require(waiting.pool_sha256)
    places = _places(run, pool, said, file, allow_unasked)
    labels = _labels(waiting.classes, said, file)
    source, given = _utf8(file.name), _utf8((annotator or "").strip())
    found = [
        Answer(
            sample_index=places[each.sample_id],
            sample_id=each.sample_id,
            label=None if each.label is None else labels[each.label],
            status=each.status,
            annotator=each.annotator or given or source,
            time=each.time,
            file=source,
            row=each.row,
        )
        for each in said
    ]
    if not given:
        _refuse_contradictions(file, [answer for answer, each in zip(found, said, strict=True) if not each.annotator])
    added = kept.add(run.answers, found)
    settled = waiting.settled(run)
    return {
        "state": "complete",
        "run": str(run.path),
        "answers": len(found),
        "new": len(added.new),
        "file": str(added.file) if added.file else None,
        "changed": [answer.sample_id for answer in added.changed],
        "too_late": _too_late(waiting.known(run), added),
        "answered": waiting.n_answered(settled),
        "needed": waiting.needed,
        "conflicts": settled.conflicts,
    }


def _places(run: Run, pool: Pool, said: Sequence[Said], file: Path, allow_unasked: bool) -> dict[str, int]:
    """`sample_index` of each sample that a file names; raises SourceError for one that is not welcome."""
    names = list(dict.fromkeys(each.sample_id for each in said))
    indices = find(pool, names)
    places = dict(zip(names, indices.tolist(), strict=True))
    unknown = [name for name, index in places.items() if index < 0]
    if unknown:
        raise SourceError(f"{file}: {_some(unknown, 'sample')} not in the pool; nothing was imported")
    asked = run.asked()
    unasked = [name for name, index in places.items() if index not in asked]
    if unasked and not allow_unasked:
        raise SourceError(
            f"{file}: {_some(unasked, 'sample')} not asked for by any batch; nothing was imported; "
            "--allow-unasked takes them all the same"
        )
    require_readable(pool, names, indices, str(file))
    return places


def _labels(classes: Sequence[str], said: Sequence[Said], file: Path) -> dict[str, int]:
    """The class index of each label that a file gives."""
    index_of = label_reader(classes, len(classes))
    labels = {each.label: index_of(each.label) for each in said if each.label is not None}
    strange = [name for name, label in labels.items() if label is None]
    if strange:
        raise SourceError(
            f"{file}: {_some(strange, 'label')} no class; the classes are {', '.join(classes)}; "
            "nothing was imported (a new class is appended to pool.classes)"
        )
    return {name: label for name, label in labels.items() if label is not None}


def _refuse_contradictions(file: Path, unnamed: Sequence[Answer]) -> None:
    """Two answers to one sample by nobody knows whom: which of them counts cannot be told."""
    first: dict[str, Answer] = {}
    for answer in unnamed:
        before = first.setdefault(answer.sample_id, answer)
        if answer.differs_from(before):
            raise SourceError(
                f"{file}: rows {before.row} and {answer.row} answer sample {shown(answer.sample_id)} differently, and "
                "no annotator is named; nothing was imported; keep one of them, add a column annotator, or, when one "
                "person changed their mind, give --annotator NAME"
            )


def _too_late(known: Ledger, added: Added) -> list[str]:
    """The samples of new answers that are not used: a trained cycle has another label."""
    label_of = dict(zip(known.indices.tolist(), known.labels.tolist(), strict=True))
    changed = set(added.changed)
    late = [a for a in added.new if a.sample_index in label_of and a.label != label_of[a.sample_index]]
    return list(dict.fromkeys(a.sample_id for a in late if a.status == LABELED or a in changed))


def export_labels(
    path: Path,
    out: Path,
    *,
    fmt: Format = "csv",
    copy_images: Path | None = None,
    url_map: tuple[str, str] | None = None,
    predictions: bool = False,
) -> JsonObject:
    """Write what is still to be answered of the batch, in a seeded random order.

    Declined samples are asked again when all of the batch is answered, and its labels do not suffice to begin with.

    Args:
        copy_images: folder to write the images to, as PNG files; a pool that was packed from Parquet has no URLs.
        url_map: (from, to): a beginning of every URL or path, and what annotators see in its place.
        predictions: have Label Studio pre-select what the last checkpoint says. It biases annotators.

    Raises:
        RunConflict: the run waits for no labels.
    """
    run = Run.open(path)
    waiting = _require_waiting(run)
    pool = Pool.open(waiting.pool).require(waiting.pool_sha256)
    batch = Selection.read(waiting.selection)
    settled = waiting.settled(run)
    ask_again = waiting.short(settled) is not None
    done = {a.sample_index for a in settled.answers if a.status == LABELED or not ask_again}
    open_ = [row for row in batch.table.to_pylist() if row["sample_index"] not in done]
    keys = mix64("export", np.array([row["sample_index"] for row in open_], np.int64))
    rows = [open_[i] for i in np.argsort(keys)]
    indices = np.array([row["sample_index"] for row in rows], np.int64)
    said = _predictions(run, waiting, indices) if predictions else None
    if copy_images is not None:
        for index in indices.tolist():
            write_png(pool, index, copy_images / f"{index}.png")
    entries: list[dict[str, Any]] = []
    for position, row in enumerate(rows):
        image = str((copy_images / f"{row['sample_index']}.png").absolute()) if copy_images else row["uri"]
        if url_map is not None and image.startswith(url_map[0]):
            image = url_map[1] + image.removeprefix(url_map[0])
        scores = {name: value for name, value in row.items() if isinstance(value, float)}
        entry = {"sample_id": row["sample_id"], "image": image, "uri": row["uri"], **scores}
        entries.append(entry | ({"prediction": said[position]} if said else {}))
    files = write_batch(out, fmt, entries, waiting.classes)
    return {
        "state": "complete",
        "run": str(run.path),
        "format": fmt,
        "samples": len(entries),
        "files": [str(each) for each in files],
        "images": str(copy_images) if copy_images else None,
    }


def _require_waiting(run: Run) -> Waiting:
    waiting = Waiting.read(run)
    if waiting is None:
        raise RunConflict(
            f"{run.path}: waits for no labels; `distal run` with label.oracle=files selects a batch first"
        )
    remade = waiting.remade(run)
    if remade is not None:
        raise RunConflict(remade)
    return waiting


def _utf8(text: str) -> str:
    """A text of the command line, which may have bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


def _some(names: Sequence[str], what: str) -> str:
    some = ", ".join(shown(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{what}{'' if len(names) == 1 else 's'} {some}{more} {verb}"


def _predictions(run: Run, waiting: Waiting, indices: NDArray[np.int64]) -> list[str | None]:
    """The class at the last checkpoint, by name; None where nothing was predicted."""
    if waiting.cycle < 0:
        return [None] * len(indices)
    assignments = Assignments.open(run.cycle(waiting.cycle).assignments)
    last = assignments.n_rows - 1
    found = [int(assignments.read(int(i), int(i) + 1, [last])[0, 0]) for i in indices]
    return [waiting.classes[label] if label < assignments.n_classes else None for label in found]
