"""What a way of selecting needs: the checkpoints that are scored, and what a strategy of the user's own is shown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distal import plugins
from distal.config import Config, Recorded, SelectConfig, VoteMeasure
from distal.errors import ConfigError
from distal.records import Window

Need = Literal["final", "all", "probabilities", "embeddings"]
K_CENTER = "k_center"


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


def strategy(select: SelectConfig) -> Strategy | None:
    """The user's own strategy; None when the batch is composed in one of distal's ways.

    Raises:
        ConfigError: it has no `select`, or `needs` names something unknown.
    """
    if ":" not in select.batch:
        return None
    made: Strategy = plugins.load(select.batch, "select.batch")()
    if not callable(getattr(made, "select", None)):
        raise ConfigError(f"select.batch: {select.batch} has no method select(candidates, budget, rng)")
    needs = getattr(made, "needs", None)
    unknown = [need for need in ([needs] if isinstance(needs, str) else needs or ()) if need not in get_args(Need)]
    if needs is None or isinstance(needs, str) or unknown:
        raise ConfigError(
            f"select.batch: {select.batch}.needs must be a set of some of {', '.join(get_args(Need))}, got {needs!r}"
        )
    return made


def needs_of(select: SelectConfig) -> frozenset[str]:
    """What must be known of the candidates for the batch to be composed."""
    if select.batch == K_CENTER:
        return frozenset({"embeddings"})
    own = strategy(select)
    return frozenset(own.needs) if own else frozenset()


def recorded(select: SelectConfig) -> tuple[str, ...]:
    """What must be recorded beside the assignments, for a way of selecting."""
    measure, _ = Window.of_name(select.measure)
    names = [measure] if measure in get_args(Recorded) and select.from_ is None else []
    return tuple(dict.fromkeys(["margin", *names] if select.breaks_ties_by_margin else names))


def scored_epochs(config: Config) -> list[int]:
    """The epochs whose checkpoints a cycle scores: those that its selection needs, all if `score.checkpoints` says so.

    Row t of the assignments belongs to entry t. A draw, or a file, needs none; a measure of the last checkpoint one.
    """
    epochs, select = config.train.checkpoint_epochs, config.select
    measure, _ = Window.of_name(select.measure)
    needs = set(needs_of(select))
    if select.from_ is None:
        if measure in get_args(VoteMeasure):
            needs.add("all")
        elif measure in get_args(Recorded):
            needs.add("final")
    if "all" in needs or config.score.checkpoints == "all":
        return epochs
    return epochs[-1:] if "final" in needs else []
