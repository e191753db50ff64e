from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distal import cluster as ray_cluster
from distal.cluster import Slots
from distal.errors import ConfigError
from distal.pool import Pool
from distal.runs import Run
from tests.helpers import small_overrides

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


def slots(total: int = 8, cpus: int = 8, device: str = "cpu", *roles: str) -> Slots:
    return Slots(device, total, cpus, frozenset(roles))


def test_training_takes_its_slots_from_scoring_unless_it_has_nodes_of_its_own() -> None:
    assert slots().training(workers=2, threads=3) == 6
    assert slots(2, 16, "cuda").training(workers=2, threads=4) == 2
    assert slots(8, 8, "cpu", "train", "score").training(workers=2, threads=3) == 0


@pytest.mark.parametrize(("cpus", "workers", "threads"), [(1, 1, 1), (2, 1, 1), (8, 1, 4), (8, 2, 2), (2, 4, 1)])
def test_training_gets_half_of_the_cpus(cpus: int, workers: int, threads: int) -> None:
    assert slots(cpus, cpus).train_threads(workers) == threads


def test_roles_select_nodes_only_where_nodes_have_them() -> None:
    assert slots().selector("train") is None
    assert slots(8, 8, "cpu", "train").selector("train") == {"distal-role": "train"}
    assert slots(8, 8, "cpu", "train").selector("score") is None


def test_the_slots_of_a_cluster(cluster: str) -> None:
    assert ray_cluster.find_slots("auto") == Slots("cpu", 3, 3, frozenset())
    with pytest.raises(ConfigError, match="device: cuda, but no node of the cluster has a GPU"):
        ray_cluster.find_slots("cuda")


def test_a_cluster_is_never_joined_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    """`local` is a cluster of one's own, unless the environment names one, as it does in a submitted job."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert ray_cluster.is_own("local")
    assert not ray_cluster.is_own("auto")
    ray_cluster.secure("auto")
    assert "RAY_AUTH_MODE" not in os.environ
    ray_cluster.secure("local")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not ray_cluster.is_own("local")


def test_no_cluster_at_the_address(tmp_path: Path, pool: Pool) -> None:
    overrides = [*small_overrides(tmp_path / "run", pool, None), "ray.address=127.0.0.1:1"]
    result = subprocess.run(
        [sys.executable, "-m", "distal", "run", CONFIG, *overrides], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "ray.address: no Ray cluster at 127.0.0.1:1" in result.stderr.splitlines()[-1]


@pytest.mark.cluster
def test_training_and_scoring_on_nodes_of_their_own(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """Three nodes on this machine: a head without slots, one labelled for training and one for scoring."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1, labels={"distal-role": "train"})
        nodes.add_node(num_cpus=2, labels={"distal-role": "score"})
        overrides = [*small_overrides(tmp_path / "run", pool, test_pool), f"ray.address={nodes.address}"]
        command = [sys.executable, "-m", "distal", "run", CONFIG, *overrides]
        result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert result.returncode == 0, result.stderr
    finally:
        nodes.shutdown()
    run = Run.open(tmp_path / "run")
    assert len(run.summary()["cycles"]) == 2
    (log,) = (run.path / "events").iterdir()
    assert '"slots": 2' in log.read_text()
