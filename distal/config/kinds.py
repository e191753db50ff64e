"""What the file of each command is: `Config` of `distal run`, `CompareConfig`, `ScoreConfig`.

Where the commands differ, callers ask a property of `Root` (`trains`, `budget`, `n_cycles`)
instead of the type.
"""

from __future__ import annotations

import keyword
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, model_validator

from distal.config.keys import (
    ANY_TIME,
    NEVER,
    NEXT_CYCLE,
    PLACE,
    Section,
    as_yaml,
    documented_keys,
    key,
)
from distal.config.sections import (
    NAMED,
    Architecture,
    CheckpointsSection,
    CompareLoop,
    CompareSection,
    EvalSection,
    FolderModel,
    FolderPool,
    FolderScore,
    Integer,
    LabelSection,
    LoopSection,
    ModelSection,
    PoolSection,
    PoolSource,
    RaySection,
    Recorded,
    ScoreSection,
    Scoring,
    SelectSection,
    TrainSection,
)
from distal.errors import RunConflict
from distal.hashing import digest
from distal.records import JsonObject, Stage, Window
from distal.storage import local_path

# The keys that may name a function or class of the user.
_FUNCTIONS = ("model.name", "model.normalize", "model.output", "select.batch")


class Root(Section):
    """What the configurations of all commands share.

    Attributes:
        command: the command of `distal` that it is for.
        trains: whether cycles train the checkpoints they score; otherwise a folder has them.
        stages: the stages of a cycle, in order.
    """

    command: ClassVar[str]
    trains: ClassVar[bool]
    stages: ClassVar[tuple[Stage, ...]]

    run: str = key(..., "Run directory.", PLACE)
    seed: Integer = key(0, "Seed of every random draw.", NEVER, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "Device that the networks run on. auto: cuda when the cluster has a GPU."
    )
    durable: bool = key(
        False,
        "Fsync every file before it is committed, so a power loss costs no more than a killed process. Slower.",
        ANY_TIME,
    )
    pool: PoolSource
    ray: RaySection = RaySection()
    model: Architecture
    score: Scoring = Scoring()
    select: SelectSection = SelectSection()

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        select, recorded = self.select, self.score.record
        if select.measure in get_args(Recorded) and select.measure not in recorded:
            raise ValueError(f"select.measure: {select.measure} needs score.record to contain it")
        if select.breaks_ties_by_margin and "margin" not in recorded:
            raise ValueError("select.tie_break: margin needs score.record to contain it; or set tie_break: hash")
        if self.score.eliminate == "none":
            return self
        if select.batch != "top_k":
            raise ValueError(
                f"score.eliminate: exact is for select.batch: top_k, not for {select.batch}; set score.eliminate=none"
            )
        if select.from_ is not None:
            raise ValueError("score.eliminate: exact, and select.from names the batch; set score.eliminate=none")
        if select.measure != "dispersion":
            raise ValueError(
                f"score.eliminate: exact is for select.measure: dispersion, not for "
                f"{select.measure}; set score.eliminate=none"
            )
        return self

    @property
    def n_cycles(self) -> int:
        """Cycles of the whole run."""
        return 1

    @property
    @abstractmethod
    def n_checkpoints(self) -> int | None:
        """Checkpoints of a cycle, scored or not; None when the configuration does not know."""

    @property
    @abstractmethod
    def budget(self) -> int:
        """Samples that one cycle selects."""

    @property
    def augments(self) -> bool:
        """Whether images are scored as training augments them."""
        return False

    @property
    def train_command(self) -> str | None:
        """The user's own training command."""
        return None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the configuration lists them."""
        return None

    @property
    @abstractmethod
    def labelled(self) -> int | str:
        """The samples that are labelled before the first cycle: how many, or a file of them."""

    def places(self) -> dict[str, str]:
        """The keys whose value is a path, with their values; built-in names are no paths."""
        named = {"run": self.run, "pool.path": self.pool.path}
        if self.pool.source is not None and not self.pool.source.startswith(NAMED):
            named["pool.source"] = self.pool.source
        if self.select.from_ is not None:
            named["select.from"] = self.select.from_
        return named

    def functions(self) -> dict[str, str]:
        """The keys that name a function or a class of the user, with their values."""
        leaves = self.leaves()
        named = {name: leaves[name] for name in _FUNCTIONS}
        return {k: value for k, value in named.items() if isinstance(value, str) and ":" in value}

    def absolute(self) -> Self:
        """A copy with absolute paths; relative ones start at the working directory."""
        return self.with_values({name: str(local_path(place, name)) for name, place in self.places().items()})

    def leaves(self) -> dict[str, Any]:
        """Every key with its value, as `{"train.lr": 0.05, ...}`, in order."""
        return {name: _value(self, name) for name, _ in documented_keys(type(self))}

    def result_keys(self) -> dict[str, Any]:
        """The keys that can change a bit of the result, with their values."""
        return self._changing(NEVER, NEXT_CYCLE)

    def identity_keys(self) -> dict[str, Any]:
        """The keys that are part of the run's identity, with their values."""
        return self._changing(NEVER)

    def _changing(self, *when: str) -> dict[str, Any]:
        leaves = self.leaves()
        return {k.name: leaves[k.name] for k in documented_keys(type(self)) if k.changes in when}

    def digest(self, *prefixes: str) -> str:
        """Hash of the result keys under some prefixes.

        Defaults are left out, so a key added later, whose default changes nothing, changes no
        hash.
        """
        defaults = {key.name: key.default for key in documented_keys(type(self))}
        return digest(
            {
                name: value
                for name, value in self.result_keys().items()
                if name.startswith(prefixes) and value != defaults[name]
            }
        )

    def autos(self) -> list[str]:
        """The result keys that are `auto`."""
        keys = self.result_keys().items()
        return [name for name, value in keys if value == "auto" and name != "model.stem"]

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with some keys set, named as in `leaves`; validated again."""
        return self.of(self.model_dump(by_alias=True), values)

    @classmethod
    def of(cls, tree: Mapping[str, Any], values: Mapping[str, Any]) -> Self:
        """Validate nested keys, with some of them replaced, named as in `leaves`."""
        return cls.model_validate(_merged(tree, values))

    def to_record(self) -> JsonObject:
        """Plain nested values, as written to `cycle.yaml`."""
        return self.model_dump(mode="json", by_alias=True)


AnyRoot = TypeVar("AnyRoot", bound=Root)


class Config(Root):
    """One active-learning run."""

    command: ClassVar[str] = "run"
    trains: ClassVar[bool] = True
    stages: ClassVar[tuple[Stage, ...]] = ("train", "score", "test", "reduce", "select", "label")

    pool: PoolSection
    model: ModelSection = ModelSection()
    loop: LoopSection = LoopSection()
    train: TrainSection = TrainSection()
    score: ScoreSection = ScoreSection()
    eval: EvalSection = EvalSection()
    label: LabelSection = LabelSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        initial, workers = self.loop.initial, self.train.workers
        if isinstance(initial, int) and initial < 2 * workers:
            raise ValueError(
                f"loop.initial: {initial} must be at least 2 per rank (train.workers: {workers}): "
                "batch norm needs two images"
            )
        measure, window = Window.of_name(self.select.measure)
        if measure == "dispersion_authors" and not self.augments:
            raise ValueError("select.measure: dispersion_authors needs score.transform: train")
        n_rows = len(self.train.checkpoint_epochs)
        n_inside = len(window.rows(n_rows))
        if window != Window() and n_inside < 2:
            raise ValueError(
                f"select.measure: {self.select.measure}: that is {n_inside} of {n_rows} "
                "checkpoints, and a measure of one is always 0; take a wider window"
            )
        return self

    @property
    def n_cycles(self) -> int:
        """See `Root.n_cycles`."""
        return self.loop.cycles

    @property
    def n_checkpoints(self) -> int:
        """See `Root.n_checkpoints`."""
        return len(self.train.checkpoint_epochs)

    @property
    def budget(self) -> int:
        """See `Root.budget`."""
        return self.loop.budget

    @property
    def augments(self) -> bool:
        """See `Root.augments`."""
        return self.score.transform == "train"

    @property
    def train_command(self) -> str | None:
        """See `Root.train_command`."""
        return self.train.command

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See `Root.class_names`."""
        return self.pool.classes if isinstance(self.pool.classes, tuple) else None

    @property
    def labelled(self) -> int | str:
        """See `Root.labelled`."""
        return self.loop.initial

    def places(self) -> dict[str, str]:
        """See `Root.places`."""
        named = super().places()
        for name, place in (("eval.test", self.eval.test), ("eval.val", self.eval.val)):
            if place is not None and not place.startswith(NAMED):
                named[name] = place
        if isinstance(self.loop.initial, str):
            named["loop.initial"] = self.loop.initial
        if isinstance(self.pool.classes, str):
            named["pool.classes"] = self.pool.classes
        weights = self.model.weights
        if weights is not None and (os.sep in weights or Path(weights).suffix):
            named["model.weights"] = weights
        return named


