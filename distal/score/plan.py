"""Which (block, checkpoints) goes to which actor next. Decisions only: no Ray, no disk, no clock.

Events go in (`published`, `actor_joined`, `done`, `failed`, `actor_lost`), and `next_tasks` says what to hand
out. The same events always give the same decisions, so the tests are scripts of events.

A block sticks to the actor that has it decoded. When several checkpoints wait, one hand-out carries up to `MAX_ROWS` of
them, and the actor reads and decodes the block once for all; towards the end hand-outs get smaller, so that all actors
end together. An actor without work of its own takes a block from the actor that has most left to do.

At a barrier (see `eliminate`) no block goes on before every block has its rows up to there, and has counted its votes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from distal.errors import BlockFailed

MAX_ROWS = 8  # checkpoints in one hand-out: an actor keeps as many sets of weights in memory
IN_FLIGHT = 2  # hand-outs per actor: the next one waits at the actor while the first is scored
MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """One hand-out.

    Attributes:
        block: the block to score.
        rows: rows of the assignments to score it at, ascending; none when only votes are to be counted.
        barrier: the last barrier before these rows, whose decision applies to them; None: there is none.
        count: the next barrier, when the votes before it are to be counted once these rows are scored; else None.
    """

    actor: int
    block: int
    rows: tuple[int, ...]
    barrier: int | None = None
    count: int | None = None


class _Queue(dict[int, int]):
    """Blocks that can be handed out, each with its rank; the lowest (rank, block) is taken first."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[int, int]] = []  # an entry with another rank than its block has now is void

    def put(self, block: int, rank: int) -> None:
        if self.get(block) != rank:
            self[block] = rank
            heappush(self._heap, (rank, block))

    def take(self, suits: Callable[[int], bool]) -> int | None:
        """Take out the first block that suits; None when none does."""
        found, passed_over = None, []
        while self._heap and found is None:
            rank, block = heappop(self._heap)
            if self.get(block) == rank and suits(block):
                found = block
            elif self.get(block) == rank:
                passed_over.append(block)
        for block in passed_over:
            heappush(self._heap, (self[block], block))
        if found is not None:
            del self[found]
        return found


