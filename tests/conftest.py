"""Fixtures shared by all tests: one small Ray cluster, one small pool, images made on the spot."""

from __future__ import annotations

import os

# Before anything imports them: Ray would turn token authentication on, and torch would take every core.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ.pop("RAY_ADDRESS", None)
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from distal.driver import run as driver
from distal.pool import Pool
from distal.pool.build import build
from tests.helpers import small_config, write_source
from tests.stand_ins import SpareActor, ranks_here

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in one process of pytest-xdist: all that share the Ray cluster or start nodes, and otherwise a file."""
    for item in items:
        on_ray = "cluster" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cluster")
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray else str(item.path)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A Ray cluster for the whole test run; gives its address."""
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        namespace="distal",
        object_store_memory=200 * 2**20,
        logging_level="warning",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 labelled images, two of them damaged."""
    folder = tmp_path_factory.mktemp("source")
    path = write_source(folder / "train.parquet", 240, seed=1)
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[7], images[201] = images[7][:40], b"not an image"
    pq.write_table(table.set_column(1, "image", pa.array(images)), path, row_group_size=100)
    return path


@pytest.fixture(scope="session")
def pool(cluster: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """The 240 images, packed."""
    return build(str(source), tmp_path_factory.mktemp("pools") / "train")


@pytest.fixture(scope="session")
def test_pool(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """100 other images, packed."""
    folder = tmp_path_factory.mktemp("test-pool")
    return build(str(write_source(folder / "test.parquet", 100, seed=2)), folder / "packed")


@pytest.fixture(scope="session")
def spare_actor(cluster: str) -> Iterator[SpareActor]:
    """The scoring actor that runs of different tests share."""
    spare = SpareActor()
    yield spare
    spare.end()


@pytest.fixture(scope="module")
def stand_ins(spare_actor: SpareActor) -> Iterator[None]:
    """For modules about the files and messages of runs: training without Ray Train, and one scoring actor for many
    runs; see `tests/stand_ins.py`."""
    with ranks_here(), spare_actor.kept():
        yield


@pytest.fixture(scope="session")
def small_run(pool: Pool, test_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two cycles of three checkpoints, by as many actors as there is room for. Not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "small"
    with ranks_here():
        driver.run(small_config(path, pool, test_pool, "score.actors=auto"))
    return path
