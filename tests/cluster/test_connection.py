from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from distal import cluster as ray_cluster
from distal.artifacts.runs import Run
from distal.cluster import Node, divide, find_slots, tasks
from distal.errors import ConfigError, DistalError
from distal.pool import Pool
from tests.helpers import small_overrides, wait_until

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


class TestSlots:
    """Which nodes train and which score, and how many slots training takes from scoring."""

    def test_one_machine_does_both(self) -> None:
        slots = divide([Node(8)], "auto")
        assert (slots.device, slots.scoring, slots.shared) == ("cpu", 8, True)
        assert slots.selectors == {"train": None, "score": None}
        assert slots.training(workers=2, threads=3) == 6

    @pytest.mark.parametrize(("cpus", "workers", "threads"), [(1, 1, 1), (2, 1, 1), (8, 1, 4), (8, 2, 2), (2, 4, 1)])
    def test_training_gets_half_of_the_cpus(self, cpus: int, workers: int, threads: int) -> None:
        assert divide([Node(cpus)], "auto").train_threads(workers) == threads

    def test_the_ranks_of_a_node_fit_on_it(self) -> None:
        assert divide([Node(8), Node(8)], "cpu").train_threads(4) == 2
        labelled = divide([Node(16, role="train"), Node(16, role="train"), Node(4, role="score")], "cpu")
        assert labelled.train_threads(4) == 8  # all of the CPUs: nothing is scored there

    def test_labelled_nodes_have_one_role(self) -> None:
        slots = divide([Node(0), Node(4, role="train"), Node(16, role="score"), Node(2, role="other")], "auto")
        assert slots.selectors == {"train": {"distal-role": "train"}, "score": {"distal-role": "score"}}
        assert (slots.scoring, slots.training(2, 2)) == (16, 0)

    def test_where_one_role_is_labelled_the_other_gets_the_rest(self) -> None:
        slots = divide([Node(4, role="train"), Node(16), Node(8)], "auto")
        assert slots.selectors == {"train": {"distal-role": "train"}, "score": {"distal-role": "!train"}}
        assert slots.scoring == 24
        slots = divide([Node(4), Node(16, role="score")], "auto")
        assert slots.selectors == {"train": {"distal-role": "!score"}, "score": {"distal-role": "score"}}

    def test_labels_that_leave_a_role_without_a_node_are_ignored(self) -> None:
        slots = divide([Node(4, role="train"), Node(2, role="train")], "auto")
        assert slots.selectors == {"train": None, "score": None}
        assert slots.scoring == 6

    def test_nodes_that_come_and_go_change_no_role(self) -> None:
        """Which nodes score is decided when a run starts: its actors and ranks have been told."""
        train, score = Node(16, role="train"), Node(4, role="score")
        labelled = divide([train, score], "cpu")
        assert labelled.scoring_of([train]) == 0
        assert labelled.scoring_of([train, score, Node(8, role="score"), Node(2)]) == 12
        assert divide([train, Node(4)], "cpu").scoring_of([train, Node(4), score]) == 8
        assert divide([Node(4)], "cpu").scoring_of([Node(4), score, train]) == 24
        assert divide([Node(4, gpus=2)], "auto").scoring_of([Node(64)]) == 0

    def test_gpus_are_the_slots_where_there_are_any(self) -> None:
        nodes = [Node(64, gpus=4), Node(64, gpus=4), Node(32)]
        slots = divide(nodes, "auto")
        assert (slots.device, slots.scoring, slots.training(workers=2, threads=4)) == ("cuda", 8, 2)
        assert slots.train_threads(2) == 8  # half of the CPUs over the GPUs of a node
        assert divide(nodes, "cpu").scoring == 160
        with pytest.raises(ConfigError, match="device: cuda, but the cluster has no node with a GPU; add one, or set"):
            divide([Node(8)], "cuda")

    def test_unequal_nodes_hold_all_ranks(self) -> None:
        roles = [Node(64, role="train"), Node(8, role="train"), Node(4, role="score")]
        assert divide(roles, "cpu").train_threads(2) == 32
        gpus = [Node(48, gpus=4, role="train"), Node(8, gpus=1, role="train"), Node(4, gpus=1, role="score")]
        assert divide(gpus, "auto").train_threads(5) == 8
        assert divide(gpus, "auto").train_threads(4) == 12

    def test_a_cluster_that_has_no_node_yet(self) -> None:
        with pytest.raises(ConfigError, match="device: auto, but the cluster has no node with a CPU or a GPU; add one"):
            divide([Node(0)], "auto")

    def test_those_of_a_cluster(self, cluster: str) -> None:
        assert find_slots("auto") == divide([Node(3)], "cpu")


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