class Plan:
    """The state of one scoring pass over `n_rows` checkpoints and `n_blocks` blocks.

    Args:
        done: (row, block) pairs that are committed already.
        barriers: rows, ascending, before which votes are counted.
        passed: how many of them have been decided already.
    """

    def __init__(
        self,
        n_rows: int,
        n_blocks: int,
        done: Iterable[tuple[int, int]] = (),
        barriers: Sequence[int] = (),
        passed: int = 0,
    ) -> None:
        self.max_rows = MAX_ROWS  # of a hand-out; less where a row takes long
        self._n_rows = n_rows
        self._barriers = list(barriers)
        self._passed = passed
        self._waiting: list[set[int]] = [set() for _ in range(n_blocks)]  # published rows not handed out
        self._oldest = [n_rows] * n_blocks  # the first of them; n_rows when there is none
        self._n_waiting = [0] * n_rows  # blocks that wait, per row
        self._done: set[tuple[int, int]] = set(done)
        self._left = [n_rows] * n_blocks  # rows not committed yet, per block
        self._missing = [n_blocks] * n_rows  # blocks not committed yet, per row
        for row, block in self._done:
            self._left[block] -= 1
            self._missing[row] -= 1
        self._published: set[int] = set()
        self._counted: set[int] = set()  # blocks that have counted their votes before the next barrier
        self._attempts: dict[int, int] = {}
        self._failed_at: dict[int, int] = {}  # the actor at which a block failed last
        self._owner: dict[int, int] = {}  # the actor that scored a block last, and may have it decoded
        self._in_hand: dict[int, list[Task]] = {}  # what each actor has in hand, in the order it was handed out
        self._busy: set[int] = set()  # blocks that are in a hand
        self._queues: dict[int | None, _Queue] = {}  # what can be handed out, by owner; None: of no one
        for block in range(n_blocks):
            self._enqueue(block)

    @property
    def finished(self) -> bool:
        """Whether every block is committed at every row, and every barrier before them is decided."""
        barrier = self.next_barrier
        return not any(self._missing) and (barrier is None or barrier >= self._n_rows)

    @property
    def n_rows_done(self) -> int:
        """Rows at which every block is committed."""
        return self._missing.count(0)

    @property
    def n_blocks_done(self) -> int:
        """Blocks that are committed, summed over all rows."""
        return len(self._done)

    @property
    def n_blocks_pending(self) -> int:
        """Blocks that are not committed, summed over the published rows."""
        return sum(self._missing[row] for row in self._published if row < self._n_rows)

    @property
    def n_unfinished_blocks(self) -> int:
        """Blocks that lack a row, published or not, or that only have to count votes: more actors are of no use."""
        unfinished = len(self._left) - self._left.count(0)
        return unfinished or (0 if self.finished else len(self._left) - len(self._counted))

    @property
    def next_barrier(self) -> int | None:
        """The row before which votes are counted next."""
        return self._barriers[self._passed] if self._passed < len(self._barriers) else None

    @property
    def at_barrier(self) -> bool:
        """Whether every block has counted its votes, and waits for what is decided."""
        return self.next_barrier is not None and len(self._counted) == len(self._waiting)

    def pass_barrier(self) -> None:
        """The barrier is decided: rows up to the next one may be handed out."""
        self._passed += 1
        self._counted.clear()
        for block in range(len(self._waiting)):
            self._enqueue(block)

    def published(self, row: int) -> None:
        """A checkpoint can be scored; a second call changes nothing."""
        if row in self._published:
            return
        self._published.add(row)
        for block in range(len(self._waiting)):
            if (row, block) not in self._done:
                self._wait(block, (row,))

    def no_more(self) -> None:
        """No checkpoint will come: rows that were not published are no rows."""
        never = [row for row in range(self._n_rows) if row not in self._published]
        self._left = [left - len(never) for left in self._left]
        self._published.update(never)
        self._n_rows -= len(never)
        self._missing = self._missing[: self._n_rows]

    def actor_joined(self, actor: int) -> None:
        """An actor is ready for work."""
        self._in_hand[actor] = []

    def actor_left(self, actor: int) -> list[Task]:
        """An actor was sent away; its tasks wait again, and are returned."""
        self._owner = {block: owner for block, owner in self._owner.items() if owner != actor}
        for block in self._queues.pop(actor, ()):
            self._enqueue(block)
        in_hand = self._in_hand.pop(actor)
        for task in in_hand:
            self._busy.remove(task.block)
            self._wait(task.block, task.rows)
        return in_hand

    def actor_lost(self, actor: int) -> None:
        """An actor has died; its tasks wait again.

        Raises:
            BlockFailed: the block it was working on has been lost too often.
        """
        for task in self.actor_left(actor)[:1]:  # the others were only queued behind it
            self._count_failure(task.block, "the actor died")

    def done(self, task: Task) -> None:
        """A hand-out is committed, and its votes are counted if that was asked for."""
        self._in_hand[task.actor].remove(task)
        self._busy.remove(task.block)
        self._done.update((row, task.block) for row in task.rows)
        self._left[task.block] -= len(task.rows)
        for row in task.rows:
            self._missing[row] -= 1
        if task.count is not None:
            self._counted.add(task.block)
        self._attempts.pop(task.block, None)
        self._failed_at.pop(task.block, None)
        self._enqueue(task.block)

    def failed(self, task: Task, reason: str) -> None:
        """A hand-out failed without taking its actor down; it waits again.

        Raises:
            BlockFailed: it has failed too often.
        """
        self._in_hand[task.actor].remove(task)
        self._busy.remove(task.block)
        self._owner.pop(task.block, None)
        self._failed_at[task.block] = task.actor  # another one tries it next: it may be the actor that is at fault
        self._wait(task.block, task.rows)
        self._count_failure(task.block, reason)

    def next_tasks(self) -> list[Task]:
        """Everything that can be handed out now; the plan counts it as handed out."""
        handed_out: list[Task] = []
        with_room = [(actor, in_hand) for actor, in_hand in self._in_hand.items() if len(in_hand) < IN_FLIGHT]
        for depth in range(IN_FLIGHT):  # one each before a second one
            for actor, in_hand in with_room:
                if not self._queues:
                    return handed_out
                block = self._choose(actor) if len(in_hand) <= depth else None
                if block is None:
                    continue
                task = self._hand_out(actor, block)
                self._take(block, task.rows)
                self._busy.add(block)
                self._owner[block] = actor
                in_hand.append(task)
                handed_out.append(task)
        return handed_out

    def _hand_out(self, actor: int, block: int) -> Task:
        ready = sorted(row for row in self._waiting[block] if row < self._limit)
        below = bisect_right(self._barriers, ready[0]) if ready else self._passed
        stop = self._barriers[below] if below < len(self._barriers) else self._n_rows  # one stretch between barriers
        stretch = [row for row in ready if row < stop][: self._rows_at_once()]
        last = len(stretch) == len(ready) and self._complete_before_barrier(block, stretch)
        return Task(
            actor,
            block,
            tuple(stretch),
            barrier=self._barriers[below - 1] if below else None,
            count=self.next_barrier if last else None,
        )

    def _rows_at_once(self) -> int:
        """At most `MAX_ROWS`, and with several actors less than a fair share of what waits."""
        if len(self._in_hand) == 1:
            return min(MAX_ROWS, self.max_rows)
        waiting = sum(self._n_waiting[: self._limit])
        return max(1, min(MAX_ROWS, self.max_rows, waiting // (2 * IN_FLIGHT * len(self._in_hand))))

    @property
    def _limit(self) -> int:
        """Rows from here on may not be handed out yet."""
        return len(self._n_waiting) if self.next_barrier is None else self.next_barrier

    def _wait(self, block: int, rows: Iterable[int]) -> None:
        for row in rows:
            self._waiting[block].add(row)
            self._n_waiting[row] += 1
            self._oldest[block] = min(self._oldest[block], row)
        self._enqueue(block)

    def _enqueue(self, block: int) -> None:
        """Queue a block if it can be handed out: by its oldest row, and before all rows if it only has to count."""
        if block in self._busy:
            return
        if self._oldest[block] < self._limit:
            rank = self._oldest[block]
        elif self._complete_before_barrier(block):
            rank = -1
        else:
            return
        self._queues.setdefault(self._owner.get(block), _Queue()).put(block, rank)

    def _take(self, block: int, rows: Iterable[int]) -> None:
        for row in rows:
            self._waiting[block].remove(row)
            self._n_waiting[row] -= 1
        self._oldest[block] = min(self._waiting[block], default=len(self._n_waiting))

    def _complete_before_barrier(self, block: int, handed_out: Sequence[int] = ()) -> bool:
        """Whether a block that has not counted its votes can do so, once the rows in `handed_out` are scored."""
        barrier = self.next_barrier
        if barrier is None or block in self._counted:
            return False
        return all((row, block) in self._done or row in handed_out for row in range(barrier))

    def _choose(self, actor: int) -> int | None:
        """The block whose oldest row is the most behind: own blocks first, then free ones, then others'."""
        alone = len(self._in_hand) == 1
        for owner in self._in_turn(actor):
            queue = self._queues.get(owner, _Queue())
            # A block that failed is not tried twice in a row by one actor of several.
            block = queue.take(lambda block: alone or self._failed_at.get(block) != actor)
            if block is not None:
                if not queue:
                    del self._queues[owner]  # when none is left nothing can be handed out
                return block
        return None

    def _in_turn(self, actor: int) -> Iterator[int | None]:
        """The owners whose blocks an actor may take: itself, nobody, and the actor with most of them left."""
        yield actor
        yield None
        queues = {owner: queue for owner, queue in self._queues.items() if owner is not None}
        most = max(map(len, queues.values()), default=0)
        richest = [owner for owner, queue in queues.items() if len(queue) == most]
        yield from sorted(richest, key=lambda owner: min(queues[owner]))[:1]

    def _count_failure(self, block: int, reason: str) -> None:
        self._attempts[block] = self._attempts.get(block, 0) + 1
        if self._attempts[block] >= MAX_ATTEMPTS:
            raise BlockFailed(f"block {block} failed {MAX_ATTEMPTS} times; the last reason: {reason}")


def actors_allowed(asked: int | None, slots: int, training_slots: int) -> int:
    """How many scoring actors there may be now, so that no slot is used twice.

    Args:
        asked: `score.actors`, None for auto.
        slots: CPU slots, or GPUs, of the cluster.
        training_slots: how many of them training holds at the moment.
    """
    free = max(0, slots - training_slots)
    return free if asked is None else min(asked, free)
