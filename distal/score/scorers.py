"""The scoring actors of a run: started, counted, asked, and sent away."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from distal import cluster
from distal.errors import DistalError, one_line
from distal.records import CheckpointRef
from distal.score.job import Job
from distal.score.plan import actors_allowed
from distal.score.predict import Precision
from distal.score.scorer import WATCH, Scorer

MAX_FAILED_STARTS = 3
OUTPUT_BATCHES = 8


class Scorers:
    """The scoring actors of a run. They live from cycle to cycle; their number follows the free slots.

    Args:
        prefix: makes the actors' names unique to this attempt.
        options: Ray options of an actor, such as the resources it takes.
        asked: `score.actors`, None for auto.
        slots: counts the CPU slots, or GPUs, that there are or may come to be. When nodes are lost the actors that
            they had wait for others to come.
        cache_bytes, threads, run: see `Scorer`.
    """

    def __init__(
        self,
        prefix: str,
        options: dict[str, Any],
        *,
        asked: int | None,
        slots: Callable[[], int],
        cache_bytes: int,
        threads: int,
        run: str = "",
    ) -> None:
        self._prefix = prefix
        self._options = options
        self._arguments = (cache_bytes, threads, run)
        self._next = 0
        self._shards: dict[int, int] = {}
        self._find_slots = slots
        self.asked = asked
        self.slots = slots()
        self.actors: dict[int, Any] = {}
        self.processes: dict[int, cluster.Process] = {}
        self._placing: dict[Any, int] = {}

    @property
    def n_started(self) -> int:
        """Actors started so far."""
        return self._next

    def __str__(self) -> str:
        needs = {name: value for name, value in self._options.items() if name.startswith(("num_", "label")) and value}
        return f"a scoring actor, which needs {needs}"

    def look_around(self) -> None:
        """Count the slots again, and learn which actors have found room."""
        self.slots = max(self.slots, self._find_slots())
        for ref in answered(self._placing):
            with suppress(RayError):  # it died: what else it is asked says so
                self._placed(ref)

    def _placed(self, ref: Any) -> None:
        """An actor has found room; raises RayError when it died meanwhile."""
        self.processes[self._placing[ref]] = ray.get(ref)
        del self._placing[ref]

    def shrink(self, n: int) -> None:
        """Stop actors until there are at most `n`."""
        while len(self.actors) > n:
            self.drop(next(reversed(self.actors)))

    def grow(self, n: int) -> list[int]:
        """Start actors until there are at least `n`; returns the new ones, which are not ready yet."""
        started = []
        while len(self.actors) < n:
            name = f"{self._prefix}-{self._next}"
            actor = ray.remote(concurrency_groups={WATCH: 1})(Scorer).options(
                name=name, namespace="distal", **self._options
            )
            # The number of one that has gone is used again: series that are never written to are kept all the same.
            self._shards[self._next] = next(n for n in itertools.count() if n not in self._shards.values())
            self.actors[self._next] = actor.remote(name, *self._arguments, self._shards[self._next])
            self._placing[self.actors[self._next].process.remote()] = self._next
            started.append(self._next)
            self._next += 1
        return started

    def choose(self, job: Job, precision: str, batch_size: int | str, n_images: int) -> tuple[Precision, int]:
        """What `auto` comes to on an actor; see `Scorer.choose`."""
        chosen: tuple[Precision, int] = self._ask("choose", job, precision, batch_size, n_images)
        return chosen

    def predict(self, job: Job, indices: Sequence[int], ref: CheckpointRef) -> NDArray[np.int64]:
        """The class of some samples at a checkpoint; see `Scorer.predict`."""
        labels: NDArray[np.int64] = self._ask("predict", job, list(indices), ref)
        return labels

    def outputs(
        self, job: Job, indices: NDArray[np.int64], ref: CheckpointRef, names: Collection[str]
    ) -> dict[str, NDArray[np.float32]]:
        """What a checkpoint gives for some samples, by all actors; see `Scorer.outputs`.

        Args:
            indices: (n,), ascending. They are cut into pieces of whole batches, however many actors there are.
        """
        size = OUTPUT_BATCHES * job.batch_size
        pieces = [indices[start : start + size].tolist() for start in range(0, len(indices), size)]
        found = self._ask_all("outputs", [(job, piece, ref, names) for piece in pieces])
        return {name: np.concatenate([each[name] for each in found]) for name in names}

    def _ask(self, method: str, *arguments: object) -> Any:
        """Have any actor do something; another one when it dies."""
        return self._ask_all(method, [arguments])[0]

    def _ask_all(self, method: str, calls: Sequence[tuple[object, ...]]) -> list[Any]:
        """Have the actors do something with each of some arguments; what one had in hand that died is done again.

        Only those are asked that have found room: one that stands for a lost node may wait for ever.
        """
        answers: dict[int, Any] = {}
        waiting = deque(range(len(calls)))
        working: dict[Any, tuple[int, int]] = {}
        n_died = 0
        while len(answers) < len(calls):
            self.grow(max(1, min(actors_allowed(self.asked, self.slots, 0), len(waiting) + len(working))))
            busy = {actor for actor, _ in working.values()}
            for index in [index for index in self.processes if index not in busy][: len(waiting)]:
                call = waiting.popleft()
                working[getattr(self.actors[index], method).remote(*calls[call])] = index, call
            for ref in ray.wait([*working, *self._placing], num_returns=1)[0]:
                index = working[ref][0] if ref in working else self._placing[ref]
                try:
                    if ref in working:
                        answers[working[ref][1]] = ray.get(ref)
                        del working[ref]
                        n_died = 0
                    else:
                        self._placed(ref)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    if ref in working:
                        waiting.appendleft(working.pop(ref)[1])
                    self.drop(index)
                    n_died += 1
                    if n_died == MAX_FAILED_STARTS:
                        raise DistalError(f"{n_died} scoring actors in a row died: {one_line(error)}") from None
        return [answers[call] for call in range(len(calls))]

    def drop(self, actor: int) -> None:
        """Stop one actor, and free its slot, also when it does not listen to Ray any more."""
        ray.kill(self.actors.pop(actor))
        del self._shards[actor]
        self._placing = {ref: placed for ref, placed in self._placing.items() if placed != actor}
        if actor in self.processes:
            cluster.kill(self.processes.pop(actor))


def answered(refs: dict[Any, int]) -> list[Any]:
    """Those of some calls that have been answered."""
    return ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
