"""Exact global top-k by a streaming merge: one pass, O(k) memory, ties decided.

The order is score descending, then margin ascending, then hash ascending, then sample_index ascending. It is
total, so the result does not depend on how the samples were cut into blocks or in what order those came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distal.kernels import rank_in_group


@dataclass(frozen=True)
class Candidates:
    """Samples with what decides between them; all arrays have the same length.

    Attributes:
        index: int64 sample_index.
        score: float32, larger first.
        margin: float16, smaller first; all zero when it plays no part.
        hash: uint64, smaller first.
        group: int64, a number for each group; -1: none, and so a group of its own. None where nobody asks.
    """

    index: NDArray[np.int64]
    score: NDArray[np.float32]
    margin: NDArray[np.float16]
    hash: NDArray[np.uint64]
    group: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def at(self, where: NDArray[np.integer] | NDArray[np.bool_] | slice) -> Self:
        """The candidates at these positions."""
        group = None if self.group is None else self.group[where]
        return type(self)(self.index[where], self.score[where], self.margin[where], self.hash[where], group)

    def joined(self, other: Self) -> Self:
        """Both together."""
        return type(self)(
            np.concatenate([self.index, other.index]),
            np.concatenate([self.score, other.score]),
            np.concatenate([self.margin, other.margin]),
            np.concatenate([self.hash, other.hash]),
            None if self.group is None or other.group is None else np.concatenate([self.group, other.group]),
        )

    def ranked(self) -> Self:
        """In the order of choice."""
        return self.at(np.lexsort((self.index, self.hash, self.margin, -self.score)))


class TopK:
    """Keeps the best `k` of all candidates it is shown, and the best that was not taken.

    Args:
        k: at least 1.
        most_per_group: of each group only so many are kept. The best so many of a part are all that can be among the
            best so many of the whole, so this is exact, whatever the parts.
    """

    def __init__(self, k: int, most_per_group: int | None = None) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self._keep = k + 1  # the first one not taken shows how the last one taken was decided
        self._k = k
        self._most_per_group = most_per_group
        self._best = Candidates(
            np.empty(0, np.int64),
            np.empty(0, np.float32),
            np.empty(0, np.float16),
            np.empty(0, np.uint64),
            None if most_per_group is None else np.empty(0, np.int64),
        )
        self._threshold = np.float32(-np.inf)

    def add(self, candidates: Candidates) -> None:
        """Show a batch of candidates; those whose score is NaN are passed over."""
        # A score at the threshold may still win by its margin or hash; NaN compares false.
        able = candidates.score >= self._threshold
        if not able.any():
            return
        self._best = self._best.joined(candidates.at(able))
        if len(self._best) >= 2 * self._keep:
            self._trim()

    def _trim(self) -> None:
        ranked = self._best.ranked()
        if ranked.group is not None and self._most_per_group is not None:
            ranked = ranked.at(first_of_each(ranked.group, self._most_per_group))
        self._best = ranked.at(slice(self._keep))
        if len(self._best) == self._keep:
            self._threshold = self._best.score[-1]

    def result(self) -> tuple[Candidates, list[str]]:
        """The chosen in rank order, and for each what decided that it was chosen.

        "score": no candidate with the same score was left out. "margin": one was, with a larger margin.
        "hash": one was, with the same margin. Those of a group that has its share already do not count as left out.
        """
        self._trim()
        chosen, left_out = self._best.at(slice(self._k)), self._best.at(slice(self._k, None))
        if not len(left_out):
            return chosen, ["score"] * len(chosen)
        same_score = chosen.score == left_out.score[0]
        same_margin = same_score & (chosen.margin == left_out.margin[0])
        return chosen, np.where(same_margin, "hash", np.where(same_score, "margin", "score")).tolist()


def first_of_each(groups: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    """Which of some samples in rank order are among the first `n` of their group.

    Args:
        groups: a number for each group; -1 is a sample that has none, and is a group of its own.
    """
    return (rank_in_group(groups, np.arange(len(groups))) < n) | (groups < 0)
