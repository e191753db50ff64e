"""Is what is stored what was written? `distal verify` reads everything, `distal repair` deletes what is damaged.

Nothing that a run names is imported: a run directory may come from anybody, and a strategy or a model of the user's own
may not be importable here. How many rows a cycle has is read from what was written, never worked out again.

What is deleted can be made again from what is left: the next `distal run` or `distal score` refills it, and a selection
that was made before must come out again, or it stops. What cannot be made again is named and left alone.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TypeVar

from distal.artifacts import checkpoints
from distal.artifacts.assignments import ELIGIBLE, Assignments, begun_path, record_path
from distal.artifacts.lease import Lease
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import EXPECTED, STAGES, Analysis, Cycle, Run, Staged
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.config import Config, ScoreConfig
from distal.errors import Damage, RunConflict, UnknownFormat, one_line
from distal.hashing import digest
from distal.labels import answers
from distal.pool import Pool
from distal.pool.images import IMAGES, MANIFEST, SAMPLES, begin_content, parts
from distal.progress import Display, Silent
from distal.records import JsonObject, Progress
from distal.score.eliminate import barrier_rows
from distal.storage import (
    check_parquet,
    check_sealed,
    file_sha256,
    files_below,
    names_in,
    read_json,
    read_table,
    remove_tree,
    sweep,
)
from distal.train.folder import known

T = TypeVar("T")

UNREADABLE = (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""What else reading something damaged raises: a disk that fails, a record of another shape or of a senseless size."""

COPY = "put it back from a copy"
IMPORT_AGAIN = "import the answers again from a copy"
ELSEWHERE = "try again where it can be"
ANSWERS = re.compile(r"\d{6}|[1-9]\d{6,}", re.ASCII)
SHOWN = 3  # of many files

REDO = {
    "train": ("train",),
    "score": ("score", "reduce", "select"),
    "test": ("test",),
    "reduce": ("reduce", "select"),
    "select": ("select",),
    "label": ("label",),
}
"""The stages to do again, when what a stage made is damaged."""


@dataclass(frozen=True)
class Damaged:
    """Something that is not what was written.

    Attributes:
        what: one line that names file, array, row or block.
        delete: files or folders to remove, in this order, so that they are made again.
        redo: the stage that makes them, where its marker is; None when no marker depends on them.
        mend: makes it good on the spot, when that can be done.
        advice: what to do when nothing can make it again; empty when something can.
    """

    what: str
    delete: tuple[Path, ...] = ()
    redo: tuple[Staged, str] | None = None
    mend: Callable[[], None] | None = None
    advice: str = ""


def verify(path: Path, display: Display | None = None) -> JsonObject:
    """Read and check every file of a run, or of a pool.

    Returns:
        `{"state": "sound" | "damaged", "path": ..., "files": ..., "damage": [one line each]}`.

    Raises:
        RunConflict: there is neither a run nor a pool.
        UnknownFormat: another version of distal made the run.
    """
    inspection = _inspect(path, display or Silent())
    return {
        "state": "damaged" if inspection.found else "sound",
        "path": str(path),
        "files": inspection.n_files,
        "damage": [damaged.what for damaged in inspection.found],
    }


