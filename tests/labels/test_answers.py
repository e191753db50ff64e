"""Histories of imports against a reference of a few lines, and importers that come at once."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.artifacts.ledger import LABELED, SKIPPED, UNSURE, write_labels
from distal.artifacts.runs import Run
from distal.errors import Damage, UnknownFormat
from distal.labels.answers import Answer, Policy, add, last_words, read, settle
from distal.labels.waiting import ImportResult, Waiting, export_labels, import_labels
from distal.pool import Pool
from distal.storage import create_bytes
from tests.helpers import CLASSES
from tests.labels.waiting import next_cycle, waiting_run

SAMPLES = (0, 1, 2)
WORDS = (*CLASSES[:2], "", "cannot tell")

Row = tuple[int, str, str]  # sample_index, word, annotator; "" for nobody
File = tuple[str, list[Row]]

rows = st.tuples(st.sampled_from(SAMPLES), st.sampled_from(WORDS), st.sampled_from(["ann", "bob", "cy"]))
named_files = st.tuples(st.sampled_from(["a.csv", "b.csv"]), st.lists(rows, min_size=1, max_size=5))
unnamed_files = st.tuples(
    st.sampled_from(["a.csv", "b.csv"]),
    st.dictionaries(st.sampled_from(SAMPLES), st.sampled_from(WORDS), min_size=1).map(
        lambda said: [(sample, word, "") for sample, word in said.items()]
    ),
)
steps = st.one_of(named_files, unnamed_files, st.just("train"), st.integers(0, 5))  # a number: that file once more


def reference(history: Sequence[File | str], policy: Policy) -> tuple[dict[int, str], set[int]]:
    """What is labelled and what is declined in the end."""
    words: dict[tuple[int, str], str] = {}
    labelled: dict[int, str] = {}
    declined: set[int] = set()
    for step in history:
        if not isinstance(step, str):
            name, said = step
            words |= {(sample, who or name): word for sample, word, who in said}
            continue
        for sample in {sample for sample, _ in words} - set(labelled):
            labels = [word for (of, _), word in words.items() if of == sample and word in CLASSES]
            votes = [*Counter(labels).values()]
            clear = (
                len(votes) == 1
                or policy == "first"
                or (policy == "majority" and votes.count(max(votes, default=0)) == 1)
            )
            if labels and clear:
                labelled[sample] = labels[0] if policy == "first" else max(labels, key=labels.count)
            elif not labels:
                declined.add(sample)
    return labelled, declined - set(labelled)


def write_csv(path: Path, pool: Pool, said: Sequence[Row]) -> Path:
    names = pool.samples(0, max(SAMPLES) + 1)["sample_id"].to_pylist()
    with path.open("w", newline="") as out:
        csv.writer(out).writerows(
            [("sample_id", "label", "annotator"), *((names[index], word, who) for index, word, who in said)]
        )
    return path


def waiting_of(run: Run) -> Waiting:
    waiting = Waiting.read(run)
    assert waiting is not None
    return waiting


@settings(max_examples=40, deadline=None)
@given(st.lists(steps, min_size=1, max_size=10), st.sampled_from(["majority", "first", "reask"]))
def test_histories(pool: Pool, history: list[File | str | int], policy: Policy) -> None:
    """Files, annotators, repetitions and cycles in any order come to what the reference says, cycle by cycle."""
    with tempfile.TemporaryDirectory() as folder:
        run = waiting_run(Path(folder, "run"), pool, SAMPLES, needed=0, policy=policy, workers=0)
        done: list[File | str] = []
        for step in [*history, "train"]:
            if isinstance(step, int):
                files = [each for each in done if not isinstance(each, str)]
                if not files:
                    continue
                step = files[step % len(files)]
            done.append(step)
            if isinstance(step, str):
                waiting = waiting_of(run)
                assert waiting.collect(run)
                later = next_cycle(run, waiting, pool, SAMPLES)
                ledger = run.ledger(before=later.cycle)
                labelled, declined = reference(done, policy)
                found = dict(zip(ledger.indices.tolist(), ledger.labels.tolist(), strict=True))
                assert {sample: CLASSES[label] for sample, label in found.items()} == labelled
                assert set(ledger.declined.tolist()) == declined
            else:
                path = write_csv(Path(folder, step[0]), pool, step[1])
                known = len(read(run.answers))
                assert import_labels(run.path, path).new == len(read(run.answers)) - known
                assert import_labels(run.path, path).new == 0


timed = st.lists(
    st.tuples(st.sampled_from(SAMPLES), st.sampled_from([*CLASSES[:2], None]), st.sampled_from(["ann", "bob"])),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(timed, st.randoms(), st.integers(1, 8))
def test_with_times_neither_order_nor_split_matters(
    said: list[tuple[int, str | None, str]], random: object, size: int
) -> None:
    """Old exports may be imported late, in any parts, and again: the latest time is the last word."""
    answers = [
        Answer(
            sample, f"s{sample}", None if word is None else CLASSES.index(word), LABELED if word else SKIPPED, who, time
        )
        for time, (sample, word, who) in enumerate(said)
    ]
    latest = {(each.sample_index, each.annotator): each for each in answers}
    mixed = [*answers, *answers[:3]]
    random.shuffle(mixed)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(mixed), size):
            add(Path(folder), mixed[start : start + size])
        words = last_words(read(Path(folder)))
    assert {who: (each.label, each.time) for who, each in words.items()} == {
        who: (each.label, each.time) for who, each in latest.items()
    }


def answer(label: int | None, who: str = "ann", time: int | None = None, status: str | None = None) -> Answer:
    return Answer(7, "x", label, status or (SKIPPED if label is None else LABELED), who, time)


def test_of_two_answers_with_one_time_the_one_imported_last_counts(tmp_path: Path) -> None:
    for label, n_new in ((0, 1), (1, 1), (1, 0)):
        assert len(add(tmp_path, [answer(label, time=5)]).new) == n_new
    assert [each.label for each in settle(read(tmp_path), "majority").answers] == [1]


def test_a_correction_that_is_taken_back_is_heard(tmp_path: Path) -> None:
    for label, n_new in ((0, 1), (1, 1), (0, 1), (0, 0)):
        assert len(add(tmp_path, [answer(label)]).new) == n_new
    assert [each.label for each in settle(read(tmp_path), "majority").answers] == [0]
    assert add(tmp_path, [answer(0), answer(1), answer(0)]).new == []  # in one file its last row counts
    assert [each.label for each in add(tmp_path, [answer(1), answer(0), answer(1)]).changed] == [1]


@pytest.mark.parametrize(
    ("policy", "said", "expected"),
    [
        ("majority", [answer(None), answer(None, "bob", status=UNSURE)], UNSURE),
        ("majority", [answer(None), answer(None, status=UNSURE)], UNSURE),  # the same annotator looked again
        ("majority", [answer(None, status=UNSURE), answer(None)], SKIPPED),
        ("majority", [answer(1), answer(None)], SKIPPED),  # the same annotator takes the label back
        ("majority", [answer(None), answer(2, "bob"), answer(None, status=UNSURE)], 2),
        ("first", [answer(1), answer(2, "bob"), answer(3)], 3),  # ann came first, and this is her last word
        ("first", [answer(None), answer(2, "bob"), answer(3)], 3),
        ("reask", [answer(1), answer(2, "bob"), answer(2)], 2),  # now they agree
        ("majority", [answer(1, time=10), answer(2, time=5)], 1),  # an older export
        ("majority", [answer(1, time=10), answer(2)], 2),
    ],
)
def test_what_counts(policy: Policy, said: list[Answer], expected: int | str) -> None:
    (settled,) = settle(said, policy).answers
    assert expected in (settled.label, settled.status)


def test_a_file_of_the_log_that_is_missing_is_damage(tmp_path: Path) -> None:
    for label in (0, 1, 2):
        add(tmp_path, [answer(label)])
    (tmp_path / "000001.parquet").unlink()
    with pytest.raises(Damage, match="000001.parquet: missing"):
        read(tmp_path)
    shutil.copy(tmp_path / "000002.parquet", tmp_path / "000001.parquet")
    with pytest.raises(Damage, match="000001.parquet: holds another import than its number says"):
        read(tmp_path)


def test_a_log_of_another_version(tmp_path: Path) -> None:
    import numpy as np

    write_labels(tmp_path / "000000.parquet", np.array([1]), ["x"], np.array([0]), "ann")
    with pytest.raises(UnknownFormat, match="has other columns"):
        read(tmp_path)


IMPORTER = """
import sys
from pathlib import Path
from distal.labels.answers import Answer, add

