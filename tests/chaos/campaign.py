"""Runs that are disturbed on purpose, and compared with one that was left alone.

A campaign has one pool, and a Ray cluster of three nodes of its own. Each run is of a kind, and is `distal run` as a
process that joins the cluster. A killer, seeded, waits until a named thing appears on disk and strikes; when that ended
the driver, the same command is given again. In the end the run must be complete, and every decoded array, table and
weights file the same as those of the undisturbed run of its kind.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from distal.artifacts.runs import Run
from distal.artifacts.selection import Selection
from distal.errors import DistalError, Superseded
from distal.labels.waiting import Waiting
from distal.pool import Pool
from distal.pool.build import build
from distal.score.eliminate import histogram, survivors
from distal.storage import files_below, names_in, read_json
from tests.helpers import content, flip, write_source

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
BLOCK, BUDGET = 128, 20
STUCK_S = 4
PER_GROUP = 20  # samples of the pool
QUICK_DEATHS = {  # so that a lost node is noticed within seconds, not half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "health_check_timeout_ms": 1000,
}
DISK = "30m"
NOTHING = "nothing to strike"
CHANGED = "which changed"
ENVIRONMENT = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # of 60: see `lose_cluster`
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(STUCK_S),  # of 600
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of 30: how long a rank that hangs is waited for
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # of 60: how soon ranks without a place get the slots of actors
}
AS_ANOTHER_MACHINE = """
import distal.processes
distal.processes._machine = lambda: {machine!r}
from distal.cli.app import main
main()
"""
TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        overrides: in addition to `Lab.overrides`.
        people: whether labels come from files, which the campaign imports.
        command: whether `train.py` trains, in place of the ranks.
    """

    name: str
    overrides: tuple[str, ...] = ()
    people: bool = False
    command: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain"),
        Kind("elimination", ("score.eliminate=exact",)),
        Kind("people", ("label.oracle=files", "select.batch=power", "select.max_per_group=1"), people=True),
        Kind("command", command=True),
    )
}


@dataclass
class Strike:
    """One injected fault.

    Attributes:
        at: what had appeared when it struck.
        in_hand: blocks x checkpoints that lost actors had in hand, as the driver told; they are scored again.
        rewritten: blocks that were committed before, or until a zombie was let go, and written again by the end of the
            run; none should be.
        seconds: from the strike to the next block, checkpoint, or stage that was committed.
    """

    run: int
    fault: str
    at: str
    in_hand: int = 0
    rewritten: int = 0
    seconds: float = 0.0
    recovered: bool = False
    note: str = ""
    began: float = 0.0
    committed: dict[Path, int] = field(default_factory=dict)
    damaged: Path | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("committed", "damaged")}


def compile_kernels() -> None:
    """Have what elimination calls compiled, and kept on disk: in an actor it takes longer than `STUCK_S`."""
    votes, eligible = np.zeros((3, 8), np.uint8), np.ones(8, bool)
    histogram(votes, eligible, 4, 8)
    survivors(votes, eligible, 4, 0)


