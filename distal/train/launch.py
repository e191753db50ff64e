"""Start the ranks with Ray Train, and start them again when they die.

Ray Train only places and starts ranks: nothing is reported to it, and what survives a failure is `state.pt`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distal.artifacts import checkpoints
from distal.errors import DistalError, Superseded, TrainingFailed
from distal.storage import remove_tree
from distal.train.rank import TrainJob, claim, release, train_rank

# Read by Ray Train's controller when `fit` starts it.
_RAY_TRAIN_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s is how late a finished rank is noticed
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a rank keeps the working directory, so a user's module is found
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


@dataclass(frozen=True)
class Ranks:
    """How the ranks are placed.

    Attributes:
        use_gpu: one GPU per rank, and NCCL; else gloo.
        label_selector: nodes they may run on, None for any.
    """

    workers: int
    threads: int
    use_gpu: bool
    label_selector: dict[str, str] | None

    def __str__(self) -> str:
        where = f" on nodes with {self.label_selector}" if self.label_selector else ""
        gpu = " and a GPU" if self.use_gpu else ""
        return f"{self.workers} ranks of {self.threads} CPU slots{gpu} each{where}"


def train(
    job: TrainJob,
    ranks: Ranks,
    *,
    given_up: threading.Event | None = None,
    still_ours: Callable[[], None] = lambda: None,
    on_event: Callable[..., None] = lambda name, **values: None,
) -> None:
    """Train all epochs of a cycle; returns when the last checkpoint is committed.

    Ranks that die are started again, with the same world size, from the last finished epoch. While the cluster has no
    room for them this waits, and logs it about once a minute.

    Args:
        given_up: no attempt starts once it is set; see `abandon`.
        still_ours: called before each attempt; raises when another driver has the run.
        on_event: called with the name and the values of each event.

    Raises:
        Superseded: given up, or another driver has taken over.
        Diverged, Damage, DiskFull: as a rank raised it.
        TrainingFailed: ranks died more than `train.max_failures` times in a row without finishing an epoch.
        Damage: a checkpoint is missing although all ranks are done: they do not write to the folder seen here.
    """
    _set_environment()
    from ray.train import TrainingFailedError

    failures = 0
    while True:
        before = _state_version(job)
        try:
            _fit(job, ranks, given_up or threading.Event(), still_ours)
            break
        except TrainingFailedError as error:
            ours = _find(error, DistalError)
            if ours is not None:
                raise ours from None
            if type(getattr(error, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
                on_event("training_waits", reason=f"no room on the cluster for {ranks}")
                continue
            failures = failures + 1 if _state_version(job) == before else 1
            reason = _last_line(error)
            on_event("training_failed", failures=failures, reason=reason)
            if failures > job.config.max_failures:
                raise TrainingFailed(
                    f"cycle {job.cycle}: training failed {failures} times in a row without finishing an epoch; "
                    f"the last reason: {reason}"
                ) from error
    remove_tree(_storage(job))
    published = checkpoints.Queue(job.checkpoints, len(job.config.checkpoint_epochs))
    while not published.complete():
        time.sleep(0.5)


def abandon(job: TrainJob, given_up: threading.Event) -> None:
    """Begin no more attempts, and have ranks that are still at work stop at the end of their epoch, without writing."""
    given_up.set()  # before the claim: `_fit` looks at it after it has made its own
    release(job.folder, job.owner_prefix)


def _storage(job: TrainJob) -> Path:
    """Where Ray Train keeps its files while it runs; nothing reads them."""
    return job.folder / "train" / "ray"


def _set_environment() -> None:
    for name, value in _RAY_TRAIN_ENV.items():
        os.environ.setdefault(name, value)


def _fit(job: TrainJob, ranks: Ranks, given_up: threading.Event, still_ours: Callable[[], None]) -> None:
    """One attempt, under a name of its own."""
    name = f"{job.owner_prefix}{uuid.uuid4().hex[:8]}"
    if not given_up.is_set():
        claim(job.folder, name, still_ours)
    if given_up.is_set():
        release(job.folder, job.owner_prefix)
        raise Superseded(f"{job.folder}: training was given up")
    _run_ranks(replace(job, owner=name), ranks)


def _run_ranks(job: TrainJob, ranks: Ranks) -> None:
    """Run `train_rank` on every rank, with Ray Train's files inside the cycle.

    The one place where Ray Train starts processes: a test may train in its own process instead.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": float(ranks.threads)} | ({"GPU": 1.0} if ranks.use_gpu else {})
    try:
        TorchTrainer(
            _entry,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=ranks.workers,
                use_gpu=ranks.use_gpu,
                resources_per_worker=resources,
                label_selector=ranks.label_selector,
            ),
            run_config=RunConfig(
                name=job.owner,
                storage_path=str(_storage(job)),
                # What goes wrong ends this attempt, placement too; `train` looks at the reason and starts the next.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        ).fit()
    finally:
        with suppress(OSError):  # a process that is being killed may still write there; nothing reads it
            remove_tree(_storage(job) / job.owner)  # another attempt may use the folder around it


def _entry(config: dict[str, Any]) -> None:
    import ray.train.torch as ray_torch

    train_rank(config["job"], ray_torch.get_device(), ray_torch.prepare_model)


def _state_version(job: TrainJob) -> int | None:
    """Something that changes whenever an epoch is finished."""
    try:
        return job.state_path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _find(error: BaseException, kind: type[DistalError]) -> DistalError | None:
    """The error that a rank raised on purpose, inside what Ray Train makes of it."""
    seen: list[Any] = [error]
    for candidate in seen:  # grows while it is walked
        if isinstance(candidate, kind):
            return candidate
        inner = [getattr(candidate, name, None) for name in ("__cause__", "cause", "controller_failure")]
        inner += getattr(candidate, "worker_failures", {}).values()
        seen += [other for other in inner if isinstance(other, BaseException) and other not in seen]
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
