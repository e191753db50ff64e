"""Real actors on a real cluster, writing a real array."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from distal.artifacts import checkpoints
from distal.artifacts.assignments import Assignments
from distal.config import ModelSection
from distal.errors import Damage, Diverged, PoolError, RunConflict, Unfit, UserError
from distal.model.spec import ModelSpec, seeded_build
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.records import Block, CheckpointRef, Progress, split_blocks
from distal.score.actor import WATCH, Scorer
from distal.score.fleet import STUCK_S, Fleet
from distal.score.job import ActorJob, Owner, Scored, ScoringJob, TaskResult
from distal.score.loop import score
from distal.score.plan import Task
from distal.score.predict import Prediction, Predictor

ROWS, BLOCK, BATCH = 4, 32, 16


class Silent:
    """A producer that holds nothing and has published what is in the folder."""

    def __init__(self, folder: Path) -> None:
        self.queue = checkpoints.Queue(folder, 0)

    def published(self) -> list[CheckpointRef]:
        return self.queue.published()

    def finished(self) -> bool:
        return True

    def slots_held(self) -> int:
        return 0


def folder_of(job: ActorJob) -> Path:
    """Where its checkpoints are."""
    return job.assignments.parent / "checkpoints"


def spec(pool: Pool) -> ModelSpec:
    return ModelSpec(ModelSection(), 4, pool.image_shape, pool.mean, pool.std)


def commit(folder: Path, pool: Pool, row: int) -> None:
    """Weights that differ from row to row; batch norm set so that the logits do too."""
    net = seeded_build(spec(pool), seed=row, cycle=0)
    checkpoints.commit(folder, row, row + 1, net.state_dict())


def prepare(
    folder: Path,
    pool: Pool,
    n_rows: int = ROWS,
    published: int = ROWS,
    block_size: int = BLOCK,
    recorded: tuple[str, ...] = ("margin", "entropy", "probabilities"),
) -> tuple[ActorJob, Assignments]:
    for row in range(published):
        commit(folder / "checkpoints", pool, row)
    eligible = Eligibility(pool, 0, None)
    assignments = Assignments.create(
        folder / "assignments.zarr",
        n_rows=n_rows,
        n_samples=pool.n_samples,
        block_size=block_size,
        n_classes=4,
        eligible=(eligible.read(block.start, block.stop) for block in split_blocks(pool.n_samples, block_size)),
        recorded=recorded,
    )
    job = ActorJob(
        pool=pool.path,
        pool_sha256=pool.content_sha256,
        assignments=assignments.path,
        model=spec(pool),
        precision="fp32",
        batch_size=BATCH,
        device="cpu",
        recorded_from=n_rows - 1,
    )
    return job, assignments


def score_block(scorer: Scorer, job: ActorJob, block: Block, refs: Sequence[CheckpointRef]) -> int:
    """Have one actor score a block; returns the images it predicted."""
    return scorer.score(job, Task(0, block.index, tuple(ref.index for ref in refs)), refs).n_predicted


def run(job: ActorJob, assignments: Assignments, fleet: Fleet, n_actors: int, **options: object) -> Scored:
    """Score with at most `n_actors`."""
    fleet.slots = n_actors
    whole = ScoringJob(
        job,
        assignments,
        options.pop("producer", None) or Silent(folder_of(job)),
        Progress(0, "score"),
        options.pop("on_progress", lambda _: None),
        Owner(on_event=options.pop("on_event", lambda name, **values: None)),
        **options,
    )
    return score(whole, fleet)


def new_fleet(prefix: str, cache_bytes: int = 2**20, stuck_after: float = STUCK_S, **options: Any) -> Fleet:
    """Actors of half a CPU each, on the only node that there is."""
    return Fleet(
        prefix,
        {"num_cpus": 0.5},
        asked=None,
        slots=lambda avoided: 0 if avoided else 1,
        cache_bytes=cache_bytes,
        threads=1,
        stuck_after=stuck_after,
        **options,
    )


@pytest.fixture(scope="module")
def fleet(cluster: str) -> Iterator[Fleet]:
    """Actors that live from test to test, as they live from cycle to cycle in a run."""
    shared = new_fleet("shared")
    yield shared
    shared.shrink(0)


def gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=10)
    return not psutil.pid_exists(pid)


def digest(path: Path) -> dict[str, str]:
    """sha256 of every chunk."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "zarr.json"
    }


