"""Stand-ins for what takes seconds to start, for tests whose subject is files and messages."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError

from distal import cluster
from distal.score import fleet
from distal.train import launch
from distal.train.launch import Ranks
from distal.train.rank import TrainJob, train_rank

run_ranks = launch._run_ranks  # the real one
_one_at_a_time = threading.Lock()


def run_rank_here(job: TrainJob, ranks: Ranks) -> None:
    """What Ray Train does for a single rank, without its processes; it gets several ranks itself."""
    if ranks.workers > 1:
        run_ranks(job, ranks)
        return
    with _one_at_a_time:  # the rank of a run that failed works until its epoch ends
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            train_rank(job, torch.device("cpu"), lambda net: net)
        finally:
            dist.destroy_process_group()


@contextmanager
def ranks_here() -> Iterator[None]:
    """Runs train in this process instead of under Ray Train. The bytes are the same: `tests/train/test_launch.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run_ranks", run_rank_here)
        yield


class SpareActor:
    """The scoring actor that a run leaves behind for the next run, instead of ending it.

    It takes no CPU slot, which packing a pool or another test may wait for. One at most is kept; whoever wants an actor
    of another kind ends it first.
    """

    def __init__(self) -> None:
        self._start, self._stop = fleet._start_actor, fleet._stop_actor
        self._kinds: dict[Any, object] = {}  # of every actor started here
        self._spare: tuple[object, Any, cluster.Process] | None = None

    def start(self, name: str, options: Mapping[str, Any], arguments: Sequence[object]) -> Any:
        kind = fleet.Scorer, dict(options), arguments[:2]  # the rest are labels of metrics
        if self._spare is not None and self._spare[0] == kind:
            actor, self._spare = self._spare[1], None
        else:
            self.end()
            actor = self._start(name, {**options, "num_cpus": 0}, arguments)
        self._kinds[actor] = kind
        return actor

    def stop(self, actor: Any, process: cluster.Process | None) -> None:
        kind = self._kinds.pop(actor)
        if process is not None and self._spare is None and _is_idle(actor):
            self._spare = kind, actor, process
        else:
            self._stop(actor, process)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Runs take over the scoring actor of the run before, which saves starting a process for each."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fleet, "_start_actor", self.start)
            patch.setattr(fleet, "_stop_actor", self.stop)
            yield

    def end(self) -> None:
        if self._spare is not None:
            self._stop(*self._spare[1:])
            self._spare = None


def _is_idle(actor: Any) -> bool:
    """Whether it answers at once; it forgets what it has opened, which the next run may have replaced."""
    try:
        ray.get(actor.__ray_call__.remote(lambda scorer: setattr(scorer, "_job", None)), timeout=5)
    except (RayError, GetTimeoutError):
        return False
    return True