class CompareConfig(Config):
    """One run per seed and strategy. `select` is given per strategy."""

    command: ClassVar[str] = "compare"

    loop: CompareLoop = CompareLoop()
    compare: CompareSection

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.compare.metric not in self.eval.metrics:
            raise ValueError(
                f"compare.metric: {self.compare.metric} is not in eval.metrics, {', '.join(self.eval.metrics)}"
            )
        if self.label.oracle != "pool":
            raise ValueError("label.oracle must be pool: nobody labels the same images for every strategy")
        return self

    def functions(self) -> dict[str, str]:
        """See `Root.functions`."""
        batches = {
            f"compare.strategies.{name}.batch": strategy.batch for name, strategy in self.compare.strategies.items()
        }
        return super().functions() | {k: batch for k, batch in batches.items() if ":" in batch}

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.compare.seeds)


class ScoreConfig(Root):
    """Scoring a pool at the checkpoints of a directory, and selecting from it."""

    command: ClassVar[str] = "score"
    trains: ClassVar[bool] = False
    stages: ClassVar[tuple[Stage, ...]] = ("score",)

    pool: FolderPool
    model: FolderModel
    checkpoints: CheckpointsSection
    score: FolderScore = FolderScore()

    @model_validator(mode="after")
    def _of_scores_alone(self) -> Self:
        select = self.select
        if select.batch not in ("top_k", "power"):
            raise ValueError(f"select.batch: {select.batch} is for `distal run`; here a batch is top_k or power")
        if select.measure.startswith("dispersion_authors"):
            raise ValueError(f"select.measure: {select.measure} is for `distal run`, which can augment the pool")
        for name, value in (("from", select.from_), ("subpool", select.subpool)):
            if value is not None:
                raise ValueError(f"select.{name} is for `distal run`; remove it")
        return self

    @property
    def n_checkpoints(self) -> int | None:
        """See `Root.n_checkpoints`."""
        return self.checkpoints.expect

    @property
    def budget(self) -> int:
        """See `Root.budget`."""
        return self.score.budget

    @property
    def labelled(self) -> int | str:
        """See `Root.labelled`."""
        return self.pool.exclude or 0

    def places(self) -> dict[str, str]:
        """See `Root.places`."""
        named = super().places() | {"checkpoints.path": self.checkpoints.path}
        if self.pool.exclude is not None:
            named["pool.exclude"] = self.pool.exclude
        return named


def check_unchanged(old: Root, new: Root, cycle: int) -> None:
    """Refuse a change of a result key in a cycle that has begun.

    Args:
        old: the resolved configuration of `cycle`.

    Raises:
        RunConflict: naming the key, both values and the first cycle the change may apply to.
    """
    before = old.result_keys()
    for name, value in new.result_keys().items():
        if before[name] != value:
            raise RunConflict(
                f"{name}: {as_yaml(before[name])} -> {as_yaml(value)}: cycle {cycle} has begun "
                f"with the old value; the new one may apply from cycle {cycle + 1}, when cycle "
                f"{cycle} is finished; or remove cycles/{cycle:03d} from the run to do it again, "
                "or give another run directory (run=...)"
            )


def _value(section: BaseModel, name: str) -> Any:
    value: Any = section
    for part in name.split("."):
        value = getattr(value, f"{part}_" if keyword.iskeyword(part) else part)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Sections as mappings, also inside a mapping."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _merged(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `tree` with dotted `values` set."""
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        if rest:
            inner = merged.get(section)
            merged[section] = _merged(inner if isinstance(inner, Mapping) else {}, {rest: value})
        else:
            merged[section] = value
    return merged