@pytest.fixture(scope="module")
def reference(pool: Pool, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every chunk as one undisturbed actor writes it."""
    job, assignments = prepare(tmp_path_factory.mktemp("reference"), pool)
    run(job, assignments, fleet, 1)
    return digest(assignments.path)


def test_assignments_are_what_each_checkpoint_predicts(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    """Against a plain loop over all images, without blocks, actors or Zarr."""
    job, assignments = prepare(tmp_path, pool)
    assert run(job, assignments, fleet, 2).images == ROWS * 238
    eligible = np.array([status == "ok" for status in pool.samples(0, 240)["status"].to_pylist()])
    for row in range(ROWS):
        predictor = Predictor(spec(pool).build(), spec(pool).preprocess(), batch_size=BATCH)
        predictor.net.load_state_dict(checkpoints.load(checkpoints.read(folder_of(job), row)))
        expected = predictor(pool.read(0, 240))
        stored = assignments.read(0, 240)[row]
        assert np.array_equal(stored[eligible], expected.labels[eligible])
        assert np.all(stored[~eligible] == 255)
    probability = torch.nn.functional.softmax(expected.logits.double(), dim=1).numpy()
    last = assignments.read_recorded("probabilities", ROWS - 1, 0, 240)
    assert np.allclose(last[eligible], probability[eligible], atol=1e-6)
    assert np.isnan(last[~eligible]).all()
    margin = assignments.read_recorded("margin", ROWS - 1, 0, 240)
    assert np.array_equal(margin[eligible], expected.margin()[eligible].astype(np.float16))
    assert np.isnan(margin[~eligible]).all()
    assert not (assignments.path / "margin/c/0").exists()  # kept at the last checkpoint only
    assert len(np.unique(assignments.read(0, 240)[:, eligible])) > 1


@pytest.mark.parametrize("n_actors", [2, 3])
def test_any_number_of_actors_writes_the_same_bytes(
    pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str], n_actors: int
) -> None:
    job, assignments = prepare(tmp_path, pool)
    run(job, assignments, fleet, n_actors)
    assert digest(assignments.path) == reference


def test_killed_actors_are_replaced_and_change_nothing(pool: Pool, tmp_path: Path, reference: dict[str, str]) -> None:
    """SIGKILL of the actor's process as soon as the 5th, the 12th and the 20th of 32 blocks are committed."""
    job, assignments = prepare(tmp_path, pool)
    fleet = new_fleet("killed")
    pids: list[int] = []
    killed_at: list[int] = []
    events: list[str] = []

    def on_event(name: str, **values: object) -> None:
        events.append(name)
        if name == "actor_joined":
            actor = fleet.actors[values["actor"]]
            pids.append(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))

    def killer() -> None:
        for threshold in (5, 12, 20):
            while (done := sum(len(assignments.committed(row)) for row in range(ROWS))) < threshold:
                time.sleep(0.001)
            killed_at.append(done)
            os.kill(pids[-1], signal.SIGKILL)
            n_started = len(pids)
            while len(pids) == n_started:
                time.sleep(0.001)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    run(job, assignments, fleet, 1, on_event=on_event)
    fleet.shrink(0)
    assert digest(assignments.path) == reference
    assert len(killed_at) == 3
    assert killed_at[-1] < ROWS * len(assignments.blocks)
    assert events.count("actor_lost") == 3


