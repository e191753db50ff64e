"""The sections of a configuration and their keys: type, default, bounds, meaning, and when each may change."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, Strict, field_validator, model_validator

from distal.config.keys import ANY_TIME, NEVER, PLACE, Section, key
from distal.records import Window

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


def check_measure(measure: str, window: Window) -> None:
    """Raise ValueError when there is no such measure, or it has no window."""
    if measure not in get_args(Measure):
        raise ValueError(f"{measure!r} is unknown; known: {', '.join(get_args(Measure))}")
    if window != Window() and measure not in get_args(VoteMeasure):
        raise ValueError(f"{measure} has no window; a window is for {', '.join(get_args(VoteMeasure))}")


class ChannelStats(Section):
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[Annotated[float, Field(gt=0)], ...]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need one value per channel each, got {len(self.mean)} and {len(self.std)}")
        return self


Function = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
Normalize = Literal["pool", "imagenet"] | ChannelStats | Function
NORMALIZE_VALUES = "imagenet, pool, {mean: [...], std: [...]} with a value per channel, or package.module:function"
NORMALIZE = (
    "Preprocessing, from pixels to the network's input. `pool`: by the mean and standard "
    "deviation of the pool's pixels. `imagenet`: by those of ImageNet. `{mean: [...], "
    "std: [...]}`: by these values per channel, of pixels scaled to [0, 1]. "
    "`package.module:function`: your own, from uint8 (B, C, H, W) to the input."
)


class PoolSource(Section):
    """All images, read-only."""

    path: str = key(..., "Folder of the packed pool.", PLACE)
    source: str | None = key(
        None,
        "Source to pack the pool from if `path` does not exist: a Parquet file or a folder of "
        "them, an image folder, `builtin:fashion-mnist-12k` (10,000 images; `/test` has 2,000 "
        "more), or a dataset that torchvision downloads, such as `torchvision:CIFAR10` or "
        "`torchvision:CIFAR10/test`. An existing pool must have been packed from it. null: the "
        "pool must exist, from any source.",
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


class PoolSection(PoolSource):
    """All images, read-only."""

    classes: tuple[str, ...] | str | None = key(
        None,
        "Class names in the order of their indices, or a text file with one per line. "
        "Required when the pool has no labels; otherwise the pool's classes, optionally "
        "followed by more. A later cycle may append to them. null: the pool's classes.",
    )


class FolderPool(PoolSource):
    """All images, read-only; labels are not needed."""

    exclude: str | None = key(
        None,
        "File of samples already labelled, which are neither scored nor selected: text with a "
        "sample_id per line, or CSV or Parquet with a column `sample_id`. null: none.",
        PLACE,
    )


class RaySection(Section):
    """The Ray cluster."""

    address: str = key(
        "local",
        "`local`: start Ray on this machine, unless RAY_ADDRESS is set. `auto`: join this "
        "machine's cluster. Or `host:port`.",
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
        "`small_cnn` (0.1 M parameters) or `resnet20` (0.3 M), both for small images; a "
        "torchvision classifier such as `resnet18`; or your own function, "
        "`package.module:function`, called with num_classes and image_shape=(C, H, W).",
    )
    args: dict[str, Any] = key({}, "Further arguments of the model, such as `{dropout: 0.2}`.")
    stem: Literal["auto", "small", "standard"] = key(
        "auto",
        "First layers of a torchvision ResNet. small: 3x3 stride 1 and no max-pool. auto: small for images "
        "under 64 pixels.",
    )
    output: Function | None = key(
        None,
        "Your own function, `package.module:function`, from the network's output to logits "
        "(B, classes). null: the output is a tensor of logits, a tuple that starts with them, "
        "or a mapping with `logits`.",
    )


class ModelSection(Architecture):
    """The classifier."""

    weights: str | None = key(
        None,
        "Pretrained weights: a state_dict file, or a name that torchvision knows for this "
        "model (`DEFAULT`, `IMAGENET1K_V1`). A head for other classes is dropped. null: "
        "random weights.",
    )
    normalize: Normalize = key("pool", NORMALIZE)
    num_classes: ClassVar[None] = None


class FolderModel(Architecture):
    """The classifier of the checkpoints. Its preprocessing and number of classes have no default."""

    num_classes: Integer = key(..., "Number of classes that the network predicts.", ge=2)
    normalize: Normalize = key(..., NORMALIZE)
    weights: ClassVar[None] = None


class CheckpointsSection(Section):
    """Checkpoints that another program writes: state_dicts as .pt, .pth or .safetensors, or Lightning's .ckpt."""

    path: str = key(..., "Directory of the checkpoints.", PLACE)
    pattern: str = key("*.pt", "Pattern of the checkpoint files, as in a shell.", NEVER)
    strip_prefix: str | None = key(
        None,
        "Prefix to strip from the keys of the state_dict, such as `model.`; keys without it "
        "are dropped. null: detected if unambiguous.",
        NEVER,
    )
    expect: Count | None = key(None, "Total number of checkpoints. null: unknown.", ANY_TIME)
    idle: float = key(
        600.0, "With --watch: stop waiting after so many seconds without a new checkpoint.", ANY_TIME, gt=0
    )
    key: str | None = key(  # last: here the name means the function above
        None,
        "Location of the state_dict in a file, with dots between nested keys, such as "
        "averaged weights. null: the file is a state_dict, or has one as `state_dict`.",
        NEVER,
    )


