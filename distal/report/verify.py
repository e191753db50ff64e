"""`distal verify`: read every file of a run or of a pool, and report damage.

Nothing that a run names is imported: a run directory may come from anybody, and a strategy or a
model of the user's own may not be importable here. The number of rows of a cycle is read from its
files, never computed again from the configuration.
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
from typing import Literal, TypeVar

from distal.artifacts import checkpoints
from distal.artifacts.assignments import ELIGIBLE, Assignments, begun_path, record_path, restore_metadata
from distal.artifacts.cycles import Analysis, Cycle
from distal.artifacts.ledger import Ledger
from distal.artifacts.runs import Run
from distal.artifacts.scores import Scores
from distal.artifacts.selection import Selection
from distal.artifacts.stages import (
    EXPECTED,
    LabelOutputs,
    Marker,
    ScoreOutputs,
    Staged,
    TrainOutputs,
)
from distal.config import Config, ScoreConfig
from distal.errors import Damage, RunConflict, UnknownFormat, one_line
from distal.hashing import digest
from distal.labels import answers
from distal.pool import Pool
from distal.pool.images import IMAGES, MANIFEST, SAMPLES, begin_content, parts
from distal.progress import Display, Silent
from distal.records import Progress, Result, Stage
from distal.score.eliminate import barrier_rows
from distal.storage import (
    check_parquet,
    check_sealed,
    file_sha256,
    files_below,
    names_in,
    read_json,
    read_table,
)
from distal.train.folder import known

T = TypeVar("T")

UNREADABLE = (
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""Other errors of reading a damaged file: the disk fails, a record has another shape or a senseless size."""

_COPY = "put it back from a copy"
_IMPORT_AGAIN = "import the answers again from a copy"
_ELSEWHERE = "try again where it can be"
_ANSWERS = re.compile(r"\d{6}|[1-9]\d{6,}", re.ASCII)
_SHOWN = 3  # of many files


@dataclass(frozen=True)
class Damaged:
    """One damaged or missing thing.

    Attributes:
        what: one line that names file, array, row or block.
        delete: files or folders to remove, in this order, so that their stage makes them again.
        redo: that stage, and the folder of its marker; None when no marker depends on them.
        mend: repairs it on the spot, where that is possible.
        advice: for the user, when no command can make it again; else empty.
    """

    what: str
    delete: tuple[Path, ...] = ()
    redo: tuple[Staged, str] | None = None
    mend: Callable[[], None] | None = None
    advice: str = ""


@dataclass(frozen=True)
class VerifyResult(Result):
    """The result of `distal verify`.

    Attributes:
        files: that were read.
        damage: one line for each damaged thing.
    """

    state: Literal["sound", "damaged"]
    path: Path
    files: int
    damage: list[str]


def verify(path: Path, display: Display | None = None) -> VerifyResult:
    """Read and check every file of a run, or of a pool.

    Raises:
        RunConflict: there is neither a run nor a pool.
        UnknownFormat: another version of distal made the run.
    """
    inspection = inspect(path, display or Silent())
    return VerifyResult(
        state="damaged" if inspection.found else "sound",
        path=path,
        files=inspection.n_files,
        damage=[damaged.what for damaged in inspection.found],
    )


def inspect(path: Path, display: Display) -> Inspection:
    """Check a run, or a pool; raises like `verify`."""
    inspection = Inspection(path, display)
    if (path / MANIFEST).exists():
        inspection.pool(path)
    else:
        inspection.run(open_run(path))
    return inspection


def open_run(path: Path) -> Run:
    """Open a run even when its record is damaged.

    Raises:
        RunConflict: there is no run.
        UnknownFormat: another version made the run, so every file would look damaged.
    """
    try:
        return Run.open(path)
    except (RunConflict, UnknownFormat):
        raise
    except (Damage, *UNREADABLE):
        return Run(path)