def test_a_stuck_actor_is_replaced(pool: Pool, tmp_path: Path, reference: dict[str, str]) -> None:
    """SIGSTOP: the process is there and does nothing, nor does it answer. Woken up later, it changes nothing either."""
    job, assignments = prepare(tmp_path, pool)
    fleet = new_fleet("stuck", stuck_after=2.0)
    reasons: list[str] = []
    stopped: list[int] = []

    def on_event(name: str, **values: object) -> None:
        if name == "actor_lost":
            reasons.append(str(values["reason"]))
        if name == "actor_joined" and not stopped:
            actor = fleet.actors[values["actor"]]
            stopped.append(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))
            os.kill(stopped[0], signal.SIGSTOP)

    run(job, assignments, fleet, 1, on_event=on_event)
    fleet.shrink(0)
    assert digest(assignments.path) == reference
    assert len(reasons) == 1
    assert re.match(r"no sign of life for \d+ s; it is replaced", reasons[0])
    assert gone(stopped[0]), "it would keep its slot"


class HangsAtFirst(Scorer):
    """The first one never gets as far as to tell its process; or tells it, and never gets to work."""

    def __init__(self, name: str, *arguments: int) -> None:
        super().__init__(name, *arguments)
        self.first = name.endswith("-0")
        if self.first and name.startswith("mute"):
            time.sleep(600)

    def ready(self, job: ActorJob) -> dict[str, str]:
        if self.first:
            time.sleep(600)
        return super().ready(job)


@pytest.mark.parametrize(("prefix", "told"), [("mute", "actor_asked_for_again"), ("idle", "actor_lost")])
def test_an_actor_that_hangs_before_it_has_work_is_replaced(
    pool: Pool, tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch, prefix: str, told: str
) -> None:
    monkeypatch.setattr("distal.score.fleet.Scorer", HangsAtFirst)
    monkeypatch.setattr("distal.score.fleet.WAITS_S", 8.0)
    job, assignments = prepare(tmp_path, pool)
    fleet = new_fleet(prefix, stuck_after=2.0)
    events: list[str] = []
    run(job, assignments, fleet, 1, on_event=lambda name, **_: events.append(name))
    fleet.shrink(0)
    assert digest(assignments.path) == reference
    assert events.count(told) >= 1
    assert events[-1] == "actor_joined"


class NoBatches(Scorer):
    """Finishes a block now and then, and has predicted no batch, as where no sample of a block is left to score."""

    def score(self, job: ActorJob, task: Task, refs: Sequence[CheckpointRef], theta: int = 0) -> TaskResult:
        time.sleep(0.75)
        return super().score(job, task, refs, theta)

    @ray.method(concurrency_group=WATCH)
    def sign_of_life(self) -> int:
        return 0


def test_a_finished_block_is_a_sign_of_life(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distal.score.fleet.Scorer", NoBatches)
    job, assignments = prepare(tmp_path, pool, n_rows=1, published=1)
    fleet = new_fleet("batchless", stuck_after=3.0)  # eight blocks take longer
    events: list[str] = []
    run(job, assignments, fleet, 1, on_event=lambda name, **_: events.append(name))
    fleet.shrink(0)
    assert events == ["actor_joined"]


def test_only_what_is_missing_is_scored(pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str]) -> None:
    job, assignments = prepare(tmp_path, pool)
    run(job, assignments, fleet, 1)
    untouched = assignments.path / "assignments/c/0/0"
    stamp = untouched.stat().st_mtime_ns
    again = run(job, assignments, fleet, 1)  # nothing is missing, and the figures are those of the whole array
    assert (again.images, again.n_rows, again.left_out) == (ROWS * 238, ROWS, 0)
    for lost in ("0/3", "2/0", "3/7"):
        (assignments.path / "assignments/c" / lost).unlink()
    run(job, assignments, fleet, 2)
    assert digest(assignments.path) == reference
    assert untouched.stat().st_mtime_ns == stamp