def repair(path: Path, display: Display | None = None) -> JsonObject:
    """Delete what is damaged and can be made again; in a pool, pack it again from its source.

    Returns:
        `{"state": "sound" | "repaired" | "damaged", "deleted": [...], "redone": [...], "left": [...], "next": ...}`;
        damaged when something cannot be made again. `redone` names the stages that are to be done again.

    Raises:
        RunConflict: there is neither a run nor a pool, or a driver is at work.
        UnknownFormat: another version of distal made the run; nothing is deleted.
    """
    display = display or Silent()
    if (path / MANIFEST).exists():
        return _repair_pool(path, display)
    run = _run(path)
    deleted: list[str] = []
    redone: list[str] = []
    mended: list[str] = []
    with Lease(run.path, run.attempt, display.say) as lease:
        n_swept = sweep(run.path)
        found = _inspect(path, display).found
        for damaged in found:
            if damaged.advice:
                continue
            lease.require()
            if damaged.redo is not None:
                _invalidate(*damaged.redo)
                redone.append(f"{damaged.redo[0].folder}: {damaged.redo[1]}")
            if damaged.mend is not None:
                damaged.mend()
                mended.append(damaged.what)
            for each in damaged.delete:
                remove_tree(each) if each.is_dir() else each.unlink(missing_ok=True)
                deleted.append(str(each))
        redone = sorted({*redone})
        if deleted or redone:
            run.event("repaired", deleted=deleted, redone=redone)
    left = [f"{damaged.what}; {damaged.advice}" for damaged in found if damaged.advice]
    return {
        "state": "damaged" if left else "repaired" if deleted or redone or mended else "sound",
        "path": str(path),
        "deleted": deleted,
        "redone": redone,
        "mended": mended,
        "swept": n_swept,
        "left": left,
        "next": "run the command that made it again" if deleted or redone else "",
    }


def _inspect(path: Path, display: Display) -> _Inspection:
    inspection = _Inspection(path, display)
    if (path / MANIFEST).exists():
        inspection.pool(path)
    else:
        inspection.run(_run(path))
    return inspection


def _run(path: Path) -> Run:
    """The run, also when its record is damaged; not that of another version, of which every file would look damaged."""
    try:
        return Run.open(path)
    except (RunConflict, UnknownFormat):
        raise
    except (Damage, *UNREADABLE):
        return Run(path)


def _invalidate(staged: Staged, stage: str) -> None:
    """Remove the markers of a stage and of those that follow, and keep which selections must come out again."""
    if isinstance(staged, Analysis):
        stages = [stage] if stage != "reduce" else ["reduce", *staged.selections()]
        analyses: list[Analysis] = []
    else:
        assert isinstance(staged, Cycle)
        stages, analyses = list(REDO[stage]), staged.analyses() if stage == "score" else []
    for each in stages:
        if each.startswith("select"):
            staged.expect_again(each, _made_before(staged, each))
        staged.invalidate(each)
    for analysis in analyses:
        _invalidate(analysis, "reduce")


def _made_before(staged: Staged, stage: str) -> str | None:
    """Which selection a stage made, told by its marker, by that of the labels, or by the file itself."""
    assert isinstance(staged, Cycle | Analysis)
    dest = staged.selection if isinstance(staged, Cycle) else staged.selection_of(stage)
    ways: list[Callable[[], str | None]] = [
        lambda: (staged.marker(stage) or {}).get("selection_sha256"),
        lambda: (staged.marker("label") or {}).get("inputs", {}).get("selection"),
        lambda: Selection.read(dest).sha256,
    ]
    for way in ways:
        with suppress(Damage, UnknownFormat, *UNREADABLE):
            found = way()
            if found is not None:
                return found
    return None


