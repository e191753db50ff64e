"""How a user's own strategy looks, and what it is shown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distal.config import SelectSection
from distal.config.needs import Need, load_strategy


@dataclass(frozen=True)
class Shown:
    """The candidates that a strategy of the user's own chooses from, best first by `select.measure`.

    Attributes:
        index: sample_index, (n,) int64.
        sample_id: n strings.
        score: by `select.measure`, larger is more uncertain, (n,) float32.
        assignments: classes at every checkpoint, (T, n), for "all"; at the last one, (1, n), for "final"; else None.
        probabilities: of each class at the last checkpoint, (n, C) float32, or None.
        embeddings: what the last linear layer is given at the last checkpoint, (n, d) float32, or None.
    """

    index: NDArray[np.int64]
    sample_id: Sequence[str]
    score: NDArray[np.float32]
    assignments: NDArray[np.unsignedinteger[Any]] | None = None
    probabilities: NDArray[np.float32] | None = None
    embeddings: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.index)


class Strategy(Protocol):
    """A strategy of the user's own: `select.batch=package.module:Class`, made without arguments.

    Attributes:
        needs: what of the candidates it looks at; nothing else is scored or kept.
    """

    needs: Collection[Need]

    def select(self, candidates: Shown, budget: int, rng: np.random.Generator) -> ArrayLike:
        """Positions of the chosen candidates in [0, len(candidates)), in rank order: `budget` different ones."""
        ...


def strategy(select: SelectSection) -> Strategy | None:
    """The user's own strategy; None when the batch is composed in one of distal's ways.

    Raises:
        ConfigError: as `distal.config.needs.load_strategy`.
    """
    own: Strategy | None = load_strategy(select)
    return own


def by_scores(how: SelectSection, measure: str) -> SelectSection:
    """How a batch is composed from scores alone: a way that needs more than scores becomes `top_k`."""
    batch = how.batch if how.batch in ("top_k", "power") else "top_k"
    return how.model_copy(update={"measure": measure, "batch": batch, "from_": None})
