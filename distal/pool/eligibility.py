"""Which samples count: readable, inside `pool.limit`, and neither labelled nor declined when the cycle starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from distal.artifacts.ledger import Ledger
from distal.hashing import mix64
from distal.pool import Pool
from distal.pool.images import OK
from distal.records import STRIPE_SAMPLES, split_blocks


@dataclass(frozen=True)
class Eligibility:
    """A view on the pool and the ledger; nothing of it is kept in memory.

    Attributes:
        largest_draw: samples whose seeded draw is larger are outside `pool.limit`; None: no limit.
        ledger: the labelled samples; None: nothing is labelled yet.
        part: share of the samples, and the cycle that they are drawn for; None: all of them.
    """

    pool: Pool
    seed: int
    largest_draw: int | None
    ledger: Ledger | None = None
    part: tuple[float, int] | None = None

    @classmethod
    def of(cls, pool: Pool, limit: int | None, seed: int) -> Self:
        """The eligible samples while nothing is labelled: the readable ones with the `limit` smallest draws."""
        everything = cls(pool, seed, None)
        if limit is None:
            return everything
        if limit >= pool.n_readable:
            return everything
        smallest = np.empty(0, np.uint64)
        for start, stop, flags in everything.stripes():
            (keys,) = pool.columns(start, stop, "sample_key")
            smallest = np.concatenate([smallest, mix64("limit", seed, keys[flags])])
            if len(smallest) > limit:
                smallest.partition(limit - 1)
                smallest = smallest[:limit]
        return cls(pool, seed, int(smallest.max()))

    def without(self, ledger: Ledger) -> Self:
        """The eligible samples when those of the ledger are labelled."""
        return replace(self, ledger=ledger)

    def within(self, share: float, cycle: int) -> Self:
        """A seeded random part of them, another one in each cycle."""
        return replace(self, part=(share, cycle))

    def read(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the samples [start, stop) are eligible: (stop - start,) bool."""
        samples = self.pool.samples(start, stop, ["status", "sample_key"])
        flags = pc.equal(samples["status"], OK).to_numpy()
        if self.largest_draw is not None:
            draws = mix64("limit", self.seed, samples["sample_key"].to_numpy())
            flags = flags & (draws <= np.uint64(self.largest_draw))
        if self.part is not None:
            share, cycle = self.part
            draws = mix64("subpool", self.seed, cycle, samples["sample_key"].to_numpy())
            flags = flags & (draws < share * 2.0**64)
        if self.ledger is not None:
            flags = flags & ~self.ledger.asked(start, stop)
        return flags

    def stripes(self, n_samples: int = STRIPE_SAMPLES) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
        """(start, stop, flags) over the whole pool, `n_samples` at a time."""
        for stripe in split_blocks(self.pool.n_samples, n_samples):
            yield stripe.start, stripe.stop, self.read(stripe.start, stripe.stop)

    def count(self) -> int:
        """How many samples are eligible."""
        return sum(int(flags.sum()) for _, _, flags in self.stripes())