class LoopSection(Section):
    """The number of cycles, and the labels of each."""

    cycles: Integer = key(3, "Cycles to run; may grow. The last one selects but does not label.", ANY_TIME, ge=1)
    initial: Count | str = key(
        300,
        "First labelled set: a number of samples, or a CSV or Parquet file with columns "
        "`sample_id` and `label`. A number is balanced over the classes with label.oracle: "
        "pool, and random with files. Groups are taken whole.",
        NEVER,
    )
    budget: Integer = key(300, "Samples to label per cycle.", ge=1)
    balance: bool = key(
        True,
        "Whether a number in `initial` is balanced over the classes, with label.oracle: pool. "
        "This reads labels that have not been paid for. false: random.",
        NEVER,
    )


class TrainSection(Section):
    """DDP training on the labelled samples."""

    command: str | None = key(
        None,
        "Your own training command. It reads `{labels}`, a Parquet file, and publishes to "
        "`{checkpoints}` with distal.publish_checkpoint; `{images}` is a folder with the "
        "labelled images; `{epochs}`, `{seed}` and `{cycle}` are numbers. It must publish "
        "exactly the checkpoints that epochs and checkpoint_every ask for. Of the keys below, "
        "only these two, workers and threads apply. null: distal trains.",
    )
    epochs: Integer = key(15, "Passes over the labelled samples.", ge=1, le=100_000)
    checkpoint_every: Integer = key(1, "Epochs between checkpoints; the last epoch always publishes one.", ge=1)
    batch_size: Integer = key(64, "Images per optimizer step, summed over ranks.", ge=1)
    lr: float = key(0.05, "Initial learning rate of SGD.", gt=0)
    momentum: float = key(0.9, "Nesterov momentum of SGD.", gt=0, lt=1)
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
        "scratch", "Initial weights of a cycle: new ones, or the last checkpoint of the previous cycle."
    )
    workers: Integer = key(
        1, "DDP ranks (gloo on CPU, NCCL on GPU). Affects results, because gradients are summed in another order.", ge=1
    )
    threads: Count | Auto = key(
        "auto",
        "CPU threads per rank. auto: half of the CPUs divided by the ranks, or all CPUs of nodes that only train.",
    )
    max_failures: Integer = key(
        3,
        "Consecutive failures of ranks without a finished epoch, after which the run stops.",
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
        """The epochs (from 1) that publish a checkpoint, in order: entry t has `checkpoint_index` t."""
        epochs = range(1, self.epochs + 1)
        return [e for e in epochs if e % self.checkpoint_every == 0 or e == self.epochs]


class Scoring(Section):
    """Predicting the class of every eligible sample at every checkpoint."""

    actors: Count | Auto = key(
        "auto",
        "Number of scoring actors. auto: one per free CPU slot, or per GPU. If there are too "
        "few slots and nodes are labelled for scoring, the autoscaler is asked for more "
        "nodes.",
        ANY_TIME,
    )
    precision: Literal["auto", "fp32", "bf16"] = key(
        "auto", "Arithmetic of the forward pass. auto: bf16 where the processor supports it in hardware."
    )
    batch_size: Count | Auto = key("auto", "Images per forward pass. auto: the fastest of a few, measured once.")
    record: tuple[Recorded, ...] = key(
        ("margin",),
        "Values stored beside the assignments: margin p1 - p2, entropy in nats and "
        "least_confidence 1 - p1 as float16; the probabilities of all classes as float32.",
    )
    record_rows: Literal["last", "all"] = key("last", "Checkpoints at which these values are stored.")
    mixed_hardware: Literal["refuse", "allow"] = key(
        "refuse",
        "Actors on another kind of processor, or with another torch, than the cycle began "
        "with: refuse them, or let them score, which can flip the predicted class of near-ties.",
        ANY_TIME,
    )
    cache_gb: float = key(1.0, "Memory in which one actor keeps decoded images, in GiB (2^30 bytes).", ANY_TIME, ge=0)
    stuck_after: float = key(
        600.0, "Seconds without a finished batch after which a scoring actor is replaced.", ANY_TIME, gt=0
    )
    eliminate: Literal["none", "exact"] = key(
        "none",
        "exact: from half of the checkpoints on, omit samples that can no longer be selected. "
        "The selection stays the same; only for measure: dispersion.",
    )


class ScoreSection(Scoring):
    """Predicting the class of every eligible sample at the checkpoints of a cycle."""

    checkpoints: Literal["needed", "all"] = key(
        "needed",
        "Checkpoints to score. needed: only what the selection reads: all for dispersion, "
        "the last one for margin, none for random. all: the whole trajectory.",
    )
    transform: Literal["clean", "train"] = key(
        "clean",
        "Images to predict. clean: unchanged. train: as train.augment changes them, anew at "
        "each checkpoint; dispersion_authors is defined on these.",
    )


class FolderScore(Scoring):
    """Predicting the class of every eligible sample at every checkpoint, and how many to select."""

    budget: Count = key(1000, "Samples to select.")


class EvalSection(Section):
    """Evaluation of the last checkpoint of each cycle. No decision of distal depends on it."""

    test: str | None = key(
        None,
        "Images and labels to test on: a packed pool, or a source, which is then packed beside the pool as "
        "`<path>-test`. Classes are matched by name. null: no test.",
        PLACE,
    )
    val: str | None = key(
        None,
        "Validation set, for your own decisions: given in the same way, packed as "
        "`<path>-val`. Its labels are part of the price. null: none.",
        PLACE,
    )
    metrics: tuple[Metric, ...] = key(
        ("accuracy",),
        "Metrics of both sets. balanced_accuracy, macro_f1: mean recall and mean F1 over the "
        "classes among the labels; auroc: mean over all classes of the area under the ROC "
        "curve, one class against the rest; ece: expected calibration error in 15 equal bins "
        "of confidence. An undefined metric is null, with the reason.",
    )
    allow_overlap: bool = key(
        False, "Accept test or validation images that are also in the pool, pixel by pixel.", ANY_TIME
    )

    @field_validator("metrics")
    @classmethod
    def _some(cls, value: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if not value:
            raise ValueError(f"name at least one of {', '.join(get_args(Metric))}")
        return value


class SelectSection(Section):
    """Which samples to label next."""

    from_: str | None = key(
        None,
        "File of samples chosen elsewhere: text with a sample_id per line, or CSV or Parquet "
        "with a column `sample_id`. They are the batch, in this order; nothing is scored. "
        "null: distal selects.",
        alias="from",
    )
    measure: str = key(
        "dispersion",
        f"Measure to rank by; larger is always more uncertain. One of {', '.join(get_args(Measure))}. "
        "Measures of several checkpoints also take a window, such as `dispersion@last=0.5`, "
        "`@from=10` or `@every=2`.",
    )
    tie_break: Literal["margin", "hash"] = key(
        "margin",
        "Order of equal scores: margin of the last checkpoint, then a seeded hash; or the hash alone.",
    )
    subpool: float | None = key(
        None,
        "Fraction of the eligible samples, drawn anew in every cycle, to score and select from. null: all.",
        gt=0,
        lt=1,
    )
    batch: Literal["top_k", "power", "k_center"] | Function = key(
        "top_k",
        "Rule that composes a batch. top_k: the largest scores. power: drawn without "
        "replacement, a sample with score s in proportion to s^beta. k_center: greedily, the "
        "candidate farthest from those chosen so far, in the space of the inputs to the last "
        "linear layer. Or your own strategy, `package.module:Class`, among the candidates.",
    )
    beta: float = key(1.0, "With power: the exponent; a larger one is closer to top_k.", gt=0)
    candidate_factor: float = key(
        10.0,
        "With k_center or your own strategy: candidates, those with the largest scores, per sample of the batch.",
        ge=1,
    )
    max_per_group: Count | None = key(
        None, "Maximum number of samples in a batch with the same `group_id` (a patient, a product). null: no limit."
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


class LabelSection(Section):
    """The oracle: who gives the labels."""

    oracle: Literal["pool", "files"] = key(
        "pool",
        "Source of labels. pool: the pool's own labels (experiments). files: people, by "
        "`distal labels export` and `import`; `distal run` ends when a batch waits for "
        "labels, and resumes after the import.",
    )
    min_labels: Count | None = key(
        None,
        "With files: number of answers to a batch after which the next cycle may start. null: the whole batch.",
        ANY_TIME,
    )
    conflict: Literal["majority", "first", "reask"] = key(
        "majority",
        "When annotators disagree: the label of most of them (a tie is asked again), that of "
        "the first one, or ask again.",
    )


class CompareSection(Section):
    """The strategies to compare, and the number of seeds of each."""

    strategies: dict[Annotated[str, Field(pattern=r"^[\w.@=+-]+$")], SelectSection] = key(
        ...,
        "Name of each strategy and its keys of the section `select`, as `entropy: {measure: entropy}`. A name is "
        "letters, digits and `_.@=+-`.",
        min_length=2,
    )
    seeds: Count = key(10, "Number of seeds, from `seed` on. A seed decides first set, weights and order.", ANY_TIME)
    references: tuple[str, ...] = key(("random", "entropy"), "Strategies that the others are tested against.", ANY_TIME)
    metric: Metric = key("accuracy", "Metric to compare, of eval.metrics.", ANY_TIME)
    level: float = key(
        0.05, "Probability of a false positive over all tests; intervals are at 1 - level.", ANY_TIME, gt=0, lt=1
    )

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


class CompareLoop(LoopSection):
    """The number of cycles, and the labels of each."""

    balance: bool = key(
        False,
        "Whether the first set is balanced over the classes: it reads labels that have not been paid for. false: it is "
        "random.",
        NEVER,
    )
