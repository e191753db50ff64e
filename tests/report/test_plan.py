from __future__ import annotations

from pathlib import Path

import pytest

from distal import machine
from distal.config import load_any
from distal.errors import PoolError
from distal.pool import Pool
from distal.reduce.stream import stripe_bytes
from distal.report.plan import PROCESS_BYTES, plan
from tests.helpers import foreign_config, small_config, write_checkpoints

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_run_of_the_small_pool(pool: Pool, tmp_path: Path) -> None:
    """240 samples, 238 readable, 24 labelled first; four blocks, three checkpoints."""
    planned = plan(small_config(tmp_path / "run", pool, None))
    assert (planned.candidates, planned.checkpoints, planned.blocks) == (214, 3, 4)
    assert planned.forwards == 3 * 214
    assert planned.objects["assignments"] == 12
    assert planned.objects["recorded"] == 4
    assert planned.disk_bytes["assignments"] == 3 * 240
    assert planned.disk_bytes["total"] == sum(v for k, v in planned.disk_bytes.items() if k != "total")
    assert set(planned.memory_bytes) == {"driver", "scoring actor", "reducer", "training rank"}
    assert [way.forwards for way in planned.alternatives] == [2 * 214, 3 * 107, 475]
    assert planned.warnings == []
    exact = plan(small_config(tmp_path / "run", pool, None, "score.eliminate=exact"))
    assert (exact.forwards, exact.objects["scores"]) == (475, 4)


def test_a_pool_that_is_not_packed_yet() -> None:
    planned = plan(load_any(CONFIGS / "quickstart.yaml", ["pool.path=/no/such/pool"]))
    assert (planned.samples, planned.candidates, planned.forwards) == (10_000, 9_700, 15 * 9_700)


def test_a_directory_of_checkpoints(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"has no file \*.pt yet; set checkpoints.expect to plan"):
        plan(foreign_config(tmp_path / "run", pool, tmp_path / "ck"))
    write_checkpoints(tmp_path / "ck", pool, range(4))
    assert plan(foreign_config(tmp_path / "run", pool, tmp_path / "ck")).forwards == 4 * 238
    (tmp_path / "labelled.txt").write_text("a\nb\n")
    excluding = foreign_config(tmp_path / "run", pool, tmp_path / "ck", f"pool.exclude={tmp_path / 'labelled.txt'}")
    assert plan(excluding).forwards == 4 * 236
    many = foreign_config(tmp_path / "run", pool, tmp_path / "ck", "checkpoints.expect=50000", "score.budget=500")
    warnings = plan(many).warnings
    assert warnings[0].startswith("200,")
    assert "more than 100,000" in warnings[0]
    assert "the budget of 500 is more than the 238 candidates" in warnings[1]


def test_nothing_is_cheaper_where_nothing_can_be_selected(pool: Pool, tmp_path: Path) -> None:
    told = plan(small_config(tmp_path / "run", pool, None, "loop.budget=5000"))
    assert told.alternatives == []
    assert any("budget of 5,000 is more than" in warning for warning in told.warnings)


def test_memory_counts_what_is_recorded_and_every_thread(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities of 4 classes take 16 bytes for each row of a hand-out until the block of 64 is committed."""
    memory = {}
    for rows in ("last", "all"):
        config = small_config(
            tmp_path / "run", pool, None, "score.record=[probabilities, margin]", f"score.record_rows={rows}"
        )
        memory[rows] = plan(config).memory_bytes["scoring actor"]
    assert memory["all"] - memory["last"] == 2 * (16 + 2) * 64
    monkeypatch.setattr(machine, "cpus", lambda: 1)
    one = plan(small_config(tmp_path / "run", pool, None)).memory_bytes["reducer"]
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    eight = plan(small_config(tmp_path / "run", pool, None)).memory_bytes["reducer"]
    stripe = stripe_bytes(3, 1, 240)
    assert (one, eight) == (PROCESS_BYTES // 2 + stripe, PROCESS_BYTES // 2 + 8 * stripe)


def test_the_driver_holds_eight_bytes_a_sample_also_while_it_packs() -> None:
    planned = plan(load_any(CONFIGS / "quickstart.yaml", ["pool.path=/no/such/pool"]))
    assert planned.memory_bytes["driver"] == PROCESS_BYTES + 8 * 10_000
