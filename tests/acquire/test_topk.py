from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.acquire.topk import Candidates, TopK, first_of_each


@st.composite
def candidates(draw: st.DrawFn) -> Candidates:
    """Scores with massive ties, as dispersion has, some of them NaN; margins and hashes that tie too."""
    n = draw(st.integers(0, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    score = rng.integers(0, draw(st.integers(1, 6)), n).astype(np.float32) / 8
    score[rng.random(n) < draw(st.sampled_from([0, 0.3, 1]))] = np.nan
    margin = rng.integers(0, draw(st.integers(1, 4)), n).astype(np.float16) / 4
    hashes = rng.integers(0, draw(st.sampled_from([3, 2**63])), n).astype(np.uint64)
    return Candidates(rng.permutation(10 * n)[:n].astype(np.int64), score, margin, hashes)


def brute_force(c: Candidates) -> list[tuple[float, float, int, int]]:
    """(-score, margin, hash, index) of all candidates that have a score, in order."""
    rows = zip((-c.score).tolist(), c.margin.tolist(), c.hash.tolist(), c.index.tolist(), strict=True)
    return sorted(row for row in rows if row[0] == row[0])


@settings(max_examples=300, deadline=None)
@given(candidates(), st.integers(1, 40), st.data())
def test_against_a_full_sort(c: Candidates, k: int, data: st.DataObject) -> None:
    """In pieces of any size and any order: the same as sorting everything."""
    borders = sorted(data.draw(st.lists(st.integers(0, len(c)), max_size=6)))
    pieces = np.split(np.arange(len(c)), borders)
    top = TopK(k)
    for piece in data.draw(st.permutations(pieces)):
        top.add(c.at(piece))
    chosen, decided_by = top.result()
    everything = brute_force(c)
    expected = everything[:k]
    assert chosen.index.tolist() == [row[3] for row in expected]
    assert len(set(chosen.index.tolist())) == len(chosen)

    left_out = everything[k:]
    for row, decided in zip(expected, decided_by, strict=True):
        tied = [other for other in left_out if other[0] == row[0]]
        closer = [other for other in tied if other[1] == row[1]]
        assert decided == ("hash" if closer else "margin" if tied else "score")


def test_memory_is_of_the_order_of_k() -> None:
    """A hundred thousand equal scores must not be kept."""
    top = TopK(10)
    for start in range(0, 100_000, 1000):
        index = np.arange(start, start + 1000)
        top.add(
            Candidates(
                index, np.full(1000, 0.5, np.float32), np.zeros(1000, np.float16), (index % 997).astype(np.uint64)
            )
        )
        assert len(top._best) < 2 * 11 + 1000
    chosen, decided_by = top.result()
    assert chosen.index.tolist() == sorted(range(100_000), key=lambda i: (i % 997, i))[:10]
    assert decided_by == ["hash"] * 10


def test_fewer_candidates_than_asked_for() -> None:
    top = TopK(5)
    top.add(
        Candidates(
            np.array([3, 1]), np.array([0.5, 0.5], np.float32), np.zeros(2, np.float16), np.array([1, 0], np.uint64)
        )
    )
    chosen, decided_by = top.result()
    assert chosen.index.tolist() == [1, 3]
    assert decided_by == ["score", "score"]


def test_none_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(0)


@given(st.lists(st.integers(-1, 5), max_size=60), st.integers(1, 4))
def test_the_first_of_each_group(groups: list[int], n: int) -> None:
    """As somebody would do it who goes down the list."""
    taken: dict[int, int] = {}
    expected = []
    for group in groups:
        taken[group] = taken.get(group, 0) + 1
        expected.append(group < 0 or taken[group] <= n)
    assert first_of_each(np.array(groups, np.int64), n).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(candidates(), st.integers(1, 20), st.integers(1, 3), st.data())
def test_a_cap_on_groups_against_going_down_the_list(c: Candidates, k: int, most: int, data: st.DataObject) -> None:
    """In pieces of any size and any order."""
    rng = np.random.default_rng(k)
    c = replace(c, group=rng.integers(-1, 5, len(c)))
    group_of = dict(zip(c.index.tolist(), c.group.tolist(), strict=True))
    borders = sorted(data.draw(st.lists(st.integers(0, len(c)), max_size=6)))
    top = TopK(k, most)
    for piece in data.draw(st.permutations(np.split(np.arange(len(c)), borders))):
        top.add(c.at(piece))
    taken: dict[int, int] = {}
    expected = []
    for *_, index in brute_force(c):
        group = group_of[index]
        if group < 0 or taken.get(group, 0) < most:
            taken[group] = taken.get(group, 0) + 1
            expected.append(index)
    assert top.result()[0].index.tolist() == expected[:k]


def test_a_cap_leaves_room_for_worse_ones() -> None:
    """Of twenty of one group one is kept: that is no full list, and its score is no threshold."""
    top = TopK(3, most_per_group=1)
    for score, groups in ((1.0, [0] * 20), (0.5, [1, 2]), (0.25, [3, 4])):
        n = len(groups)
        index = np.arange(n) + int(100 / score)
        top.add(
            Candidates(
                index, np.full(n, score, np.float32), np.zeros(n, np.float16), index.astype(np.uint64), np.array(groups)
            )
        )
    assert top.result()[0].index.tolist() == [100, 200, 201]