class _Inspection:
    """A walk over a run or a pool. Every check that fails adds to `found`, and the walk goes on."""

    def __init__(self, path: Path, display: Display) -> None:
        self.found: list[Damaged] = []
        self._path = path
        self.n_files = 0
        self._display = display
        self._n_expected = sum(1 for _ in files_below(path))

    def run(self, run: Run) -> None:
        """All cycles, and what lies beside them."""
        self._look(partial(getattr, run, "identity"), advice=COPY)
        self._look_at_file(read_json, run.path / "summary.json")
        self._answers(run.answers)
        for path in (run.waiting, run.initial_selection):
            if path.exists():
                self._look(partial(read_json if path.suffix == ".json" else read_table, path), advice=COPY)
        for cycle in self._look(run.cycles, advice=COPY) or []:
            if not (cycle.folder / "cycle.yaml").exists() and any(cycle.folder.glob("*.json")):
                self.found.append(Damaged(f"{cycle.folder / 'cycle.yaml'}: missing", advice=COPY))
            config = self._look(partial(getattr, cycle, "config"), advice=COPY)
            try:
                if isinstance(config, Config):
                    self._own(run, cycle, config)
                elif isinstance(config, ScoreConfig):
                    self._foreign(cycle, config)
            except (Damage, UnknownFormat, *UNREADABLE) as error:  # a record of a shape that no check expects
                self.found.append(_unread(cycle.folder, error) or Damaged(_line(cycle.folder, error), advice=COPY))

    def _answers(self, folder: Path) -> None:
        """The log of what people said: its files are numbered without a gap, and each holds its number."""
        for name in self._look(partial(names_in, folder), place=folder, advice=COPY) or []:
            if not _is_import(name):
                self.found.append(Damaged(f"{folder / name}: not a file of answers", advice="move it elsewhere"))
        numbers = sorted(int(Path(name).stem) for name in names_in(folder) if _is_import(name))
        gaps = [range(a + 1, b) for a, b in pairwise([-1, *numbers, answers.n_imports(folder)]) if b - a > 1]
        if gaps:
            n = sum(gap.stop - gap.start for gap in gaps)
            some = [str(answers.import_path(folder, i)) for i in islice(chain.from_iterable(gaps), SHOWN)]
            more = f" and {n - SHOWN:,} more" if n > SHOWN else ""
            what = f"{', '.join(some)}{more}: missing, and the number of another file is higher"
            self.found.append(Damaged(what, advice=answers.PUT_BACK))
        for number in numbers:
            self._look(partial(answers.read_import, folder, number), place=folder, advice=COPY)

    def _own(self, run: Run, cycle: Cycle, config: Config) -> None:
        """A cycle of `distal run`."""
        if cycle.index == 0 and (run.initial.exists() or (cycle.folder / "train.json").exists()):
            from_pool = config.label.oracle == "pool" and isinstance(config.loop.initial, int)
            read = partial(Ledger.read, [run.initial])
            self._look(read, delete=(run.initial,), advice="" if from_pool else COPY)
        markers = self._markers(cycle, STAGES)
        refs = self._checkpoints(cycle, config, complete="train" in markers)
        n_rows = _n_rows(cycle, markers)
        recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
        complete = range(n_rows) if "score" in markers else range(0)
        first = len(config.train.checkpoint_epochs) - n_rows
        weights = {index - first: sha256 for index, sha256 in refs.items() if index >= first}
        self._assignments(cycle, "score", cycle.assignments, complete, recorded_from, weights)
        for name in ("test", "val"):
            evaluated = name in markers.get("test", {}).get("inputs", ())
            self._assignments(cycle, "test", cycle.held_out(name), range(1 if evaluated else 0), 0, {})
        self._elimination(cycle, config, n_rows if "score" in markers else 0)
        if "reduce" in markers:
            self._scores(cycle.scores, (cycle, "reduce"))
        if "select" in markers:
            self._look(cycle.chosen, delete=(cycle.selection,), redo=(cycle, "select"))
        if "label" in markers:
            # What people said may have grown since, so what it came to then is not made again.
            advice = "" if config.label.oracle == "pool" else COPY
            check = partial(_labels, cycle, markers["label"])
            self._look(check, delete=(cycle.labels,), redo=(cycle, "label"), advice=advice)
        if "train" in markers:
            self._look(partial(_ledger, run, cycle, markers["train"]), advice="put the label files back from a copy")
            # A gap in the log is found without this; the last file of it is not.
            for number in range(answers.n_imports(run.answers), markers["train"].get("n_imports", 0)):
                what = (
                    f"{answers.import_path(run.answers, number)}: missing, and cycle {cycle.index} was trained after it"
                )
                self.found.append(Damaged(what, advice=IMPORT_AGAIN))
        self._analyses(cycle)

    def _foreign(self, cycle: Cycle, config: ScoreConfig) -> None:
        """The one cycle of `distal score`."""
        markers = self._markers(cycle, ("score",))
        entries = self._look(partial(known, cycle.foreign), advice=COPY) or []
        if not cycle.foreign.exists() and ("score" in markers or Assignments.begun(cycle.assignments)):
            self.found.append(Damaged(f"{cycle.foreign}: missing", advice=COPY))
        for entry in entries:
            path = Path(config.checkpoints.path) / entry.path
            if path.exists():  # rows that are scored do not need it any more
                self._look(partial(_unchanged, path, entry.sha256), advice="put the old file back")
        n_rows = markers["score"]["n_rows"] if "score" in markers else 0
        recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
        refs = {entry.index: entry.sha256 for entry in entries if entry.index is not None}
        if entries and "score" in markers:
            self._look(partial(_indexed, cycle, refs, markers["score"]), advice=COPY)
        self._assignments(cycle, "score", cycle.assignments, range(n_rows), recorded_from, refs)
        self._elimination(cycle, config, n_rows if "score" in markers else 0)
        self._analyses(cycle)

    def _elimination(self, cycle: Cycle, config: Config | ScoreConfig, n_rows: int) -> None:
        """What was decided at each barrier; it is decided the same again from the assignments."""
        decided = names_in(cycle.elimination)
        if config.score.eliminate == "exact" and n_rows:
            for name in {f"{row:05d}.json" for row in barrier_rows(n_rows)} - {*decided}:
                self.found.append(Damaged(f"{cycle.elimination / name}: missing", redo=(cycle, "score")))
        for name in decided:
            self._look_at_file(read_json, cycle.elimination / name, redo=(cycle, "score"))

    def _markers(self, cycle: Cycle, stages: tuple[str, ...]) -> dict[str, JsonObject]:
        """The completion markers that can be read."""
        found = {}
        self._look_at_file(read_json, cycle.folder / EXPECTED, advice=COPY)
        for stage in stages:
            path = cycle.folder / f"{stage}.json"
            marker = self._look(partial(cycle.marker, stage), delete=(path,), redo=(cycle, stage))
            if marker is not None:
                found[stage] = marker
        return found

    def _checkpoints(self, cycle: Cycle, config: Config, *, complete: bool) -> dict[int, str]:
        """Weights, manifests and the state of training. To make one checkpoint again, all epochs are trained again."""
        state, marker = cycle.folder / "train" / "state.pt", cycle.folder / "train.json"
        self._look_at_file(check_sealed, state)
        # Only where training gives the same bits again: on processors, not on every GPU, and a script promises nothing.
        same = config.device == "cpu" and not (complete and config.train.command is not None)
        advice = "" if same else COPY
        refs: dict[int, str] = {}
        for index in range(len(config.train.checkpoint_epochs)):
            place = cycle.checkpoints / f"{index:04d}"
            delete = (marker, state, place)  # in this order: a state without its checkpoints could not be continued
            if not (place / checkpoints.MANIFEST).exists():
                if complete:
                    what = f"{place / checkpoints.MANIFEST}: missing"
                    self.found.append(Damaged(what, delete, (cycle, "train"), advice=advice))
                continue
            redo = (cycle, "train")
            read = partial(checkpoints.read, cycle.checkpoints, index)
            ref = self._look(read, delete=delete, redo=redo, advice=advice)
            if ref is not None:
                refs[index] = ref.sha256
                self._look(partial(_unchanged, ref.path, ref.sha256), delete=delete, redo=redo, advice=advice)
        return refs

    def _assignments(
        self, cycle: Cycle, stage: str, path: Path, complete: range, recorded_from: int, weights: dict[int, str]
    ) -> None:
        """Every chunk that is there; of the rows in `complete` all must be."""
        redo = (cycle, stage)
        if not path.exists():
            if len(complete):
                self.found.append(Damaged(f"{path}: missing", (), redo))
            return
        if not Assignments.begun(path):
            if len(complete):
                self.found.append(Damaged(f"{record_path(path)}: missing", advice=COPY))
            return  # cut off while it was laid out
        try:
            assignments = Assignments.open(path)
        except (Damage, UnknownFormat, *UNREADABLE) as error:
            unread = _unread(path, error)
            self.found.append(unread) if unread else self._metadata(path, error)
            return
        self._read(1)
        for block, damage in assignments.damaged_eligible():
            self.found.append(Damaged(str(damage), (assignments.chunk(ELIGIBLE, None, block),), redo))
        for name in names_in(begun_path(path)):
            self._look(partial(read_json, begun_path(path) / name), advice=COPY)
        kept = self._look(partial(getattr, assignments, "weights"), advice=COPY) or {}
        for row, checksum in weights.items():
            if kept.get(row, checksum) != checksum:
                what = f"{path}: row {row} was scored with other weights than checkpoint {row} has now"
                self.found.append(Damaged(what, advice="put the old checkpoint back from a copy"))
        if complete.stop > assignments.n_rows:
            what = f"{path}: {assignments.n_rows} rows, and {complete.stop} were scored"
            self.found.append(Damaged(what, advice=COPY))
        for row in range(assignments.n_rows):
            for name, block, damage in assignments.damaged(row):
                # With its recorded values missing a block is scored again; its labels must come out the same.
                self.found.append(Damaged(str(damage), (assignments.chunk(name, row, block),), redo))
            committed = assignments.committed(row)
            self._read(len(committed))
            if committed and row not in kept:
                what = f"{begun_path(path)}: the weights that row {row} was scored with are missing"
                self.found.append(Damaged(what, advice=COPY))
            if row in complete:
                whole = assignments.committed(row, recorded=row >= recorded_from)
                for block in assignments.blocks:
                    if block.index not in whole:
                        what = "has no recorded values" if block.index in committed else "is missing"
                        self.found.append(Damaged(f"{path}: row {row}, block {block.index} {what}", (), redo))

    def _metadata(self, path: Path, error: Exception) -> None:
        """Zarr's own metadata is made again from the record beside the arrays; the record cannot be."""
        try:
            read_json(record_path(path))
        except (Damage, UnknownFormat) as damage:
            self.found.append(Damaged(str(damage), advice=COPY))
        else:
            self.found.append(Damaged(_line(path, error), mend=partial(Assignments.restore_metadata, path)))

    def _scores(self, path: Path, redo: tuple[Staged, str]) -> None:
        scores = self._look(partial(Scores.open, path), delete=(path,), redo=redo)
        for damage in scores.damaged() if scores is not None else ():
            self.found.append(Damaged(str(damage), (path,), redo))
        self._read(sum(1 for _ in files_below(path)))

    def _analyses(self, cycle: Cycle) -> None:
        for analysis in cycle.analyses():
            path = analysis.folder / "reduce.json"
            reduced = self._look(partial(analysis.marker, "reduce"), delete=(path,), redo=(analysis, "reduce"))
            if reduced is not None:
                self._scores(analysis.scores, (analysis, "reduce"))
            for stage in analysis.selections():
                dest = analysis.selection_of(stage)
                again = (analysis.folder / f"{stage}.json", dest)
                self._look(partial(_selection, analysis, stage, dest), delete=again, redo=(analysis, stage))

    def pool(self, path: Path) -> None:
        """All images and all rows of a pool, and its content hash."""
        anew = "build the pool again in another folder"
        pool = self._look(partial(Pool.open, path), advice=anew)
        if pool is None or not self._look(partial(_sound, path / SAMPLES), advice=anew):
            return
        content = begin_content(pool.n_samples, pool.image_shape, pool.classes)
        for part in parts(pool.n_samples):
            digest = self._look(partial(pool.part_sha256, part), advice=f"run `distal repair {path}`")
            content.update(digest or b"")
            self._read(len(part) // pool.chunk_size)
        if not self.found and content.hexdigest() != pool.content_sha256:
            what = f"{path}: {IMAGES} and {SAMPLES} are not what {MANIFEST} says (another content hash)"
            self.found.append(Damaged(what, advice=anew))

    def _look_at_file(
        self, read: Callable[[Path], object], path: Path, redo: tuple[Staged, str] | None = None, advice: str = ""
    ) -> None:
        if path.exists():
            self._look(partial(read, path), delete=() if advice else (path,), redo=redo, advice=advice)

    def _look(
        self,
        work: Callable[[], T],
        *,
        place: Path | None = None,
        delete: tuple[Path, ...] = (),
        redo: tuple[Staged, str] | None = None,
        advice: str = "",
    ) -> T | None:
        """Do a check; when it fails, keep what is wrong and what makes it good.

        Args:
            place: what to name when the error names nothing; None: the first of `delete`.
        """
        try:
            return work()
        except (Damage, UnknownFormat, *UNREADABLE) as error:
            where = place or next(iter(delete), self._path)
            damaged = _unread(where, error) or Damaged(_line(where, error), delete, redo, advice=advice)
            self.found.append(damaged)
            return None
        finally:
            self._read(1)

    def _read(self, n_files: int) -> None:
        self.n_files += n_files
        done = min(self.n_files, self._n_expected)
        self._display.progress(Progress(-1, "verifying", images_scored=done, images=self._n_expected))


def _unread(path: Path, error: Exception) -> Damaged | None:
    """What this process could not read, and another may, of more memory or of another user; None for anything else."""
    if isinstance(error, OSError):
        here = error.errno not in (None, errno.ENOENT, errno.EIO)
    else:
        here = isinstance(error, MemoryError)
    why = getattr(error, "strerror", None) or one_line(error)
    what = f"{getattr(error, 'filename', None) or path}: could not be read here: {why}"
    return Damaged(what, advice=ELSEWHERE) if here else None


def _is_import(name: str) -> bool:
    return name.endswith(".parquet") and ANSWERS.fullmatch(Path(name).stem) is not None


def _line(path: Path, error: Exception) -> str:
    """What is wrong, naming the file also when the error does not."""
    if isinstance(error, Damage | UnknownFormat):
        return str(error)
    return f"{getattr(error, 'filename', None) or path}: cannot be read ({type(error).__name__}: {one_line(error)})"


def _n_rows(cycle: Cycle, markers: Mapping[str, JsonObject]) -> int:
    """Rows of the assignments of a cycle, as its marker or else their own record says; 0 when there are none yet."""
    if "score" in markers:
        return int(markers["score"]["n_rows"])
    with suppress(FileNotFoundError, Damage, UnknownFormat):  # a damaged record is named with the assignments
        return int(read_json(record_path(cycle.assignments), required=("n_rows",))["n_rows"])
    return 0


def _indexed(cycle: Cycle, refs: Mapping[int, str], marker: JsonObject) -> None:
    """The record of indices may have grown since; what was scored stays as it was."""
    scored = [refs.get(index) for index in range(marker["n_rows"])]
    if digest(scored) != marker["inputs"]["checkpoints"]:
        raise Damage(f"{cycle.foreign}: not the checkpoints that were scored")


def _sound(path: Path) -> bool:
    check_parquet(path)
    return True


def _unchanged(path: Path, checksum: str) -> None:
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise Damage(f"{path}: missing") from None
    if found != checksum:
        raise Damage(f"{path}: its bytes have changed")


def _labels(cycle: Cycle, marker: JsonObject) -> None:
    if Ledger.read([cycle.labels]).sha256 != marker["inputs"]["labels"]:
        raise Damage(f"{cycle.labels}: not the labels that came back")


def _ledger(run: Run, cycle: Cycle, marker: JsonObject) -> None:
    try:
        found = run.ledger(before=cycle.index).sha256
    except Damage:
        return  # the file itself is named elsewhere
    if found != marker["inputs"]["ledger"]:
        raise Damage(f"{cycle.folder}: trained with other labels than the label files of the cycles before hold now")


def _selection(analysis: Analysis, stage: str, dest: Path) -> None:
    marker = analysis.marker(stage)
    if marker is not None and Selection.read(dest).sha256 != marker["selection_sha256"]:
        raise Damage(f"{dest}: not the selection that was made")


def _repair_pool(path: Path, display: Display) -> JsonObject:
    """Pack the damaged images of a pool again."""
    damaged = _inspect(path, display).found
    packed: list[str] = []
    if damaged and all("distal repair" in each.advice for each in damaged):
        from distal.pool.build import pack_again

        packed = pack_again(path)
    left = [f"{each.what}; {each.advice}" for each in _inspect(path, display).found] if damaged else []
    return {
        "state": "damaged" if left else "repaired" if packed else "sound",
        "path": str(path),
        "packed_again": packed,
        "left": left,
        "next": "",
    }
