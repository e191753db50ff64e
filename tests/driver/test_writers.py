"""Every artifact that two drivers may write: one is paused before each operation on a file, the other one finishes.

The first driver is what a machine leaves that was cut off and comes back: its lease has expired, it has a successor, and
it goes on where it stood.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distal.artifacts import checkpoints
from distal.artifacts import lease as leases
from distal.artifacts.assignments import Assignments
from distal.artifacts.lease import Holder, Lease
from distal.artifacts.ledger import Ledger, write_labels
from distal.artifacts.runs import Run
from distal.config import parse
from distal.errors import Damage, RunConflict, Superseded
from distal.records import Block
from distal.score.eliminate import Barrier
from distal.score.loop import barrier_path, read_barriers
from distal.storage import create_json, names_in, read_json, write_json
from distal.train.rank import check_owner, claim, last_claim, release
from tests.interleave import interleavings

BLOCK = Block(0, 0, 4)


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """An empty folder, another one each time."""
    numbers = itertools.count()

    def make() -> Path:
        path = tmp_path / str(next(numbers))
        path.mkdir()
        return path

    return make


@pytest.fixture
def expired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds a lease seems to be gone: it is on a machine whose beat has stood still."""
    monkeypatch.setattr(Holder, "lives", lambda self: False)
    monkeypatch.setattr(Lease, "_beat", lambda self: None)


def begun(path: Path) -> Path:
    (path / "run.yaml").touch()
    return path


@pytest.mark.parametrize("n_before", [0, 1, 3])
@pytest.mark.parametrize("comes_to_nothing", [False, True])
def test_one_lease_is_held_whoever_was_paused(
    fresh: Callable[[], Path], expired: None, n_before: int, comes_to_nothing: bool
) -> None:
    """A taker that is paused while others take over, and end, cannot take a number that one of them had."""
    state: dict[str, object] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        run = fresh() / "run"
        run.mkdir()
        if n_before or not comes_to_nothing:
            begun(run)
        for i in range(n_before):
            Lease(run, f"before-{i}")._take()
        if comes_to_nothing:
            (run / "run.yaml").unlink(missing_ok=True)
        taken: list[Lease] = []
        state.update(run=run, taken=taken)

        def take(name: str) -> None:
            lease = Lease(run, name)
            lease._take()
            taken.append(lease)

        def others() -> None:
            state["was_paused"] = not taken
            for name in ("b", "c", "d"):
                with Lease(run, name) as lease:
                    taken.append(lease)

        return (lambda: take("a")), others

    def check() -> None:
        run, taken = state["run"], state["taken"]
        assert isinstance(run, Path)
        assert isinstance(taken, list)
        (mine,) = (lease for lease in taken if lease._me.attempt == "a")
        if state["was_paused"]:  # the others have ended when it gets the lease, so it has it
            mine.require()
            assert names_in(run / "driver")[-1] == f"{mine.number:06d}.json"
        if not comes_to_nothing:
            assert len({lease.number for lease in taken}) == len(taken)

    assert interleavings(begin, check) > 3


