"""Runs over several nodes and hosts: where the work lands, and that the answer is that of one node.

Nodes are Ray nodes of this machine. Hosts are network namespaces: each has an address and ports of its own, and starts
Ray by itself; they share the disk, as the hosts of a cluster share a file system, and a wire that can be cut.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distal.driver import run as driver
from distal.model.networks import SmallCNN
from distal.pool import Pool
from tests.helpers import content, free_ports, ray_head, small_config, small_overrides, wait_until

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
BLOCKS, ROWS = 15, 12
SLOW = ("model.name=tests.cluster.test_hosts:Slow", "pool.block_size=16", f"train.epochs={ROWS}", "score.actors=auto")
SMALL_STORE = 100 * 2**20
LACKING = "TESTS_LACKING"  # in the environment of actors: a package that is missing
BRAKE = "TESTS_BRAKE"  # in the environment of actors: a file, and while it is there they are slow


class Slow(SmallCNN):
    """Takes its time to predict, and no processor: scoring goes on until something has been done to it.

    It cannot be made where `LACKING` is set, as on a node that lacks a package.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        if package := os.environ.get(LACKING):
            raise ModuleNotFoundError(f"No module named {package!r}")
        super().__init__(num_classes, image_shape[0])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            brake = os.environ.get(BRAKE)
            time.sleep(0.5 if brake and Path(brake).exists() else 0.05)
        return super().forward(images)


