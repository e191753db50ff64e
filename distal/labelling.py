"""Labels from people: what is waited for, and the way out to annotators and back.

A batch is asked for by `distal run`, which writes `waiting.json` and ends. `export_labels` writes what is still open of
it; `import_labels` keeps the answers; the next `distal run` settles them and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distal.assignments import Assignments
from distal.errors import RunConflict, SourceError
from distal.hashing import mix64
from distal.labels import answers as kept
from distal.labels.answers import Answer, Policy, Settled, settle
from distal.labels.formats import Format, read_said, write_batch
from distal.ledger import LABELED, Ledger, write_labels
from distal.lists import find, label_reader, require_readable
from distal.pool import Pool
from distal.pool.images import write_png
from distal.records import JsonObject
from distal.runs import Run
from distal.selection import Selection
from distal.storage import read_json, write_json

SHOWN = 5  # of many mistakes


@dataclass(frozen=True)
class Waiting:
    """A batch that people have been asked for.

    Attributes:
        cycle: the cycle that selected it; -1 for the samples to start from.
        selection: the file with the batch.
        classes: names, in the order of their indices.
        needed: answers after which the run goes on.
    """

    cycle: int
    selection: Path
    classes: tuple[str, ...]
    needed: int
    policy: Policy
    pool: Path
    pool_sha256: str

    @classmethod
    def read(cls, run: Run) -> Waiting | None:
        """What a run waits for; None when it does not."""
        try:
            record = read_json(run.waiting)
        except FileNotFoundError:
            return None
        paths = {"selection": run.path / record["selection"], "pool": Path(record["pool"])}
        waiting = cls(**{**record, **paths, "classes": tuple(record["classes"])})
        return None if waiting.dest(run).exists() else waiting

    def write(self, run: Run) -> None:
        """Say it to everybody."""
        paths = {"selection": str(self.selection.relative_to(run.path)), "pool": str(self.pool)}
        write_json(run.waiting, {**vars(self), **paths, "classes": list(self.classes)})

    def dest(self, run: Run) -> Path:
        """The file that the labels of this batch will be in."""
        return run.initial if self.cycle < 0 else run.cycle(self.cycle).labels

    def settled(self, run: Run) -> Settled:
        """What has been answered and is in no label file yet, of this batch and of those before it."""
        known = run.ledger(before=self.cycle) if self.cycle >= 0 else Ledger.empty()
        done = set(known.indices.tolist()) | set(known.declined.tolist())
        return settle((a for a in kept.read(run.answers) if a.sample_index not in done), self.policy)

    def n_answered(self, settled: Settled) -> int:
        """How many of the batch are settled."""
        batch = set(Selection.read(self.selection).indices.tolist())
        return sum(answer.sample_index in batch for answer in settled.answers)

    def report(self, run: Run) -> JsonObject:
        """What `distal run` says while it waits."""
        settled = self.settled(run)
        return {
            "state": "waiting_for_labels",
            "run": str(run.path),
            "cycle": self.cycle,
            "selection": str(self.selection),
            "asked": len(Selection.read(self.selection)),
            "answered": self.n_answered(settled),
            "needed": self.needed,
            "conflicts": settled.conflicts,
            "next": f"distal labels export {run.path} --format csv --out batch.csv, then distal labels import",
        }

    def collect(self, run: Run) -> JsonObject | None:
        """Write the labels of the batch when enough has been answered; None when it has not.

        Late answers to earlier batches are taken along.
        """
        settled = self.settled(run)
        n = self.n_answered(settled)
        if n < self.needed:
            return None
        rows = settled.answers
        write_labels(
            self.dest(run),
            np.array([row.sample_index for row in rows], np.int64),
            [row.sample_id for row in rows],
            [row.label for row in rows],
            [row.annotator for row in rows],
            [row.status for row in rows],
        )
        n_labeled = sum(row.status == LABELED for row in rows)
        return {"n_answered": n, "n_labeled": n_labeled, "n_conflicts": len(settled.conflicts)}


def import_labels(path: Path, file: Path, *, allow_unasked: bool = False) -> JsonObject:
    """Keep what a file of annotators says. Nothing is kept when anything in it is wrong.

    Args:
        path: the run directory.
        allow_unasked: whether samples that no batch asked for are welcome.

    Raises:
        SourceError: the file cannot be used, or names a sample or a class that is not known.
        RunConflict: the run waits for no labels, or an answer differs from one that a cycle was trained with.
    """
    run = Run.open(path)
    waiting = _require_waiting(run)
    said = read_said(file)
    pool = Pool.open(waiting.pool).require(waiting.pool_sha256)
    names = list(dict.fromkeys(each.sample_id for each in said))
    indices = find(pool, names)
    place = dict(zip(names, indices.tolist(), strict=True))
    unknown = [name for name, index in place.items() if index < 0]
    if unknown:
        raise SourceError(f"{file}: {_some(unknown, 'sample')} not in the pool; nothing was imported")
    index_of = label_reader(waiting.classes, len(waiting.classes))
    labels = {each.label: index_of(each.label) for each in said if each.label is not None}
    strange = [name for name, label in labels.items() if label is None]
    if strange:
        raise SourceError(
            f"{file}: {_some(strange, 'label')} no class; the classes are {', '.join(waiting.classes)}; "
            "nothing was imported (a new class is appended to pool.classes)"
        )
    asked = run.asked()
    unasked = [name for name, index in place.items() if index not in asked]
    if unasked and not allow_unasked:
        raise SourceError(
            f"{file}: {_some(unasked, 'sample')} not asked for by any batch; nothing was imported; "
            "--allow-unasked takes them all the same"
        )
    require_readable(pool, names, indices, str(file))
    found = [
        Answer(
            place[each.sample_id],
            each.sample_id,
            None if each.label is None else labels[each.label],
            each.status,
            each.annotator,
        )
        for each in said
    ]
    _refuse_changes(run, waiting, found, file)
    written, n_new = kept.add(run.answers, found)
    settled = waiting.settled(run)
    return {
        "state": "complete",
        "run": str(run.path),
        "answers": len(found),
        "new": n_new,
        "file": str(written) if written else None,
        "answered": waiting.n_answered(settled),
        "needed": waiting.needed,
        "conflicts": settled.conflicts,
    }


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
    settled = {answer.sample_index for answer in waiting.settled(run).answers}
    open_ = [row for row in batch.table.to_pylist() if row["sample_index"] not in settled]
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
    return waiting


def _refuse_changes(run: Run, waiting: Waiting, found: Sequence[Answer], file: Path) -> None:
    """A cycle was trained with the answer that was there; it cannot be another now."""
    if waiting.cycle < 0:
        return
    trained = run.ledger(before=waiting.cycle)
    label_of = dict(zip(trained.indices.tolist(), trained.labels.tolist(), strict=True))
    changed = [
        a.sample_id for a in found if a.sample_index in label_of and a.label not in (None, label_of[a.sample_index])
    ]
    if changed:
        raise RunConflict(
            f"{file}: {_some(changed, 'sample')} labelled otherwise in a cycle that is trained; nothing was imported; "
            "leave these lines out"
        )


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{what}{'' if len(names) == 1 else 's'} {shown}{more} {verb}"


def _predictions(run: Run, waiting: Waiting, indices: NDArray[np.int64]) -> list[str | None]:
    """The class at the last checkpoint, by name; None where nothing was predicted."""
    if waiting.cycle < 0:
        return [None] * len(indices)
    assignments = Assignments.open(run.cycle(waiting.cycle).assignments)
    last = assignments.n_rows - 1
    found = [int(assignments.read(int(i), int(i) + 1, [last])[0, 0]) for i in indices]
    return [waiting.classes[label] if label < assignments.n_classes else None for label in found]