def test_a_temporary_folder_with_a_long_name(tmp_path: Path, pool: Pool) -> None:
    folder = tmp_path / ("a" * 80)
    folder.mkdir()
    overrides = small_overrides(tmp_path / "run", pool, None)
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(
        [sys.executable, "-m", "distal", "run", CONFIG, *overrides],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"distal: TMPDIR: {folder} is too long")


@pytest.mark.cluster
@pytest.mark.parametrize("score_labels", [{"distal-role": "score"}, {}], ids=["both labelled", "one labelled"])
def test_training_and_scoring_on_nodes_of_their_own(
    pool: Pool, test_pool: Pool, tmp_path: Path, score_labels: dict[str, str]
) -> None:
    """Three nodes on this machine: a head without slots, one labelled for training, and one that scores."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1, labels={"distal-role": "train"})
        nodes.add_node(num_cpus=2, labels=score_labels)
        overrides = [
            *small_overrides(tmp_path / "run", pool, test_pool),
            f"ray.address={nodes.address}",
            "score.actors=auto",
        ]
        command = [sys.executable, "-m", "distal", "run", CONFIG, *overrides]
        result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
        assert result.returncode == 0, result.stderr
    finally:
        nodes.shutdown()
    run = Run.open(tmp_path / "run")
    assert len(run.summary().cycles) == 2
    (log,) = (run.path / "events").iterdir()
    assert '"slots": 2' in log.read_text()


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_run_waits_for_the_first_node(pool: Pool, tmp_path: Path) -> None:
    """A cluster that is being started has a head first, which only conducts."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    log = tmp_path / "log"
    overrides = [*small_overrides(tmp_path / "run", pool, None), f"ray.address={nodes.address}", "loop.cycles=1"]
    try:
        with log.open("w") as out:
            process = subprocess.Popen([sys.executable, "-m", "distal", "run", CONFIG, *overrides], stderr=out)
        try:
            waits = "waiting for a node with a CPU or a GPU to join the cluster, for 600 s at most"
            wait_until(lambda: process.poll() is not None or waits in log.read_text())
            assert process.poll() is None, log.read_text()
            nodes.add_node(num_cpus=2)
            wait_until(lambda: process.poll() is not None or "asking every node" in log.read_text())
            assert process.wait(timeout=200) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    finally:
        nodes.shutdown()


class TestTasks:
    def test_every_item_once(self, cluster: str) -> None:
        assert sorted(ray_cluster.in_tasks(lambda item: item * item, range(20))) == [n * n for n in range(20)]
        assert list(ray_cluster.in_tasks(lambda item: item, [])) == []

    def test_a_node_that_has_died_meanwhile_is_left_out(self, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between listing the nodes and asking them one may go: it takes no part, and is no reason to stop."""
        alive = tasks.workers()
        listed = iter([{**alive, "ab" * 28: "a node that died"}])
        monkeypatch.setattr(tasks, "workers", lambda: next(listed, alive))
        assert list(ray_cluster.on_each_node(os.getpid, 60)) == list(alive.values())

    @pytest.mark.timeout(100)
    def test_a_task_that_stops_is_done_by_another_process(self, cluster: str, tmp_path: Path) -> None:
        stopped = tmp_path / "stopped"

        def work(item: int) -> int:
            with suppress(FileExistsError), stopped.open("x") as file:  # the first one
                file.write(str(os.getpid()))
                file.flush()
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.1)
            return item * item

        try:
            assert sorted(ray_cluster.in_tasks(work, range(8), stuck_after=5.0)) == [n * n for n in range(8)]
        finally:
            os.kill(int(stopped.read_text()), signal.SIGKILL)

    @pytest.mark.timeout(100)
    def test_tasks_that_all_stop_end_the_work(self, cluster: str, tmp_path: Path) -> None:
        over = tmp_path / "over"

        def work(item: int) -> int:
            if not over.exists():  # Ray does them again when they are killed
                (tmp_path / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return item

        try:
            with pytest.raises(DistalError, match="no task has answered for 9 s, and 1 are left"):
                list(ray_cluster.in_tasks(work, [1], stuck_after=3.0))
        finally:
            over.touch()
            for path in tmp_path.glob("[0-9]*"):
                os.kill(int(path.name), signal.SIGKILL)

    def test_what_a_task_raises(self, cluster: str) -> None:
        def work(item: int) -> int:
            raise ConfigError(f"item {item}")

        with pytest.raises(ConfigError, match="item 5"):
            list(ray_cluster.in_tasks(work, [5]))
