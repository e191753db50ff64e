"""Exact elimination against the full computation: the same selection, whatever the trajectories."""

from __future__ import annotations

import itertools
import random
from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.acquire.topk import Candidates, TopK
from distal.records import split_blocks
from distal.reduce.measures import Votes, dispersion
from distal.score.eliminate import Barrier, barrier_rows, decide, histogram, survivors
from distal.score.plan import Plan

UNASSIGNED = 255


def full(labels: np.ndarray, eligible: np.ndarray, n_classes: int) -> np.ndarray:
    """(N,) dispersion over all rows, NaN where not eligible."""
    return np.where(eligible, dispersion(Votes(labels, n_classes)), np.nan)


def stored(labels: np.ndarray, eligible: np.ndarray, n_classes: int, block_size: int, budget: int, rng) -> np.ndarray:
    """The assignments as a pass with elimination leaves them, its blocks out of step and its driver killed at will.

    Decisions survive a kill, like committed blocks; what was in hand is lost.
    """
    T, N = labels.shape
    blocks = split_blocks(N, block_size)
    array = np.full((T, N), UNASSIGNED, np.uint8)
    done: set[tuple[int, int]] = set()
    decided: list[Barrier] = []
    for attempt in itertools.count(1):
        plan = Plan(T, len(blocks), done, barriers=barrier_rows(T), passed=len(decided))
        unpublished, histograms = deque(range(T)), {}
        for actor in range(rng.randint(1, 3)):
            plan.actor_joined(actor)
        in_hand: list = []
        for _ in range(rng.randint(1, 30) * attempt):  # votes are counted again in each attempt
            if unpublished and rng.random() < 0.5:
                plan.published(unpublished.popleft())
            if plan.at_barrier:
                row = plan.next_barrier
                decided.append(decide(row, [histograms[i] for i in range(len(blocks))], budget))
                plan.pass_barrier()
                histograms.clear()
            in_hand += plan.next_tasks()
            if not in_hand or rng.random() < 0.3:
                continue
            task = in_hand.pop(rng.randrange(len(in_hand)))
            block = blocks[task.block]
            here = slice(block.start, block.stop)
            scored = eligible[here]
            if task.barrier is not None and task.rows:
                theta = next(barrier.theta for barrier in decided if barrier.row == task.barrier)
                scored = survivors(array[: task.barrier, here], eligible[here], n_classes, theta)
            for row in task.rows:
                array[row, here] = np.where(scored, labels[row, here], UNASSIGNED)
                done.add((row, task.block))
            if task.count is not None:
                histograms[task.block] = histogram(array[: task.count, here], eligible[here], n_classes, T)
            plan.done(task)
            if plan.finished:
                remaining = decided[-1].remaining if decided else None
                complete = eligible & (array < n_classes).all(axis=0)
                if remaining is not None:
                    assert [int(complete[b.start : b.stop].sum()) for b in blocks] == list(remaining)
                return array
    raise AssertionError


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(T, N) labels, some more settled than others, and which samples are eligible."""
    T, N, C = draw(st.integers(1, 14)), draw(st.integers(1, 60)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    settled = rng.random(N) ** draw(st.sampled_from([0.2, 1.0, 5.0]))
    labels = np.where(rng.random((T, N)) < settled, rng.integers(0, C, N), rng.integers(0, C, (T, N)))
    return labels.astype(np.uint8), rng.random(N) < draw(st.sampled_from([0.3, 0.9, 1.0])), C


def top(scores: np.ndarray, budget: int) -> list[int]:
    """Selected in order; ties are decided by a fixed hash."""
    best = TopK(budget)
    index = np.arange(len(scores))
    keys = (index * 2654435761 % 1000003).astype(np.uint64)
    best.add(Candidates(index, scores.astype(np.float32), np.zeros(len(scores), np.float16), keys))
    return best.result()[0].index.tolist()


@settings(max_examples=300, deadline=None)
@given(trajectories(), st.integers(1, 70), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_the_selection_is_that_of_the_full_computation(
    case: tuple[np.ndarray, np.ndarray, int], budget: int, block_size: int, seed: int
) -> None:
    labels, eligible, n_classes = case
    array = stored(labels, eligible, n_classes, block_size, budget, random.Random(seed))
    expected = full(labels, eligible, n_classes)
    complete = eligible & (array < n_classes).all(axis=0)
    found = np.where(complete, dispersion(Votes(array, n_classes)), np.nan)
    assert np.array_equal(found[complete], expected[complete])
    assert top(found, budget) == top(expected, budget)
    if eligible.sum() <= budget:
        assert complete.sum() == eligible.sum()  # all of them will be selected


@settings(max_examples=50, deadline=None)
@given(trajectories(), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_what_is_left_out_is_the_same_in_every_run(
    case: tuple[np.ndarray, np.ndarray, int], budget: int, seed: int
) -> None:
    labels, eligible, n_classes = case
    arrays = [stored(labels, eligible, n_classes, 10, budget, random.Random(seed + i)) for i in range(2)]
    assert np.array_equal(*arrays)


def test_nothing_can_be_left_out_in_the_first_half() -> None:
    assert barrier_rows(1) == []
    assert barrier_rows(2) == []
    assert barrier_rows(8) == [5, 7]
    assert barrier_rows(9) == [5, 7]
    for T in range(2, 30):
        for row in range(1, T // 2 + 1):
            counts = np.zeros(T + 1, np.int64)
            counts[row] = counts[1] = 100  # as settled, and as unsettled, as can be
            assert decide(row, [counts], budget=1).theta >= row


def test_worked_by_hand() -> None:
    """T = 8, after 6 rows: mode counts 2, 3, 5, 6 in two blocks, budget 2: two samples end at most at 3 + 2."""
    first, second = np.bincount([2, 6], minlength=9), np.bincount([3, 5], minlength=9)
    barrier = decide(6, [first, second], budget=2)
    assert barrier == Barrier(row=6, theta=5, remaining=(1, 2))
    assert decide(6, [first, second], budget=5).theta == 8  # fewer samples than the budget
    assert Barrier.from_record(barrier.to_record()) == barrier


def test_it_saves_something() -> None:
    """Half of the samples never change their mind: of them none goes on."""
    rng = random.Random(0)
    labels = np.random.default_rng(0).integers(0, 5, (20, 100)).astype(np.uint8)
    labels[:, :50] = 1
    array = stored(labels, np.ones(100, bool), 5, 16, 10, rng)
    assert (array[-1, :50] == UNASSIGNED).all()
    assert (array < 5).mean() < 0.85
