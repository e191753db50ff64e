"""A short campaign in the slow tests; every fault alone, and every kind of run, before a release."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import FAULTS, KINDS, Kind, Lab, Strike, disturb, undisturbed


def check(strikes: list[Strike]) -> None:
    assert len(strikes) >= 2  # one may find nothing to strike
    assert [strike for strike in strikes if not strike.recovered or strike.rewritten] == []


@pytest.mark.slow
def test_a_run_under_fire_ends_with_the_same_answer(tmp_path: Path) -> None:
    with Lab(tmp_path, 1000, cycles=1, rows=5, actors=2) as lab:
        expected, _ = undisturbed(lab, KINDS["plain"])
        faults = ["actor killed", "driver killed", "finished file damaged"]
        check(disturb(lab, 0, faults, KINDS["plain"], expected, seed=3))


@pytest.mark.campaign
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault(tmp_path: Path, fault: str) -> None:
    with Lab(tmp_path, 2000) as lab:
        kind = next(kind for kind in (KINDS["elimination"], KINDS["command"]) if FAULTS[fault].fits(kind))
        expected, _ = undisturbed(lab, kind)
        tried = (disturb(lab, seed, [fault], kind, expected, seed=seed) for seed in range(1, 5))
        strikes = next(found for found in tried if found)  # at first there may be nothing to strike
        assert strikes[0].recovered
        assert not strikes[0].rewritten


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_run(tmp_path: Path, kind: Kind) -> None:
    with Lab(tmp_path, 2000) as lab:
        expected, _ = undisturbed(lab, kind)
        check(disturb(lab, 0, ["actor killed", "driver killed", "finished file damaged"], kind, expected, seed=3))
