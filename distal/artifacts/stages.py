"""Completion markers: a stage is complete when its `<stage>.json` exists.

::

    <stage>.json     {"inputs": {name: hash}, "inputs_sha256": ..., "seconds": ..., and the outputs}
    expected.json    after a repair: the selection that a stage must make again
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from distal import storage
from distal.artifacts.selection import Selection
from distal.errors import Damage
from distal.hashing import digest
from distal.records import OPTIONAL, Result

EXPECTED = "expected.json"

_T = TypeVar("_T")
_AnyOutputs = TypeVar("_AnyOutputs", bound=Result)
_Outputs = TypeVar("_Outputs", bound=Result, covariant=True)


@dataclass(frozen=True, kw_only=True)
class TrainOutputs(Result):
    """The outputs of training.

    Attributes:
        n_labeled: samples it trained on.
        n_imports: files in the log of answers when it began.
        deterministic: whether training again on such a device gives the same bits.
    """

    n_labeled: int
    n_imports: int = 0
    device: str
    world_size: int
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class ScoreOutputs(Result):
    """The outputs of scoring a pool at the checkpoints of a cycle.

    Attributes:
        n_rows: checkpoints that were scored.
        n_eligible: samples that were eligible.
        images_scored: predictions, over all rows.
        left_out: predictions that elimination saved.
        fingerprint: the machine and the libraries that scored; None where nothing was scored.
    """

    n_rows: int
    n_eligible: int
    images_scored: int
    left_out: int
    fingerprint: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class FolderScoreOutputs(ScoreOutputs):
    """The outputs of `distal score`, with the figures of its last scoring pass; without the fingerprint.

    Attributes:
        scoring_seconds: from the first task to the last commit.
        driver_seconds: that the driver worked meanwhile.
        hand_outs: tasks.
        startup_s: until the first actor was ready.
        peak_rss_bytes: of the `driver`, and of an `actor`.
    """

    images_per_s: float | None
    scoring_seconds: float
    driver_seconds: float
    hand_outs: int
    startup_s: float
    peak_rss_bytes: dict[str, int]
    fingerprint: dict[str, str] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class EvaluationOutputs(Result):
    """The evaluation of the last checkpoint.

    Attributes:
        n_test, n_val: labelled images that it was evaluated on.
        test, val: a value for each metric, None where it is undefined; None without such images.
        undefined: the reason for each undefined value, by `test.<metric>` or `val.<metric>`.
    """

    n_test: int = 0
    n_val: int = 0
    test: dict[str, float | None] | None = None
    val: dict[str, float | None] | None = None
    undefined: dict[str, str] = field(default_factory=dict)

    def with_images(self, name: str, n: int, values: Mapping[Any, float | None], reasons: dict[str, str]) -> Self:
        """Add the evaluation on the `n` images to `test` or to `val` on, as `name` says."""
        figures: dict[str, Any] = {f"n_{name}": n, name: dict(values)}
        return replace(self, **figures, undefined=self.undefined | reasons)


@dataclass(frozen=True, kw_only=True)
class ReduceOutputs(Result):
    """The measures that a cycle was reduced to."""

    measures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnalysisOutputs(Result):
    """The outputs of reducing a cycle again, to one measure.

    Attributes:
        rows: checkpoints in the window.
        samples: of the pool.
        annotated: whether the most frequent classes were kept.
    """

    rows: int
    samples: int
    annotated: bool


@dataclass(frozen=True, kw_only=True)
class SelectOutputs(Result):
    """The selection that was made; see `Selection`."""

    n_selected: int
    tie_share: float
    selection_sha256: str

    @classmethod
    def of(cls, selection: Selection) -> Self:
        """The outputs for a selection."""
        return cls(
            n_selected=len(selection),
            tie_share=round(selection.tie_share, 6),
            selection_sha256=selection.sha256,
        )


@dataclass(frozen=True, kw_only=True)
class LabelOutputs(Result):
    """The labels that came back.

    Attributes:
        n_answered: samples that are answered.
        n_labeled: those with a label; None where the pool was asked, which has one for all.
    """

    n_answered: int
    n_labeled: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class _Header:
    inputs: dict[str, str]
    inputs_sha256: str
    seconds: float


@dataclass(frozen=True)
class Marker(_Header, Generic[_Outputs]):
    """The completion marker of a stage.

    Attributes:
        inputs: names and hashes of what the stage was made from.
        inputs_sha256: of the name of the stage and its inputs.
        seconds: that it took.
        outputs: figures of the stage.
    """

    outputs: _Outputs


@dataclass(frozen=True)
class _Expectation(Result):
    inputs: dict[str, str] | None
    selection_sha256: str


@dataclass(frozen=True)
class Staged:
    """A folder with completion markers.

    Attributes:
        folder: where the markers are, and the files of their stages.
    """

    folder: Path

    def read_marker(self, stage: str, outputs: type[_AnyOutputs]) -> Marker[_AnyOutputs] | None:
        """The completion marker of a stage; None when it is not complete.

        Raises:
            Damage: the file is not such a marker.
        """
        path = self.folder / f"{stage}.json"
        try:
            record = storage.read_json(path, required=("inputs", "inputs_sha256", "seconds"))
        except FileNotFoundError:
            return None
        header = parse(path, _Header, record)
        return Marker(header.inputs, header.inputs_sha256, header.seconds, parse(path, outputs, record))

    def is_complete(self, stage: str) -> bool:
        """Whether a stage has its marker; raises Damage when that cannot be read."""
        return self.read_marker(stage, Result) is not None

    def complete(self, stage: str, inputs: dict[str, str], outputs: _AnyOutputs, seconds: float) -> Marker[_AnyOutputs]:
        """Write the completion marker of a stage."""
        header = _Header(inputs, digest([stage, inputs]), round(seconds, 3))
        storage.write_json(self.folder / f"{stage}.json", {**vars(header), **outputs.to_record()})
        return Marker(header.inputs, header.inputs_sha256, header.seconds, outputs)

    def invalidate(self, stage: str) -> None:
        """Remove the completion marker of a stage, before one of its files is replaced."""
        (self.folder / f"{stage}.json").unlink(missing_ok=True)

    def expect_again(self, stage: str, sha256: str | None) -> None:
        """Record the selection's hash before its marker is removed; redoing the stage must reproduce it.

        For the holder of the lease, who checks it right before. A writer that is late all the same
        restores the hash of its own marker: should another selection have been made since, the run
        stops and names both rather than go on.
        """
        if sha256 is not None:
            try:
                marker = self.read_marker(stage, Result)
            except Damage:
                marker = None
            expected = _Expectation(marker.inputs if marker else None, sha256)
            kept = {name: each.to_record() for name, each in self._expectations().items()}
            storage.write_json(self.folder / EXPECTED, {**kept, stage: expected.to_record()})

    def expected(self, stage: str, inputs: dict[str, str], *, labelled: bool = False) -> str | None:
        """The sha256 that a selection made again must have; None when it may be any.

        Args:
            inputs: of the stage. Other inputs may give another selection, unless
            labelled: people have labelled the samples that were selected.
        """
        kept = self._expectations().get(stage)
        bound = kept is not None and (labelled or kept.inputs in (None, inputs))
        return kept.selection_sha256 if kept is not None and bound else None

    def _expectations(self) -> dict[str, _Expectation]:
        path = self.folder / EXPECTED
        try:
            record = storage.read_json(path)
        except FileNotFoundError:
            return {}
        return {stage: parse(path, _Expectation, each) for stage, each in record.items()}


def parse(path: Path, kind: type[_T], record: object) -> _T:
    """A record of a file as the dataclass that wrote it; keys that the dataclass lacks are ignored.

    Raises:
        Damage: a key is missing, or has a value of another type.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        raise Damage(f"{path}: {where}: {first['msg']}") from error