def test_checkpoints_are_scored_as_they_appear(
    pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str]
) -> None:
    """Training publishes one checkpoint after the other, and holds a slot until it is done."""
    job, assignments = prepare(tmp_path, pool, published=0)
    order: list[tuple[int, int]] = []

    class Trainer(Silent):
        n = 0

        def finished(self) -> bool:
            return self.n == ROWS

        def slots_held(self) -> int:
            return int(self.n < ROWS)

    trainer = Trainer(folder_of(job))

    def follow(progress: Progress) -> None:
        order.append((progress.published, progress.rows_scored))
        assert progress.actors <= 2 - trainer.slots_held()
        if trainer.n == progress.rows_scored and trainer.n < ROWS:
            commit(folder_of(job), pool, trainer.n)
            trainer.n += 1

    run(job, assignments, fleet, 2, producer=trainer, on_progress=follow)
    assert digest(assignments.path) == reference
    for row in range(ROWS):
        assert (row + 1, row) in order or (row + 1, row + 1) in order


def test_a_failed_producer_stops_the_pass(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    class Failed(Silent):
        def finished(self) -> bool:
            raise Diverged("the loss is nan")

    job, assignments = prepare(tmp_path, pool, published=1)
    with pytest.raises(Diverged, match="the loss is nan"):
        run(job, assignments, fleet, 1, producer=Failed(folder_of(job)))


def test_a_logit_that_is_not_finite_names_checkpoint_and_sample(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    job, assignments = prepare(tmp_path, pool, published=2)
    commit(folder_of(job), pool, 3)
    state = seeded_build(spec(pool), 0, 0).state_dict()
    state["14.bias"][1] = torch.nan
    checkpoints.commit(folder_of(job), 2, 3, state)
    with pytest.raises(Diverged, match=r"checkpoint 2 \(.*\) gives a logit that is not finite for sample s1-\d+"):
        run(job, assignments, fleet, 1)
    assert assignments.committed(2) == set()


def test_changed_weights_stop_the_pass(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    job, assignments = prepare(tmp_path, pool)
    weights = checkpoints.read(folder_of(job), 1).path
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Damage, match="the bytes of checkpoint 1 have changed"):
        run(job, assignments, fleet, 1)


def test_another_machine_is_refused_unless_allowed(
    pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str]
) -> None:
    strangers = new_fleet("another")
    job, assignments = prepare(tmp_path, pool)
    assignments.adopt_fingerprint({"processor": "another one"})
    with pytest.raises(
        RunConflict, match="begun with processor 'another one', this actor has .*, or set score.mixed_hardware=allow"
    ):
        run(job, assignments, strangers, 1)
    assert not strangers.actors
    run(job, assignments, fleet, 1, mixed_hardware=True)
    assert digest(assignments.path) == reference


def test_test_images_at_the_last_checkpoint_only(
    pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str]
) -> None:
    """The same pass with one row that belongs to the last checkpoint."""
    job, assignments = prepare(tmp_path, pool, n_rows=1)
    run(replace(job, first_index=ROWS - 1, recorded_from=0), assignments, fleet, 1)
    assert digest(assignments.path)["assignments/c/0/0"] == reference[f"assignments/c/{ROWS - 1}/0"]


def test_one_actor_of_another_kind_is_sent_away(pool: Pool, tmp_path: Path, reference: dict[str, str]) -> None:
    """The others go on without it."""
    fleet = new_fleet("mixed")
    first, assignments = prepare(tmp_path / "first", pool)
    run(first, assignments, fleet, 1)
    fleet._arguments = (2**20, 2)  # the next actor has two threads
    job, mixed = prepare(tmp_path / "mixed", pool, published=ROWS - 1)
    mixed.adopt_fingerprint(assignments.fingerprint)
    events: list[tuple[str, object]] = []

    class Waiting(Silent):
        """Publishes the last checkpoint when both actors have come."""

        def finished(self) -> bool:
            if len(events) == 2:
                commit(folder_of(job), pool, ROWS - 1)
            return len(events) == 2

    run(
        job,
        mixed,
        fleet,
        2,
        producer=Waiting(folder_of(job)),
        on_event=lambda name, **values: events.append((name, values["actor"])),
    )
    assert sorted(events) == [("actor_joined", 0), ("actor_refused", 1)]
    assert list(fleet.actors) == [0]
    fleet.shrink(0)
    assert digest(mixed.path) == reference


