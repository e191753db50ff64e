from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import zarr

from distal.errors import Damage, DistalError, PoolError, SourceError
from distal.hashing import sample_key
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.decode import Unreadable, decode
from distal.pool.images import parts
from distal.pool.pack import ImageLayout, _chunk_size
from distal.pool.rows import Row
from distal.pool.sources import open_source
from distal.processes import this_process
from distal.records import Block
from distal.storage import write_json
from tests.helpers import CLASSES, SIDE, png, write_source


def expected_images(source: Path) -> np.ndarray:
    """(n, 1, H, W) decoded one by one; zero where unreadable."""
    rows = pq.read_table(source)["image"].to_pylist()
    images = np.zeros((len(rows), 1, SIDE, SIDE), dtype=np.uint8)
    for image, data in zip(images, rows, strict=True):
        try:
            image[0] = np.asarray(decode(data))
        except Unreadable:
            continue
    return images


def test_images_come_back_as_they_were(pool: Pool, source: Path) -> None:
    expected = expected_images(source)
    assert pool.image_shape == (1, SIDE, SIDE)
    assert np.array_equal(pool.read(0, 240), expected)
    assert np.array_equal(pool.read(100, 131), expected[100:131])
    assert pool.read(5, 5).shape == (0, 1, SIDE, SIDE)
    order = np.array([239, 0, 128, 127, 0, 55])
    assert np.array_equal(pool.take(order), expected[order])
    assert pool.take([]).shape == (0, 1, SIDE, SIDE)


@pytest.mark.parametrize("bad", [(-1, 3), (0, 241), (5, 3)])
def test_ranges_outside_the_pool(pool: Pool, bad: tuple[int, int]) -> None:
    with pytest.raises(IndexError):
        pool.read(*bad)
    with pytest.raises(IndexError):
        pool.take([240])


def test_samples_say_what_each_image_is(pool: Pool, source: Path) -> None:
    given = pq.read_table(source)
    samples = pool.samples(0, 240)
    assert samples["sample_index"].to_pylist() == list(range(240))
    assert samples["sample_id"].to_pylist() == given["sample_id"].to_pylist()
    assert samples["sample_key"][3].as_py() == sample_key("s1-00003")
    assert samples["label"].to_pylist() == given["label"].to_pylist()
    assert samples["uri"][150].as_py() == f"{source}#row=150"
    statuses = samples["status"].to_pylist()
    assert [i for i, status in enumerate(statuses) if status != "ok"] == [7, 201]
    assert statuses[201] == "unreadable: not an image of a known format"
    assert samples.slice(130, 20).equals(pool.samples(130, 150))
    assert pool.take_samples([200, 3, 130])["sample_id"].to_pylist() == ["s1-00200", "s1-00003", "s1-00130"]
    assert pool.take_samples([]).num_rows == 0


def test_statistics_are_those_of_the_readable_pixels(pool: Pool, source: Path) -> None:
    readable = np.delete(expected_images(source), [7, 201], axis=0) / 255
    assert pool.mean == pytest.approx([readable.mean()], abs=1e-12)
    assert pool.std == pytest.approx([readable.std()], abs=1e-12)
    assert (pool.n_unreadable, pool.n_labeled, pool.classes) == (2, 238, CLASSES)
    assert pool.describe().unreadable == [f"s1-{i:05} (not an image of a known format)" for i in (7, 201)]


def test_layout_on_disk(pool: Pool) -> None:
    array = zarr.open_array(pool.path / "images.zarr", mode="r")
    assert (array.shape, array.dtype, array.chunks) == ((240, SIDE, SIDE, 1), np.uint8, (128, SIDE, SIDE, 1))
    assert sorted(path.name for path in pool.path.iterdir()) == ["images.zarr", "pool.json", "samples.parquet"]


def test_building_again_gives_the_same_pool(pool: Pool, source: Path, tmp_path: Path) -> None:
    again = build(str(source), tmp_path / "again")
    assert again.content_sha256 == pool.content_sha256
    assert replace(again.describe(), path=pool.path) == pool.describe()
    copy = pickle.loads(pickle.dumps(again))
    assert np.array_equal(copy.read(0, 3), pool.read(0, 3))


