"""The scoring actors: started, counted, called, watched, and sent away."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from distal import cluster
from distal.errors import DistalError, Unfit, one_line
from distal.records import CheckpointRef
from distal.score.actor import WATCH, Scorer
from distal.score.job import ActorJob, Owner
from distal.score.plan import actors_allowed
from distal.score.predict import Precision

_WATCH_S = 5.0  # between two checks of the actors, at most
STUCK_S = cluster.STUCK_S
WAITS_S = 60.0
MAX_FAILED = 3
_OUTPUT_BATCHES = 8
_NODE_ID = "ray.io/node-id"  # a label that Ray gives to every node


class Fleet:
    """The scoring actors. They live from cycle to cycle; their number follows the free slots.

    Args:
        prefix: makes the actors' names unique in the cluster.
        options: Ray options of an actor, such as the resources it takes.
        asked: `score.actors`, None for auto.
        slots: counts the CPU slots, or GPUs, that exist or may be added, without those of some nodes. When nodes
            are lost, their actors wait for new ones.
        cache_bytes, threads: see `Scorer`.
        stuck_after: seconds without a finished batch, or without an answer, after which an actor that has work is
            replaced; see `hanging` and `without_a_word`.
    """

    def __init__(
        self,
        prefix: str,
        options: dict[str, Any],
        *,
        asked: int | None,
        slots: Callable[[Collection[str]], int],
        cache_bytes: int,
        threads: int,
        stuck_after: float = STUCK_S,
    ) -> None:
        self._prefix = prefix
        self._options = options
        self._arguments = (cache_bytes, threads)
        self._next = 0
        self._shards: dict[int, int] = {}
        self._find_slots = slots
        self._avoided: set[str] = set()  # ids of nodes
        self._without_room_since: float | None = None
        self.asked, self.stuck_after = asked, stuck_after
        self.slots = slots(())
        self.actors: dict[int, Any] = {}
        self.processes: dict[int, cluster.Process] = {}
        self._placing: dict[Any, int] = {}
        self._grown_at: dict[int, float] = {}  # when each actor was started
        self._asked: dict[Any, int] = {}  # signs of life that are on their way
        self._heard: dict[int, tuple[int, float]] = {}  # the last new sign of each actor that is busy, and when

    @property
    def n_started(self) -> int:
        """Actors started so far."""
        return self._next

    def __str__(self) -> str:
        needs = {name: value for name, value in self._options.items() if name.startswith(("num_", "label")) and value}
        return f"a scoring actor, which needs {needs}"

    def look_around(self) -> None:
        """Count the slots again, and note which actors have found room."""
        self.slots = max(self.slots, self._count())
        for ref in answered(self._placing):
            with suppress(RayError):  # it died: its other calls raise
                self._placed(ref)

    def _count(self) -> int:
        """Slots of the nodes that are not avoided, and those that actors have on the others."""
        kept = sum(process.node_id in self._avoided for process in self.processes.values())
        return self._find_slots(self._avoided) + kept

    @property
    def unplaced(self) -> list[int]:
        """The actors that have found no room yet."""
        return list(self._placing.values())

    def without_room(self) -> str | None:
        """A line to report, once a minute, while no actor has found room for a minute."""
        now = time.monotonic()
        if self.processes or not self.actors:
            self._without_room_since = None
            return None
        self._without_room_since = self._without_room_since or now
        if now - self._without_room_since <= WAITS_S:
            return None
        self._without_room_since = now
        return f"no room on the cluster for {self}"

    @property
    def watch_s(self) -> float:
        """Seconds between two looks at the actors."""
        return min(_WATCH_S, self.stuck_after / 4)

    def without_a_word(self) -> dict[int, str]:
        """The actors that have not answered since they were started, for too long, with the reason to report.

        Such an actor waits for room, or stopped before it could answer: nobody can see which. The caller drops it,
        and starts another one.
        """
        limit, now = max(self.stuck_after, WAITS_S), time.monotonic()
        waits = {actor: now - self._grown_at[actor] for actor in self._placing.values()}
        return {
            actor: f"a scoring actor has not answered for {seconds:.0f} s: no room, or it hangs"
            for actor, seconds in waits.items()
            if seconds > limit
        }

    def hanging(self, busy: Collection[int]) -> dict[int, str]:
        """The actors that have work and give no sign of life, with the reason to report.

        Args:
            busy: the actors that have work; those that are not placed yet are left to `without_a_word`.
        """
        now = time.monotonic()
        for ref in answered(self._asked):
            actor = self._asked.pop(ref)
            with suppress(RayError):  # it died: so did its work, which raises
                sign = ray.get(ref)
                if actor in self._heard and sign != self._heard[actor][0]:
                    self._heard[actor] = sign, now
        self._heard = {actor: self._heard.get(actor, (-1, now)) for actor in self.processes.keys() & set(busy)}
        found = {}
        for actor, (_, since) in self._heard.items():
            if now - since > self.stuck_after:
                found[actor] = f"no sign of life for {now - since:.0f} s; it is replaced"
            elif actor not in self._asked.values():
                self._asked[self.actors[actor].sign_of_life.remote()] = actor
        return found

    def heard(self, actor: int) -> None:
        """Note that an actor finished some work: a sign of life even without a batch to predict."""
        self._heard.pop(actor, None)

    def _placed(self, ref: Any) -> None:
        """An actor has found room; raises RayError when it died meanwhile."""
        self.processes[self._placing[ref]] = ray.get(ref)
        del self._placing[ref]

    def allowed(self, slots_held: int) -> int:
        """How many actors there may be now, while training holds some slots."""
        return actors_allowed(self.asked, self.slots, slots_held)

    def youngest_beyond(self, n: int) -> list[int]:
        """The actors but the `n` that were started first, in the order of their start, which `actors` keeps."""
        return list(self.actors)[n:]

    def shrink(self, n: int) -> None:
        """Stop the youngest actors until there are at most `n`."""
        for actor in reversed(self.youngest_beyond(n)):
            self.drop(actor)

    def grow(self, n: int) -> list[int]:
        """Start actors until there are at least `n`; returns the new ones, which are not ready yet."""
        started = []
        options = dict(self._options)
        if self._avoided:
            others = {_NODE_ID: f"!in({','.join(sorted(self._avoided))})"}
            options["label_selector"] = (options.get("label_selector") or {}) | others
        while len(self.actors) < n:
            name = f"{self._prefix}-{self._next}"
            # The number of an actor that is gone is used again: Prometheus keeps a series for ever.
            self._shards[self._next] = next(n for n in itertools.count() if n not in self._shards.values())
            arguments = (*self._arguments, self._shards[self._next])
            self.actors[self._next] = _start_actor(name, options, arguments)
            self._placing[self.actors[self._next].process.remote()] = self._next
            self._grown_at[self._next] = time.monotonic()
            started.append(self._next)
            self._next += 1
        return started

    def choose(
        self, job: ActorJob, precision: str, batch_size: int | str, n_images: int, owner: Owner
    ) -> tuple[Precision, int]:
        """Resolve an `auto` on an actor; see `Scorer.choose`."""
        chosen: tuple[Precision, int] = self._call("choose", [(job, precision, batch_size, n_images)], owner)[0]
        return chosen

    def predict(self, job: ActorJob, indices: Sequence[int], ref: CheckpointRef, owner: Owner) -> NDArray[np.int64]:
        """The class of some samples at a checkpoint; see `Scorer.predict`."""
        labels: NDArray[np.int64] = self._call("predict", [(job, list(indices), ref)], owner)[0]
        return labels

    def outputs(
        self,
        job: ActorJob,
        indices: NDArray[np.int64],
        ref: CheckpointRef,
        names: Collection[str],
        begun: Mapping[str, str] | None,
        owner: Owner = Owner(),  # noqa: B008 - frozen
    ) -> dict[str, NDArray[np.float32]]:
        """Probabilities or embeddings of some samples at a checkpoint, by all actors; see `Scorer.outputs`.

        Args:
            indices: (n,), ascending. They are cut into pieces of whole batches, however many actors there are.
            begun: the fingerprint that an actor must have; None: any.

        Raises:
            Unfit: no actor has it.
        """
        size = _OUTPUT_BATCHES * job.batch_size
        pieces = [indices[start : start + size].tolist() for start in range(0, len(indices), size)]
        parts = self._call("outputs", [(job, piece, ref, names, begun) for piece in pieces], owner)
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _call(self, method: str, calls: Sequence[tuple[object, ...]], owner: Owner) -> list[Any]:
        """Call a method of the actors with each of some arguments; the call of an actor that dies is repeated.

        Only actors that have found room are called: one that stands for a lost node may wait for ever.
        """
        answers: dict[int, Any] = {}
        waiting = deque(range(len(calls)))
        working: dict[Any, tuple[int, int]] = {}  # actor, call
        failed: Counter[int | None] = Counter()  # of each call; None: starts in a row
        looked = -math.inf

        def lost(actor: int, call: int | None, reason: str) -> None:
            """Replace an actor, and give its call to another one."""
            owner.on_event("actor_lost", actor=actor, reason=reason)
            self.drop(actor)
            if call is not None:
                waiting.appendleft(call)
            failed[call] += 1
            if failed[call] == MAX_FAILED:
                raise DistalError(f"{MAX_FAILED} scoring actors in a row were lost: {reason}")

        while len(answers) < len(calls):
            owner.still_ours()
            if time.monotonic() - looked >= self.watch_s:
                looked = time.monotonic()
                self.look_around()
                if reason := self.without_room():
                    owner.on_event("scoring_waits", reason=reason)
                for actor, reason in self.without_a_word().items():
                    owner.on_event("actor_asked_for_again", actor=actor, reason=reason)
                    self.drop(actor)
                for actor, reason in self.hanging([actor for actor, _ in working.values()]).items():
                    ref = next(ref for ref, (at_work, _) in working.items() if at_work == actor)
                    lost(actor, working.pop(ref)[1], reason)
            self.grow(max(1, min(self.allowed(0), len(waiting) + len(working))))
            busy = {actor for actor, _ in working.values()}
            for actor in [actor for actor in self.processes if actor not in busy][: len(waiting)]:
                call = waiting.popleft()
                ref = getattr(self.actors[actor], method).remote(*calls[call])
                working[ref] = actor, call
            ready, _ = ray.wait([*working, *self._placing], num_returns=1, timeout=self.watch_s)
            for ref in ready:
                if ref in self._placing:
                    actor = self._placing[ref]
                    try:
                        self._placed(ref)
                        del failed[None]
                    except RayError as error:
                        lost(actor, None, one_line(error))
                    continue
                actor, call = working.pop(ref)
                try:
                    answers[call] = ray.get(ref)
                    self.heard(actor)
                except RayTaskError as error:
                    if not isinstance(error.cause, Unfit):
                        raise error.cause from None
                    waiting.appendleft(call)
                    self.send_away(actor)
                    for unplaced in self.unplaced:
                        self.drop(unplaced)
                    if not self.slots:
                        raise error.cause from None
                except RayError as error:
                    lost(actor, call, one_line(error))
        return [answers[call] for call in range(len(calls))]

    def send_away(self, actor: int) -> None:
        """Stop an actor, and start none on its node again.

        The caller stops those that wait for room too: they could find it there.
        """
        self.look_around()
        if actor in self.processes:
            self._avoided.add(self.processes[actor].node_id)
        self.drop(actor)
        self.slots = self._count()

    def drop(self, actor: int) -> None:
        """Stop one actor and free its slot, even when it no longer responds to Ray."""
        handle, process = self.actors.pop(actor), self.processes.pop(actor, None)
        del self._shards[actor], self._grown_at[actor]
        self._asked = {ref: asked for ref, asked in self._asked.items() if asked != actor}
        self._heard.pop(actor, None)
        self._placing = {ref: placed for ref, placed in self._placing.items() if placed != actor}
        _stop_actor(handle, process)


def _start_actor(name: str, options: Mapping[str, Any], arguments: Sequence[object]) -> Any:
    """Start an actor's process; returns the handle at once, before the process has found room."""
    actor = ray.remote(concurrency_groups={WATCH: 1})(Scorer)
    return actor.options(name=name, namespace="distal", **options).remote(name, *arguments)


def _stop_actor(actor: Any, process: cluster.Process | None) -> None:
    """End an actor's process, even one that no longer answers Ray."""
    ray.kill(actor)
    if process is not None:
        cluster.kill(process)


def answered(refs: dict[Any, int]) -> list[Any]:
    """The calls that have been answered."""
    return ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
