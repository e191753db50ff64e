"""Scripts of events in, decisions out: no Ray, no clock."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.errors import BlockFailed
from distal.score.plan import IN_FLIGHT, MAX_ROWS, Plan, Task, actors_allowed


def plan_with(n_rows: int, n_blocks: int, *actors: int, published: int = 0, done: tuple = ()) -> Plan:
    plan = Plan(n_rows, n_blocks, done)
    for actor in actors:
        plan.actor_joined(actor)
    for row in range(published):
        plan.published(row)
    return plan


def test_nothing_is_handed_out_before_a_checkpoint_or_an_actor() -> None:
    plan = plan_with(2, 3, 0)
    assert plan.next_tasks() == []
    plan = plan_with(2, 3, published=2)
    assert plan.next_tasks() == []


def test_every_actor_gets_one_before_any_gets_a_second() -> None:
    plan = plan_with(1, 8, 0, 1, 2, published=1)
    handed_out = plan.next_tasks()
    assert [task.actor for task in handed_out] == [0, 1, 2] * IN_FLIGHT
    assert sorted(task.block for task in handed_out) == list(range(3 * IN_FLIGHT))
    assert plan.next_tasks() == []  # all are busy


def test_a_block_stays_with_its_actor() -> None:
    plan = plan_with(3, 4, 0, 1)
    owners: dict[int, set[int]] = {}
    for row in range(3):
        plan.published(row)
        tasks = plan.next_tasks()
        while tasks:
            for one in tasks:
                owners.setdefault(one.block, set()).add(one.actor)
                plan.done(one)
            tasks = plan.next_tasks()
    assert plan.finished
    assert all(len(actors) == 1 for actors in owners.values())


def test_waiting_checkpoints_share_one_reading_of_a_block() -> None:
    plan = plan_with(MAX_ROWS + 3, 1, 0, published=MAX_ROWS + 3)
    (task,) = plan.next_tasks()
    assert task.rows == tuple(range(MAX_ROWS))
    plan.done(task)
    (task,) = plan.next_tasks()
    assert task.rows == tuple(range(MAX_ROWS, MAX_ROWS + 3))


def test_a_block_is_in_one_hand_at_a_time() -> None:
    plan = plan_with(2, 1, 0, 1, published=1)
    (task,) = plan.next_tasks()
    plan.published(1)
    assert plan.next_tasks() == []
    plan.done(task)
    assert plan.next_tasks() == [Task(0, 0, (1,))]


def test_an_idle_actor_takes_from_the_one_with_most_left() -> None:
    plan = plan_with(2, 6, 0, published=1)
    for _ in range(6):
        for task in plan.next_tasks():
            plan.done(task)
    plan.actor_joined(1)
    plan.published(1)
    taken = [task.block for task in plan.next_tasks() if task.actor == 1]
    assert len(taken) == IN_FLIGHT


def test_committed_blocks_are_not_handed_out_again() -> None:
    plan = plan_with(2, 2, 0, published=2, done=((0, 0), (1, 0), (0, 1)))
    assert plan.next_tasks() == [Task(0, 1, (1,))]
    assert (plan.n_unfinished_blocks, plan.n_rows_done) == (1, 1)


def test_publishing_twice_changes_nothing() -> None:
    plan = plan_with(1, 1, 0, published=1)
    (task,) = plan.next_tasks()
    plan.published(0)
    plan.done(task)
    plan.published(0)
    assert plan.finished
    assert plan.next_tasks() == []


def test_what_a_lost_actor_had_waits_again() -> None:
    plan = plan_with(1, 3, 0, published=1)
    lost = plan.next_tasks()
    plan.actor_lost(0)
    plan.actor_joined(7)
    again = plan.next_tasks()
    assert {(task.block, task.rows) for task in again} == {(task.block, task.rows) for task in lost}
    assert {task.actor for task in again} == {7}


def test_a_block_that_keeps_failing_stops_the_pass() -> None:
    plan = plan_with(1, 1, 0, published=1)
    for _ in range(2):
        (task,) = plan.next_tasks()
        plan.failed(task, "ValueError: bad")
    (task,) = plan.next_tasks()
    with pytest.raises(BlockFailed, match="block 0 failed 3 times; the last reason: ValueError: bad"):
        plan.failed(task, "ValueError: bad")


def test_a_block_that_failed_is_tried_by_another_actor_next() -> None:
    plan = plan_with(1, 1, 0, 1, published=1)
    (task,) = plan.next_tasks()
    plan.failed(task, "a bad disk")
    (again,) = plan.next_tasks()
    assert (again.block, again.actor) == (task.block, 1 - task.actor)


def test_an_actor_that_is_sent_away_is_not_blamed_for_its_blocks() -> None:
    plan = plan_with(1, 1, published=1)
    for actor in range(4):
        plan.actor_joined(actor)
        (task,) = plan.next_tasks()
        assert plan.actor_left(actor) == [task]
    plan.actor_joined(4)
    (task,) = plan.next_tasks()
    plan.done(task)
    assert plan.finished


def test_a_block_that_keeps_killing_actors_stops_the_pass() -> None:
    plan = plan_with(1, 4, published=1)
    for actor in range(2):
        plan.actor_joined(actor)
        assert plan.next_tasks()[0].block == 0
        plan.actor_lost(actor)
    plan.actor_joined(2)
    plan.next_tasks()
    with pytest.raises(BlockFailed, match="block 0 failed 3 times; the last reason: the actor died"):
        plan.actor_lost(2)


def test_blocks_queued_behind_the_culprit_are_not_blamed() -> None:
    plan = plan_with(1, 2, published=1)
    for actor in range(2):
        plan.actor_joined(actor)
        assert [task.block for task in plan.next_tasks()] == [0, 1]
        plan.actor_lost(actor)
    plan.actor_joined(2)
    first, second = plan.next_tasks()
    plan.done(first)
    plan.failed(second, "once")  # block 1 has failed once, not three times
    assert not plan.finished


def two_owners() -> Plan:
    """Row 0 of 2 is done: actor 0 has scored the blocks 0 to 3, actor 1 the blocks 4 and 5."""
    plan = plan_with(2, 6, 0, published=1)
    for task in plan.next_tasks():
        plan.done(task)
    tasks = plan.next_tasks()
    plan.actor_joined(1)
    for one in [*tasks, *plan.next_tasks()]:
        plan.done(one)
    return plan


def test_a_block_is_queued_by_the_rows_that_wait_now() -> None:
    """Row 5 was seen before row 3, and both are done; now block 0 waits with row 7, block 1 with row 6 already."""
    plan = plan_with(8, 3, 0, published=1, done=((6, 0),))
    while tasks := plan.next_tasks():
        for one in tasks:
            plan.done(one)
    for row in (5, 3):
        plan.published(row)
    in_hand = plan.next_tasks()
    assert [(task.block, task.rows) for task in in_hand] == [(0, (3, 5)), (1, (3, 5))]
    for row in (6, 7):
        plan.published(row)
    for task in in_hand:
        plan.done(task)
    assert [(task.block, task.rows) for task in plan.next_tasks()] == [(2, (3, 5, 6, 7)), (1, (6, 7))]


def test_the_one_with_most_left_is_robbed() -> None:
    plan = two_owners()
    plan.actor_joined(2)
    plan.published(1)
    assert [(task.actor, task.block) for task in plan.next_tasks()][:3] == [(0, 0), (1, 4), (2, 1)]


def test_blocks_of_an_actor_that_left_are_taken_before_others_are_robbed() -> None:
    plan = two_owners()
    plan.actor_left(1)
    plan.actor_joined(2)
    plan.published(1)
    assert next(task.block for task in plan.next_tasks() if task.actor == 2) == 4


def test_a_block_that_failed_belongs_to_nobody() -> None:
    """An actor that is new takes it before it robs another one."""
    plan = two_owners()
    plan.published(1)
    (failed,) = (task for task in plan.next_tasks() if task.block == 4)
    plan.failed(failed, "a bad disk")
    plan.actor_joined(2)
    assert next(task.block for task in plan.next_tasks() if task.actor == 2) == 4


def test_failures_are_counted_anew_once_the_block_is_scored() -> None:
    """Twice at each of two rows is not four times."""
    plan = plan_with(2, 1, 0)
    for row in range(2):
        plan.published(row)
        for _ in range(2):
            plan.failed(*plan.next_tasks(), "a bad disk")
        plan.done(*plan.next_tasks())
    assert plan.finished


def test_a_failure_is_forgotten_once_the_block_is_scored() -> None:
    """The actor at which it failed may have it again."""
    plan = plan_with(2, 1, 0, 1, published=1)
    (task,) = plan.next_tasks()
    plan.failed(task, "a bad disk")
    (task,) = plan.next_tasks()
    plan.done(task)
    plan.actor_left(1)
    plan.actor_joined(2)
    plan.published(1)
    assert plan.next_tasks() == [Task(0, 0, (1,))]


def test_pending_blocks_are_those_of_published_rows() -> None:
    plan = plan_with(3, 2, 0, published=2, done=((0, 0), (2, 1)))
    assert plan.n_blocks_pending == 3
    plan.no_more()
    assert plan.n_blocks_pending == 3
    for task in plan.next_tasks():
        plan.done(task)
    assert plan.n_blocks_pending == 0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_script_of_events_ends_with_everything_done_once(data: st.DataObject) -> None:
    """Whatever joins, dies, fails and finishes in whatever order: all is committed, and nothing twice at once."""
    n_rows, n_blocks = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    cells = [(row, block) for row in range(n_rows) for block in range(n_blocks)]
    done = set(data.draw(st.lists(st.sampled_from(cells), unique=True)))
    plan = Plan(n_rows, n_blocks, done)
    unpublished, next_actor, alive, working = deque(range(n_rows)), 0, set(), []
    failures = dict.fromkeys(range(n_blocks), 0)

    def step(event: str) -> None:
        nonlocal next_actor
        if event == "publish" and unpublished:
            plan.published(unpublished.popleft())
        elif event == "join":
            plan.actor_joined(next_actor)
            alive.add(next_actor)
            next_actor += 1
        elif event == "done" and working:
            task = working.pop(data.draw(st.integers(0, len(working) - 1)))
            plan.done(task)
            done.update((row, task.block) for row in task.rows)
            failures[task.block] = 0
        elif event == "fail" and working and failures[working[0].block] < 2:
            task = working.pop(0)
            failures[task.block] += 1
            plan.failed(task, "reason")
        elif event == "die" and alive:
            actor = min(alive)
            mine = [task for task in working if task.actor == actor]
            if mine and failures[mine[0].block] == 2:
                return
            alive.discard(actor)
            if mine:
                failures[mine[0].block] += 1
            working[:] = [task for task in working if task.actor != actor]
            plan.actor_lost(actor)

    for event in data.draw(st.lists(st.sampled_from(["publish", "join", "done", "fail", "die"]), max_size=60)):
        step(event)
        for task in plan.next_tasks():
            assert task.block not in {other.block for other in working}
            assert not {(row, task.block) for row in task.rows} & done
            assert task.actor in alive
            assert list(task.rows) == sorted(task.rows)
            working.append(task)
        assert max([sum(w.actor == actor for w in working) for actor in alive], default=0) <= IN_FLIGHT
    step("join")
    while unpublished:
        step("publish")
    for _ in range(len(cells) + 1):
        working += plan.next_tasks()
        while working:
            plan.done(working.pop())
    assert plan.finished
    assert plan.n_rows_done == n_rows
    assert plan.n_unfinished_blocks == 0


class Plain(Plan):
    """The rule of `Plan`, written down plainly: it looks at every block for every hand-out."""

    def next_tasks(self) -> list[Task]:
        handed_out = []
        for depth in range(IN_FLIGHT):
            for actor, in_hand in self._in_hand.items():
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

    def _choose(self, actor: int) -> int | None:
        busy = {task.block for in_hand in self._in_hand.values() for task in in_hand}
        alone = len(self._in_hand) == 1
        candidates = [
            block
            for block in range(len(self._waiting))
            if block not in busy
            and (alone or self._failed_at.get(block) != actor)
            and (self._is_ready(block) or self._complete_before_barrier(block))
        ]
        if not candidates:
            return None
        own = [b for b in candidates if self._owner.get(b) == actor]
        free = [b for b in candidates if b not in self._owner]
        pick = own or free or self._of_the_richest(candidates)
        return min(pick, key=lambda b: (self._oldest[b] if self._is_ready(b) else -1, b))

    def _is_ready(self, block: int) -> bool:
        return self._oldest[block] < self._limit

    def _of_the_richest(self, candidates: list[int]) -> list[int]:
        by_owner: dict[int, list[int]] = {}
        for block in candidates:
            by_owner.setdefault(self._owner[block], []).append(block)
        return max(by_owner.values(), key=len)


EVENTS = {"publish": 2, "join": 2, "done": 8, "fail": 2, "die": 1, "leave": 1, "pass": 3, "limit": 1}


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_queues_decide_as_the_plain_rule(random: Random) -> None:
    n_rows, n_blocks = random.randint(1, 12), random.randint(1, 14)
    barriers = sorted(random.sample(range(n_rows + 1), random.randint(0, min(3, n_rows))))
    share_done = random.choice([0, 0, 0.3, 0.9])
    done = [(row, block) for row in range(n_rows) for block in range(n_blocks) if random.random() < share_done]
    plan, plain = (kind(n_rows, n_blocks, done, barriers) for kind in (Plan, Plain))
    rows, working, alive, n_joined = list(range(n_rows)), [], [], 0

    def both(event: str, *arguments: object) -> None:
        assert outcome(plan, event, *arguments) == outcome(plain, event, *arguments)

    for event in random.choices(list(EVENTS), list(EVENTS.values()), k=random.randint(10, 150)):
        if event == "publish" and rows:
            both("published", rows.pop(random.choice([0, 0, -1])))  # a checkpoint may be seen before older ones
        elif event == "join":
            both("actor_joined", n_joined)
            alive.append(n_joined)
            n_joined += 1
        elif event in ("done", "fail") and working:
            task = working.pop(random.randrange(len(working)))
            both(*(("done", task) if event == "done" else ("failed", task, "reason")))
        elif event in ("die", "leave") and alive:
            actor = alive.pop(random.randrange(len(alive)))
            both("actor_lost" if event == "die" else "actor_left", actor)
            working = [task for task in working if task.actor != actor]
        elif event == "pass" and plan.at_barrier:
            both("pass_barrier")
        elif event == "limit":
            plan.max_rows = plain.max_rows = random.randint(1, MAX_ROWS)
        handed_out = plan.next_tasks()
        assert handed_out == plain.next_tasks()
        working += handed_out
        for name in ("finished", "at_barrier", "n_unfinished_blocks", "n_rows_done"):
            assert getattr(plan, name) == getattr(plain, name)


def outcome(plan: Plan, event: str, *arguments: object) -> object:
    try:
        return getattr(plan, event)(*arguments)
    except BlockFailed as failed:
        return str(failed)


@pytest.mark.parametrize(
    ("asked", "slots", "training", "allowed"),
    [
        (None, 2, 1, 1),  # training and scoring share a machine
        (None, 2, 0, 2),  # training is over: its slot goes to scoring
        (None, 1, 1, 0),  # with one slot scoring waits
        (None, 2, 4, 0),
        (3, 8, 2, 3),
        (8, 4, 1, 3),
    ],
)
def test_slots_are_never_used_twice(asked: int | None, slots: int, training: int, allowed: int) -> None:
    assert actors_allowed(asked, slots, training) == allowed


def test_hand_outs_get_smaller_towards_the_end() -> None:
    """Two actors and eight checkpoints of eight blocks: neither is left with a long one while the other has none."""
    plan = plan_with(8, 8, 0, 1, published=8)
    sizes = []
    tasks = plan.next_tasks()
    while tasks:
        sizes += [len(one.rows) for one in tasks]
        plan.done(tasks[0])
        for one in tasks[1:]:
            plan.done(one)
        tasks = plan.next_tasks()
    assert plan.finished
    assert (sizes[0], sizes[-1]) == (MAX_ROWS, 1)
    assert max(sizes[len(sizes) // 2 :]) <= 2


def test_rows_that_were_not_published_are_no_rows() -> None:
    plan = plan_with(10, 2, 0, published=3)
    plan.no_more()
    while tasks := plan.next_tasks():
        assert all(row < 3 for one in tasks for row in one.rows)
        for one in tasks:
            plan.done(one)
    assert plan.finished
    assert plan.n_rows_done == 3
    assert plan.n_unfinished_blocks == 0


class TestBarriers:
    """Rows 0..7, decisions before rows 5 and 7."""

    def plan(self, n_blocks: int, *actors: int, published: int = 8, done: tuple = (), passed: int = 0) -> Plan:
        plan = Plan(8, n_blocks, done, barriers=[5, 7], passed=passed)
        for actor in actors:
            plan.actor_joined(actor)
        for row in range(published):
            plan.published(row)
        return plan

    def drain(self, plan: Plan) -> list[Task]:
        handed_out = []
        while tasks := plan.next_tasks():
            handed_out += tasks
            for one in tasks:
                plan.done(one)
        return handed_out

    def test_no_block_goes_on_before_all_have_counted(self) -> None:
        plan = self.plan(3, 0, 1)
        first = self.drain(plan)
        assert max(row for task in first for row in task.rows) == 4
        assert sorted(task.block for task in first if task.count == 5) == [0, 1, 2]
        assert all(task.barrier is None for task in first)
        assert plan.at_barrier
        plan.pass_barrier()
        assert not plan.at_barrier
        second = self.drain(plan)
        assert {row for task in second for row in task.rows} == {5, 6}
        assert {task.barrier for task in second} == {5}
        assert sorted(task.block for task in second if task.count == 7) == [0, 1, 2]
        plan.pass_barrier()
        third = self.drain(plan)
        assert {(task.rows, task.barrier, task.count) for task in third} == {((7,), 7, None)}
        assert plan.finished

    def test_votes_are_counted_when_the_rows_before_are_done(self) -> None:
        """Rows 0 to 3 are published: no block can count yet. With row 4 it can."""
        plan = self.plan(2, 0, published=4)
        assert all(task.count is None for task in self.drain(plan))
        plan.published(4)
        assert [(task.rows, task.count) for task in self.drain(plan)] == [((4,), 5), ((4,), 5)]

    def test_blocks_that_were_done_before_a_restart_only_count(self) -> None:
        done = tuple((row, 0) for row in range(5))
        counting = [task for task in self.drain(self.plan(2, 0, done=done)) if task.block == 0]
        assert counting == [Task(0, 0, (), None, 5)]

    def test_what_was_decided_before_a_restart_is_not_decided_again(self) -> None:
        """A block that lost an old row, found damaged, scores it without what was decided later, and first."""
        done = tuple((row, block) for row in range(6) for block in range(2) if (row, block) != (2, 1))
        plan = self.plan(2, 0, done=done, passed=1)
        of_block = [(task.rows, task.barrier, task.count) for task in self.drain(plan) if task.block == 1]
        assert of_block == [((2,), None, None), ((6,), 5, 7)]

    def test_an_actor_that_dies_while_counting(self) -> None:
        plan = self.plan(1, 0, published=5)
        (task,) = plan.next_tasks()
        assert task.count == 5
        plan.actor_lost(0)
        assert not plan.at_barrier
        plan.actor_joined(1)
        assert [one.count for one in self.drain(plan)] == [5]
        assert plan.at_barrier

    def test_a_barrier_behind_the_last_row_that_came_is_none(self) -> None:
        plan = self.plan(2, 0, published=5)
        plan.no_more()
        self.drain(plan)
        assert plan.finished