def test_a_late_beat_and_a_late_end_leave_the_successor_alone(
    fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a superseded driver writes into its own file, another one is the lease."""
    monkeypatch.setattr(Holder, "lives", lambda self: False)
    monkeypatch.setattr(leases, "BEAT_S", 0.0)
    state: dict[str, Path] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        run = begun(fresh())
        state["run"] = run
        first = Lease(run, "first")
        first._take()
        second, third = Lease(run, "second"), Lease(run, "third")

        def beat_once_and_end() -> None:
            turns = iter([False, True])
            first._ended.wait = lambda timeout=None: next(turns)  # type: ignore[method-assign]
            first._beat()
            first._thread.join = lambda timeout=None: None  # type: ignore[method-assign]
            first.__exit__(None, None, None)

        def take_over() -> None:
            second._take()
            third._take()

        return beat_once_and_end, take_over

    def check() -> None:
        run = state["run"]
        number, holder = Lease(run, "looks")._latest()
        assert holder is not None
        assert (number, holder.attempt, holder.released) == (3, "third", False)

    assert interleavings(begin, check) > 3


def test_the_right_to_train_is_the_successors(fresh: Callable[[], Path], expired: None) -> None:
    state: dict[str, Path] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        run = begun(fresh())
        state["cycle"] = run / "cycles/000"
        old = Lease(run, "old")
        old._take()

        def first() -> None:
            claim(state["cycle"], "old-1", old.require)
            claim(state["cycle"], "old-2", old.require)
            release(state["cycle"], "old-")

        def second() -> None:
            new = Lease(run, "new")
            new._take()
            claim(state["cycle"], "new-1", new.require)

        return first, second

    def check() -> None:
        check_owner(state["cycle"], "new-1")
        assert last_claim(state["cycle"])[1] == "new-1"
        with pytest.raises(Superseded):
            check_owner(state["cycle"], "old-1")

    assert interleavings(begin, check) > 3


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_the_attempt_at_training_that_counts_is_the_successors(
    fresh: Callable[[], Path], expired: None, n_before: int
) -> None:
    """Where its checkpoints and assignments are does not change while it trains."""
    state: dict[str, Any] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        run = begun(fresh())
        cycle = Run(run).cycle(0)
        state.update(cycle=cycle, late=None)
        for _ in range(n_before):
            cycle.begin_attempt()
        old = Lease(run, "old")
        old._take()

        def second() -> None:
            new = Lease(run, "new")
            new._take()
            dest = cycle.begin_attempt(new.require)
            assert names_in(dest) == []
            state["begun"] = dest, cycle.checkpoints, cycle.assignments
            checkpoints.commit_bytes(dest, 0, 1, b"weights")

        def first() -> None:
            state["late"] = cycle.begin_attempt(old.require)

        return first, second

    def check() -> None:
        cycle = state["cycle"]
        dest, *folders = state["begun"]
        assert [cycle.checkpoints, cycle.assignments] == folders
        assert folders[0] == dest != state["late"]
        assert checkpoints.committed(cycle.checkpoints) == [0]
        assert cycle.assignments not in cycle.earlier_assignments()

    assert interleavings(begin, check) > 3


def test_who_was_given_up_may_not_write(tmp_path: Path) -> None:
    claim(tmp_path, "mine-1")
    release(tmp_path, "another-")
    check_owner(tmp_path, "mine-1")
    release(tmp_path, "mine-")
    with pytest.raises(Superseded):
        check_owner(tmp_path, "mine-1")
    claim(tmp_path, "mine-2")
    check_owner(tmp_path, "mine-2")


def lay_out(path: Path, n_rows: int = 2) -> Assignments:
    return Assignments.take_up(
        path / "a.zarr",
        n_rows=n_rows,
        n_samples=4,
        block_size=4,
        n_classes=3,
        eligible=lambda start, stop: np.ones(stop - start, bool),
        on_damage=lambda what: pytest.fail(what),
    )


def test_assignments_are_laid_out_once(fresh: Callable[[], Path]) -> None:
    """A layout that comes late does not wipe what has been scored."""
    state: dict[str, Path] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        path = state["path"] = fresh()

        def second() -> None:
            assignments = lay_out(path)
            assignments.adopt_weights(0, "a" * 64)
            assignments.write(0, BLOCK, np.arange(4, dtype=np.uint8) % 3)

        return (lambda: lay_out(path)), second

    def check() -> None:
        assignments = Assignments.open(state["path"] / "a.zarr")
        assert assignments.read(0, 4, [0], complete=True).tolist() == [[0, 1, 2, 0]]
        assert assignments.eligible(0, 4).all()
        assert assignments.weights == {0: "a" * 64}
        assert not [path for path in state["path"].iterdir() if path.name.endswith(".tmp")]

    assert interleavings(begin, check) > 3


def test_assignments_have_the_rows_that_the_first_one_knew_of(fresh: Callable[[], Path]) -> None:
    """Where checkpoints go on coming, whoever lays out later knows of more."""
    state: dict[str, Any] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        path = fresh()
        state.update(path=path, found=[])
        return (lambda: lay_out(path, 3)), (lambda: state["found"].append(lay_out(path, 5).n_rows))

    def check() -> None:
        assert state["found"] == [Assignments.open(state["path"] / "a.zarr").n_rows]
        assert lay_out(state["path"], 7).n_rows in (3, 5)

    assert interleavings(begin, check) > 3


def test_what_scoring_was_begun_with_is_kept_by_both(fresh: Callable[[], Path]) -> None:
    """Two drivers adopt rows and a machine: what one has adopted the other cannot take back, nor differ from."""
    state: dict[str, object] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        path = fresh()
        lay_out(path)
        old, new = (Assignments.open(path / "a.zarr") for _ in range(2))
        said: dict[str, object] = {}
        state.update(path=path, said=said)

        def adopt(name: str, assignments: Assignments, weights: dict[int, str]) -> None:
            said[name] = assignments.adopt_fingerprint({"torch": name})
            for row, sha256 in weights.items():
                try:
                    assignments.adopt_weights(row, sha256)
                except Damage:
                    said[f"{name} {row}"] = "refused"

        old_ones, new_ones = {0: "a" * 64, 1: "b" * 64}, {1: "c" * 64, 0: "a" * 64}
        return (lambda: adopt("old", old, old_ones)), (lambda: adopt("new", new, new_ones))

    def check() -> None:
        path, said = state["path"], state["said"]
        assert isinstance(path, Path)
        assert isinstance(said, dict)
        assignments = Assignments.open(path / "a.zarr")
        assert said["old"] == said["new"] == assignments.fingerprint
        assert assignments.weights[0] == "a" * 64
        assert {"old 1", "new 1"} & said.keys() == {"new 1" if assignments.weights[1] == "b" * 64 else "old 1"}

    assert interleavings(begin, check) > 3


def test_what_was_decided_at_a_barrier_is_never_taken_back(fresh: Callable[[], Path]) -> None:
    """The first driver decides rows 3 and 5; its successor, who began from nothing, has decided 7 as well."""
    decided = [Barrier(row, row - 2, (row, row)) for row in (3, 5, 7)]
    state: dict[str, Path] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        state["record"] = record = fresh() / "elimination"

        def decide(barriers: list[Barrier]) -> None:
            for barrier in barriers:
                create_json(barrier_path(record, barrier.row), barrier.to_record())

        return (lambda: decide(decided[:2])), (lambda: decide(decided))

    def check() -> None:
        assert read_barriers(state["record"], [3, 5, 7, 9]) == decided

    assert interleavings(begin, check) > 3
    barrier_path(state["record"], 5).unlink()
    assert read_barriers(state["record"], [3, 5, 7, 9]) == decided[:1]  # what follows a gap is decided again


def test_labels_that_a_cycle_is_trained_with_are_never_replaced(fresh: Callable[[], Path]) -> None:
    """A driver that collected answers before more of them came finds the labels of its successor."""
    state: dict[str, object] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        path = fresh() / "labels.parquet"
        state["path"] = path

        def write(n: int) -> str:
            write_labels(path, np.arange(n), [f"s{i}" for i in range(n)], np.zeros(n, np.int64), "someone")
            return Ledger.read([path]).sha256

        def second() -> None:
            state["trained"] = write(5)

        return (lambda: write(3)), second

    def check() -> None:
        path = state["path"]
        assert isinstance(path, Path)
        assert Ledger.read([path]).sha256 == state["trained"]

    assert interleavings(begin, check) > 3


def test_a_run_and_a_cycle_are_begun_once(fresh: Callable[[], Path]) -> None:
    """Constants and configuration are those that the successor goes on with."""
    config = parse({"run": "r", "pool": {"path": "p"}})
    state: dict[str, object] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        path = fresh()
        state.update(path=path, kept=None)

        def start(seed: int) -> None:
            run = Run(path)
            run.begin({"seed": 0}, {"score.batch_size": seed})
            cycle = run.cycle(0)
            if not (cycle.folder / "cycle.yaml").exists():  # `config` has a lock between the threads of a process
                cycle.begin(config.with_values({"train.lr": seed / 100}))

        def second() -> None:
            start(2)
            run = Run(path)
            assert run.identity is not None
            state["kept"] = run.identity.constants, run.cycle(0).config

        return (lambda: start(1)), second

    def check() -> None:
        path = state["path"]
        assert isinstance(path, Path)
        run = Run(path)
        assert run.identity is not None
        if state["kept"] is not None:
            assert (run.identity.constants, run.cycle(0).config) == state["kept"]
        assert run.cycle(0).config is not None

    assert interleavings(begin, check) > 3


def test_a_superseded_driver_looks_before_it_replaces(fresh: Callable[[], Path], expired: None) -> None:
    """`waiting.json`, `expected.json` and `checkpoints.json` are replaced: right before, the lease is looked at."""
    run = begun(fresh())
    old = Lease(run, "old")
    old._take()
    old.require()
    write_json(run / "driver/000002.json", asdict(replace(Holder.this_process("new"), host="elsewhere")))
    with pytest.raises(Superseded, match="attempt new .* has taken over"):
        old.require()
    with pytest.raises(Superseded):
        old.check()
    assert not read_json(run / "driver/000002.json")["released"]


def test_a_living_driver_is_not_taken_over_by_one_that_was_paused(fresh: Callable[[], Path]) -> None:
    """All on one machine, where it can be seen that the holder lives: there is one that goes on, in every order."""
    state: dict[str, object] = {}

    def begin() -> tuple[Callable[[], object], Callable[[], object]]:
        run = begun(fresh())
        taken: list[Lease] = []
        state.update(run=run, taken=taken)

        def take(name: str) -> None:
            lease = Lease(run, name)
            lease._take()
            taken.append(lease)

        return (lambda: take("a")), (lambda: take("b"))

    def check() -> None:
        taken = state["taken"]
        assert isinstance(taken, list)
        assert [lease.number for lease in taken] == [1]

    assert interleavings(begin, check) > 3
    with pytest.raises(RunConflict):
        Lease(state["run"], "c")._take()  # type: ignore[arg-type]
