from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distal import cluster as ray_cluster
from distal.driver.preflight import Found, Wanted, look, verdict, versions
from distal.pool import Pool
from tests.helpers import small_overrides

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


HERE = {"Python": "3.12.1", "torch": "2.9.0", "numpy": "2.1.0"}


class TestVerdict:
    def test_nodes_that_lack_nothing_are_left_out(self) -> None:
        assert verdict(HERE, {"a": Found(HERE), "b": Found(HERE)}) == {}

    def test_a_line_for_each_other_node(self) -> None:
        other = Found({"Python": "3.11.9", "torch": "2.9.0"}, ("pool: /data/pool is not there",))
        told = verdict(HERE, {"a": Found(HERE), "b": other, "c": TimeoutError("no answer within 120 s")})
        assert told == {
            "b": "Python 3.11.9, the driver has 3.12.1; numpy missing, the driver has 2.1.0; "
            "pool: /data/pool is not there",
            "c": "no answer within 120 s",
        }


class TestLook:
    """What one node says, asked here."""

    @pytest.fixture
    def wanted(self, pool: Pool, tmp_path: Path) -> Wanted:
        mark = tmp_path / ".preflight-1.tmp"
        mark.touch()
        return Wanted((pool,), mark, {}, {"model.name": "torch.nn:Linear"})

    def test_a_node_that_can(self, wanted: Wanted, tmp_path: Path) -> None:
        assert look(wanted) == Found(versions())
        assert list(tmp_path.iterdir()) == [wanted.mark]
        assert versions()["torch"] == __import__("torch").__version__.partition("+")[0]

    def test_another_pool(self, wanted: Wanted, pool: Pool, tmp_path: Path) -> None:
        (problem,) = look(replace(wanted, pools=(replace(pool, content_sha256="other"),))).problems
        assert "not the pool of this run" in problem
        (problem,) = look(replace(wanted, pools=(replace(pool, path=tmp_path / "none"),))).problems
        assert problem == f"pool: {tmp_path}/none is not there"

    def test_another_run_directory(self, wanted: Wanted, tmp_path: Path) -> None:
        (problem,) = look(replace(wanted, mark=tmp_path / "local" / ".preflight-1.tmp")).problems
        assert problem == f"run: {tmp_path}/local is not the folder that the driver sees"
        assert not (tmp_path / "local").exists()

    def test_what_the_model_needs(self, wanted: Wanted) -> None:
        functions = {"model.name": "no_such_module:build", "model.output": "torch:no_such_function"}
        told = look(replace(wanted, files={"model.weights": "/no/weights.pt"}, functions=functions)).problems
        assert told == (
            "model.weights: /no/weights.pt is not there",
            "model.name: module 'no_such_module' cannot be imported (No module named 'no_such_module')",
            "model.output: module 'torch' has no function or class 'no_such_function'",
        )


class TestOnEachNode:
    def test_one_answer_of_each(self, cluster: str) -> None:
        assert ray_cluster.is_alone()
        (answer,) = ray_cluster.on_each_node(os.getpid, 60).values()
        assert answer != os.getpid()

    def test_errors_are_answers(self, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise KeyError("a bug")

        (answer,) = ray_cluster.on_each_node(fail, 60).values()
        assert isinstance(answer, KeyError)
        (tmp_path / "only_here.py").write_text("def work(): return 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        (answer,) = ray_cluster.on_each_node(__import__("only_here").work, 60).values()
        assert "No module named 'only_here'" in str(answer)  # as on a node without distal

    def test_the_wait_is_bounded(self, cluster: str) -> None:
        (answer,) = ray_cluster.on_each_node(lambda: time.sleep(60), 0.5).values()
        assert str(answer) == "no answer within 0 s"


@pytest.mark.cluster
class TestTwoNodes:
    """Two nodes on this machine; the second has a mount namespace of its own, so that it can see other files."""

    @pytest.fixture
    def head(self) -> Iterator[str]:
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield nodes.address
        nodes.shutdown()

    @staticmethod
    def run(address: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "distal", "run", CONFIG, *overrides, f"ray.address={address}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    @pytest.mark.parametrize("hidden", [True, False])
    def test_a_node_that_sees_other_files(
        self, head: str, pool: Pool, test_pool: Pool, tmp_path: Path, hidden: bool
    ) -> None:
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            pytest.skip("a mount namespace needs root")
        hide = f"mount -t tmpfs none {pool.path} && mount -t tmpfs none {tmp_path}" if hidden else "true"
        start = f"exec ray start --address={head} --num-cpus=1 --block --disable-usage-stats"
        node = subprocess.Popen(["unshare", "-m", "sh", "-c", f"{hide} && {start}"], stdout=subprocess.DEVNULL)
        try:
            wait_for_nodes(head, 2)
            overrides = [*small_overrides(tmp_path / "run", pool, test_pool), "loop.cycles=1"]
            result = self.run(head, *overrides)
        finally:
            node.terminate()
            node.wait(60)
        if not hidden:
            assert result.returncode == 0, result.stderr
            return
        assert result.returncode == 2
        told = result.stderr.splitlines()
        assert told[-2].startswith("node ")
        assert told[-2].endswith(
            f"pool: {pool.path} is not there; run: {tmp_path}/run is not the folder that the driver sees"
        )
        assert told[-1].startswith("distal: 1 of 2 nodes cannot take part, for the reasons above: node ")
        assert not (tmp_path / "run").exists()


def wait_for_nodes(address: str, n: int) -> None:
    """In a process of its own: this one may be connected to another cluster."""
    look = "sum(node['Alive'] for node in ray.nodes())"
    code = f"import ray, time; ray.init('{address}')\nwhile {look} < {n}: time.sleep(0.2)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
