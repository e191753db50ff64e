"""Every image of a stranger ends in the pool or in the quarantine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import EpsImagePlugin

from distal.pool import Pool
from distal.pool.decode import Unreadable, decode, pixels
from tests.hostile import images

MAX_PROCESS_GB = 1.0
"""Resident memory of any process while the corpus is packed; Python with what is imported has about 0.3 GB of it."""


def outcome(data: bytes) -> str:
    """What becomes of an image, as its status in the pool."""
    try:
        packed = pixels(decode(data), "grey", (8, 8))
    except Unreadable as error:
        return str(error)
    assert packed.shape == (8, 8, 1)
    return images.READABLE


@pytest.mark.filterwarnings("ignore")  # as while a pool is packed
@pytest.mark.parametrize("name", images.valid())
def test_images_of_every_kind_are_read(name: str) -> None:
    assert outcome(images.valid()[name]) == images.READABLE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", images.bad())
def test_the_others_have_a_short_reason(name: str) -> None:
    data, reason = images.bad()[name]
    found = outcome(data)
    assert found != images.READABLE
    assert re.search(reason, found)
    assert len(found) <= 200
    assert "\n" not in found
    assert outcome(data) == found


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "was here"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    assert EpsImagePlugin.has_ghostscript()
    assert marker.exists(), "so Pillow would start it"
    marker.unlink()
    assert outcome(images.postscript()) == "not an image of a known format"
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_read_or_has_a_reason() -> None:
    """Some bytes flipped, taken out or repeated, at random; the same damage has the same outcome."""
    rng = np.random.default_rng(images.RNG_SEED)
    outcomes: Counter[bool] = Counter()
    for data in images.valid().values():
        for _ in range(40):
            damaged = bytearray(data)
            for where in rng.integers(0, len(data), rng.integers(1, 5)):
                damaged[where] = rng.integers(0, 256)
            start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
            cut = [damaged, damaged[:stop], damaged[:start] + damaged[stop:], damaged[:stop] + damaged[start:]]
            broken = bytes(cut[rng.integers(0, 4)])
            found = outcome(broken)
            assert len(found) <= 200
            assert outcome(broken) == found
            outcomes[found == images.READABLE] += 1
    assert min(outcomes[True], outcomes[False]) > 100


class TestBuild:
    """One command over all of them, with each process watched."""

    def packed(self, cluster: str, source: Path, expected: images.Expected, pool: Path) -> Pool:
        command = [sys.executable, "-m", "distal", "pool", "build", str(source), str(pool), "--size=16x16", "--json"]
        command += ["--channels=grey", "--follow-symlinks", f"--ray-address={cluster}"]
        with Watch() as watch:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        print(f"{source.name}: at most {watch.most / 1e9:.2f} GB resident in a process")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        opened = Pool.open(pool)
        assert json.loads(done.stdout)["n_unreadable"] == sum(what != images.READABLE for what in expected.values())
        rows = opened.samples(0, opened.n_samples, ["sample_id", "status"]).to_pylist()
        assert {row["sample_id"] for row in rows} == set(expected)
        wrong = {
            row["sample_id"]: row["status"]
            for row in rows
            if not re.search(f"^unreadable: .*({expected[row['sample_id']]})|^ok$", row["status"], re.DOTALL)
            or (row["status"] == "ok") != (expected[row["sample_id"]] == images.READABLE)
        }
        assert wrong == {}
        assert watch.most < MAX_PROCESS_GB * 1e9
        return opened

    @pytest.mark.timeout(150)
    def test_a_folder(self, cluster: str, tmp_path: Path) -> None:
        expected = images.write_folder(tmp_path / "in")
        pool = self.packed(cluster, tmp_path / "in", expected, tmp_path / "pool")
        assert pool.read(0, pool.n_samples).any()

    @pytest.mark.timeout(150)
    def test_a_parquet_file(self, cluster: str, tmp_path: Path) -> None:
        expected = images.write_parquet(tmp_path / "in" / "a.parquet")
        self.packed(cluster, tmp_path / "in" / "a.parquet", expected, tmp_path / "pool")


class Watch:
    """The most memory that one process below this one has, looked at again and again."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                self.most = max(self.most, memory.rss - memory.shared)
            time.sleep(0.02)
