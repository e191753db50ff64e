"""The configuration: YAML in, frozen models out, every key documented in its one place.

`docs/config.md` is generated from here (`python -m distal.config > docs/config.md`), and so is what
`distal init` writes.
"""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distal.errors import ConfigError, RunConflict
from distal.hashing import digest
from distal.records import JsonObject, Window
from distal.storage import is_relative, local_path

VoteMeasure = Literal[
    "dispersion", "dispersion_authors", "vote_entropy", "gini", "vote_margin", "flips", "last_flip", "decayed"
]
Measure = Literal[VoteMeasure, "margin", "entropy", "least_confidence", "random"]
Recorded = Literal["margin", "entropy", "least_confidence", "probabilities"]
Metric = Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"]
Auto = Literal["auto"]
Integer = Annotated[int, Strict()]  # true is not 1
Count = Annotated[int, Strict(), Field(ge=1)]

BUILTIN, TORCHVISION = "builtin:", "torchvision:"
FIRST = "first"  # in a comparison, the folder of what all strategies share
NAMED = (BUILTIN, TORCHVISION)  # sources that have a name, which is no path
SECTIONS = {  # in the order of the work; what is no section comes first
    name: place
    for place, name in enumerate(
        ("pool", "ray", "model", "checkpoints", "loop", "train", "score", "eval", "select", "label", "compare"),
        start=1,
    )
}

# When a key may change. It says what a change can do to a run that exists already.
NEVER = "never"  # part of what the run is
NEXT_CYCLE = "next cycle"  # affects results: fixed once a cycle has begun
PLACE = "may move"  # where something is whose content never changes
ANY_TIME = "any time"  # affects speed or length, or what to put up with, never a result


def key(default: Any, description: str, changes: str = NEXT_CYCLE, **constraints: Any) -> Any:
    """A configuration key: default, description (with the unit), when it may change, bounds."""
    return Field(default, description=description, json_schema_extra={"changes": changes}, **constraints)


def check_measure(measure: str, window: Window) -> None:
    """Raise ValueError when there is no such measure, or it has no window."""
    if measure not in get_args(Measure):
        raise ValueError(f"{measure!r} is unknown; known: {', '.join(get_args(Measure))}")
    if window != Window() and measure not in get_args(VoteMeasure):
        raise ValueError(f"{measure} has no window; a window is for {', '.join(get_args(VoteMeasure))}")


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ChannelStats(Section):
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need one value per channel each, got {len(self.mean)} and {len(self.std)}")
        return self


FUNCTIONS = ("model.name", "model.normalize", "model.output", "select.batch")  # the keys that may name one
Function = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
Normalize = Literal["pool", "imagenet"] | ChannelStats | Function
NORMALIZE_VALUES = "imagenet, pool, {mean: [...], std: [...]} with a value per channel, or package.module:function"
NORMALIZE = (
    "How pixels become the network's input: `pool`, the mean and standard deviation of the pool's pixels; `imagenet`, "
    "those of ImageNet; `{mean: [...], std: [...]}` per channel, of pixels scaled to [0, 1]; or a function of yours, "
    "`package.module:function`, from uint8 (B, C, H, W) to that input."
)


class PoolSource(Section):
    """All images, read-only."""

    path: str = key(..., "Folder of the packed pool.", PLACE)
    source: str | None = key(
        None,
        "What the pool is packed from when `path` does not exist yet: a Parquet file or a folder of them, an image "
        "folder, `builtin:fashion-mnist-12k`, or a dataset that torchvision downloads, such as "
        "`torchvision:CIFAR10` or `torchvision:CIFAR10/test`. A pool that exists must have been packed from it. null: "
        "the pool must exist, whatever it was packed from.",
        PLACE,
    )
    limit: Count | None = key(
        None,
        "Number of images to use: a seeded random subset; the others are not eligible. null: all.",
        NEVER,
    )
    block_size: Count | Auto = key(
        "auto", "Samples in a block. auto: about n/64, a multiple of 128 in [128, 65536].", NEVER
    )


class PoolConfig(PoolSource):
    """All images, read-only."""

    classes: tuple[str, ...] | str | None = key(
        None,
        "Names of the classes in the order of their indices, or a text file with one per line. Needed when the pool "
        "has no labels; otherwise the classes of the pool, and more after them. A later cycle may append to them. "
        "null: those of the pool.",
    )


