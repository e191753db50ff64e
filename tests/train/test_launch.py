"""Real ranks under Ray Train, killed for real."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distal.artifacts import checkpoints
from distal.config import ModelSection, TrainSection
from distal.errors import Damage, Diverged, PoolError, Superseded, TrainingFailed
from distal.labels.oracle import choose_initial, label_from_pool
from distal.model.spec import ModelSpec
from distal.pool import Pool
from distal.pool.eligibility import Eligibility
from distal.storage import read_sealed, write_bytes
from distal.train.launch import Ranks, abandon, train
from distal.train.rank import TrainJob, last_claim, read_state
from tests.helpers import descendants
from tests.stand_ins import ranks_here


class Deadly(nn.Module):
    """Ends its process in the middle of the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        os._exit(9)


def deadly(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return Deadly()


def job(folder: Path, pool: Pool, **config: object) -> TrainJob:
    labels = folder / "initial.parquet"
    if not labels.exists():
        label_from_pool(pool, choose_initial(Eligibility.of(pool, None, 0), 40, 0), labels)
    settings = {"epochs": 3, "batch_size": 12, "threads": 1, **config}
    return TrainJob(
        pool=pool.path,
        pool_sha256=pool.content_sha256,
        folder=folder,
        labels=(labels,),
        model=ModelSpec(ModelSection(), 4, pool.image_shape, pool.mean, pool.std),
        config=TrainSection(**settings),  # type: ignore[arg-type]
        seed=0,
        cycle=0,
        threads=1,
        warm_from=None,
        inputs="inputs",
    )


def ranks(n: int) -> Ranks:
    return Ranks(workers=n, threads=1, use_gpu=False, label_selector=None)


def weights(job: TrainJob) -> list[str]:
    """sha256 of the weights of every checkpoint."""
    return [checkpoints.read(job.checkpoints, index).sha256 for index in checkpoints.committed(job.checkpoints)]


@pytest.fixture(scope="module")
def one_rank(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    done = job(tmp_path_factory.mktemp("one-rank"), pool)
    train(done, ranks(1))
    return done


@pytest.fixture(scope="module")
def two_ranks(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    done = job(tmp_path_factory.mktemp("two-ranks"), pool, workers=2)
    train(done, ranks(2))
    return done


def test_every_epoch_publishes_a_checkpoint_and_the_loss_falls(one_rank: TrainJob) -> None:
    refs = [checkpoints.read(one_rank.checkpoints, index) for index in range(3)]
    assert [ref.epoch for ref in refs] == [1, 2, 3]
    losses = [ref.metrics["train_loss"] for ref in refs]
    assert losses[0] > losses[-1] > 0
    assert len(set(weights(one_rank))) == 3
    assert checkpoints.load(refs[2]).keys() == one_rank.model.build().state_dict().keys()
    assert not (one_rank.folder / "train" / "ray").exists()


def test_a_rank_without_ray_train_gives_the_same_bytes(pool: Pool, tmp_path: Path, one_rank: TrainJob) -> None:
    """What the tests of files and messages train with: weights, losses, and what a restarted rank needs."""
    here = job(tmp_path, pool)
    with ranks_here():
        train(here, ranks(1))
    assert weights(here) == weights(one_rank)
    mine, theirs = (checkpoints.deserialize(read_state(of) or b"") for of in (here, one_rank))
    assert {name: mine[name] for name in ("inputs", "epoch", "loss")} == {
        name: theirs[name] for name in ("inputs", "epoch", "loss")
    }
    momenta = [of["optimizer"]["state"] for of in (mine, theirs)]
    assert momenta[0].keys() == momenta[1].keys()
    for one, other in zip(*(each.values() for each in momenta), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


@pytest.mark.slow
def test_a_finished_job_is_not_trained_again(one_rank: TrainJob) -> None:
    """The state says three epochs are done: nothing is trained, a checkpoint that is missing is committed."""
    before = weights(one_rank)
    state = one_rank.state_path.stat().st_mtime_ns
    manifest = one_rank.checkpoints / "0002" / "manifest.json"
    manifest.unlink()
    train(one_rank, ranks(1))
    assert weights(one_rank) == before
    assert one_rank.state_path.stat().st_mtime_ns == state


def test_two_ranks_learn_the_same_thing_in_another_order_of_sums(one_rank: TrainJob, two_ranks: TrainJob) -> None:
    """Same samples in the same batches: nearly the same weights as one rank, but for batch norm and rounding."""
    assert weights(one_rank) != weights(two_ranks)
    one, two = (checkpoints.read(job.checkpoints, 2).metrics["train_loss"] for job in (one_rank, two_ranks))
    assert two == pytest.approx(one, rel=0.5)


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_ranks_are_started_again_and_give_the_same_bits(
    pool: Pool, tmp_path: Path, two_ranks: TrainJob, workers: int
) -> None:
    """SIGKILL of one rank when the first checkpoint appears."""
    undisturbed = two_ranks
    if workers == 3:  # with three, DDP sums in an order that a resume could change
        undisturbed = job(tmp_path / "undisturbed", pool, workers=3, epochs=3)
        train(undisturbed, ranks(3))
    again = job(tmp_path, pool, workers=workers, epochs=3)
    killed: list[int] = []
    events: list[str] = []

    def killer() -> None:
        while not checkpoints.committed(again.checkpoints):
            time.sleep(0.001)
        pids = descendants("RayTrainWorker")
        os.kill(pids[-1], signal.SIGKILL)
        killed.append(pids[-1])

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    train(again, ranks(workers), on_event=lambda name, **_: events.append(name))
    thread.join(timeout=5)
    assert killed
    assert events == ["training_failed"]
    assert weights(again) == weights(undisturbed)


def test_a_state_from_other_inputs_is_refused(one_rank: TrainJob, tmp_path: Path) -> None:
    assert read_state(one_rank) == read_sealed(one_rank.state_path)
    other = replace(one_rank, folder=tmp_path, inputs="others")
    assert read_state(other) is None
    write_bytes(other.state_path, one_rank.state_path.read_bytes())
    with pytest.raises(Damage, match="from other inputs than the cycle has now; put back what was there, or remove"):
        read_state(other)
    write_bytes(other.state_path, one_rank.state_path.read_bytes()[:-100])
    with pytest.raises(Damage, match="state.pt: its bytes have changed; put back what was there, or remove"):
        read_state(other)


@pytest.mark.slow
def test_a_checkpoint_that_was_lost_is_not_trained_again(
    one_rank: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All epochs are done, so nothing will bring it back."""
    monkeypatch.setattr(checkpoints, "VISIBLE_S", 1.0)
    shutil.copytree(one_rank.folder, tmp_path / "copy")
    copy = replace(one_rank, folder=tmp_path / "copy")
    (copy.checkpoints / "0000" / "manifest.json").unlink()
    with pytest.raises(Damage, match="training is complete, and checkpoint 0 is not here"):
        train(copy, ranks(1))


@pytest.mark.slow
def test_ranks_whose_driver_gave_up_stop_writing(pool: Pool, tmp_path: Path) -> None:
    """`abandon` takes the right to write away: the ranks of a failed run must not go on in the caller's cluster."""
    long = job(tmp_path, pool, epochs=500)
    given_up = threading.Event()

    def give_up() -> None:
        while not checkpoints.committed(long.checkpoints):
            time.sleep(0.001)
        abandon(long, given_up)

    threading.Thread(target=give_up, daemon=True).start()
    with pytest.raises(Superseded, match="another attempt has taken over training"):
        train(long, ranks(1), given_up=given_up)
    assert 1 <= len(checkpoints.committed(long.checkpoints)) < 500


def test_nothing_is_begun_once_the_driver_gave_up(cluster: str, pool: Pool, tmp_path: Path) -> None:
    never = job(tmp_path, pool)
    given_up = threading.Event()
    abandon(never, given_up)
    with pytest.raises(Superseded, match="training was given up"):
        train(never, ranks(1), given_up=given_up)
    assert last_claim(never.folder) == (0, "")
    assert checkpoints.committed(never.checkpoints) == []


@pytest.mark.slow
def test_another_pool_at_the_same_place_is_refused(pool: Pool, tmp_path: Path) -> None:
    other = replace(job(tmp_path, pool), pool_sha256="0" * 64)
    with pytest.raises(PoolError, match="not the pool of this run"):
        train(other, ranks(1))


def test_divergence_stops_at_once_and_says_what_to_do(pool: Pool, tmp_path: Path) -> None:
    events: list[str] = []
    diverging = job(tmp_path, pool, lr=1e30, workers=2)
    with pytest.raises(
        Diverged, match=r"the loss of epoch \d is (nan|inf): training diverged; remove .*, with a lower"
    ):
        train(diverging, ranks(2), on_event=lambda name, **_: events.append(name))
    assert events == []


@pytest.mark.slow
def test_ranks_that_always_die_end_the_run(pool: Pool, tmp_path: Path) -> None:
    doomed = job(tmp_path, pool, max_failures=0)
    model = replace(doomed.model, config=ModelSection(name="tests.train.test_launch:deadly"))
    with pytest.raises(TrainingFailed, match="training failed 1 times in a row without finishing an epoch"):
        train(replace(doomed, model=model), ranks(1))
