"""What annotators said: raw answers, kept as they came, and what becomes of them.

::

    RUN/answers/<number>-<sha12>.parquet    one immutable file per import: sample, label, status, annotator

An answer that is there already is not kept again, so importing a file twice, or in parts, changes nothing. `settle` is
the one place that turns answers into labels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from distal.ledger import LABELED, SCHEMA, UNSURE
from distal.storage import create_bytes, names_in, read_table, table_bytes

Policy = Literal["majority", "first", "reask"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one annotator said of one sample.

    Attributes:
        label: class index; None unless `status` is LABELED.
        status: LABELED, SKIPPED or UNSURE.
    """

    sample_index: int
    sample_id: str
    label: int | None
    status: str
    annotator: str


@dataclass(frozen=True)
class Settled:
    """What the answers to some samples come to.

    Attributes:
        answers: one per sample that is settled, in the order of `sample_index`.
        conflicts: `sample_id` of those whose annotators disagree and that are to be asked again.
    """

    answers: list[Answer]
    conflicts: list[str]


def settle(answers: Iterable[Answer], policy: Policy) -> Settled:
    """One answer for each sample, or none when its annotators disagree.

    Of several answers by one annotator the last one counts. A label outweighs passing over or not being able to tell:
    somebody could. With `majority` the most frequent label wins, and a tie is a conflict; with `first` the annotator
    who came first wins; with `reask` every disagreement is a conflict.
    """
    by_sample: dict[int, dict[str, Answer]] = {}
    for answer in answers:
        by_sample.setdefault(answer.sample_index, {})[answer.annotator] = answer
    settled, conflicts = [], []
    for _, said in sorted(by_sample.items()):
        winner = _winner([*said.values()], policy)
        if winner is None:
            conflicts.append(next(iter(said.values())).sample_id)
        else:
            settled.append(winner)
    return Settled(settled, conflicts)


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


def add(folder: Path, answers: Sequence[Answer]) -> tuple[Path | None, int]:
    """Keep the answers of one import; returns their file, None when nothing is new, and how many are."""
    known = set(read(folder))
    rows = [asdict(answer) for answer in dict.fromkeys(answers) if answer not in known]
    if not rows:
        return None, 0
    name = f"{len(names_in(folder)):06d}-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]}.parquet"
    create_bytes(folder / name, bytes(table_bytes(pa.Table.from_pylist(rows, schema=SCHEMA))))
    return folder / name, len(rows)


def read(folder: Path) -> list[Answer]:
    """All answers, in the order in which they were imported."""
    found = []
    for name in names_in(folder):
        found += [Answer(**row) for row in read_table(folder / name).to_pylist()]
    return found