class ForeignPool(PoolSource):
    """All images, read-only; labels are not needed."""

    exclude: str | None = key(
        None,
        "File of the samples that are labelled already, which are neither scored nor selected: text with a sample_id "
        "per line, or CSV or Parquet with a column `sample_id`. null: none.",
        PLACE,
    )


class RayConfig(Section):
    """Where the work runs."""

    address: str = key(
        "local",
        "`local` starts Ray here, unless the environment sets RAY_ADDRESS; `auto` joins the cluster of this "
        "machine; or `host:port`.",
        ANY_TIME,
    )

    @field_validator("address")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ("local", "auto") and not re.fullmatch(r"[\w.\-\[\]:]+:\d+", value):
            raise ValueError("must be local, auto or host:port")
        return value


class Architecture(Section):
    """The network."""

    name: str = key(
        "small_cnn",
        "`small_cnn` (0.1 M parameters) or `resnet20` (0.3 M), both for small images; a torchvision classifier such as "
        "`resnet18`; or a function of yours as `package.module:function`, called with num_classes and image_shape=(C, "
        "H, W).",
    )
    args: dict[str, Any] = key({}, "Further arguments to build it with, such as `{dropout: 0.2}`.")
    stem: Literal["auto", "small", "standard"] = key(
        "auto",
        "First layers of a torchvision ResNet. small: 3x3 stride 1 and no max-pool. auto: small for images "
        "under 64 pixels.",
    )
    output: Function | None = key(
        None,
        "A function of yours, `package.module:function`, from what the network returns to logits (B, classes). null: a "
        "tensor is taken as it is, of a tuple the first, of a mapping `logits`.",
    )


class ModelConfig(Architecture):
    """The classifier."""

    weights: str | None = key(
        None,
        "Pretrained weights to start from: a state_dict file, or a name that torchvision knows for this model "
        "(`DEFAULT`, `IMAGENET1K_V1`). A head for other classes is left out. null: random.",
    )
    normalize: Normalize = key("pool", NORMALIZE)


class ForeignModel(Architecture):
    """The classifier that the checkpoints are of. What they were trained with has no default."""

    num_classes: Integer = key(..., "Length of its output.", ge=2)
    normalize: Normalize = key(..., NORMALIZE)
    weights: ClassVar[None] = None


class CheckpointsConfig(Section):
    """Checkpoints that something else writes: state_dicts as .pt, .pth or .safetensors, or Lightning's .ckpt."""

    path: str = key(..., "The directory.", PLACE)
    pattern: str = key("*.pt", "Which of its files are checkpoints, as in a shell.", NEVER)
    strip_prefix: str | None = key(
        None,
        "What the keys of the state_dict have before those of the network, such as `model.`; keys without it are left "
        "out. null: found, where there is one choice.",
        NEVER,
    )
    expect: Count | None = key(None, "How many there will be. null: unknown.", ANY_TIME)
    idle: float = key(
        600.0, "With --watch: seconds without a new checkpoint after which none will come.", ANY_TIME, gt=0
    )
    key: str | None = key(  # last: here the name means the function above
        None,
        "Where in a file the state_dict is, with dots between nested keys: of averaged weights, say. null: the file is "
        "one, or has one as `state_dict`.",
        NEVER,
    )


class LoopConfig(Section):
    """Cycles and what is bought in each."""

    cycles: Integer = key(3, "Cycles to run; may grow. The last one selects but does not label.", ANY_TIME, ge=1)
    initial: Count | str = key(
        300,
        "Labelled samples to start from: how many, or a CSV or Parquet file with columns `sample_id` and `label`. A "
        "number is balanced over the classes with label.oracle: pool, and random with files. Groups are taken whole.",
        NEVER,
    )
    budget: Integer = key(300, "Samples to label per cycle.", ge=1)
    balance: bool = key(
        True,
        "Whether a first set of so many is balanced over the classes, with label.oracle: pool: it reads labels that "
        "have not been paid for. false: it is random.",
        NEVER,
    )


