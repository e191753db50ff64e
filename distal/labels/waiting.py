"""Labels from people: the batch that a run waits for, its export to annotators, and their answers.

`distal run` asks for a batch: it writes `waiting.json` and ends. `export_labels` writes the samples of
the batch that are still open; `import_labels` keeps the answers; the next `distal run` settles them
and continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distal.artifacts.assignments import Assignments
from distal.artifacts.ledger import LABELED, Ledger, too_few, write_labels
from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.errors import RunConflict, SourceError, shown
from distal.hashing import mix64
from distal.labels import answers as kept
from distal.labels.answers import Added, Answer, Policy, Resolution, settle
from distal.labels.formats import (
    AnnotationRow,
    Format,
    read_annotations,
    unsure_word,
    write_batch,
)
from distal.pool import Pool
from distal.pool.images import write_png
from distal.pool.sample_files import find, label_reader, require_readable
from distal.records import Result
from distal.storage import read_json, write_json

_SHOWN = 5  # of many mistakes


@dataclass(frozen=True, kw_only=True)
class WaitingResult(Result):
    """How far people are with a batch. After a repair took the batch away, counts are None.

    Attributes:
        cycle: the cycle that selected it; -1 for the samples to start from.
        selection: the file with the batch.
        needed: answers after which the run continues.
        asked: samples in the batch.
        answered: samples of it that are settled.
        ready: whether the run can continue.
        short: why the labels do not suffice for the first training; None when they do.
        conflicts: `sample_id` of samples that annotators disagree on.
        next: advice.
    """

    state: Literal["waiting_for_labels"] = "waiting_for_labels"
    run: Path
    cycle: int
    selection: Path
    needed: int
    asked: int | None = None
    answered: int | None = None
    ready: bool = False
    short: str | None = None
    conflicts: list[str] = field(default_factory=list)
    next: str


@dataclass(frozen=True, kw_only=True)
class ImportResult(Result):
    """The result of importing a file of answers.

    Attributes:
        answers: in the file.
        new: of them, those that were not known.
        file: in the log; None when nothing is new.
        changed: `sample_id` of samples whose annotator had answered otherwise before.
        too_late: of samples that a trained cycle has with another label, which stays.
        answered, needed, conflicts: see `WaitingResult`.
    """

    state: Literal["complete"] = "complete"
    run: Path
    answers: int
    new: int
    file: Path | None
    changed: list[str]
    too_late: list[str]
    answered: int
    needed: int
    conflicts: list[str]


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """The files that were written for annotators.

    Attributes:
        images: folder of the copied images.
    """

    state: Literal["complete"] = "complete"
    run: Path
    format: Format
    samples: int
    files: list[Path]
    images: Path | None


@dataclass(frozen=True)
class Waiting:
    """A batch that people were asked for, `waiting.json`.

    Attributes:
        cycle: the cycle that selected it; -1 for the samples to start from.
        selection: the file with the batch.
        classes: names, in the order of their indices.
        needed: answers after which the run continues.
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
        """The batch that a run waits for; None when it waits for none."""
        names = tuple(f.name for f in fields(cls))
        try:
            record = read_json(run.waiting, required=names)
        except FileNotFoundError:
            return None
        paths = {"selection": run.path / record["selection"], "pool": Path(record["pool"])}
        waiting = cls(**{name: record[name] for name in names} | {**paths, "classes": tuple(record["classes"])})
        return None if waiting.dest(run).exists() else waiting

    def write(self, run: Run) -> None:
        """Write `waiting.json`. For the holder of the lease, who checks it right before.

        A writer that is late all the same names a batch that has its labels: then the run waits for
        nothing, an import is refused, and the next `distal run` names the right batch again.
        """
        paths = {"selection": str(self.selection.relative_to(run.path)), "pool": str(self.pool)}
        write_json(run.waiting, {**vars(self), **paths, "classes": list(self.classes)})

    def dest(self, run: Run) -> Path:
        """The label file of this batch."""
        return run.initial if self.cycle < 0 else run.cycle(self.cycle).labels

    def remade(self, run: Run) -> str | None:
        """After a repair, the batch to select again, in one line of advice; None when all are there."""
        for index in range(self.cycle + 1):
            if not run.cycle(index).is_complete("select"):
                return f"{run.path}: the batch of cycle {index} is made again after a repair; call `distal run` first"
        return None

    def known(self, run: Run) -> Ledger:
        """The ledger before this batch."""
        return run.ledger(before=self.cycle) if self.cycle >= 0 else Ledger.empty()

    def settled(self, run: Run) -> Resolution:
        """The settled answers, to this batch and to earlier ones, that no label file has yet.

        For a sample that was declined in an earlier batch, a label is new; for one with a label
        nothing is new.
        """
        known = self.known(run)
        labelled, declined = set(known.indices.tolist()), set(known.declined.tolist())
        settled = settle((a for a in kept.read(run.answers) if a.sample_index not in labelled), self.policy)
        new = [a for a in settled.answers if a.status == LABELED or a.sample_index not in declined]
        return Resolution(new, settled.conflicts)

    def n_answered(self, settled: Resolution) -> int:
        """Samples of the batch that are settled."""
        batch = set(Selection.read(self.selection).indices.tolist())
        return sum(answer.sample_index in batch for answer in settled.answers)

    def short(self, settled: Resolution) -> str | None:
        """Why enough answers are too few labels for the first training; None when they suffice."""
        if not self.workers or self.n_answered(settled) < self.needed:
            return None
        return too_few([answer.label for answer in settled.answers if answer.label is not None], self.workers)

    def ready(self, settled: Resolution) -> bool:
        """Whether the run can continue."""
        return self.n_answered(settled) >= self.needed and self.short(settled) is None

    def report(self, run: Run) -> WaitingResult:
        """How far people are with the batch."""
        remade = self.remade(run)
        result = WaitingResult(
            run=run.path,
            cycle=self.cycle,
            selection=self.selection,
            needed=self.needed,
            next=remade or f"distal labels export {run.path} --format csv --out batch.csv, then distal labels import",
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
        """Write the labels of the batch if enough of it is answered; return whether it is.

        Late answers to earlier batches go into the same file.
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


def import_labels(path: Path, file: Path, *, annotator: str | None = None, allow_unasked: bool = False) -> ImportResult:
    """Import a file of answers. Nothing is kept when anything in it is wrong.

    Args:
        path: the run directory.
        annotator: of the answers that name nobody; None: the file, by its name, is an annotator.
        allow_unasked: accept answers to samples that no batch asked for.

    Raises:
        SourceError: the file cannot be used, names an unknown sample or class, or contradicts itself.
        RunConflict: the run waits for no labels.
    """
    run = Run.open(path)
    waiting = _require_waiting(run)
    rows = read_annotations(file, unsure_word(waiting.classes))
    pool = Pool.open(waiting.pool).require(waiting.pool_sha256)
    places = _places(run, pool, rows, file, allow_unasked)
    labels = _labels(waiting.classes, rows, file)
    source, given = _utf8(file.name), _utf8((annotator or "").strip())
    imported = [
        Answer(
            sample_index=places[row.sample_id],
            sample_id=row.sample_id,
            label=None if row.label is None else labels[row.label],
            status=row.status,
            annotator=row.annotator or given or source,
            time=row.time,
            file=source,
            row=row.row,
        )
        for row in rows
    ]
    if not given:
        unnamed = [answer for answer, row in zip(imported, rows, strict=True) if not row.annotator]
        _refuse_contradictions(file, unnamed)
    added = kept.add(run.answers, imported)
    settled = waiting.settled(run)
    return ImportResult(
        run=run.path,
        answers=len(imported),
        new=len(added.new),
        file=added.file,
        changed=[answer.sample_id for answer in added.changed],
        too_late=_too_late(waiting.known(run), added),
        answered=waiting.n_answered(settled),
        needed=waiting.needed,
        conflicts=settled.conflicts,
    )


def _places(run: Run, pool: Pool, rows: Sequence[AnnotationRow], file: Path, allow_unasked: bool) -> dict[str, int]:
    """`sample_index` of each sample that a file names; raises SourceError for one that is refused."""
    names = list(dict.fromkeys(row.sample_id for row in rows))
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


def _labels(classes: Sequence[str], rows: Sequence[AnnotationRow], file: Path) -> dict[str, int]:
    """The class index of each label in a file."""
    index_of = label_reader(classes, len(classes))
    labels = {row.label: index_of(row.label) for row in rows if row.label is not None}
    strange = [name for name, label in labels.items() if label is None]
    if strange:
        raise SourceError(
            f"{file}: {_some(strange, 'label')} no class; the classes are {', '.join(classes)}; "
            "nothing was imported (a new class is appended to pool.classes)"
        )
    return {name: label for name, label in labels.items() if label is not None}


def _refuse_contradictions(file: Path, unnamed: Sequence[Answer]) -> None:
    """Refuse two answers to one sample without an annotator: nothing says which of them counts."""
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
    """Samples whose new answers stay unused, because a trained cycle has another label."""
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
) -> ExportResult:
    """Write the samples of the batch that are still open, in a seeded random order.

    Declined samples are asked again when the whole batch is answered and has too few labels for the
    first training.

    Args:
        copy_images: folder for PNG files of the images; a pool packed from Parquet has no URLs.
        url_map: (from, to): a beginning of every URL or path, and its replacement for annotators.
        predictions: let Label Studio pre-select the class of the last checkpoint. It biases annotators.

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
    predicted = _predictions(run, waiting, indices) if predictions else None
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
        entries.append(entry | ({"prediction": predicted[position]} if predicted else {}))
    files = write_batch(out, fmt, entries, waiting.classes)
    return ExportResult(run=run.path, format=fmt, samples=len(entries), files=list(files), images=copy_images)


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
    """A text of the command line, which may hold bytes that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _some(names: Sequence[str], what: str) -> str:
    some = ", ".join(shown(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{what}{'' if len(names) == 1 else 's'} {some}{more} {verb}"


def _predictions(run: Run, waiting: Waiting, indices: NDArray[np.int64]) -> list[str | None]:
    """The name of the class at the last checkpoint; None where nothing was predicted."""
    if waiting.cycle < 0:
        return [None] * len(indices)
    assignments = Assignments.open(run.cycle(waiting.cycle).assignments)
    last = assignments.n_rows - 1
    votes = [int(assignments.read(int(i), int(i) + 1, [last])[0, 0]) for i in indices]
    return [waiting.classes[vote] if vote < assignments.n_classes else None for vote in votes]