def test_another_pixel_or_label_is_another_pool(cluster: str, pool: Pool, tmp_path: Path) -> None:
    one = build(str(write_source(tmp_path / "a.parquet", 20, seed=5)), tmp_path / "one")
    table = pq.read_table(tmp_path / "a.parquet")
    labels = table["label"].to_pylist()
    swapped = table.set_column(2, "label", pa.array([labels[1], labels[0], *labels[2:]]))
    assert labels[0] != labels[1]
    names = [CLASSES[label] for label in swapped["label"].to_pylist()]
    pq.write_table(swapped.set_column(3, "class_name", pa.array(names)), tmp_path / "b.parquet")
    assert build(str(tmp_path / "b.parquet"), tmp_path / "two").content_sha256 != one.content_sha256


def test_colour_images_of_several_sizes(cluster: str, tmp_path: Path) -> None:
    for i, side in enumerate([8, 8, 10]):
        name = tmp_path / "in" / f"{'ab'[i % 2]}/{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(png(np.full((side, side, 3), 10 * i, dtype=np.uint8)))
    with pytest.raises(SourceError, match="b/1.png is 8x8|is 10x10 pixels and the first image 8x8; .* --size 8x8"):
        build(str(tmp_path / "in"), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()
    pool = build(str(tmp_path / "in"), tmp_path / "pool", size=(6, 4))
    assert pool.image_shape == (3, 6, 4)
    assert pool.classes == ("a", "b")
    assert pool.read(2, 3).max() == 10


def test_a_colour_image_after_grey_ones_stops_the_build_until_it_is_said_what_to_do(
    cluster: str, tmp_path: Path
) -> None:
    """The first 128 images are grey: taking the colour out of the 131st unasked would be silent damage."""
    images = [png(np.zeros((4, 4), dtype=np.uint8))] * 130 + [png(np.full((4, 4, 3), 200, dtype=np.uint8))]
    pq.write_table(pa.table({"sample_id": [str(i) for i in range(131)], "image": images}), tmp_path / "a.parquet")
    message = r"130 is in colour and the first images are grey; .* --channels rgb \(or grey\)"
    with pytest.raises(SourceError, match=message):
        build(str(tmp_path / "a.parquet"), tmp_path / "auto")
    assert not (tmp_path / "auto").exists()
    for channels, n_channels in (("rgb", 3), ("grey", 1)):
        pool = build(str(tmp_path / "a.parquet"), tmp_path / channels, channels=channels)
        assert (pool.n_unreadable, pool.image_shape) == (0, (n_channels, 4, 4))
        assert np.all(pool.read(130, 131) == 200)


def test_no_readable_image(cluster: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a", "b"], "image": [b"x", None]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="none of its 2 images can be decoded"):
        build(str(tmp_path / "a.parquet"), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


class TestRoom:
    """A build makes a folder of its own, and removes nothing that it did not make."""

    def refused(self, source: Path, dest: Path, message: str) -> None:
        before = {path: path.read_bytes() for path in dest.parent.rglob("*") if path.is_file()}
        with pytest.raises(PoolError, match=message):
            build(str(source), dest)
        assert {path: path.read_bytes() for path in dest.parent.rglob("*") if path.is_file()} == before

    def test_a_pool(self, cluster: str, pool: Pool, source: Path) -> None:
        self.refused(source, pool.path, "there is a pool already")

    @pytest.mark.parametrize("name", ["notes.txt", ".hidden", "samples.parquet", "images.zarr"])
    def test_a_folder_that_holds_something(self, cluster: str, source: Path, tmp_path: Path, name: str) -> None:
        (tmp_path / "dest").mkdir()
        (tmp_path / "dest" / name).write_text("dear to someone")
        self.refused(source, tmp_path / "dest", rf"not an empty folder \(it holds {name}\)")

    def test_the_source_itself(self, cluster: str, tmp_path: Path) -> None:
        """`distal pool build data data` and `distal pool build data/samples.parquet data`."""
        (tmp_path / "data").mkdir()
        path = write_source(tmp_path / "data" / "samples.parquet", 20, seed=5)
        self.refused(path, tmp_path / "data", "not an empty folder")
        self.refused(tmp_path / "data", tmp_path / "data", "not an empty folder")

    def test_a_file(self, cluster: str, source: Path, tmp_path: Path) -> None:
        (tmp_path / "dest").write_text("dear to someone")
        self.refused(source, tmp_path / "dest", "dest: a file; the pool needs a folder of its own")

    def test_an_interrupted_build_with_something_of_the_users(self, cluster: str, source: Path, tmp_path: Path) -> None:
        interrupted(source, tmp_path / "dest")
        (tmp_path / "dest" / "notes.txt").write_text("dear to someone")
        self.refused(source, tmp_path / "dest", r"not an empty folder \(it holds notes.txt\)")

    def test_an_interrupted_build_is_no_pool_and_is_started_over(
        self, cluster: str, pool: Pool, source: Path, tmp_path: Path
    ) -> None:
        dest = interrupted(source, tmp_path / "pool")
        with pytest.raises(PoolError, match="the build of this pool was interrupted; run `distal pool build SOURCE"):
            Pool.open(dest)
        assert build(str(source), dest).content_sha256 == pool.content_sha256
        assert sorted(path.name for path in dest.iterdir()) == ["images.zarr", "pool.json", "samples.parquet"]

    def test_a_build_that_is_at_work_is_not_interrupted(self, cluster: str, source: Path, tmp_path: Path) -> None:
        dest = tmp_path / "pool"
        write_json(dest / "building.json", asdict(this_process()))
        self.refused(source, dest, f"process {os.getpid()} on .* is packing this pool; wait until it is done")

    @pytest.mark.parametrize(
        "other",
        [
            replace(this_process(), host="another host", pid=1),
            replace(this_process(), machine="another boot"),
            {"host": this_process().host, "pid": os.getpid()},  # written by nobody that is known
        ],
    )
    def test_one_that_cannot_be_seen_is_at_work_while_there_are_signs_of_it(
        self, cluster: str, source: Path, tmp_path: Path, other: object
    ) -> None:
        dest = tmp_path / "pool"
        write_json(dest / "building.json", other if isinstance(other, dict) else asdict(other))
        self.refused(source, dest, "process .* is packing this pool")
        long_ago = time.time() - 3600
        os.utime(dest / "building.json", (long_ago, long_ago))
        assert build(str(source), dest).n_samples == 240

    def test_another_process_with_the_same_id_is_not_at_work(self, cluster: str, source: Path, tmp_path: Path) -> None:
        """Process ids are used again: this one was another's when the build was interrupted."""
        me = this_process()
        write_json(tmp_path / "pool" / "building.json", asdict(replace(me, started=me.started - 100)))
        assert build(str(source), tmp_path / "pool").n_samples == 240

    def test_a_lost_record_is_not_an_interrupted_build(self, cluster: str, source: Path, tmp_path: Path) -> None:
        """Days of packing are not thrown away because one small file is missing."""
        build(str(source), tmp_path / "pool")
        (tmp_path / "pool" / "pool.json").unlink()
        self.refused(source, tmp_path / "pool", "not an empty folder")


def interrupted(source: Path, dest: Path) -> Path:
    """A build that gets SIGKILL when its first chunk is there."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "distal", "pool", "build", str(source), str(dest), f"--ray-address={address}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not any(dest.glob("images.zarr/c/*/0/0/0")):
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert not (dest / "pool.json").exists(), "the build was quicker than the kill"
    time.sleep(1)  # until its tasks have ended, too
    return dest


@pytest.mark.parametrize("sizes", [[2000], [100] * 20, [777, 777, 446], [1] * 3 + [1997]])
def test_a_pool_does_not_depend_on_how_its_source_is_cut(cluster: str, tmp_path: Path, sizes: list[int]) -> None:
    """Nor on how many threads decode it: `2000` and `1997` are one task, with as many as a node has."""
    path = write_source(tmp_path / "whole.parquet", 2000, seed=5)
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[3], images[1501] = b"no image", images[1501][:50]
    table = table.set_column(1, "image", pa.array(images))
    with pq.ParquetWriter(tmp_path / "cut.parquet", table.schema) as writer:
        for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
            writer.write_table(table.slice(start, size), row_group_size=size)
    pool = build(str(tmp_path / "cut.parquet"), tmp_path / "pool")
    assert pool.content_sha256 == CONTENT_SHA256
    assert pool.chunk_size == 128
    assert np.array_equal(pool.read(0, 2000), expected_images(tmp_path / "cut.parquet"))
    assert pool.samples(0, 2000)["sample_id"].to_pylist() == table["sample_id"].to_pylist()


CONTENT_SHA256 = "ee86e997319ed4f412d03c3eb6c5e28d8a539fcabb7527163a50cb94134667f5"
"""Of those 2000 images, when each block was a task of its own that read whole row groups."""


def test_two_tasks_never_write_to_one_chunk() -> None:
    """Of very small images a chunk of 16 MiB would hold more samples than a task packs."""
    for n_samples in (100, 10_000, 600_000, 5_000_000):
        for side in (1, 16, 28, 224):
            layout = ImageLayout((side, side), "grey", resize=False, recolour=False)
            chunk = _chunk_size(n_samples, layout)
            assert all(part.start % chunk == 0 for part in parts(n_samples))
            assert chunk * side * side <= 16 * 2**20


class Deadly:
    """A source at whose sample 300 the process that reads it dies, until it has died often enough."""

    classes = None

    def __init__(self, deaths: Path, n_deaths: int) -> None:
        self.deaths, self.n_deaths = deaths, n_deaths

    def __len__(self) -> int:
        return 600

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for i in range(start, stop):
            if i == 300 and len(list(self.deaths.iterdir())) < self.n_deaths:
                (self.deaths / str(time.time_ns())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield Row(str(i), str(i), png(np.full((2, 2), i % 256, dtype=np.uint8)))

    def part(self, start: int, stop: int) -> Deadly:
        return self

    def ranges(self, blocks: list[Block]) -> list[list[Block]]:
        return [blocks[:1], blocks[1:4], blocks[4:]]


@pytest.mark.parametrize(("n_deaths", "survives"), [(1, True), (4, True), (99, False)])
def test_a_task_that_dies_again_and_again_is_tried_alone(
    cluster: str, tmp_path: Path, n_deaths: int, survives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tries beside others, and three alone."""
    (tmp_path / "deaths").mkdir()
    monkeypatch.setattr("distal.pool.build.open_source", lambda *_, **__: Deadly(tmp_path / "deaths", n_deaths))
    monkeypatch.setattr("distal.pool.build.learn_layout", lambda *_: ImageLayout((2, 2), "grey", False, False))
    if survives:
        pool = build("deadly", tmp_path / "pool")
        assert pool.read(0, 600)[:, 0, 0, 0].tolist() == [i % 256 for i in range(600)]
        assert len(list((tmp_path / "deaths").iterdir())) == n_deaths
    else:
        with pytest.raises(
            DistalError, match=r"packs samples \[256, 384\) of the source died again and again"
        ) as caught:
            build("deadly", tmp_path / "pool")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "pool").exists()


def test_no_pool(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="no such pool; make it with `distal pool build SOURCE"):
        Pool.open(tmp_path / "missing")


def test_a_missing_or_damaged_chunk_is_not_read_as_black(cluster: str, tmp_path: Path) -> None:
    pool = build(str(write_source(tmp_path / "a.parquet", 200, seed=5)), tmp_path / "pool")
    first, second = (pool.path / f"images.zarr/c/{i}/0/0/0" for i in range(2))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.unlink()
    with pytest.raises(Damage, match="images.zarr: block 0 does not decode"):
        pool.read(0, 10)
    with pytest.raises(Damage, match="images.zarr: block 1 is missing"):
        pool.read(128, 130)
    with pytest.raises(Damage, match="images.zarr: block 1 is missing"):
        pool.take([150])


def test_the_length_of_a_source_is_that_of_its_pool(pool: Pool, source: Path) -> None:
    assert len(open_source(str(source))) == pool.n_samples


def test_threads_may_share_a_pool(pool: Pool) -> None:
    """One ParquetFile in two threads at a time gave wrong bytes, errors, or hung."""
    names = pool.samples(0, pool.n_samples, ["sample_id"])["sample_id"].to_pylist()

    def read(thread: int) -> None:
        for start in range(thread, pool.n_samples - 8):
            column = ("sample_id", "status")[start % 2]
            told = pool.samples(start, start + 8, [column])[column].to_pylist()
            assert column == "status" or told == names[start : start + 8]
            last = pool.n_samples - 1 - start
            assert pool.take_samples([last, start], ["sample_id"])["sample_id"].to_pylist() == [
                names[last],
                names[start],
            ]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