class Lab:
    """A pool, a cluster, and the answer of an undisturbed run.

    Args:
        folder: for everything.
        n_samples: of the pool.
        cycles, rows: of each run; checkpoints of each cycle.
        actors: at most so many score; auto: as many as there is room for, which is four.
    """

    def __init__(
        self, folder: Path, n_samples: int, *, cycles: int = 2, rows: int = 8, actors: int | str = "auto"
    ) -> None:
        self.folder = folder
        self.n_samples, self.cycles, self.rows, self.actors = n_samples, cycles, rows, actors
        self.cluster: Cluster
        self.nodes: list[Any] = []

    def __enter__(self) -> Lab:
        compile_kernels()
        self.start_cluster()
        connected = ray.is_initialized()  # in a test run, to the cluster of the other tests, which can pack as well
        if not connected:
            ray.init(address=self.cluster.address, namespace="distal", log_to_driver=False, logging_level="error")
        try:
            groups: list[object] = [f"g{i // PER_GROUP}" for i in range(self.n_samples)]
            source = write_source(self.folder / "train.parquet", self.n_samples, seed=1, group_id=groups)
            table = pq.read_table(source, columns=["sample_id", "class_name"]).to_pydict()
            self.truth = dict(zip(table["sample_id"], table["class_name"], strict=True))
            self.pool: Pool = build(str(source), self.folder / "pool")
            test = write_source(self.folder / "test.parquet", 100, seed=2)
            self.test: Pool = build(str(test), self.folder / "test")
        finally:
            if not connected:
                ray.shutdown()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()

    def start_cluster(self) -> None:
        """A head without slots, so that losing a node is not losing everything, and two nodes."""
        small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        head = {"num_cpus": 0, "_system_config": QUICK_DEATHS, **small}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.nodes = []
        for _ in range(2):
            self.add_node()

    def add_node(self) -> None:
        """A node of two slots."""
        self.nodes.append(self.cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20))

    def processes(self, title: str, nodes: Sequence[Any] | None = None) -> list[psutil.Process]:
        """The processes of some nodes, or of all, whose title contains `title`."""
        found = []
        for node in self.nodes if nodes is None else nodes:
            for process in raylet(node).children(recursive=True):
                try:
                    if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
                except psutil.NoSuchProcess:
                    continue
        return found

    def overrides(self, run: Path, kind: Kind) -> list[str]:
        """A small run, on two ranks."""
        command = (
            f"{sys.executable} {TRAIN} --pool {self.pool.path} --labels {{labels}} --out {{checkpoints}} "
            "--epochs {epochs} --seed {seed} --cycle {cycle}"
        )
        return [
            *kind.overrides, *([f"train.command='{command}'"] if kind.command else []),
            f"run={run}", "device=cpu", f"ray.address={self.cluster.address}", "seed=0",
            f"pool.path={self.pool.path}", "pool.source=null", f"eval.test={self.test.path}", f"pool.block_size={BLOCK}",
            f"loop.cycles={self.cycles}", "loop.initial=40", f"loop.budget={BUDGET}",
            f"train.epochs={self.rows}", "train.batch_size=20", "train.threads=1", "train.workers=2", "train.max_failures=10",
            f"score.actors={self.actors}", "score.batch_size=32", "score.precision=fp32", "score.cache_gb=0.01", f"score.stuck_after={STUCK_S}",
        ]  # fmt: skip

    @contextmanager
    def disk(self, run: Path) -> Iterator[bool]:
        """A small disk of its own for a run, where that can be had; tells whether it is one."""
        run.mkdir(parents=True)
        mounted = (
            os.getuid() == 0
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(run)], capture_output=True, check=False
            ).returncode
        )
        try:
            yield mounted
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(run)], check=True)


