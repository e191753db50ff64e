from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from distal.errors import Damage, PoolError, SourceError
from distal.hashing import sample_key
from distal.pool import Pool
from distal.pool.build import build
from distal.pool.decode import Unreadable, decode
from distal.pool.sources import open_source
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


def test_layout_on_disk(pool: Pool) -> None:
    array = zarr.open_array(pool.path / "images.zarr", mode="r")
    assert (array.shape, array.dtype, array.chunks) == ((240, SIDE, SIDE, 1), np.uint8, (128, SIDE, SIDE, 1))
    assert sorted(path.name for path in pool.path.iterdir()) == ["images.zarr", "pool.json", "samples.parquet"]


def test_building_again_gives_the_same_pool(pool: Pool, source: Path, tmp_path: Path) -> None:
    again = build(str(source), tmp_path / "again")
    assert again.content_sha256 == pool.content_sha256
    assert again.describe() | {"path": ""} == pool.describe() | {"path": ""}
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


def test_a_colour_image_after_grey_ones_is_quarantined(cluster: str, tmp_path: Path) -> None:
    images = [png(np.zeros((4, 4), dtype=np.uint8))] * 130 + [png(np.zeros((4, 4, 3), dtype=np.uint8))]
    pq.write_table(pa.table({"sample_id": [str(i) for i in range(131)], "image": images}), tmp_path / "a.parquet")
    pool = build(str(tmp_path / "a.parquet"), tmp_path / "grey")
    assert pool.samples(130, 131)["status"].to_pylist() == [
        "unreadable: a colour image in a grey pool; build with --channels rgb"
    ]
    assert build(str(tmp_path / "a.parquet"), tmp_path / "rgb", channels="rgb").n_unreadable == 0


def test_no_readable_image(cluster: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a", "b"], "image": [b"x", None]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="none of its 2 images can be decoded"):
        build(str(tmp_path / "a.parquet"), tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_folders_that_are_not_free(cluster: str, pool: Pool, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="there is a pool already"):
        build(str(source), pool.path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PoolError, match=r"not an empty folder \(it holds notes.txt\)"):
        build(str(source), tmp_path)


def test_an_interrupted_build_is_no_pool_and_is_started_over(cluster: str, tmp_path: Path) -> None:
    path = str(write_source(tmp_path / "a.parquet", 20, seed=5))
    build(path, tmp_path / "pool")
    (tmp_path / "pool" / "pool.json").unlink()
    with pytest.raises(PoolError, match="the build of this pool was interrupted; run `distal pool build SOURCE"):
        Pool.open(tmp_path / "pool")
    assert build(path, tmp_path / "pool").n_samples == 20


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
    with pytest.raises(Damage, match=r"samples \[0, 10\) cannot be read"):
        pool.read(0, 10)
    with pytest.raises(Damage, match="chunk 1 is missing"):
        pool.read(128, 130)
    with pytest.raises(Damage, match="chunk 1 is missing"):
        pool.take([150])


def test_the_length_of_a_source_is_that_of_its_pool(pool: Pool, source: Path) -> None:
    assert len(open_source(str(source))) == pool.n_samples
