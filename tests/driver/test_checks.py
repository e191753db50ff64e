from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.driver import checks
from distal.pool import Pool
from distal.pool.build import build
from distal.progress import Silent
from distal.storage import read_json, write_json
from tests.helpers import png, small_config


def test_a_pool_is_known_by_its_content(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", pool, test_pool)
    keys = checks.identity_keys(config, pool, {"test": test_pool})
    assert checks.content_key(pool).items() <= keys.items()
    moved = small_config(tmp_path / "elsewhere", test_pool, None)
    assert checks.identity_keys(moved, pool, {"test": test_pool}) == keys
    assert checks.identity_keys(config, test_pool, {"test": test_pool}) != keys


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class TestOverlap:
    """Images to evaluate on that are in the pool as well, against a look at every pair."""

    @pytest.fixture
    def pools(self, cluster: str, tmp_path: Path) -> tuple[Pool, dict[str, Pool]]:
        """300 images of which some are there twice; and two sets that share some with it, with unreadable ones."""
        rng = np.random.default_rng(0)
        images = [png(image) for image in rng.integers(0, 256, (400, 3, 3), dtype=np.uint8)]
        images[290], images[131] = images[5], images[130]
        images[40] = b"unreadable in the pool"
        taken = {"pool": range(300), "test": [310, 5, 130, 40, 299, 350, 5], "val": [350, 399], "own": [130, 290]}
        packed = {}
        for name, which in taken.items():
            table = {"sample_id": [f"{name}-{i}" for i in range(len(which))], "image": [images[i] for i in which]}
            pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
            packed[name] = build(str(tmp_path / f"{name}.parquet"), tmp_path / name)
        return packed.pop("pool"), packed

    def expected(self, pool: Pool, other: Pool) -> list[tuple[int, int]]:
        """Each readable image of `other` that equals one of the pool, with the first that it equals."""
        mine, theirs = pool.read(0, pool.n_samples), other.read(0, other.n_samples)
        (ok_here,), (ok_there,) = (each.columns(0, each.n_samples, "status") for each in (other, pool))
        found = []
        for i in np.flatnonzero(ok_here == "ok"):
            equal = [j for j in np.flatnonzero(ok_there == "ok") if np.array_equal(theirs[i], mine[j])]
            found += [(int(i), int(equal[0]))] if equal else []
        return found

    def test_what_is_in_both_is_found(self, pools: tuple[Pool, dict[str, Pool]]) -> None:
        pool, held_out = pools
        expected = {name: self.expected(pool, other) for name, other in held_out.items()}
        assert {name: len(pairs) for name, pairs in expected.items()} == {"test": 4, "val": 0, "own": 2}
        for _ in range(2):  # the second time from what is kept
            found = checks._find_overlaps(pool, held_out, Silent())
            for name, other in held_out.items():
                assert found[name]["n_shared"] == len(expected[name])
                if expected[name]:
                    here, there = expected[name][0]
                    assert (found[name]["here"], found[name]["there"]) == (
                        other.samples(here, here + 1)["sample_id"][0].as_py(),
                        f"pool-{there}",
                    )
            assert list(found) == list(held_out)

    def test_what_is_kept_is_of_these_images_alone(self, pools: tuple[Pool, dict[str, Pool]]) -> None:
        pool, held_out = pools
        test = held_out["test"]
        checks._find_overlaps(pool, {"test": test}, Silent())
        (kept,) = (test.path / "overlaps").iterdir()
        record = read_json(kept)
        write_json(kept, {**record, "n_shared": 99})
        assert checks._find_overlaps(pool, {"test": test}, Silent())["test"]["n_shared"] == 99
        write_json(kept, {**record, "n_shared": 99, "held_out": "what was packed there before"})
        assert checks._find_overlaps(pool, {"test": test}, Silent())["test"]["n_shared"] == 4
        kept.write_bytes(b"")
        assert checks._find_overlaps(pool, {"test": test}, Silent())["test"]["n_shared"] == 4
        kept.rename(kept.with_name("of another pool.json"))
        assert checks._find_overlaps(pool, {"test": test}, Silent())["test"]["n_shared"] == 4

    def test_of_another_shape_there_is_nothing_to_compare(self, pools: tuple[Pool, dict[str, Pool]]) -> None:
        pool, held_out = pools
        display = Said()
        larger = build(pool.source, pool.path.with_name("larger"), size=(4, 4))
        assert checks._find_overlaps(larger, {"test": held_out["test"]}, display) == {}
        assert display.lines == ["eval.test: images of another shape than those of the pool; none is looked for there"]