@pytest.fixture(scope="module")
def on_one_node(pool: Pool, test_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the run comes to on one node without a label, undisturbed."""
    run = tmp_path_factory.mktemp("one") / "run"
    driver.run(small_config(run, pool, test_pool, *SLOW))
    return content(run)


def command(run: Path, pool: Pool, test_pool: Pool, address: str) -> list[str]:
    overrides = [*small_overrides(run, pool, test_pool), *SLOW, f"ray.address={address}"]
    return [sys.executable, "-m", "distal", "run", CONFIG, *overrides]


def wait_for(driver: subprocess.Popen[bytes], there: Callable[[], object], log: Path, seconds: float = 400) -> None:
    """Wait until something is there; the run must go on meanwhile."""
    deadline = time.monotonic() + seconds
    while not there():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def wait_for_end(driver: subprocess.Popen[bytes], log: Path, look: Callable[[], None]) -> None:
    """Wait until the run has ended well, and look at it meanwhile."""
    deadline = time.monotonic() + 400
    while driver.poll() is None:
        look()
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    assert driver.returncode == 0, log.read_text()[-3000:]


def titles(processes: list[psutil.Process]) -> dict[int, str]:
    """What those of some processes that are there call themselves."""
    found = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found[process.pid] = " ".join(process.cmdline())
    return found


def events(run: Path, name: str) -> list[dict[str, Any]]:
    """What the driver told, with `time` in seconds since 1970."""
    lines = [json.loads(line) for log in run.glob("events/*") for line in log.read_text().splitlines()]
    return [{**e, "time": datetime.fromisoformat(e["time"]).timestamp()} for e in lines if e["event"] == name]


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_node_that_comes_while_scoring_goes_on_gets_actors(
    pool: Pool, test_pool: Pool, tmp_path: Path, on_one_node: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node that trains, one that scores, then one that cannot, and another one that can.

    What is on a node is what its raylet started.
    """
    from ray.cluster_utils import Cluster

    run, log, brake = tmp_path / "run", tmp_path / "log", tmp_path / "brake"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(BRAKE, str(brake))
    brake.touch()
    small: dict[str, Any] = {"object_store_memory": SMALL_STORE, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    raylets: dict[str, psutil.Process] = {}
    seen: dict[str, dict[str, float]] = {}  # node: kind of process: when it was seen first

    def add(name: str, role: str, **environment: str) -> None:
        node = nodes.add_node(
            num_cpus=1, labels={"distal-role": role}, object_store_memory=SMALL_STORE, env_vars=environment
        )
        raylets[name] = psutil.Process(node.all_processes["raylet"][0].process.pid)
        seen[name] = {}

    def look() -> None:
        for name, raylet in raylets.items():
            for title in titles(raylet.children(recursive=True)).values():
                for kind in ("RayTrainWorker", "Scorer", "Scorer.score"):
                    if title.startswith(f"ray::{kind}"):
                        seen[name].setdefault(kind, time.monotonic())

    def scores() -> bool:
        look()
        return any(run.glob("cycles/000/assignments.zarr/assignments/c/0/[0-9]*"))

    def late_scores() -> bool:
        look()
        return "Scorer.score" in seen["late"]

    try:
        add("train", "train")
        add("score", "score")
        with log.open("ab") as out:
            process = subprocess.Popen(
                command(run, pool, test_pool, nodes.address), stdout=out, stderr=out, cwd=ROOT, start_new_session=True
            )
        try:
            wait_for(process, scores, log)
            add("lacking", "score", **{LACKING: "timm"})
            wait_for(process, lambda: events(run, "actor_refused"), log, seconds=120)
            add("late", "score")
            joined = time.monotonic()
            wait_for(process, late_scores, log, seconds=120)
            brake.unlink()
            wait_for_end(process, log, look)
        finally:
            process.kill()
            process.wait()
    finally:
        nodes.shutdown()
    assert seen["train"].keys() == {"RayTrainWorker"}
    assert seen["score"].keys() == {"Scorer", "Scorer.score"}
    assert seen["late"].keys() == {"Scorer", "Scorer.score"}
    assert seen["late"]["Scorer"] - joined < 60
    assert "Scorer.score" not in seen["lacking"]
    assert all("No module named 'timm'" in event["reason"] for event in events(run, "actor_refused"))
    assert content(run) == on_one_node


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_an_autoscaler_brings_the_score_nodes_that_are_asked_for(
    pool: Pool, test_pool: Pool, tmp_path: Path, on_one_node: dict[str, object]
) -> None:
    """Ray's own autoscaler, with a provider that starts nodes on this machine: one that scores, and up to two more."""
    from ray._raylet import GcsClient
    from ray.autoscaler._private.fake_multi_node import node_provider
    from ray.util import get_node_ip_address

    run, log, brake, config = (tmp_path / name for name in ("run", "log", "brake", "autoscaler.yaml"))
    brake.touch()

    def joined() -> set[int]:
        return {event["actor"] for event in events(run, "actor_joined")}

    address = f"{get_node_ip_address()}:{free_ports(1)[0]}"
    provider = {
        "type": "external",
        "module": f"{node_provider.__name__}.{node_provider.FakeMultiNodeProvider.__name__}",
        "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "gcs_address": address,
    }
    one = {"resources": {"CPU": 1, "object_store_memory": SMALL_STORE}, "node_config": {}, "worker_setup_commands": []}
    kinds = {
        node_provider.FAKE_HEAD_NODE_TYPE: {**one, "resources": {"CPU": 0}, "max_workers": 0},
        "train": {**one, "labels": {"distal-role": "train"}, "min_workers": 1, "max_workers": 1},
        "score": {**one, "labels": {"distal-role": "score"}, "min_workers": 1, "max_workers": 3},
    }
    lists = ("setup_commands", "head_setup_commands", "initialization_commands", "head_start_ray_commands")
    lists += ("worker_setup_commands", "worker_start_ray_commands", "cluster_synced_files")
    record = {
        "cluster_name": "tests", "max_workers": 4, "idle_timeout_minutes": 5, "upscaling_speed": 4,
        "provider": provider, "auth": {}, "docker": {}, "file_mounts": {}, **{name: [] for name in lists},
        "head_node_type": node_provider.FAKE_HEAD_NODE_TYPE, "available_node_types": kinds,
    }  # fmt: skip
    config.write_text(json.dumps(record))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",  # the older one knows no labels; `ray up` and KubeRay have this one
        "RAY_FAKE_CLUSTER": "1",
        BRAKE: str(brake),
        "RAY_CLOUD_INSTANCE_ID": node_provider.FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_provider.FAKE_HEAD_NODE_ID,
    }
    port = address.rpartition(":")[2]
    options = ("--num-cpus=0", "--include-dashboard=false", f"--port={port}", f"--autoscaling-config={config}")
    with ray_head(environment, *options):
        wait_until(lambda: len(GcsClient(address).get_all_node_info()) == 3)  # the head, and one of each kind
        wanted = [*command(run, pool, test_pool, address), "score.actors=3"]
        with log.open("ab") as out:
            process = subprocess.Popen(wanted, stdout=out, stderr=out, cwd=ROOT, start_new_session=True)
        try:
            wait_for(process, lambda: len(joined()) == 3, log, seconds=200)
            brake.unlink()
            wait_for_end(process, log, lambda: None)
        finally:
            process.kill()
            process.wait()
    assert joined() == {0, 1, 2}
    (begun,) = events(run, "attempt")
    assert begun["slots"] == 1, "there were more nodes from the start"
    assert content(run) == on_one_node


class Hosts:
    """Hosts on this machine, on one wire. All that they are is in network namespaces, and goes with them.

    Args:
        folder: for Ray's files. Its path is short: it becomes part of the names of sockets.
        environment: what the processes on the hosts have in their environment besides that of this one.
    """

    PORT = 6379

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._name = f"dh{secrets.token_hex(3)}"
        self._folder, self._environment = folder, environment
        self._hosts: list[str] = []
        self._started: list[subprocess.Popen[bytes]] = []

    def lay_wire(self) -> None:
        """A bridge, in a namespace of its own: the machine itself is not on the wire."""
        self._add_namespace("wire")
        self._ip("wire", "link", "add", "wire", "type", "bridge")
        self._ip("wire", "link", "set", "wire", "up")

    @property
    def address(self) -> str:
        """Of the Ray cluster."""
        return f"{self.ip_address('head')}:{self.PORT}"

    def ip_address(self, host: str) -> str:
        """Its address on the wire."""
        return f"10.77.0.{self._hosts.index(host)}"

    def add(self, host: str, role: str) -> None:
        """Put a host on the wire, and start Ray on it; the head comes first."""
        self._add_namespace(host)
        self._ip("wire", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", f"{self._name}-{host}")
        self._ip("wire", "link", "set", host, "master", "wire", "up")
        self._ip(host, "address", "add", f"{self.ip_address(host)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._ip(host, "link", "set", device, "up")
        self._ip(host, "route", "add", "default", "dev", "eth0")  # Ray asks for a route to find its own address
        head = ["--head", f"--port={self.PORT}", "--include-dashboard=false"]
        start = [
            str(Path(sys.executable).with_name("ray")), "start",
            *(head if host == "head" else [f"--address={self.address}"]), f"--node-ip-address={self.ip_address(host)}",
            f"--temp-dir={self._folder / host}", "--node-manager-port=6380", "--object-manager-port=6381",
            "--min-worker-port=10002", "--max-worker-port=10099", "--num-cpus=1", f"--labels=distal-role={role}",
            f"--object-store-memory={SMALL_STORE}", "--disable-usage-stats",
        ]  # fmt: skip
        log = self._folder / f"{host}.log"
        code = self.start(host, start, log).wait(timeout=200)
        assert code == 0, log.read_text()[-3000:]

    def start(self, host: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command on a host; what it says is added to `log`."""
        there = ["ip", "netns", "exec", f"{self._name}-{host}", *command]
        with log.open("ab") as out:
            environment = {**os.environ, **self._environment}
            process = subprocess.Popen(there, stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True)
        self._started.append(process)
        return process

    def cut(self, host: str) -> None:
        """Nothing reaches the host any more, and nobody is told; its processes go on."""
        self._ip("wire", "link", "set", host, "down")

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs on a host."""
        pids = subprocess.run(
            ["ip", "netns", "pids", f"{self._name}-{host}"], capture_output=True, text=True, check=True
        ).stdout.split()
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def close(self) -> None:
        """End every process on the hosts, and remove the hosts."""
        for host in reversed(self._hosts):
            deadline = time.monotonic() + 30
            while running := self.processes(host):
                assert time.monotonic() < deadline, titles(running)
                for process in running:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "delete", f"{self._name}-{host}"], check=True)
        for process in self._started:
            process.wait(timeout=10)

    def _add_namespace(self, host: str) -> None:
        subprocess.run(["ip", "netns", "add", f"{self._name}-{host}"], check=True, capture_output=True)
        self._hosts.append(host)

    def _ip(self, host: str, *arguments: str) -> None:
        subprocess.run(["ip", "-n", f"{self._name}-{host}", *arguments], check=True, capture_output=True)


# A node that does not answer is given up after threshold x timeout + (threshold - 1) x period: 8 s here, 62 s by default.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_start_wait_time_s": "100",
}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="dh", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        environment = {**IMPATIENT, "PYTHONPATH": str(ROOT), BRAKE: str(tmp_path / "brake")}
        found = Hosts(Path(folder), environment)
        try:
            try:
                found.lay_wire()
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not permitted here, or `ip` is missing: {error}")
            yield found
        finally:
            found.close()


HOSTS = {"head": "train", "stays": "score", "goes": "score"}


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_host_is_cut_off_while_it_scores(
    hosts: Hosts,
    pool: Pool,
    test_pool: Pool,
    tmp_path: Path,
    on_one_node: dict[str, object],
    record_property: Callable[[str, object], None],
) -> None:
    """Three hosts: one trains and drives, two score. What the one that is cut off still writes is the same."""
    run, log, brake = tmp_path / "run", tmp_path / "log", tmp_path / "brake"
    brake.touch()
    for host, role in HOSTS.items():
        hosts.add(host, role)
    process = hosts.start("head", command(run, pool, test_pool, hosts.address), log)
    commits: dict[Path, list[float]] = {}

    def look() -> None:
        for path in run.glob("cycles/*/assignments.zarr/assignments/c/*/[0-9]*"):
            if path.name.isdigit():
                with suppress(FileNotFoundError):
                    times = commits.setdefault(path, [])
                    if (changed := path.stat().st_mtime) not in times:
                        times.append(changed)

    def in_the_middle() -> bool:
        look()
        return len(commits) > BLOCKS and len(events(run, "actor_joined")) == 2

    wait_for(process, in_the_middle, log)
    hosts.cut("goes")
    cut = time.time()
    n_before = len(commits)
    assert n_before < BLOCKS * ROWS, "it came too late"
    kinds = {host: set(re.findall(r"RayTrainWorker|Scorer", str(titles(hosts.processes(host))))) for host in HOSTS}
    assert kinds["stays"] == kinds["goes"] == {"Scorer"}
    assert kinds["head"] <= {"RayTrainWorker"}
    brake.unlink()
    wait_for_end(process, log, look)
    assert content(run) == on_one_node

    (lost,) = events(run, "actor_lost")
    assert lost["blocks_in_hand"] > 0
    assert lost["time"] > cut
    after = sorted(time for path, times in commits.items() if "000" in path.parts for time in times if time > cut)
    twice = sum(len(times) > 1 for times in commits.values())
    assert twice <= lost["blocks_in_hand"]
    for name, value in {
        "blocks before the cut": f"{n_before} of {BLOCKS * ROWS}",
        "seconds from the cut to the next commit": round(after[0] - cut, 2),
        "seconds from the cut to the hand-out of what was lost": round(lost["time"] - cut, 2),
        "blocks in hand": lost["blocks_in_hand"],
        "blocks written twice": twice,
        "longest pause between commits of the cycle": round(max(b - a for a, b in pairwise([cut, *after])), 2),
        "reason": lost["reason"],
    }.items():
        record_property(name, value)
        print(f"{name}: {value}")
    print(*[path.read_text() for path in sorted((run / "events").iterdir())], log.read_text())
