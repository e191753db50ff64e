"""What a way of selecting needs: which checkpoints are scored, and what is known of the candidates."""

from __future__ import annotations

from typing import Any, Literal, get_args

from distal import plugins
from distal.config.kinds import Config
from distal.config.sections import Recorded, SelectSection, VoteMeasure
from distal.errors import ConfigError
from distal.records import Window

Need = Literal["final", "all", "probabilities", "embeddings"]
K_CENTER = "k_center"


def load_strategy(select: SelectSection) -> Any:
    """The user's own strategy (see `distal.acquire.strategy.Strategy`); None for one of distal's own.

    Raises:
        ConfigError: it has no `select`, or `needs` names something unknown.
    """
    if ":" not in select.batch:
        return None
    made = plugins.load(select.batch, "select.batch")()
    if not callable(getattr(made, "select", None)):
        raise ConfigError(f"select.batch: {select.batch} has no method select(candidates, budget, rng)")
    needs = getattr(made, "needs", None)
    unknown = [need for need in ([needs] if isinstance(needs, str) else needs or ()) if need not in get_args(Need)]
    if needs is None or isinstance(needs, str) or unknown:
        raise ConfigError(
            f"select.batch: {select.batch}.needs must be a set of some of {', '.join(get_args(Need))}, got {needs!r}"
        )
    return made


def _needs_of(select: SelectSection) -> frozenset[str]:
    """What must be known of the candidates for the batch to be composed."""
    if select.batch == K_CENTER:
        return frozenset({"embeddings"})
    own = load_strategy(select)
    return frozenset(own.needs) if own else frozenset()


def recorded(select: SelectSection) -> tuple[str, ...]:
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
    needs = set(_needs_of(select))
    if select.from_ is None:
        if measure in get_args(VoteMeasure):
            needs.add("all")
        elif measure in get_args(Recorded):
            needs.add("final")
    if "all" in needs or config.score.checkpoints == "all":
        return epochs
    return epochs[-1:] if "final" in needs else []