class Inspection:
    """A walk over a run or a pool. Every check that fails adds to `found`, and the walk goes on.

    Attributes:
        found: the damage, in the order of the walk.
        n_files: files that were read.
    """

    def __init__(self, path: Path, display: Display) -> None:
        self.found: list[Damaged] = []
        self._path = path
        self.n_files = 0
        self._display = display
        self._n_expected = sum(1 for _ in files_below(path))

    def run(self, run: Run) -> None:
        """Check all cycles, and the files beside them."""
        self._look(partial(getattr, run, "identity"), advice=_COPY)
        self._look_at_file(read_json, run.path / "summary.json")
        self._answers(run.answers)
        for path in (run.waiting, run.initial_selection):
            if path.exists():
                self._look(partial(read_json if path.suffix == ".json" else read_table, path), advice=_COPY)
        for cycle in self._look(run.cycles, advice=_COPY) or []:
            if not cycle.begun:
                if any(cycle.folder.glob("*.json")):
                    self.found.append(Damaged(f"{cycle.folder / 'cycle.yaml'}: missing", advice=_COPY))
                continue
            config = self._look(partial(getattr, cycle, "config"), advice=_COPY)
            try:
                if isinstance(config, Config):
                    self._own(run, cycle, config)
                elif isinstance(config, ScoreConfig):
                    self._of_folder(cycle, config)
            except (Damage, UnknownFormat, *UNREADABLE) as error:  # a record of a shape that no check expects
                self.found.append(_unread(cycle.folder, error) or Damaged(_line(cycle.folder, error), advice=_COPY))

    def _answers(self, folder: Path) -> None:
        """Check the log of answers: files are numbered without a gap, and each holds its number."""
        for name in self._look(partial(names_in, folder), place=folder, advice=_COPY) or []:
            if not _is_import(name):
                self.found.append(Damaged(f"{folder / name}: not a file of answers", advice="move it elsewhere"))
        numbers = sorted(int(Path(name).stem) for name in names_in(folder) if _is_import(name))
        gaps = [range(a + 1, b) for a, b in pairwise([-1, *numbers, answers.n_imports(folder)]) if b - a > 1]
        if gaps:
            n = sum(gap.stop - gap.start for gap in gaps)
            some = [str(answers.import_path(folder, i)) for i in islice(chain.from_iterable(gaps), _SHOWN)]
            more = f" and {n - _SHOWN:,} more" if n > _SHOWN else ""
            what = f"{', '.join(some)}{more}: missing, and the number of another file is higher"
            self.found.append(Damaged(what, advice=answers.PUT_BACK))
        for number in numbers:
            self._look(partial(answers.read_import, folder, number), place=folder, advice=_COPY)

    def _own(self, run: Run, cycle: Cycle, config: Config) -> None:
        """Check a cycle of `distal run`."""
        if cycle.index == 0 and (run.initial.exists() or (cycle.folder / "train.json").exists()):
            from_pool = config.label.oracle == "pool" and isinstance(config.loop.initial, int)
            read = partial(Ledger.read, [run.initial])
            self._look(read, delete=(run.initial,), advice="" if from_pool else _COPY)
        self._look_at_file(read_json, cycle.folder / EXPECTED, advice=_COPY)
        trained = self._marker(cycle, "train", lambda: cycle.marker("train"))
        scored = self._marker(cycle, "score", lambda: cycle.marker("score"))
        tested = self._marker(cycle, "test", lambda: cycle.marker("test"))
        reduced = self._marker(cycle, "reduce", lambda: cycle.marker("reduce"))
        selected = self._marker(cycle, "select", lambda: cycle.marker("select"))
        labelled = self._marker(cycle, "label", lambda: cycle.marker("label"))
        refs = self._checkpoints(cycle, config, complete=trained is not None)
        n_rows = _n_rows(cycle, scored)
        recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
        complete = range(n_rows if scored else 0)
        first = len(config.train.checkpoint_epochs) - n_rows
        weights = {index - first: sha256 for index, sha256 in refs.items() if index >= first}
        self._assignments(cycle, "score", cycle.assignments, complete, recorded_from, weights)
        for name in ("test", "val"):
            evaluated = tested is not None and name in tested.inputs
            self._assignments(cycle, "test", cycle.held_out(name), range(1 if evaluated else 0), 0, {})
        self._elimination(cycle, config, n_rows if scored else 0)
        if reduced:
            self._scores(cycle.scores, (cycle, "reduce"))
        if selected:
            self._look(cycle.chosen, delete=(cycle.selection,), redo=(cycle, "select"))
        if labelled:
            # People may have answered more since, so another look at the answers may give other labels.
            advice = "" if config.label.oracle == "pool" else _COPY
            check = partial(_labels, cycle, labelled)
            self._look(check, delete=(cycle.labels,), redo=(cycle, "label"), advice=advice)
        if trained:
            advice = "put the label files back from a copy"
            self._look(partial(_ledger, run, cycle, trained), advice=advice)
            # A gap in the log is found without this; its last file is not.
            for number in range(answers.n_imports(run.answers), trained.outputs.n_imports):
                path = answers.import_path(run.answers, number)
                what = f"{path}: missing, and cycle {cycle.index} was trained after it"
                self.found.append(Damaged(what, advice=_IMPORT_AGAIN))
        self._analyses(cycle)

    def _of_folder(self, cycle: Cycle, config: ScoreConfig) -> None:
        """Check the one cycle of `distal score`."""
        self._look_at_file(read_json, cycle.folder / EXPECTED, advice=_COPY)
        scored = self._marker(cycle, "score", lambda: cycle.marker("score"))
        entries = self._look(partial(known, cycle.folder_checkpoints), advice=_COPY) or []
        if not cycle.folder_checkpoints.exists() and (scored or Assignments.begun(cycle.assignments)):
            self.found.append(Damaged(f"{cycle.folder_checkpoints}: missing", advice=_COPY))
        for entry in entries:
            path = Path(config.checkpoints.path) / entry.path
            if path.exists():  # once its row is scored it may be deleted
                self._look(partial(_unchanged, path, entry.sha256), advice="put the old file back")
        n_rows = scored.outputs.n_rows if scored else 0
        recorded_from = n_rows - 1 if config.score.record_rows == "last" else 0
        refs = {entry.index: entry.sha256 for entry in entries if entry.index is not None}
        if entries and scored:
            self._look(partial(_indexed, cycle, refs, scored), advice=_COPY)
        self._assignments(cycle, "score", cycle.assignments, range(n_rows), recorded_from, refs)
        self._elimination(cycle, config, n_rows)
        self._analyses(cycle)

    def _elimination(self, cycle: Cycle, config: Config | ScoreConfig, n_rows: int) -> None:
        """Check the decision at each barrier, which the assignments give again."""
        decided = names_in(cycle.elimination)
        if config.score.eliminate == "exact" and n_rows:
            for name in {f"{row:05d}.json" for row in barrier_rows(n_rows)} - {*decided}:
                self.found.append(Damaged(f"{cycle.elimination / name}: missing", redo=(cycle, "score")))
        for name in decided:
            self._look_at_file(read_json, cycle.elimination / name, redo=(cycle, "score"))

    def _marker(self, cycle: Cycle, stage: Stage, read: Callable[[], T]) -> T | None:
        """A completion marker; None when there is none that can be read."""
        path = cycle.folder / f"{stage}.json"
        return self._look(read, delete=(path,), redo=(cycle, stage))

    def _checkpoints(self, cycle: Cycle, config: Config, *, complete: bool) -> dict[int, str]:
        """Check weights, manifests and the state of training; one lost checkpoint costs all epochs."""
        state, marker = cycle.folder / "train" / "state.pt", cycle.folder / "train.json"
        self._look_at_file(check_sealed, state)
        # A CPU trains the same bits again; a GPU may not, and the user's own script need not.
        same = config.device == "cpu" and not (complete and config.train.command is not None)
        advice = "" if same else _COPY
        refs: dict[int, str] = {}
        for index in range(len(config.train.checkpoint_epochs)):
            place = cycle.checkpoints / f"{index:04d}"
            delete = (marker, state, place)  # in this order: a state without its checkpoints cannot resume
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
        """Check every chunk that is there; the rows in `complete` must have all of theirs."""
        redo = (cycle, stage)
        if not path.exists():
            if len(complete):
                self.found.append(Damaged(f"{path}: missing", (), redo))
            return
        if not Assignments.begun(path):
            if len(complete):
                self.found.append(Damaged(f"{record_path(path)}: missing", advice=_COPY))
            return  # the driver was killed while it created them
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
            self._look(partial(read_json, begun_path(path) / name), advice=_COPY)
        kept = self._look(partial(getattr, assignments, "weights"), advice=_COPY) or {}
        for row, checksum in weights.items():
            if kept.get(row, checksum) != checksum:
                what = f"{path}: row {row} was scored with other weights than checkpoint {row} has now"
                self.found.append(Damaged(what, advice="put the old checkpoint back from a copy"))
        if complete.stop > assignments.n_rows:
            what = f"{path}: {assignments.n_rows} rows, and {complete.stop} were scored"
            self.found.append(Damaged(what, advice=_COPY))
        for row in range(assignments.n_rows):
            for name, block, damage in assignments.damaged(row):
                # Without its recorded values a block is scored again, to the same labels.
                self.found.append(Damaged(str(damage), (assignments.chunk(name, row, block),), redo))
            committed = assignments.committed(row)
            self._read(len(committed))
            if committed and row not in kept:
                what = f"{begun_path(path)}: the weights that row {row} was scored with are missing"
                self.found.append(Damaged(what, advice=_COPY))
            if row in complete:
                whole = assignments.committed(row, recorded=row >= recorded_from)
                for block in assignments.blocks:
                    if block.index not in whole:
                        what = "has no recorded values" if block.index in committed else "is missing"
                        self.found.append(Damaged(f"{path}: row {row}, block {block.index} {what}", (), redo))

    def _metadata(self, path: Path, error: Exception) -> None:
        """Zarr's own metadata can be restored from the record beside the arrays."""
        try:
            read_json(record_path(path))
        except (Damage, UnknownFormat) as damage:
            self.found.append(Damaged(str(damage), advice=_COPY))
        else:
            self.found.append(Damaged(_line(path, error), mend=partial(restore_metadata, path)))

    def _scores(self, path: Path, redo: tuple[Staged, str]) -> None:
        scores = self._look(partial(Scores.open, path), delete=(path,), redo=redo)
        for damage in scores.damaged() if scores is not None else ():
            self.found.append(Damaged(str(damage), (path,), redo))
        self._read(sum(1 for _ in files_below(path)))

    def _analyses(self, cycle: Cycle) -> None:
        for analysis in cycle.analyses():
            path = analysis.folder / "reduce.json"
            read = partial(getattr, analysis, "reduced")
            if self._look(read, delete=(path,), redo=(analysis, "reduce")):
                self._scores(analysis.scores, (analysis, "reduce"))
            for stage in analysis.selections():
                dest = analysis.selection_of(stage)
                again = (analysis.folder / f"{stage}.json", dest)
                self._look(partial(_selection, analysis, stage, dest), delete=again, redo=(analysis, stage))

    def pool(self, path: Path) -> None:
        """Check all images and all rows of a pool, and its content hash."""
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
        """Do a check; when it fails, add the damage to `found`. Other arguments as of `Damaged`.

        Args:
            place: the path to name when the error names none; None: the first of `delete`.
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
    """A file that another process might read, with more memory or of another user; None for damage."""
    if isinstance(error, OSError):
        here = error.errno not in (None, errno.ENOENT, errno.EIO)
    else:
        here = isinstance(error, MemoryError)
    why = getattr(error, "strerror", None) or one_line(error)
    what = f"{getattr(error, 'filename', None) or path}: could not be read here: {why}"
    return Damaged(what, advice=_ELSEWHERE) if here else None


def _is_import(name: str) -> bool:
    return name.endswith(".parquet") and _ANSWERS.fullmatch(Path(name).stem) is not None


def _line(path: Path, error: Exception) -> str:
    """The error on one line, with the file even where the error does not name it."""
    if isinstance(error, Damage | UnknownFormat):
        return str(error)
    return f"{getattr(error, 'filename', None) or path}: cannot be read ({type(error).__name__}: {one_line(error)})"


def _n_rows(cycle: Cycle, scored: Marker[ScoreOutputs] | None) -> int:
    """Rows of the assignments of a cycle, by its marker or else by their own record; 0 without them."""
    if scored is not None:
        return scored.outputs.n_rows
    with suppress(FileNotFoundError, Damage, UnknownFormat):  # the check of the assignments reports it
        return int(read_json(record_path(cycle.assignments), required=("n_rows",))["n_rows"])
    return 0


def _indexed(cycle: Cycle, refs: Mapping[int, str], marker: Marker[ScoreOutputs]) -> None:
    """The record of indices may have grown since; its first rows must be those that were scored."""
    scored = [refs.get(index) for index in range(marker.outputs.n_rows)]
    if digest(scored) != marker.inputs["checkpoints"]:
        raise Damage(f"{cycle.folder_checkpoints}: not the checkpoints that were scored")


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


def _labels(cycle: Cycle, marker: Marker[LabelOutputs]) -> None:
    if Ledger.read([cycle.labels]).sha256 != marker.inputs["labels"]:
        raise Damage(f"{cycle.labels}: not the labels that came back")


def _ledger(run: Run, cycle: Cycle, marker: Marker[TrainOutputs]) -> None:
    try:
        found = run.ledger(before=cycle.index).sha256
    except Damage:
        return  # the check of the file itself reports it
    if found != marker.inputs["ledger"]:
        raise Damage(f"{cycle.folder}: trained with other labels than the label files of the cycles before hold now")


def _selection(analysis: Analysis, stage: str, dest: Path) -> None:
    marker = analysis.selected(stage)
    if marker and Selection.read(dest).sha256 != marker.outputs.selection_sha256:
        raise Damage(f"{dest}: not the selection that was made")