folder, who = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for sample in range(10):
    for label in (0, 1):
        assert len(add(folder, [Answer(sample, f"s{sample}", label, "labeled", who)]).new) == 1
        assert not add(folder, [Answer(sample, f"s{sample}", label, "labeled", who)]).new
"""


def test_importers_that_come_at_once_lose_nothing(tmp_path: Path) -> None:
    """Two processes, answer by answer: every answer is kept once, and each annotator's are in order."""
    importers = [
        subprocess.Popen(
            [sys.executable, "-c", IMPORTER, str(tmp_path), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in ("ann", "bob")
    ]
    for each in importers:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in importers:
        each.communicate("go\n", timeout=120)
    assert [each.returncode for each in importers] == [0, 0]
    said = [(each.annotator, each.sample_index, each.label) for each in read(tmp_path)]
    for who in ("ann", "bob"):
        assert [each for each in said if each[0] == who] == [(who, i, label) for i in range(10) for label in (0, 1)]
    assert len(said) == 40


def test_the_race_that_two_importers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one importer's reading and its writing another one writes: the first one looks again."""
    from distal.labels import answers

    other = [answer(1), answer(2, "bob")]

    def meanwhile(path: Path, data: bytes) -> bool:
        monkeypatch.setattr(answers, "create_bytes", create_bytes)
        add(tmp_path, other)
        return create_bytes(path, data)

    monkeypatch.setattr(answers, "create_bytes", meanwhile)
    added = add(tmp_path, [answer(0), answer(2, "bob")])
    assert [(each.label, each.annotator) for each in added.new] == [(0, "ann")]  # bob's is known by now
    assert [each.label for each in last_words(read(tmp_path)).values()] == [0, 2]


class TestARun:
    """What imports do to a run; nothing is trained."""

    def said(self, run: Run, pool: Pool, *said: Row, name: str = "a.csv", **options: object) -> ImportResult:
        return import_labels(run.path, write_csv(run.path.parent / name, pool, said), **options)  # type: ignore[arg-type]

    def labels(self, run: Run, before: int = 0) -> dict[int, str]:
        ledger = run.ledger(before)
        return {index: CLASSES[label] for index, label in zip(ledger.indices.tolist(), ledger.labels, strict=True)}

    def test_files_that_name_nobody(self, pool: Pool, tmp_path: Path) -> None:
        """Each is an annotator by its name: the same one corrects, another one disagrees."""
        run = waiting_run(tmp_path / "run", pool, SAMPLES, policy="reask")
        assert self.said(run, pool, (0, "circle", "")).answered == 1
        told = self.said(run, pool, (0, "cross", ""), name="b.csv")
        assert (told.answered, len(told.conflicts)) == (0, 1)
        told = self.said(run, pool, (0, "cross", ""))
        assert (told.answered, told.conflicts, told.changed) == (1, [], told.changed[:1])
        told = self.said(run, pool, (0, "circle", ""), name="c.csv", annotator="a.csv")
        assert (len(told.changed), len(told.conflicts)) == (1, 1)
        assert {each.annotator for each in read(run.answers)} == {"a.csv", "b.csv"}

    def test_a_file_that_contradicts_itself(self, pool: Pool, tmp_path: Path) -> None:
        run = waiting_run(tmp_path / "run", pool, SAMPLES)
        for second in ("cross", "", "cannot tell"):
            with pytest.raises(
                ValueError, match=r"a.csv: rows 1 and 3 answer sample \S+ differently, and no annotator"
            ):
                self.said(run, pool, (0, "circle", ""), (1, "cross", ""), (0, second, ""))
            assert not run.answers.exists()
        assert self.said(run, pool, (0, "circle", ""), (0, "circle", "")).new == 1
        told = self.said(run, pool, (1, "circle", ""), (1, "cross", ""), annotator="ann")
        assert (told.answers, told.new) == (2, 1)
        assert read(run.answers)[-1].label == 1

    def test_a_label_of_a_declined_sample_is_used(self, pool: Pool, tmp_path: Path) -> None:
        run = waiting_run(tmp_path / "run", pool, SAMPLES)
        self.said(run, pool, (0, "circle", "ann"), (1, "cross", "ann"), (2, "", "ann"))
        initial = waiting_of(run)
        assert initial.collect(run)
        waiting = next_cycle(run, initial, pool, [5])
        first = run.ledger(before=0)
        assert first.declined.tolist() == [2]
        told = self.said(run, pool, (2, "line", "bob"), allow_unasked=True)
        assert (told.new, told.too_late) == (1, [])
        assert waiting.collect(run)
        assert self.labels(run, before=1) == {0: "circle", 1: "cross", 2: "line"}
        assert run.ledger(before=1).declined.tolist() == []
        assert run.ledger(before=0).sha256 == first.sha256

    def test_what_a_trained_cycle_used_stays(self, pool: Pool, tmp_path: Path) -> None:
        """A cumulative export with the answers that lost can be imported again, and grows."""
        run = waiting_run(tmp_path / "run", pool, SAMPLES, needed=2)
        lost = [(0, "circle", "ann"), (0, "circle", "bob"), (0, "cross", "cy"), (1, "cross", "ann")]
        self.said(run, pool, *lost)
        initial = waiting_of(run)
        assert initial.collect(run)
        later = next_cycle(run, initial, pool, [2])
        told = self.said(run, pool, *lost, (2, "dot", "ann"))
        assert (told.new, told.too_late, told.answered) == (1, [], 1)
        told = self.said(run, pool, *lost, (0, "cross", "bob"), (0, "cross", "dan"), (1, "", "ann"))
        assert (told.new, len(told.changed)) == (3, 2)
        names = pool.samples(0, 2)["sample_id"].to_pylist()
        assert told.too_late == names
        assert later.collect(run)
        assert self.labels(run, before=1) == {0: "circle", 1: "cross", 2: "dot"}
        assert len(read(run.answers)) == 8

    def test_nothing_is_trained_on_too_little(self, pool: Pool, tmp_path: Path) -> None:
        """All are declined: the run waits, asks again, and takes a late label or one of another sample."""
        run = waiting_run(tmp_path / "run", pool, SAMPLES)
        self.said(run, pool, *((sample, "", "ann") for sample in SAMPLES))
        waiting = waiting_of(run)
        report = waiting.report(run)
        assert (report.answered, report.ready) == (3, False)
        assert report.short == ("0 labelled samples of 0 classes; training needs at least 2 (2 per rank) of 2 classes")
        assert not waiting.collect(run)
        assert not run.initial.exists()
        assert export_labels(run.path, tmp_path / "again.csv").samples == 3
        self.said(run, pool, (0, "circle", "ann"), (1, "circle", "ann"))
        assert "2 labelled samples of 1 classes" in waiting.report(run).short
        assert export_labels(run.path, tmp_path / "again.csv").samples == 1
        (tmp_path / "b.csv").write_text(f"sample_id,label\n{pool.samples(9, 10)['sample_id'][0].as_py()},cross\n")
        assert import_labels(run.path, tmp_path / "b.csv", allow_unasked=True).answered == 3
        assert waiting.report(run).ready
        assert waiting.collect(run)
        assert self.labels(run) == {0: "circle", 1: "circle", 9: "cross"}

    def test_an_exported_file_with_nothing_in_it(self, pool: Pool, tmp_path: Path) -> None:
        run = waiting_run(tmp_path / "run", pool, SAMPLES)
        self.said(run, pool, (0, "circle", "ann"), (1, "cross", "ann"), (2, "dot", "ann"))
        for fmt in ("csv", "parquet", "label-studio"):
            assert export_labels(run.path, tmp_path / "rest", fmt=fmt).samples == 0  # type: ignore[arg-type]
        assert json.loads((tmp_path / "rest").read_text()) == []