class SeesNoPool(Scorer):
    """The second actor is on a node that lacks the folder of the pool, and says so when the first one is at work."""

    def ready(self, job: ActorJob) -> dict[str, str]:
        first = job.assignments.with_name("first is ready")
        if self._name == "partly-0":
            first.touch()
            return super().ready(job)
        while self._name == "partly-1" and not first.exists():
            time.sleep(0.05)
        return super().ready(replace(job, pool=Path("/nowhere")))


def test_an_actor_that_cannot_see_the_pool_is_sent_away(
    pool: Pool, cluster: str, tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it; when there is no other, the run ends with the reason."""
    monkeypatch.setattr("distal.score.fleet.Scorer", SeesNoPool)
    job, assignments = prepare(tmp_path, pool, published=ROWS - 1)
    fleet = new_fleet("partly")
    refused: list[dict[str, object]] = []

    class Waiting(Silent):
        """Publishes the last checkpoint when the actor has been sent away."""

        def finished(self) -> bool:
            if refused:
                commit(folder_of(job), pool, ROWS - 1)
            return bool(refused)

    run(
        job,
        assignments,
        fleet,
        2,
        producer=Waiting(folder_of(job)),
        on_event=lambda name, **values: refused.append(values) if name == "actor_refused" else None,
    )
    assert [(event["actor"], "/nowhere" in str(event["reason"])) for event in refused] == [(1, True)]
    fleet.shrink(0)
    assert digest(assignments.path) == reference
    nobody = new_fleet("nobody")
    job, assignments = prepare(tmp_path / "again", pool)
    with pytest.raises(UserError, match="/nowhere"):
        run(job, assignments, nobody, 2)
    nobody.shrink(0)


def test_what_actors_had_in_hand_is_asked_of_others(pool: Pool, fleet: Fleet, cluster: str, tmp_path: Path) -> None:
    """All of them die at once, as with their node; later one stops, and gives no sign of life."""
    job, _ = prepare(tmp_path, pool, published=1)
    ref = checkpoints.read(folder_of(job), 0)
    job = replace(job, batch_size=8)
    indices = np.arange(8, 200)  # three pieces
    expected = fleet.outputs(job, indices, ref, {"probabilities"}, None)["probabilities"]
    fleet.shrink(0)
    four = new_fleet("four", stuck_after=4.0)
    four.slots = 4
    for number, where in ((signal.SIGKILL, slice(None)), (signal.SIGSTOP, slice(1))):
        four.grow(4)
        while len(four.processes) < 4:
            four.look_around()
            time.sleep(0.1)
        for process in list(four.processes.values())[where]:
            os.kill(process.pid, number)
        found = four.outputs(job, indices, ref, {"probabilities"}, None)["probabilities"]
        assert np.array_equal(found, expected)
    four.shrink(0)


class StopsAtFirst(Scorer):
    """The first one is stopped before its first word, and says who it is in a file."""

    def __init__(self, name: str, *arguments: int) -> None:
        if name.endswith("-0"):
            Path(os.environ["STOPPED"]).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        super().__init__(name, *arguments)


@pytest.mark.timeout(100)
def test_an_actor_that_stops_before_its_first_word_keeps_no_answer_waiting(
    pool: Pool, fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = prepare(tmp_path, pool, published=1)
    ref = checkpoints.read(folder_of(job), 0)
    indices = np.arange(8, 200)
    expected = fleet.outputs(job, indices, ref, {"probabilities"}, None)["probabilities"]
    monkeypatch.setattr("distal.score.fleet.Scorer", StopsAtFirst)
    monkeypatch.setattr("distal.score.fleet.WAITS_S", 8.0)
    stopped = tmp_path / "stopped"
    events: list[str] = []
    one, owner = new_fleet("stopped", stuck_after=2.0), Owner(on_event=lambda name, **_: events.append(name))
    one._options |= {"runtime_env": {"env_vars": {"STOPPED": str(stopped)}}}
    try:
        found = one.outputs(job, indices, ref, {"probabilities"}, None, owner)["probabilities"]
        assert np.array_equal(found, expected)
        assert "actor_asked_for_again" in events
        assert one.predict(job, indices, ref, Owner()).tolist() == expected.argmax(axis=1).tolist()
    finally:
        one.shrink(0)
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(stopped.read_text()), signal.SIGKILL)


def test_probabilities_come_from_actors_of_one_kind(pool: Pool, cluster: str, tmp_path: Path) -> None:
    job, _ = prepare(tmp_path, pool, published=1)
    ref = checkpoints.read(folder_of(job), 0)
    strangers = new_fleet("strangers")
    with pytest.raises(Unfit, match="begun with processor 'another one', this actor has .*score.mixed_hardware=allow"):
        strangers.outputs(job, np.arange(8), ref, {"probabilities"}, {"processor": "another one"})
    assert not strangers.actors


@pytest.mark.timeout(100)
def test_an_actor_without_room_keeps_no_answer_waiting(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    """As after the loss of a node: two slots are counted, and there is room for one actor."""
    fleet.shrink(0)
    crowded = Fleet("crowded", {"num_cpus": 2}, asked=None, slots=lambda _: 2, cache_bytes=0, threads=1)
    job, _ = prepare(tmp_path, pool, published=1)
    ref = checkpoints.read(folder_of(job), 0)
    indices = np.arange(8, 200)  # two pieces
    found = crowded.outputs(job, indices, ref, {"probabilities"}, None)["probabilities"]
    assert (found.argmax(axis=1) == crowded.predict(job, indices, ref, Owner())).all()
    assert (len(crowded.actors), len(crowded.processes)) == (2, 1)
    crowded.shrink(0)


def test_actors_make_room_for_training_that_comes_back(
    pool: Pool, fleet: Fleet, tmp_path: Path, reference: dict[str, str]
) -> None:
    """Ranks that died need their slots again while two actors are at work."""
    seen: list[int] = []

    class Returning(Silent):
        def finished(self) -> bool:
            shrunk = 2 in seen and seen[-1] == 1
            if shrunk:
                commit(folder_of(job), pool, ROWS - 1)
            return shrunk

        def slots_held(self) -> int:
            return 1 if 2 in seen else 0

    job, assignments = prepare(tmp_path, pool, published=ROWS - 1)
    run(
        job,
        assignments,
        fleet,
        2,
        producer=Returning(folder_of(job)),
        on_progress=lambda state: seen.append(state.actors),
    )
    assert seen[-1] == 1
    assert len(fleet.actors) == 1
    assert digest(assignments.path) == reference


def test_a_row_is_not_finished_with_other_weights(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    job, assignments = prepare(tmp_path, pool)
    run(job, assignments, fleet, 1)
    (assignments.path / "assignments/c/1/3").unlink()
    (folder_of(job) / "0001/manifest.json").unlink()
    checkpoints.commit(folder_of(job), 1, 2, seeded_build(spec(pool), seed=99, cycle=0).state_dict())
    with pytest.raises(Damage, match="row 1 was begun with weights"):
        run(job, Assignments.open(assignments.path), fleet, 1)


def test_another_pool_at_the_same_place_is_refused(pool: Pool, fleet: Fleet, tmp_path: Path) -> None:
    job, assignments = prepare(tmp_path, pool)
    with pytest.raises(PoolError, match="not the pool of this run .* every node must see the same files"):
        run(replace(job, pool_sha256="0" * 64), assignments, fleet, 1)


class TestReading:
    """How often an actor reads, and how much it keeps; in this process, to look inside."""

    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        read = Pool.read

        def counted(pool: Pool, start: int, stop: int) -> np.ndarray:
            seen.append((start, stop))
            return read(pool, start, stop)

        monkeypatch.setattr(Pool, "read", counted)
        return seen

    def refs(self, job: ActorJob) -> list[CheckpointRef]:
        return [checkpoints.read(folder_of(job), row) for row in range(ROWS)]

    def test_a_block_is_read_once_for_all_checkpoints_that_wait(
        self, pool: Pool, tmp_path: Path, reads: list[tuple[int, int]], reference: dict[str, str]
    ) -> None:
        job, assignments = prepare(tmp_path, pool)
        scorer = Scorer("one", cache_bytes=0, threads=1)
        for block in assignments.blocks:
            score_block(scorer, job, block, tuple(self.refs(job)))
        assert reads == [(block.start, block.stop) for block in assignments.blocks]
        assert digest(assignments.path) == reference

    def test_a_block_that_is_kept_is_read_once_for_all_checkpoints_to_come(
        self, pool: Pool, tmp_path: Path, reads: list[tuple[int, int]]
    ) -> None:
        job, assignments = prepare(tmp_path, pool)
        keeping, forgetting = Scorer("keeping", 2**20, threads=1), Scorer("forgetting", 0, threads=1)
        for ref in self.refs(job):
            score_block(keeping, job, assignments.blocks[0], (ref,))
            score_block(forgetting, job, assignments.blocks[1], (ref,))
        assert reads.count((0, BLOCK)) == 1
        assert reads.count((BLOCK, 2 * BLOCK)) == ROWS

    @pytest.mark.parametrize("n_kept", [0, 3])
    def test_what_is_kept_stays_within_the_budget(
        self, pool: Pool, tmp_path: Path, n_kept: int, reference: dict[str, str]
    ) -> None:
        """When the budget is spent the blocks that are kept stay, and the answer is the same."""
        job, assignments = prepare(tmp_path, pool)
        budget = n_kept * BLOCK * 12 * 12
        scorer = Scorer("small", cache_bytes=budget, threads=1)
        for ref in self.refs(job):
            for block in assignments.blocks:
                score_block(scorer, job, block, (ref,))
                kept = sum(piece.images.nbytes for pieces in scorer._pieces.values() for piece in pieces)
                assert kept <= budget
        assert len(scorer._pieces) == n_kept
        assert digest(assignments.path) == reference

    def test_a_block_larger_than_a_chunk_is_never_whole_in_memory(
        self, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It goes through the network in pieces of whole batches, of about a chunk each."""
        job, assignments = prepare(tmp_path, pool, block_size=256)
        sizes: list[int] = []
        predict = Predictor.__call__

        def measured(predictor: Predictor, images: np.ndarray) -> Prediction:
            sizes.append(len(images))
            return predict(predictor, images)

        monkeypatch.setattr(Predictor, "__call__", measured)
        score_block(Scorer("pieces", 0, threads=1), job, assignments.blocks[0], tuple(self.refs(job)[:1]))
        assert sum(sizes) == 238
        assert max(sizes) < pool.chunk_size + BATCH
        assert sizes[0] % BATCH == 0
        blocks, other = prepare(tmp_path / "blocks", pool)
        for block in other.blocks:
            score_block(Scorer("blocks", 0, threads=1), blocks, block, tuple(self.refs(blocks)[:1]))
        assert np.array_equal(assignments.read(0, 240)[0], other.read(0, 240)[0])
