"""Small values that cross module borders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

_SAMPLES_PER_BLOCK_STEP = 128
MAX_BLOCK_SIZE = 65_536
STRIPE_SAMPLES = 2**20  # processed together in a pass over a pool, at some 100 bytes each


@dataclass(frozen=True, slots=True)
class Block:
    """A half-open range [start, stop) of sample indices: the unit of work, of retry and of a Zarr chunk."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def split_blocks(n_samples: int, block_size: int) -> list[Block]:
    """Cut [0, n_samples) into blocks of `block_size`; the last one may be shorter."""
    return [
        Block(index, start, min(start + block_size, n_samples))
        for index, start in enumerate(range(0, n_samples, block_size))
    ]


def auto_block_size(n_samples: int) -> int:
    """The block size for a pool of `n_samples`: the power-of-two multiple of 128 nearest to n/64.

    It depends on n alone, so every machine cuts a pool alike, and being a power of two it nests: image
    chunks, row groups and assignment chunks always share their borders. Within [128, 65536].
    """
    steps = max(1.0, n_samples / 64 / _SAMPLES_PER_BLOCK_STEP)
    return min(MAX_BLOCK_SIZE, _SAMPLES_PER_BLOCK_STEP * 2 ** round(math.log2(steps)))


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the checkpoints of a cycle.

    Attributes:
        first: leave out the rows before this one, counted from 0.
        last: of those, the last ones: a number of rows, or below 1 a share of them (rounded up). None: all. A share is
            the decimal number that it is written as: 0.55 of 100 rows are 55, although the float is a little more.
        every: of those, every k-th, counted back from the last one, so that it is always in.

    Raises:
        ValueError: a value is out of range.
    """

    first: int = 0
    last: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (("from", self.first, 0), ("every", self.every, 1)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if self.last is not None and not (0 < self.last < 1 or (self.last >= 1 and float(self.last).is_integer())):
            raise ValueError(
                f"last={self.last:g}: must be a whole number of checkpoints, or a share of them above 0 and below 1"
            )

    def rows(self, n_rows: int) -> list[int]:
        """The rows of this window, ascending, when there are `n_rows`."""
        rows = list(range(self.first, n_rows))
        if self.last is not None:
            exact = Fraction(repr(float(self.last)))
            keep = math.ceil(exact * len(rows)) if exact < 1 else int(exact)
            rows = rows[max(0, len(rows) - keep) :]
        return rows[::-1][:: self.every][::-1]

    def __str__(self) -> str:
        """As it stands in the name of an analysis: `@from=10,last=0.25,every=2`; nothing when it leaves nothing out."""
        parts = [
            f"from={self.first}" if self.first else "",
            "" if self.last is None else f"last={float(self.last)!r}".removesuffix(".0"),
            f"every={self.every}" if self.every > 1 else "",
        ]
        named = ",".join(part for part in parts if part)
        return f"@{named}" if named else ""

    @classmethod
    def of_name(cls, name: str) -> tuple[str, Self]:
        """A measure and its window: `dispersion@last=0.5` is `dispersion`, and the later half of the checkpoints.

        Raises:
            ValueError: what stands after the `@` is no window.
        """
        measure, _, named = name.partition("@")
        kinds: dict[str, tuple[str, type[int] | type[float]]]
        kinds = {"from": ("first", int), "last": ("last", float), "every": ("every", int)}
        values: dict[str, Any] = {}
        for part in named.split(",") if named else ():
            key, _, value = part.partition("=")
            if key not in kinds:
                raise ValueError(f"{part!r} is no part of a window; those are from=N, last=N or a share, and every=N")
            field_name, kind = kinds[key]
            if field_name in values:
                raise ValueError(f"{named!r} has {key} twice")
            try:
                values[field_name] = kind(value)
            except ValueError:
                raise ValueError(f"{part!r} is not a {'whole ' if kind is int else ''}number") from None
        return measure, cls(**values)


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """Published weights: their index, their file and its hash.

    Attributes:
        index: `checkpoint_index`; its row in the assignments is this minus the index of the first checkpoint scored.
        epoch: epochs completed when the weights were taken, from 1.
        path: the weights file.
        sha256: of the file's bytes (hex).
        metrics: of the trainer, such as the mean training loss.
        key: where in the file the state_dict is, with dots between nested keys; None: the file is one.
        prefix: what its keys have before those of the network; others are left out.
    """

    index: int
    epoch: int
    path: Path
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)
    key: str | None = None
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a cycle, for a display.

    Attributes:
        stage: the work in progress.
        epoch, epochs: the last epoch a checkpoint was published for, and the number of epochs.
        published, rows_scored: checkpoints published, and scored for every eligible sample.
        images_scored, images: predictions committed so far, and expected in all.
        images_per_s: predictions per second over the last seconds.
        actors, actors_starting: scoring actors at work, and on their way.
        blocks_done, blocks_pending: committed, and still to do, summed over the published checkpoints.
        blocks_retried: given back by actors that were lost or failed.
        eliminated: samples that are not scored any more.
        train_loss: of the newest checkpoint, if its trainer reported one.
    """

    cycle: int
    stage: str
    epoch: int = 0
    epochs: int = 0
    published: int = 0
    rows_scored: int = 0
    images_scored: int = 0
    images: int = 0
    images_per_s: float = 0.0
    actors: int = 0
    actors_starting: int = 0
    blocks_done: int = 0
    blocks_pending: int = 0
    blocks_retried: int = 0
    eliminated: int = 0
    train_loss: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the images of this cycle are scored at the present rate; None when unknown."""
        if not self.images_per_s:
            return None
        return (self.images - self.images_scored) / self.images_per_s


Stage = Literal["train", "score", "test", "reduce", "select", "label"]
JsonObject = dict[str, Any]

OPTIONAL = {"json": "optional"}
"""Metadata of a field that the JSON leaves out when it is None."""

PART = {"json": "part"}
"""Metadata of a field, a `Result`, whose keys the JSON has beside those of its owner; None: none."""


@dataclass(frozen=True)
class Result:
    """Base of the results of commands: frozen dataclasses, with one field for each key of the JSON."""

    def to_record(self) -> JsonObject:
        """The object that `--json` prints."""
        record: dict[str, Any] = {}
        for key in fields(self):
            value, form = getattr(self, key.name), key.metadata.get("json")
            if form == "part":
                record |= value.to_record() if value is not None else {}
            elif value is not None or form != "optional":
                record[key.name] = _plain(value)
        return record


def _plain(value: object) -> object:
    """A value as JSON has it."""
    if isinstance(value, Result):
        return value.to_record()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
