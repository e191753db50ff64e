"""The answers of annotators: an append-only log, and the one place that turns answers into labels.

::

    RUN/answers/<number>.parquet    one immutable file per import with something new

An answer has an annotator (a file that names none is an annotator of its own), a label or skipped or
unsure, the number of its import, the row in its file, and a time where the file has one. Of an
annotator's answers to a sample one counts, the last word (`last_words`); an import adds the answers
that change a last word, and nothing else.

Importers need no lock: file n is created exclusively, and whoever finds it taken reads it and tries n + 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from distal.artifacts import ledger
from distal.artifacts.ledger import LABELED, UNSURE
from distal.errors import Damage, UnknownFormat
from distal.storage import create_bytes, names_in, read_table, table_bytes

Policy = Literal["majority", "first", "reask"]

SCHEMA = pa.schema(
    [
        *ledger.SCHEMA,
        pa.field("time", pa.timestamp("us", tz="UTC")),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)

_NUMBER = b"distal.import"
PUT_BACK = (
    "put it back from a copy of the run; without one, move the whole folder answers/ away and import the files of the "
    "annotators again"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one annotator to one sample.

    Attributes:
        label: class index; None unless `status` is LABELED.
        status: LABELED, SKIPPED or UNSURE.
        time: of the answer, in microseconds since 1970 (UTC); None where the file has none.
        file: name of the file that was imported.
        row: place in that file, from 1.
    """

    sample_index: int
    sample_id: str
    label: int | None
    status: str
    annotator: str
    time: int | None = None
    file: str = ""
    row: int = 0

    def differs_from(self, other: Answer) -> bool:
        """Whether label or status differ."""
        return (self.label, self.status) != (other.label, other.status)

    def supersedes(self, before: Answer) -> bool:
        """Whether it replaces an earlier import's answer of the same annotator.

        Where both have a time, the later one counts, so importing an old export changes nothing.
        """
        if self.time is None or before.time is None or self.time == before.time:
            return self.differs_from(before)
        return self.time > before.time


@dataclass(frozen=True)
class Added:
    """What an import changed.

    Attributes:
        file: the file that keeps it; None when nothing is new.
        new: answers that were not known.
        changed: of them, answers that differ from their annotator's last word before.
    """

    file: Path | None
    new: list[Answer]
    changed: list[Answer]


@dataclass(frozen=True)
class Resolution:
    """One answer per sample, from all its annotators.

    Attributes:
        answers: of the settled samples, in the order of `sample_index`.
        conflicts: `sample_id` of samples that annotators disagree on; they are asked again.
    """

    answers: list[Answer]
    conflicts: list[str]


def last_words(answers: Iterable[Answer]) -> dict[tuple[int, str], Answer]:
    """The answer that counts of each (sample_index, annotator), in the order in which they first answered.

    Args:
        answers: in the order in which they were imported.
    """
    words: dict[tuple[int, str], Answer] = {}
    for answer in answers:
        who = answer.sample_index, answer.annotator
        if who not in words or answer.supersedes(words[who]):
            words[who] = answer
    return words


def settle(answers: Iterable[Answer], policy: Policy) -> Resolution:
    """One answer for each sample, or none when its annotators disagree.

    The last word of each annotator counts. A label outweighs skipped and unsure. With `majority` the most frequent
    label wins, and a tie is a conflict; with `first` the annotator who answered first wins; with `reask` every
    disagreement is a conflict.
    """
    by_sample: dict[int, list[Answer]] = {}
    for (sample_index, _), answer in last_words(answers).items():
        by_sample.setdefault(sample_index, []).append(answer)
    settled, conflicts = [], []
    for _, said in sorted(by_sample.items()):
        winner = _winner(said, policy)
        if winner is None:
            conflicts.append(said[0].sample_id)
        else:
            settled.append(winner)
    return Resolution(settled, conflicts)


def _winner(said: Sequence[Answer], policy: Policy) -> Answer | None:
    labelled = [answer for answer in said if answer.status == LABELED]
    if not labelled:
        return next((answer for answer in said if answer.status == UNSURE), said[0])
    votes = Counter(answer.label for answer in labelled).most_common()
    if len(votes) == 1 or policy == "first":
        return labelled[0]
    if policy == "majority" and votes[0][1] > votes[1][1]:
        return next(answer for answer in labelled if answer.label == votes[0][0])
    return None


def add(folder: Path, answers: Sequence[Answer]) -> Added:
    """Add what an import changes to the log; several processes may do so at once.

    Raises:
        Damage: a file of the log is missing or has changed.
    """
    brought = last_words(answers)
    while True:
        number = n_imports(folder)
        before = last_words(answer for each in range(number) for answer in read_import(folder, each))
        new = [answer for who, answer in brought.items() if who not in before or answer.supersedes(before[who])]
        changed = [each for each in new if _changes(each, before.get((each.sample_index, each.annotator)))]
        if not new:
            return Added(None, [], [])
        path = import_path(folder, number)
        schema = SCHEMA.with_metadata({_NUMBER: str(number)})
        table = pa.Table.from_pylist([asdict(answer) for answer in new], schema=schema)
        if create_bytes(path, bytes(table_bytes(table))):
            return Added(path, new, changed)


def _changes(answer: Answer, before: Answer | None) -> bool:
    return before is not None and answer.differs_from(before)


def read(folder: Path) -> list[Answer]:
    """All answers, in the order in which they were imported; raises like `read_import`."""
    return [answer for number in range(n_imports(folder)) for answer in read_import(folder, number)]


def n_imports(folder: Path) -> int:
    """How many files the log has, told by the largest number."""
    found = (re.match(r"(\d+).*\.parquet", name, re.ASCII) for name in names_in(folder))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def read_import(folder: Path, number: int) -> list[Answer]:
    """The answers of one file of the log.

    Args:
        number: in [0, n_imports).

    Raises:
        Damage: the file is missing, has changed, or is another one of the log.
        UnknownFormat: another version wrote it.
    """
    path = import_path(folder, number)
    if not path.exists():
        raise Damage(f"{path}: missing; {PUT_BACK}")
    table = read_table(path)
    if table.schema.names != SCHEMA.names:
        raise UnknownFormat(f"{path}: has other columns than this version of distal writes; {PUT_BACK}")
    if (table.schema.metadata or {}).get(_NUMBER) != str(number).encode():
        raise Damage(f"{path}: holds another import than its number says; {PUT_BACK}")
    times = table["time"].cast(pa.int64())
    return [Answer(**row) for row in table.set_column(SCHEMA.get_field_index("time"), "time", times).to_pylist()]


def import_path(folder: Path, number: int) -> Path:
    """The file of one import."""
    return folder / f"{number:06d}.parquet"