def raylet(node: Any) -> psutil.Process:
    """The process that starts and ends all others of a node."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@dataclass
class Disturbed:
    """One run under fire.

    Attributes:
        machine: from which machine its commands seem to be given; 0: from this one.
        kept: what was committed when a zombie was let go.
    """

    lab: Lab
    number: int
    path: Path
    kind: Kind
    mounted: bool
    rng: random.Random
    driver: subprocess.Popen[bytes] | None = None
    exits: list[int] = field(default_factory=list)
    machine: int = 0
    kept: dict[Path, int] = field(default_factory=dict)

    def distal(self, *arguments: object) -> list[str]:
        """A command."""
        another = ["-c", AS_ANOTHER_MACHINE.format(machine=f"machine {self.machine}")]
        return [sys.executable, *(another if self.machine else ["-m", "distal"]), *map(str, arguments)]

    def start(self) -> None:
        """Give the command, again if need be."""
        command = self.distal("run", CONFIG, *self.lab.overrides(self.path, self.kind))
        with self.log.open("ab") as log:
            environment = {**os.environ, **ENVIRONMENT}
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def go_on(self) -> bool:
        """Give people's labels and the command again when the run waits for labels; tells whether it did."""
        if not self.kind.people or self.driver is None or self.driver.poll() != 0:
            return False
        waiting = Waiting.read(Run.open(self.path))
        if waiting is None:
            return False
        names = sorted(Selection.read(waiting.selection).sample_ids)
        for part in (names[: len(names) // 2], names, names):  # in parts, and repeatedly
            # Answers keep the name of their file: it must not depend on the run.
            file = self.path.parent / f"labels-of-{self.path.name}" / "labels.csv"
            file.parent.mkdir(exist_ok=True)
            lines = (f"{name},{self.lab.truth[name]},somebody\n" for name in part)
            file.write_text("sample_id,label,annotator\n" + "".join(lines))
            imported = self.distal("labels", "import", self.path, file)
            done = subprocess.run(imported, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        self.start()
        return True

    @property
    def log(self) -> Path:
        """What the driver says, of all attempts."""
        return self.path.parent / f"{self.path.name}.log"

    def ended(self) -> bool:
        """Whether the driver has ended."""
        return self.driver is None or self.driver.poll() is not None

    def wait_for(self, there: Callable[[], bool], seconds: float = 400) -> bool:
        """Wait until something is there; False when the driver ended first."""
        deadline = time.monotonic() + seconds
        while not there():
            if self.ended() and not self.go_on():
                return there()
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {self.number}: nothing came for {seconds} s\n{self.tail()}")
            time.sleep(0.005)
        return True

    def finish(self) -> None:
        """Give the command until the run is complete."""
        for _ in range(4 + 2 * self.lab.cycles * self.kind.people):
            if self.ended() and not self.go_on():
                self.start()
            assert self.driver is not None
            self.exits.append(self.driver.wait(timeout=400))
            if self.exits[-1] == 0 and Run.open(self.path).is_complete(self.lab.cycles):
                return
        raise AssertionError(f"run {self.number} does not finish: {self.exits}\n{self.tail()}")

    def tail(self) -> str:
        """The end of what the driver said."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def chunks(self) -> dict[Path, int]:
        """When each block of assignments that is there was committed."""
        found = {}
        for path in files_below(self.path / "cycles"):
            if path.name.isdigit() and path.parts[-4:-2] == ("assignments", "c"):
                with suppress(FileNotFoundError):
                    found[path] = path.stat().st_mtime_ns
        return found

    def final(self) -> dict[Path, int]:
        """Whatever is never written again, and when it was: blocks, checkpoints, selections, labels, markers."""
        found = self.chunks()
        for path in files_below(self.path / "cycles"):
            if "train" not in path.parts and path.name.startswith(("weights-", "manifest.", "selection.", "labels.")):
                with suppress(FileNotFoundError):
                    found[path] = path.stat().st_mtime_ns
        for stage in ("train", "score", "test", "reduce", "select", "label"):
            found |= {path: path.stat().st_mtime_ns for path in self.path.glob(f"cycles/*/{stage}.json")}
        return found

    def n_committed(self) -> int:
        """Blocks, checkpoints and stages."""
        kinds = (".json", ".parquet")
        found = (path for path in files_below(self.path / "cycles") if "ray" not in path.parts)
        return len(self.chunks()) + sum(path.suffix in kinds and not path.name.startswith(".") for path in found)

    def events(self, since: float = 0.0) -> list[dict[str, Any]]:
        """What the drivers told, from a moment on."""
        found = []
        for log in self.path.glob("events/*.jsonl"):
            for line in log.read_text().splitlines():
                with suppress(ValueError):  # the last line of a driver that was killed
                    event = json.loads(line)
                    if datetime.fromisoformat(event["time"]).timestamp() >= since - 0.01:
                        found.append(event)
        return found

    def in_hand(self, strike: Strike, until: float) -> int:
        """Blocks that lost actors had in hand between a strike and the next one."""
        lost = [e for e in self.events(strike.began) if e["event"] == "actor_lost"]
        return sum(e["blocks_in_hand"] for e in lost if datetime.fromisoformat(e["time"]).timestamp() < until)


def triggers(rng: random.Random, lab: Lab, kind: Kind) -> list[str]:
    """Five things of which the appearance is a good moment, in the order in which they appear: patterns."""
    stages = []
    for cycle in range(lab.cycles):
        folder = f"cycles/{cycle:03d}"
        stages += [f"{folder}/cycle.yaml", f"{folder}/train/{'attempts/*' if kind.command else 'state.pt'}"]
        for row in range(lab.rows):
            block = rng.randrange(min(8, lab.n_samples // BLOCK))
            # A training script that was started again publishes to a folder of its own.
            stages += [f"{folder}/checkpoints*/{row:04d}/manifest.json"]
            stages += [f"{folder}/assignments*.zarr/assignments/c/{row}/{block}"]
        stages += [f"{folder}/train.json", f"{folder}/score.json", f"{folder}/scores.zarr/zarr.json"]
        stages += [f"{folder}/selection.parquet"] + ([f"{folder}/labels.parquet"] if cycle + 1 < lab.cycles else [])
    chosen = sorted(rng.sample(range(len(stages)), 5))
    return [stages[index] for index in chosen]


def kill_driver(run: Disturbed) -> str:
    assert run.driver is not None
    run.driver.kill()
    run.driver.wait()
    return ""


def stop_driver(run: Disturbed) -> str:
    """SIGTERM: 143 at once, and a line that says how to go on."""
    assert run.driver is not None
    run.driver.send_signal(signal.SIGTERM)
    code = run.driver.wait(timeout=30)
    assert code in (143, -signal.SIGTERM, 0), run.tail()  # -15: it came before Python had put its handler in place
    return ""


def _strike_process(
    run: Disturbed, title: str, number: signal.Signals, look: Callable[[str], list[psutil.Process]] | None = None
) -> str:
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = (look or run.lab.processes)(title)
        return bool(found)

    if not run.wait_for(there) or run.ended():
        return NOTHING
    run.rng.choice(found).send_signal(number)
    return ""


def kill_actor(run: Disturbed) -> str:
    return _strike_process(run, "ray::Scorer", signal.SIGKILL)


def stop_actor(run: Disturbed) -> str:
    """It hangs: it is there, and does nothing."""
    return _strike_process(run, "ray::Scorer", signal.SIGSTOP)


def kill_rank(run: Disturbed) -> str:
    return _strike_process(run, "RayTrainWorker", signal.SIGKILL)


def stop_rank(run: Disturbed) -> str:
    """It hangs, and Ray Train notices."""
    return _strike_process(run, "RayTrainWorker", signal.SIGSTOP)


def kill_command(run: Disturbed) -> str:
    """The training script; the command ends with what it said."""
    assert run.driver is not None
    driver = run.driver

    def look(title: str) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [each for each in psutil.Process(driver.pid).children() if title in " ".join(each.cmdline())]
        return []

    if _strike_process(run, TRAIN.name, signal.SIGKILL, look) == NOTHING:
        return NOTHING
    code = driver.wait(timeout=400)
    return NOTHING if code == 0 else f"exit {code}"  # 0: it had published everything


def cut_off_actor(run: Disturbed) -> str:
    """A node is cut off with its actors: it is lost for Ray, and they go on later, and still reach the disk."""
    return _cut_off(run, "ray::Scorer", "actor_lost")


def cut_off_rank(run: Disturbed) -> str:
    """A node is cut off with its ranks."""
    return _cut_off(run, "RayTrainWorker", "training_failed")


def _cut_off(run: Disturbed, title: str, told: str) -> str:
    lab, began = run.lab, time.time()
    nodes: list[Any] = []

    def there() -> bool:
        nodes[:] = [node for node in lab.nodes if lab.processes(title, [node])]
        return bool(nodes)

    if not run.wait_for(there) or run.ended():
        return NOTHING
    node = run.rng.choice(nodes)
    stopped = raylet(node)
    stopped.suspend()  # first: it would see its processes stop
    found = lab.processes(title, [node])
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    lab.nodes.remove(node)
    lab.add_node()
    try:
        # They are replaced, and their successors have done something.
        run.wait_for(lambda: any(event["event"] == told for event in run.events(began)))
        n = run.n_committed()
        _wait(lambda: run.ended() or run.n_committed() > n, 20)
        _let_go(run, [process.resume for process in found])
        time.sleep(3)
    finally:
        stopped.resume()
        changed = _changed(run)
        lab.cluster.remove_node(node, allow_graceful=False)
    return f"{len(found)} let go{changed}"


def suspend_driver(run: Disturbed) -> str:
    """The driver stops; on another machine the same command takes over after its lease has expired; it goes on later."""
    if not run.wait_for(lambda: run.driver is not None and _drives(run) == run.driver.pid) or run.ended():
        return NOTHING
    zombie = run.driver
    assert zombie is not None
    zombie.send_signal(signal.SIGSTOP)
    lab = run.lab
    lab.add_node()  # the actors and ranks of the one that is stopped keep theirs
    run.machine += 1
    run.start()
    try:
        run.wait_for(lambda: _drives(run) not in (None, zombie.pid))
        assert not run.ended(), run.tail()
        if run.rng.random() < 0.5:
            n = run.n_committed()
            _wait(lambda: run.ended() or run.n_committed() > n, 30)
            when = "in the middle"
        else:
            assert run.driver is not None
            run.driver.wait(timeout=400)
            when = "at the end"
        said = run.log.stat().st_size
        _let_go(run, [partial(zombie.send_signal, signal.SIGCONT)])
        code = zombie.wait(timeout=100)
    finally:
        zombie.kill()  # where it has not ended
        lab.cluster.remove_node(lab.nodes.pop(), allow_graceful=False)
    with run.log.open("rb") as log:
        log.seek(said)
        last_words = log.read().decode(errors="replace")
    if code == 0:
        return NOTHING  # it had nothing left to do
    assert code == Superseded.exit_code, f"exit {code}\n{last_words}"
    assert "has taken over" in last_words, last_words
    return f"let go {when}{_changed(run)}"


def _drives(run: Disturbed) -> int | None:
    """The process id of the driver that has the run."""
    for name in sorted(names_in(run.path / "driver"), reverse=True):
        with suppress(OSError, ValueError, DistalError):
            holder = read_json(run.path / "driver" / name)
            return None if holder["released"] else int(holder["pid"])
    return None


def _let_go(run: Disturbed, resumes: Sequence[Callable[[], None]]) -> None:
    run.kept = run.final()
    for resume in resumes:
        with suppress(psutil.NoSuchProcess):
            resume()


def _changed(run: Disturbed) -> str:
    """What is not as it was when a zombie was let go: nothing should be said."""
    now = run.final()
    changed = [path for path, written in run.kept.items() if now.get(path) != written]
    return f", {CHANGED} {changed[:3]}" if changed else ""


def _wait(there: Callable[[], bool], seconds: float) -> None:
    """Wait for something, so long at most."""
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)


def lose_node(run: Disturbed) -> str:
    """One of the two nodes that work goes away, and another one comes."""
    lab = run.lab
    node = lab.nodes.pop(run.rng.randrange(len(lab.nodes)))
    lab.cluster.remove_node(node, allow_graceful=False)
    time.sleep(run.rng.uniform(0, 2))
    lab.add_node()
    return ""


def lose_cluster(run: Disturbed) -> str:
    """Every process of Ray, and with them the driver; another cluster is started."""
    assert run.driver is not None
    run.lab.cluster.shutdown()
    try:
        run.driver.wait(timeout=100)
    finally:
        run.lab.start_cluster()
    return NOTHING if run.driver.returncode == 0 else f"exit {run.driver.returncode}"  # 0: it was complete


def damage_chunk(run: Disturbed) -> str:
    """The driver is killed, and a committed block is cut short or has a bit flipped."""
    kill_driver(run)
    chunks = [path for path in run.chunks() if not (path.parents[4] / "score.json").exists()]
    if not chunks:
        return NOTHING
    path = run.rng.choice(chunks)
    if run.rng.random() < 0.5:
        path.write_bytes(path.read_bytes()[: run.rng.randrange(20)])
    else:
        flip(path, run.rng.random())
    return str(path.relative_to(run.path))


def damage_finished(run: Disturbed) -> str:
    """The driver is killed, a bit is flipped in what is finished, and `distal repair` is run."""
    kill_driver(run)
    finished = {
        "{assignments}/assignments/c/*/*": "score.json",
        "{checkpoints}/*/weights-*.pt": "train.json",
        "{assignments}/eligible/c/*": "score.json",
        "{assignments}/margin/c/*/*": "score.json",
        "train/state.pt": "train.json",
        "scores.zarr/*/c/*": "reduce.json",
        "selection.parquet": "select.json",
        "labels.parquet": "label.json",
        "*.json": "train.json",
    }
    able = []
    for cycle in Run.open(run.path).begun_cycles():
        last = {"assignments": cycle.assignments.name, "checkpoints": cycle.checkpoints.name}
        patterns = [pattern.format(**last) for pattern, marker in finished.items() if (cycle.folder / marker).exists()]
        able += [(cycle.folder, pattern) for pattern in patterns if any(cycle.folder.glob(pattern))]
    if not able:
        return NOTHING
    cycle, pattern = run.rng.choice(able)
    path = run.rng.choice(sorted(path for path in cycle.glob(pattern) if path.name != "expected.json"))
    flip(path, run.rng.random())
    verified = subprocess.run(run.distal("verify", run.path), capture_output=True, check=False)
    assert verified.returncode == 4, path
    repaired = subprocess.run(run.distal("repair", run.path), capture_output=True, text=True, check=False)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    return str(path.relative_to(run.path))


def fill_disk(run: Disturbed) -> str:
    """Not a byte is left until the driver has ended with exit 2."""
    assert run.driver is not None
    if not run.mounted:
        return NOTHING
    filler = run.path / "events" / "filler"
    filler.parent.mkdir(exist_ok=True)
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**8, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    try:
        code = run.driver.wait(timeout=120)
    finally:
        filler.unlink()
    assert code in (0, 2), f"exit {code}\n{run.tail()}"
    return NOTHING if code == 0 else f"exit {code}"  # 0: it had nothing left to write


@dataclass(frozen=True)
class Fault:
    """What can strike.

    Attributes:
        strike: does it, and returns a note for people, or `NOTHING`.
        share: how often of a hundred.
        survived: whether the driver goes on by itself.
        command: whether there must be a training script (True), or ranks (False); None: it does not matter.
    """

    strike: Callable[[Disturbed], str]
    share: int
    survived: bool = False
    command: bool | None = None

    def fits(self, kind: Kind) -> bool:
        """Whether it can strike a run of this kind."""
        return self.command in (None, kind.command)


FAULTS: dict[str, Fault] = {
    "driver killed": Fault(kill_driver, 16),
    "driver stopped (SIGTERM)": Fault(stop_driver, 8),
    "actor killed": Fault(kill_actor, 16, survived=True),
    "actor stuck": Fault(stop_actor, 8, survived=True),
    "rank killed": Fault(kill_rank, 8, survived=True, command=False),
    "rank stuck": Fault(stop_rank, 4, survived=True, command=False),
    "training script killed": Fault(kill_command, 3, command=True),
    "node lost": Fault(lose_node, 8, survived=True),
    "cluster lost": Fault(lose_cluster, 4),
    "zombie actor": Fault(cut_off_actor, 4, survived=True),
    "zombie rank": Fault(cut_off_rank, 4, survived=True, command=False),
    "zombie driver": Fault(suspend_driver, 4),
    "unfinished block damaged": Fault(damage_chunk, 6),
    "finished file damaged": Fault(damage_finished, 5),
    "disk full": Fault(fill_disk, 4),
}


def deck(rng: random.Random, n: int, faults: Collection[str] = FAULTS) -> list[str]:
    """`n` of some faults in the shares of `FAULTS`, shuffled."""
    shares = {name: FAULTS[name].share for name in faults if name != "disk full" or os.getuid() == 0}
    total = sum(shares.values())
    wanted = [name for name, share in shares.items() for _ in range(-(-share * n // total))]
    rng.shuffle(wanted)
    return wanted[:n]


def answer(path: Path) -> dict[str, object]:
    """What a run came to.

    A training script that was started again has a folder of its own for its checkpoints, and for what is scored at
    them: the last one counts.
    """
    told = content(path)
    for cycle in Run.open(path).begun_cycles():
        folder = str(cycle.folder.relative_to(path))
        for plain, last in (("checkpoints", cycle.checkpoints.name), ("assignments.zarr", cycle.assignments.name)):
            stem, _, suffix = plain.partition(".")
            attempt = re.compile(rf"{folder}/({stem}(-\d+)?{suffix and '[.]' + suffix})/")
            attempts = {name: found[1] for name in told if (found := attempt.match(name))}
            counted = {name.replace(last, plain, 1): told[name] for name, its in attempts.items() if its == last}
            told = {name: value for name, value in told.items() if name not in attempts} | counted
    return told


def undisturbed(lab: Lab, kind: Kind) -> tuple[dict[str, object], float]:
    """What a run comes to that is left alone, and its seconds."""
    path = lab.folder / f"undisturbed-{kind.name}"
    run = Disturbed(lab, -1, path, kind, False, random.Random(0))
    path.mkdir()
    began = time.monotonic()
    run.finish()
    seconds = time.monotonic() - began
    told = answer(path)
    left_out = [cycle.left_out for cycle in Run.open(path).summary().cycles]
    assert all(n > 0 for n in left_out) == (kind.name == "elimination"), left_out
    shutil.rmtree(path)
    return told, seconds


def judge(run: Disturbed, strikes: list[Strike], expected: dict[str, object]) -> None:
    """Compare with the undisturbed run, and see what was done twice."""
    assert len(expected) > 6 * run.lab.cycles
    found, now = answer(run.path), run.chunks()
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    # With its margins a block's labels are written again, too.
    mended = {Path(str(strike.damaged).replace("/margin/c/", "/assignments/c/")) for strike in strikes}
    for strike, after in zip(strikes, [*strikes[1:], None][: len(strikes)], strict=True):
        strike.in_hand = run.in_hand(strike, after.began if after else float("inf"))
        same = {path for path, written in strike.committed.items() if now.get(path) == written}
        strike.rewritten = len(strike.committed.keys() - same - mended)
        strike.recovered = not different and "the driver ended" not in strike.note and CHANGED not in strike.note
        if strike.fault == "unfinished block damaged" and not _noticed(run, strike):
            strike.recovered, strike.note = False, f"{strike.note}: not noticed"
        if different:
            strike.note = f"{strike.note} differs: {different[:3]}"


def _noticed(run: Disturbed, strike: Strike) -> bool:
    """By the next driver; or by `distal repair`, when that was given before a driver had looked."""
    return any(
        event["event"] == "damaged_block" or str(strike.damaged) in event.get("deleted", ())
        for event in run.events(strike.began)
    )


def disturb(
    lab: Lab, number: int, faults: list[str], kind: Kind, expected: dict[str, object], seed: int
) -> list[Strike]:
    """One run, struck by some faults; those that found nothing to strike are not among what is returned."""
    rng = random.Random(f"{seed}-{number}")
    path = lab.folder / f"run-{number:02d}"
    strikes: list[Strike] = []
    with lab.disk(path) as mounted:
        run = Disturbed(lab, number, path, kind, mounted, rng)
        run.start()
        # Who trains is struck early; for the others the later moments are better: there is more to strike.
        faults = sorted(faults, key=lambda fault: FAULTS[fault].command is None)
        n_late = sum(FAULTS[fault].command is None for fault in faults)
        moments = triggers(rng, lab, kind)
        moments = moments[: len(faults) - n_late] + moments[len(moments) - n_late :]
        for fault, moment in zip(faults, moments, strict=True):
            if run.ended() and not run.go_on():
                run.start()
            if not run.wait_for(lambda moment=moment: any(path.glob(moment))) or run.ended():  # type: ignore[misc]
                assert run.driver is not None
                assert run.driver.returncode == 0, run.tail()
                break  # it was complete before
            time.sleep(rng.choice([0, 0, 0.05, 0.5]))
            before, n_before, began = run.chunks(), run.n_committed(), time.time()
            run.kept = {}
            note = FAULTS[fault].strike(run)
            if note == NOTHING:
                continue
            kept = {block: written for block, written in run.kept.items() if block.name.isdigit()}
            strike = Strike(number, fault, moment, note=note, began=began, committed={**kept, **before})
            strikes.append(strike)
            if fault.endswith("damaged"):
                strike.damaged = path / note
            if run.ended() and not run.go_on():
                run.start()
            survived = run.wait_for(lambda n_before=n_before: run.n_committed() > n_before, 200)  # type: ignore[misc]
            strike.seconds = time.time() - began
            if FAULTS[fault].survived and not survived and run.driver is not None and run.driver.returncode != 0:
                strike.note = f"{note} the driver ended with {run.driver.returncode}"
        run.finish()
        judge(run, strikes, expected)
    return strikes
