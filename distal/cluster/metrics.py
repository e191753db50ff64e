"""The metrics of a run in Prometheus, exported through Ray: every name, with its unit.

Scoring actors count their work, the driver reports the progress of the run. Ray collects both, and every node serves
them at its metrics port. Counters are tagged with run and shard, gauges with the run: one series per actor, never one
per block. `python -m distal.cluster.metrics` prints the table of docs/monitoring.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Literal, Self

from ray.util.metrics import Counter, Gauge

from distal.records import Progress

_EVERY_S = 1.0  # Ray exports every ten seconds by default


@dataclass(frozen=True, eq=False)
class MetricSpec:
    """One metric.

    Attributes:
        name: as registered with Ray; see `exported`.
        kind: counters are those of the actors, gauges those of the driver.
        what: its meaning, in a sentence.
    """

    name: str
    kind: Literal["counter", "gauge"]
    what: str

    @property
    def exported(self) -> str:
        """The name on the page that Prometheus reads: Ray puts its own before it, and `_total` behind a counter."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Its labels, without those Ray adds."""
        return ("run", "shard") if self.kind == "counter" else ("run",)


def _counter(name: str, what: str) -> MetricSpec:
    return MetricSpec(f"distal_{name}", "counter", what)


def _gauge(name: str, what: str) -> MetricSpec:
    return MetricSpec(f"distal_{name}", "gauge", what)


IMAGES_SCORED = _counter("images_scored", "images predicted, once per checkpoint; test images included")
LABELS_WRITTEN = _counter("labels_written", "assignments committed to storage")
FORWARD_SECONDS = _counter("forward_seconds", "seconds of predicting, including loading weights")
READ_SECONDS = _counter("read_seconds", "seconds of reading and decoding images, in parallel with predicting")
WAIT_SECONDS = _counter("wait_seconds", "seconds an actor waited for images")
WRITE_SECONDS = _counter("write_seconds", "seconds of writing assignments")
IDLE_SECONDS = _counter("idle_seconds", "seconds an actor had no task")
READ_BYTES = _counter("read_bytes", "bytes of decoded images read")
WRITTEN_BYTES = _counter("written_bytes", "bytes of assignments and recorded values, before compression")
CACHE_HITS = _counter("cache_hits", "blocks whose images an actor had kept")
CACHE_MISSES = _counter("cache_misses", "blocks whose images it had to read")

CYCLE = _gauge("cycle", "current cycle, counted from 0")
LABELLED = _gauge("labelled_samples", "samples that the network is trained on")
TRAIN_LOSS = _gauge("train_loss", "mean loss of the epoch of the newest checkpoint")
TEST_ACCURACY = _gauge(
    "test_accuracy", "accuracy of the last checkpoint of the last tested cycle, in [0, 1], if it is in eval.metrics"
)
CHECKPOINTS_PUBLISHED = _gauge("checkpoints_published", "checkpoints of the cycle that can be scored")
CHECKPOINTS_SCORED = _gauge("checkpoints_scored", "published checkpoints at which every block is committed")
SCORING_LAG = _gauge("scoring_lag_checkpoints", "checkpoints published and not scored yet")
BLOCKS_DONE = _gauge("blocks_done", "blocks committed, summed over the checkpoints of the cycle")
BLOCKS_PENDING = _gauge("blocks_pending", "blocks of published checkpoints that are not committed")
BLOCKS_RETRIED = _gauge("blocks_retried", "blocks to be done again because an actor was lost or failed, in this cycle")
ELIMINATED = _gauge("eliminated_samples", "samples that can no longer be selected, and are not scored any more")
QUARANTINED = _gauge("quarantined_samples", "unreadable samples of the pool")
ACTORS = _gauge("scoring_actors", "actors that score")
LAST_PROGRESS = _gauge(
    "last_progress_timestamp_seconds",
    "when the driver last saw a checkpoint, a block or a stage completed, in seconds since 1970",
)

METRICS = tuple(value for value in vars().values() if isinstance(value, MetricSpec))


class Meter:
    """Reports the metrics of a run from one process.

    Values are kept here and handed to Ray about once a second, so that an actor may count as often as it likes. Without
    a cluster, or where nobody collects, they go nowhere.

    Ray forgets a gauge that is not set again in every report interval. Inside its context a meter therefore sets all of
    them once a second, also when nothing changes; afterwards they end.

    Args:
        run: name of the run directory.
        shard: which of the actors at work this is; None in the driver.
    """

    def __init__(self, run: str, shard: int | None = None) -> None:
        self._tags = {"run": run} if shard is None else {"run": run, "shard": str(shard)}
        self._counts: dict[MetricSpec, float] = {}
        self._gauges: dict[MetricSpec, float] = {}
        self._seen: tuple[object, ...] = ()
        self._told_at = -_EVERY_S
        self._lock = Lock()  # training reports from its own thread
        self._ended = Event()
        self._thread = Thread(target=self._repeat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self.progressed()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.report(now=True)

    def _repeat(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.report(now=True)

    def add(self, metric: MetricSpec, amount: float) -> None:
        """Count something."""
        with self._lock:
            self._counts[metric] = self._counts.get(metric, 0) + amount

    def set(self, metric: MetricSpec, value: float) -> None:
        """Say what something is from now on."""
        with self._lock:
            self._gauges[metric] = value

    def report(self, *, now: bool = False) -> None:
        """Hand everything to Ray, unless that was done less than a second ago; `now`: also then."""
        if not now and time.monotonic() - self._told_at < _EVERY_S:
            return
        self._told_at = time.monotonic()
        with self._lock:
            counts, self._counts = self._counts, {}
            values = {**self._gauges, **counts}
        for metric, value in values.items():
            instrument = _instrument(metric)
            if isinstance(instrument, Gauge):
                instrument.set(value, tags=self._tags)
            elif value > 0:  # Ray refuses to count nothing
                instrument.inc(value, tags=self._tags)

    def progressed(self) -> None:
        """Note that something was completed just now."""
        self.set(LAST_PROGRESS, time.time())

    def follow(self, state: Progress) -> None:
        """Note whether something was completed since the last call."""
        seen = state.cycle, state.stage, state.published, state.blocks_done, state.images_scored
        if seen != self._seen:
            self._seen = seen
            self.progressed()

    def progress(self, state: Progress) -> None:
        """Say how far the scoring of the pool is."""
        self.set(CYCLE, max(0, state.cycle))
        self.set(CHECKPOINTS_PUBLISHED, state.published)
        self.set(CHECKPOINTS_SCORED, state.rows_scored)
        self.set(SCORING_LAG, state.published - state.rows_scored)
        self.set(BLOCKS_DONE, state.blocks_done)
        self.set(BLOCKS_PENDING, state.blocks_pending)
        self.set(BLOCKS_RETRIED, state.blocks_retried)
        self.set(ELIMINATED, state.eliminated)
        self.set(ACTORS, state.actors)
        if state.train_loss is not None:
            self.set(TRAIN_LOSS, state.train_loss)


@cache
def _instrument(metric: MetricSpec) -> Counter | Gauge:
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.what, metric.tags)


def table() -> str:
    """Every metric as Prometheus sees it: Markdown."""
    rows = [f"| `{metric.exported}` | {', '.join(metric.tags)} | {metric.what} |" for metric in METRICS]
    return "\n".join(["| metric | labels | what |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