class TrainConfig(Section):
    """DDP training on the labelled samples."""

    command: str | None = key(
        None,
        "Training by a command of yours instead: it reads `{labels}`, a Parquet file, and publishes to `{checkpoints}` "
        "with distal.publish_checkpoint; `{images}` has the labelled images written to files; `{epochs}`, `{seed}` and "
        "`{cycle}` are numbers. It publishes as many checkpoints as epochs and checkpoint_every say. Of the keys below "
        "only these, workers and threads count.",
    )
    epochs: Integer = key(15, "Passes over the labelled samples.", ge=1, le=100_000)
    checkpoint_every: Integer = key(1, "Epochs between checkpoints; the last epoch always gives one.", ge=1)
    batch_size: Integer = key(64, "Images per optimizer step, over all ranks together.", ge=1)
    lr: float = key(0.05, "Initial learning rate of SGD with Nesterov momentum.", gt=0)
    momentum: float = key(0.9, "Momentum.", gt=0, lt=1)
    weight_decay: float = key(5e-4, "L2 penalty on all parameters.", ge=0)
    schedule: Literal["cosine", "milestones", "constant"] = key(
        "cosine", "Learning rate per epoch: cosine to 0, multiplied by `gamma` at `milestones`, or constant."
    )
    milestones: tuple[Count, ...] = key((), "Epochs at which the learning rate is multiplied by `gamma`.")
    gamma: float = key(0.5, "Factor at each milestone.", gt=0)
    augment: Literal["none", "crop_flip"] = key(
        "crop_flip",
        "crop_flip: a random crop after padding by an eighth of the side, and a horizontal flip.",
    )
    init: Literal["scratch", "warm"] = key(
        "scratch", "Weights a cycle starts from: new ones, or the last checkpoint of the cycle before."
    )
    workers: Integer = key(1, "DDP ranks (gloo on CPU, NCCL on GPU). Part of the answer: sums are ordered by it.", ge=1)
    threads: Count | Auto = key(
        "auto",
        "CPU threads of a rank. auto: half of the CPUs over all ranks, the rest score; all of nodes that only train.",
    )
    max_failures: Integer = key(
        3,
        "Times that ranks may die in a row without finishing an epoch before the run stops.",
        ANY_TIME,
        ge=0,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of workers {self.workers}")
        if self.batch_size < 2 * self.workers:
            raise ValueError(f"batch_size {self.batch_size} must be at least 2 per worker: batch norm needs two images")
        if (self.schedule == "milestones") != bool(self.milestones):
            raise ValueError("schedule: milestones and a list of milestones go together")
        return self

    @property
    def checkpoint_epochs(self) -> list[int]:
        """The epochs (from 1) that publish a checkpoint, in order: row t belongs to entry t."""
        epochs = range(1, self.epochs + 1)
        return [e for e in epochs if e % self.checkpoint_every == 0 or e == self.epochs]


class ScoreConfig(Section):
    """Predicting the class of every eligible sample at every checkpoint."""

    actors: Count | Auto = key(
        "auto",
        "Scoring actors. auto: one per free CPU slot, or GPU. For more than find room an autoscaler is asked for nodes "
        "where some are labelled for scoring.",
        ANY_TIME,
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "Arithmetic of the forward pass. auto: bf16 where the processor has it."
    )
    batch_size: Count | Auto = key("auto", "Images per forward pass. auto: the quickest of a few, tried once.")
    record: tuple[Recorded, ...] = key(
        ("margin",),
        "What is kept beside the assignments: margin p1 - p2, entropy in nats and least_confidence 1 - p1 as float16; "
        "the probabilities of all classes as float32.",
    )
    record_rows: Literal["last", "all"] = key("last", "Checkpoints at which they are kept.")
    mixed_hardware: Literal["refuse", "allow"] = key(
        "refuse",
        "An actor on another kind of processor, or with another torch, than the cycle began with: send it away, or let "
        "it score, which can change last bits.",
        ANY_TIME,
    )
    cache_gb: float = key(1.0, "Decoded images that one actor keeps in memory, in GiB.", ANY_TIME, ge=0)
    stuck_after: float = key(
        600.0, "Seconds without a finished batch after which a scoring actor is replaced.", ANY_TIME, gt=0
    )
    eliminate: Literal["none", "exact"] = key(
        "none",
        "exact: from half of the checkpoints on, leave out samples that can no longer be selected. The selection stays "
        "the same; only for measure: dispersion.",
    )


class RunScore(ScoreConfig):
    """Predicting the class of every eligible sample at the checkpoints of a cycle."""

    checkpoints: Literal["needed", "all"] = key(
        "needed",
        "Which are scored. needed: those that the selection looks at: all for dispersion, the last one for margin, "
        "none for random. all: the whole trajectory.",
    )
    transform: Literal["clean", "train"] = key(
        "clean",
        "What is predicted: the images as they are, or as train.augment changes them, anew at each checkpoint, which "
        "dispersion_authors is defined on.",
    )


class ForeignScore(ScoreConfig):
    """Predicting the class of every eligible sample at every checkpoint, and how many to select."""

    budget: Count = key(1000, "Samples to select.")


class EvalConfig(Section):
    """How good the last checkpoint of each cycle is. Nothing is chosen by it."""

    test: str | None = key(
        None,
        "Images and labels to test on: a packed pool, or a source, which is then packed beside the pool as "
        "`<path>-test`. Classes are matched by name. null: no test.",
        PLACE,
    )
    val: str | None = key(
        None,
        "Others, for choices of your own: given in the same way, packed as `<path>-val`. Their labels are counted as "
        "paid for. null: none.",
        PLACE,
    )
    metrics: tuple[Metric, ...] = key(
        ("accuracy",),
        "What is computed of both. balanced_accuracy, macro_f1: mean recall and mean F1 over the classes that the "
        "labels have; auroc: mean over all classes of the area under the ROC curve, the class against the rest; ece: "
        "expected calibration error in 15 equal bins of confidence. What is not defined is null, with the reason.",
    )
    allow_overlap: bool = key(
        False, "Go on when images to test or validate on are in the pool as well, pixel by pixel.", ANY_TIME
    )

    @field_validator("metrics")
    @classmethod
    def _some(cls, value: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(get_args(Metric))}")
        return value


class SelectConfig(Section):
    """Which samples to label next."""

    from_: str | None = key(
        None,
        "File of samples that were chosen elsewhere: text with a sample_id per line, or CSV or Parquet with a column "
        "`sample_id`. They are the batch, in this order, and nothing is scored for it. null: distal chooses.",
        alias="from",
    )
    measure: str = key(
        "dispersion",
        f"The score to rank by; larger is always more uncertain. One of {', '.join(get_args(Measure))}; of those that "
        "come from several checkpoints also a window, as `dispersion@last=0.5`, `@from=10` or `@every=2`.",
    )
    tie_break: Literal["margin", "hash"] = key(
        "margin",
        "Order of equal scores: margin of the last checkpoint, then a seeded hash; or the hash alone.",
    )
    subpool: float | None = key(
        None,
        "Share of the eligible samples, drawn anew in every cycle, that are scored and selected from. null: all.",
        gt=0,
        lt=1,
    )
    batch: Literal["top_k", "power", "k_center"] | Function = key(
        "top_k",
        "How a batch comes from the scores. top_k: the largest. power: drawn without replacement, a sample with score "
        "s in proportion to s^beta. k_center: of the candidates one after the other the farthest from those chosen, by "
        "what the last linear layer is given. Or a strategy of yours, `package.module:Class`, that chooses from the "
        "candidates.",
    )
    beta: float = key(1.0, "With power: the exponent; the larger, the nearer to top_k.", gt=0)
    candidate_factor: float = key(
        10.0, "With k_center or a strategy of yours: candidates, the largest scores, per sample of the batch.", ge=1
    )
    max_per_group: Count | None = key(
        None, "The most samples of a batch with the same `group_id` (a patient, a product). null: any number."
    )

    @property
    def breaks_ties_by_margin(self) -> bool:
        """Whether margins of the last checkpoint are looked at; a draw has no ties, and a file is an order."""
        return self.tie_break == "margin" and self.measure != "random" and self.from_ is None

    @field_validator("measure")
    @classmethod
    def _named(cls, value: str) -> str:
        measure, window = Window.of_name(value)
        check_measure(measure, window)
        return f"{measure}{window}"


class LabelConfig(Section):
    """Who answers."""

    oracle: Literal["pool", "files"] = key(
        "pool",
        "pool: the labels that the pool itself carries (experiments). files: people, by `distal labels export` and "
        "`import`; `distal run` ends when a batch waits for them, and goes on when they have come.",
    )
    min_labels: Count | None = key(
        None, "With files: answers to a batch after which the next cycle may start. null: all of it.", ANY_TIME
    )
    conflict: Literal["majority", "first", "reask"] = key(
        "majority",
        "When annotators disagree: what most of them say (a tie is asked again), what the first one said, or ask "
        "again.",
    )


class Root(Section):
    """What a configuration of any kind has.

    Attributes:
        command: the command of `distal` that it is for.
    """

    command: ClassVar[str]

    run: str = key(..., "Run directory.", PLACE)
    seed: Integer = key(0, "Seed of every random draw.", NEVER, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "Where training and scoring run. auto: cuda when the cluster has a GPU."
    )
    durable: bool = key(
        False,
        "Have every file on the disk before it counts, so that a power loss loses no more than a killed process does. "
        "Slower.",
        ANY_TIME,
    )
    pool: PoolSource
    ray: RayConfig = RayConfig()
    model: Architecture
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.select.measure in get_args(Recorded) and self.select.measure not in self.score.record:
            raise ValueError(f"select.measure: {self.select.measure} needs score.record to contain it")
        if self.select.breaks_ties_by_margin and "margin" not in self.score.record:
            raise ValueError("select.tie_break: margin needs score.record to contain it; or set tie_break: hash")
        if self.score.eliminate == "exact" and self.select.batch != "top_k":
            raise ValueError(
                f"score.eliminate: exact is for select.batch: top_k, not for {self.select.batch}; set "
                "score.eliminate=none"
            )
        if self.score.eliminate == "exact" and self.select.from_ is not None:
            raise ValueError("score.eliminate: exact, and select.from names the batch; set score.eliminate=none")
        if self.score.eliminate == "exact" and self.select.measure != "dispersion":
            raise ValueError(
                f"score.eliminate: exact is for select.measure: dispersion, not for {self.select.measure}; "
                "set score.eliminate=none"
            )
        return self

    def places(self) -> dict[str, str]:
        """The keys that name a file or folder, with their values; none that is a name of something else."""
        named = {"run": self.run, "pool.path": self.pool.path}
        if self.pool.source is not None and not self.pool.source.startswith(NAMED):
            named["pool.source"] = self.pool.source
        if self.select.from_ is not None:
            named["select.from"] = self.select.from_
        return named

    def functions(self) -> dict[str, str]:
        """The keys that name a function or a class of the user's, with their values."""
        named = {name: self.leaves()[name] for name in FUNCTIONS}
        return {name: value for name, value in named.items() if isinstance(value, str) and ":" in value}

    def absolute(self) -> Self:
        """The same configuration with absolute paths; relative ones start at the working directory."""
        return self.with_values({name: str(local_path(place, name)) for name, place in self.places().items()})

    def leaves(self) -> dict[str, Any]:
        """Every key with its value, as `{"train.lr": 0.05, ...}`, in order."""
        return {name: _value(self, name) for name, _ in documented_keys(type(self))}

    def decisive(self) -> dict[str, Any]:
        """The keys that can change a bit of the answer, with their values."""
        return self._that_change(NEVER, NEXT_CYCLE)

    def fixed(self) -> dict[str, Any]:
        """The keys that are part of what a run is, with their values."""
        return self._that_change(NEVER)

    def _that_change(self, *when: str) -> dict[str, Any]:
        fields = dict(documented_keys(type(self)))
        return {name: value for name, value in self.leaves().items() if _changes(fields[name]) in when}

    def digest(self, *prefixes: str) -> str:
        """Hash of the decisive keys under some prefixes. A default is left out, so a key that is added later, with a
        default that changes nothing, changes no hash."""
        defaults = {name: _default(field) for name, field in documented_keys(type(self))}
        return digest(
            {
                name: value
                for name, value in self.decisive().items()
                if name.startswith(prefixes) and value != defaults[name]
            }
        )

    def autos(self) -> list[str]:
        """The decisive keys that say `auto`."""
        return [name for name, value in self.decisive().items() if value == "auto" and name != "model.stem"]

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with some keys set, named as in `leaves`; validated again."""
        return type(self).model_validate(_merged(self.model_dump(by_alias=True), values))


AnyRoot = TypeVar("AnyRoot", bound=Root)


class Config(Root):
    """One active-learning run."""

    command: ClassVar[str] = "run"

    pool: PoolConfig
    model: ModelConfig = ModelConfig()
    loop: LoopConfig = LoopConfig()
    train: TrainConfig = TrainConfig()
    score: RunScore = RunScore()
    eval: EvalConfig = EvalConfig()
    label: LabelConfig = LabelConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.loop.initial, int) and self.loop.initial < 2 * self.train.workers:
            raise ValueError(
                f"loop.initial: {self.loop.initial} must be at least 2 per rank (train.workers: {self.train.workers}): "
                "batch norm needs two images"
            )
        measure, window = Window.of_name(self.select.measure)
        if measure == "dispersion_authors" and self.score.transform != "train":
            raise ValueError("select.measure: dispersion_authors needs score.transform: train")
        n_rows = len(self.train.checkpoint_epochs)
        n_inside = len(window.rows(n_rows))
        if window != Window() and n_inside < 2:
            raise ValueError(
                f"select.measure: {self.select.measure}: that is {n_inside} of {n_rows} checkpoints, and a measure of "
                "one is always 0; take a wider window"
            )
        return self

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


class CompareSection(Section):
    """Strategies x seeds."""

    strategies: dict[Annotated[str, Field(pattern=r"^[\w.@=+-]+$")], SelectConfig] = key(
        ...,
        "Name of each strategy and its keys of the section `select`, as `entropy: {measure: entropy}`. A name is "
        "letters, digits and `_.@=+-`.",
        min_length=2,
    )
    seeds: Count = key(10, "How many, from `seed` on. One decides first set, weights and order.", ANY_TIME, ge=1)
    references: tuple[str, ...] = key(("random", "entropy"), "Strategies that the others are tested against.", ANY_TIME)
    metric: Metric = key("accuracy", "What of eval.metrics is compared.", ANY_TIME)
    level: float = key(0.05, "Chance of a false find over all tests; intervals are at 1 - level.", ANY_TIME, gt=0, lt=1)

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, select in self.strategies.items():
            if name == FIRST:
                raise ValueError(f"strategies: {FIRST!r} is the folder of what all share; take another name")
            if select.from_ is not None:
                raise ValueError(f"strategies: {name}: a file is chosen for one run; leave out from")
        unknown = [name for name in self.references if name not in self.strategies]
        if unknown:
            raise ValueError(f"references: {unknown[0]} is none of the strategies, {', '.join(self.strategies)}")
        return self


class CompareLoop(LoopConfig):
    """Cycles and what is bought in each."""

    balance: bool = key(
        False,
        "Whether the first set is balanced over the classes: it reads labels that have not been paid for. false: it is "
        "random.",
        NEVER,
    )


class CompareConfig(Config):
    """Runs that differ by seed and by what selects. The sections are those of a run; `select` is given per strategy."""

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
        batches = {f"compare.strategies.{name}.batch": each.batch for name, each in self.compare.strategies.items()}
        return super().functions() | {name: batch for name, batch in batches.items() if ":" in batch}

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.compare.seeds)


class ForeignConfig(Root):
    """Scoring a pool at the checkpoints of a directory, and selecting from it."""

    command: ClassVar[str] = "score"

    pool: ForeignPool
    model: ForeignModel
    checkpoints: CheckpointsConfig
    score: ForeignScore = ForeignScore()

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

    def places(self) -> dict[str, str]:
        """See `Root.places`."""
        named = super().places() | {"checkpoints.path": self.checkpoints.path}
        if self.pool.exclude is not None:
            named["pool.exclude"] = self.pool.exclude
        return named


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file of a run and apply `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: no such file, not YAML, an unknown key, or a value out of its bounds.
    """
    return parse(_read(Path(path)), overrides)


def load_foreign(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ForeignConfig:
    """The same for `distal score`."""
    return parse_foreign(_read(Path(path)), overrides)


def load_compare(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> CompareConfig:
    """The same for `distal compare`."""
    return _validated(CompareConfig, _read(Path(path)), overrides).absolute()


def load_any(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config | ForeignConfig:
    """Any kind: one with a section `checkpoints` is for `distal score`, one with `compare` for `distal compare`."""
    tree = _read(Path(path))
    return _validated(_kind(tree), tree, overrides).absolute()


def load_portable(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config | ForeignConfig:
    """Any kind, for a process that works in another directory: a relative path would name something else there.

    Raises:
        ConfigError: as `load`, and for a relative path.
    """
    tree = _read(Path(path))
    given = _validated(_kind(tree), tree, overrides)
    config = given.absolute()  # which refuses what is no path
    for name, place in given.places().items():
        if is_relative(place):
            raise ConfigError(
                f"{name}: {place!r} is relative, and a submitted job works in a scratch folder of its own; give the "
                f"absolute path that every node of the cluster sees ({name}=/...)"
            )
    return config


def _kind(tree: Mapping[str, Any]) -> type[Config] | type[ForeignConfig]:
    return ForeignConfig if "checkpoints" in tree else CompareConfig if "compare" in tree else Config


def _read(file: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"{file}: no such file; `distal init {file}` writes one for `distal run`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a mapping of keys to values was expected")
    return tree


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A `Config` from nested keys and values; raises `ConfigError` with one line."""
    return _validated(Config, tree, overrides).absolute()


def parse_foreign(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> ForeignConfig:
    """A `ForeignConfig` from nested keys and values; raises `ConfigError` with one line."""
    return _validated(ForeignConfig, tree, overrides).absolute()


def _validated(kind: type[AnyRoot], tree: Mapping[str, Any], overrides: Sequence[str]) -> AnyRoot:
    values: dict[str, Any] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name:
            raise ConfigError(f"{override!r}: an override is written key.sub=value")
        try:
            # A pattern such as *.ckpt would be an alias in YAML.
            values[name] = text if text.startswith("*") else yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            raise ConfigError(f"{override!r}: {text!r} is not a valid YAML value") from None
    try:
        return kind.model_validate(_merged(tree, values))
    except ValidationError as error:
        raise ConfigError(_one_line(error, kind)) from None


def check_unchanged(old: Root, new: Root, cycle: int) -> None:
    """Refuse a change that a cycle which has begun cannot take.

    Args:
        old: the resolved configuration of `cycle`.

    Raises:
        RunConflict: naming the key, both values and the first cycle the change may apply to.
    """
    before, after = old.decisive(), new.decisive()
    for name, value in after.items():
        if before[name] != value:
            raise RunConflict(
                f"{name}: {_yaml(before[name])} -> {_yaml(value)}: cycle {cycle} has begun with the old value; the new "
                f"one may apply from cycle {cycle + 1}, when cycle {cycle} is finished; or remove cycles/{cycle:03d} "
                "from the run to do it again, or give another run directory (run=...)"
            )


def documented_keys(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the configuration with its field, depth first: ("train.lr", ...)."""
    for name, field in sorted(model.model_fields.items(), key=lambda item: SECTIONS.get(item[0], 0)):
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from documented_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + (field.alias or name), field


def _changes(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["changes"])


def _value(section: BaseModel, name: str) -> Any:
    value: Any = section
    for part in name.split("."):
        value = getattr(value, f"{part}_" if keyword.iskeyword(part) else part)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Sections as mappings, also inside a mapping."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
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


def _one_line(error: ValidationError, kind: type[Root]) -> str:
    """The first complaint, as: key, the value, what is allowed, what to do."""
    errors = error.errors(include_url=False)
    first = errors[0]
    # A union reports its members as extra path parts ("block_size.int"): keep the parts that are keys.
    keys = [name for name, _ in documented_keys(kind)]
    known = {part for name in keys for part in name.split(".")}
    parts = [str(part) for part in first["loc"]]
    name = ".".join(part for i, part in enumerate(parts) if part in known or i == 0 or part.isdigit())
    if first["type"] == "extra_forbidden":
        *outer, last = parts
        prefix = "".join(f"{part}." for part in outer)
        siblings = {n[len(prefix) :].partition(".")[0] for n in keys if n.startswith(prefix)}
        text = f"unknown key {prefix}{last}; known keys: {', '.join(sorted(prefix + s for s in siblings))}"
        text += "".join(f"; did you mean {prefix}{near}?" for near in get_close_matches(last, sorted(siblings), 1))
    elif first["type"] == "missing" and parts == ["model", "normalize"]:
        text = (
            "model.normalize is missing: these weights were not trained with this pool's statistics; give mean and "
            f"std: model.normalize must be {NORMALIZE_VALUES}"
        )
    elif name == "model.normalize":
        text = f"{name} must be {NORMALIZE_VALUES}, got {first['input']!r}"
    elif first["type"] == "missing":
        text = f"{name} is missing; set it in the file or as {name}=..."
    elif first["type"] == "value_error":
        text = f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
        given = first["input"]
        text += f", got {given!r}" if isinstance(given, str) and repr(given) not in text else ""
    else:
        allowed = " or ".join(
            dict.fromkeys(
                e["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
                for e in errors
                if e["loc"][:2] == first["loc"][:2]
            )
        )
        text = f"{name} must be {allowed}, got {first['input']!r}"
    others = len({e["loc"][:2] for e in errors}) - 1
    return text + (f" (and {others} more)" if others else "")


def _yaml(value: Any) -> str:
    """A value as one would type it in the file."""
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def commented_yaml(run: str = "runs/quickstart") -> str:
    """A configuration file with every key, its default and its description."""
    values = {
        "run": run,
        "pool.path": "pools/fmnist",
        "pool.source": "builtin:fashion-mnist-12k",
        "eval.test": "builtin:fashion-mnist-12k/test",
    }
    lines = ["# One active-learning run: `distal run THIS_FILE`. Paths start at the working directory."]
    section = ""
    for name, field in documented_keys():
        outer, _, last = name.rpartition(".")
        if outer and outer != section:
            lines += ["", f"{outer}:  # {Config.model_fields[outer].annotation.__doc__}"]
            section = outer
        indent = "  " if outer else ""
        lines += [f"{indent}# {line}" for line in _wrapped(field.description or "", 100)]
        lines += [f"{indent}{last}: {_yaml(values.get(name, _default(field)))}"]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The reference of all keys, as kept in docs/config.md."""
    lines = [
        "# Configuration",
        "",
        "Generated by `python -m distal.config > docs/config.md`; a test keeps it current.",
        "",
        "A run is described by one YAML file. Any key can be set on the command line as `key.sub=value`, where",
        "the value is YAML (`train.lr=0.1`, `eval.test=null`, `score.record=[margin, entropy]`). Unknown keys are",
        "refused. Relative paths start at the working directory. `distal init` writes a file with every key.",
        "",
        "*May change* says what a run that exists accepts. **never**: the key is part of what the run is. **next",
        "cycle**: fixed once a cycle has begun, free for the cycles after it. **may move**: the place may change, the",
        "content may not. **any time**: it affects speed or length, or what to put up with, never a result.",
        "`distal score` has one cycle: there **next cycle** is never, but for `select` and `score.budget`, which may",
        "change any time unless `score.eliminate` is `exact`.",
    ]
    lines += _tables(Config)
    lines += ["", "# Scoring a directory of checkpoints", ""]
    lines += ["`distal score` takes a file of these sections; `ray` and `select` are those of a run."]
    lines += _tables(ForeignConfig, leave_out=("ray", "select"))
    lines += ["", "# Comparing strategies", ""]
    lines += ["`distal compare` takes a file of the sections of a run, where `loop.balance` is false by default, and"]
    lines += ["one more:"]
    lines += _tables(CompareConfig, leave_out=[name for name in SECTIONS if name != "compare"])
    return "\n".join(lines) + "\n"


def _tables(kind: type[Root], leave_out: Sequence[str] = ()) -> list[str]:
    lines: list[str] = []
    section = None
    for name, field in documented_keys(kind):
        outer, _, last = name.rpartition(".")
        if outer in leave_out:
            continue
        if outer != section:
            about = kind.model_fields[outer].annotation.__doc__ if outer else kind.__doc__
            lines += ["", f"## {outer or 'Top level'}", "", f"{about}", ""]
            lines += ["| key | values | default | may change | meaning |", "|---|---|---|---|---|"]
            section = outer
        default = "required" if field.is_required() else f"`{_yaml(_default(field))}`"
        cells = [f"`{last}`", _allowed(field), default, _changes(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _default(field: FieldInfo) -> Any:
    return None if field.default is PydanticUndefined else field.default


def _allowed(field: FieldInfo) -> str:
    """The values a field takes, in words, from its annotation and its bounds."""
    return ", ".join(_kinds(field.annotation)) + _bounds(field.metadata)


def _kinds(kind: Any) -> list[str]:
    words = {bool: "`true`, `false`", int: "integer", float: "number", str: "text", type(None): "null"}
    members = get_args(kind)
    if kind is ChannelStats:
        return ["`{mean, std}`"]
    if kind == Function:
        return ["`package.module:function`"]
    if kind in words:
        return [words[kind]]
    if get_origin(kind) is Annotated:
        bounds = [bound for part in kind.__metadata__ for bound in getattr(part, "metadata", ())]
        return [", ".join(_kinds(members[0])) + _bounds(bounds)]
    if get_origin(kind) is dict:
        return ["mapping"]
    if get_origin(kind) is tuple:
        return [f"list of {' or '.join(_kinds(members[0]))}"]
    if get_origin(kind) is Literal:
        return [f"`{member}`" for member in members]
    return [word for member in members for word in _kinds(member)]


def _bounds(metadata: Sequence[object]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        f"{sign} {getattr(bound, name):g}" for bound in metadata for name, sign in signs.items() if hasattr(bound, name)
    ]
    return f" {', '.join(limits)}" if limits else ""


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def to_record(config: Root) -> JsonObject:
    """Plain nested values, as written to `cycle.yaml`."""
    return config.model_dump(mode="json", by_alias=True)


def from_record(record: Mapping[str, Any]) -> Config | ForeignConfig:
    """The inverse of `to_record`."""
    return _kind(record).model_validate(record)
