from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from distal.config import load_portable, parse
from distal.driver.submit import CONFIG, shipped
from distal.errors import ConfigError
from distal.pool import Pool
from tests.helpers import (
    content,
    foreign_config,
    free_ports,
    ray_head,
    small_config,
    small_overrides,
    wait_until,
    write_checkpoints,
)

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

NET = """
import torch
from widths import WIDTH

def build(num_classes, image_shape):
    channels, height, width = image_shape
    layers = [torch.nn.Flatten(), torch.nn.Linear(channels * height * width, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, num_classes))
"""


class TestRelativePaths:
    """They would land in the scratch folder of the job."""

    @pytest.mark.parametrize(
        ("override", "name"),
        [
            ("run=runs/a", "run"),
            ("pool.path=../pool", "pool.path"),
            ("eval.test=file://test.parquet", "eval.test"),
            ("loop.initial=first.csv", "loop.initial"),
            ("pool.classes=names.txt", "pool.classes"),
            ("model.weights=weights.pt", "model.weights"),
        ],
    )
    def test_are_refused_by_name(self, override: str, name: str) -> None:
        absolute = ["run=/data/run", "pool.path=/data/pool"]
        with pytest.raises(ConfigError, match=rf"^{name}: '.*' is relative, .* \({name}=/...\)$"):
            load_portable(QUICKSTART, [*absolute, override])

    def test_absolute_ones_are_taken(self) -> None:
        config = load_portable(QUICKSTART, ["run=file:///data/run", "pool.path=/data/pool", "model.weights=DEFAULT"])
        assert (config.run, config.pool.source) == ("/data/run", "builtin:fashion-mnist-12k")
        score = load_portable(
            ROOT / "configs" / "score.yaml", ["run=/r", "pool.path=/p", "checkpoints.path=/c", "pool.exclude=null"]
        )
        assert score.places() == {"run": "/r", "pool.path": "/p", "checkpoints.path": "/c"}


class TestShipped:
    """What is sent: the configuration, the user's modules, and nothing else."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        files = {
            "nets/resnet.py": "from . import parts\nimport torch, helpers\n",  # no __init__.py
            "nets/parts.py": "def build(): from out.head import Head\n",
            "nets/weights.pt": "data",
            "helpers.py": "import distal, nets.resnet\n",
            "out/__init__.py": "",
            "out/head.py": "import numpy.linalg\n",
            "unused.py": "",
            "distal/__init__.py": "",
            "pools/mine/pool.json": "{}",
            "runs/mine/run.yaml": "",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_only_the_configuration(self, folder: Path, pool: Pool) -> None:
        config = small_config(folder / "runs" / "mine", pool, None, "ray.address=10.0.0.1:6379")
        ((name, text),) = shipped(config, folder).items()
        assert name == CONFIG
        record = yaml.safe_load(text)
        assert record["ray"] == {"address": "local"}  # which is the cluster that runs the job
        assert parse(record).result_keys() == config.result_keys()
        assert parse(record).places() == config.places()

    def test_modules_and_what_they_import(self, folder: Path, pool: Pool) -> None:
        config = small_config(folder / "runs" / "mine", pool, None, "model.name=nets.resnet:build")
        sent = shipped(config, folder)
        assert set(sent) == {
            CONFIG,
            "nets/resnet.py",
            "nets/parts.py",
            "helpers.py",
            "out/__init__.py",
            "out/head.py",
        }
        assert sent["helpers.py"] == (folder / "helpers.py").read_bytes()

    def test_every_key_that_names_a_function(self, folder: Path, pool: Pool) -> None:
        config = foreign_config(
            folder / "run", pool, folder, "model.normalize=helpers:scale", "model.output=unused:logits"
        )
        assert {"helpers.py", "unused.py"} < set(shipped(config, folder))
        strategy = small_config(folder / "run", pool, None, "select.batch=unused:Mine")
        assert set(shipped(strategy, folder)) == {CONFIG, "unused.py"}
        elsewhere = small_config(folder / "run", pool, None, "model.name=torchvision.models:resnet18")
        assert set(shipped(elsewhere, folder)) == {CONFIG}

    def test_a_command_of_local_files_is_refused(self, folder: Path, pool: Pool) -> None:
        config = small_config(folder / "run", pool, None, "train.command=python unused.py {labels} {checkpoints}")
        with pytest.raises(ConfigError, match="train.command: 'unused.py' is a file of this directory"):
            shipped(config, folder)
        with pytest.raises(ConfigError, match="cannot be split into words"):
            shipped(small_config(folder / "run", pool, None, "train.command=python 'x {checkpoints}"), folder)
        absolute = small_config(folder / "run", pool, None, "train.command=python /data/train.py {checkpoints}")
        assert set(shipped(absolute, folder)) == {CONFIG}

    def test_a_comparison(self, folder: Path) -> None:
        """It is read again as what it was, and brings the strategies of the user's own."""
        config = load_portable(
            ROOT / "configs" / "compare-fashion-mnist.yaml",
            ["run=/data/c", "pool.path=/data/p", "compare.strategies.mine={batch: 'unused:Mine'}"],
        )
        assert config.command == "compare"
        sent = shipped(config, folder)
        assert set(sent) == {CONFIG, "unused.py"}
        (folder / CONFIG).write_bytes(sent[CONFIG])
        again = load_portable(folder / CONFIG)
        assert again.command == "compare"
        assert again.digest("") == config.digest("")

    def test_a_module_that_cannot_be_read(self, folder: Path, pool: Pool) -> None:
        (folder / "unused.py").write_text("def\n")
        config = small_config(folder / "run", pool, None, "model.name=unused:build")
        with pytest.raises(ConfigError, match=r"unused.py: cannot be imported \(invalid syntax"):
            shipped(config, folder)


@dataclass(frozen=True)
class Head:
    """A cluster of one node with a dashboard, and how to talk to it."""

    address: str
    environment: dict[str, str]

    def submit(
        self, *arguments: str, config: Path = QUICKSTART, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments, config=config),
            capture_output=True,
            text=True,
            cwd=cwd,
            env=self.environment | environment,
            timeout=280,
            check=False,
        )

    def command(self, *arguments: str, config: Path = QUICKSTART) -> list[str]:
        return [sys.executable, "-m", "distal", "submit", str(config), "--address", self.address, *arguments]

    def shell(self, command: str) -> str:
        done = subprocess.run(
            command, shell=True, capture_output=True, text=True, env=self.environment, timeout=60, check=True
        )
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` on loopback with a token, with ports and a directory of its own, ended by its id."""
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("runtime-env-agent-port", "metrics-export-port", "ray-client-server-port")
    ports = free_ports(len(names))
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    folder = tempfile.mkdtemp(prefix="home", dir="/tmp")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": folder,
        "RAY_AUTH_TOKEN": secrets.token_hex(24),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    try:
        with ray_head(environment | {"RAY_AUTH_MODE": "token"}, "--num-cpus=2", *options):
            yield Head(f"http://127.0.0.1:{ports[1]}", environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
class TestOnARealCluster:
    def test_mistakes_get_one_line_and_exit_2(self, head: Head, pool: Pool, tmp_path: Path) -> None:
        overrides = small_overrides(tmp_path / "run", pool, None)
        refused = "to what `ray get-auth-token` prints on the head"
        for result, expected in [
            (head.submit(*overrides, RAY_AUTH_TOKEN="wrong"), "refuses this token; set RAY_AUTH_MODE=token, and"),
            (head.submit(*overrides, RAY_AUTH_TOKEN="wrong"), refused),
            (head.submit(*overrides, RAY_AUTH_TOKEN=""), f"{head.address} asks for a token; set RAY_AUTH_MODE"),
            (head.submit(*overrides, RAY_AUTH_MODE="disabled"), f"{head.address} asks for a token; set RAY_AUTH_MODE"),
            (head.submit(*overrides, "run=runs/relative"), "run: 'runs/relative' is relative"),
            (head.submit(*overrides, "--address=http://127.0.0.1:1"), "no dashboard of a Ray cluster at http://127.0."),
            (head.submit(*overrides, f"--address={head.address[7:]}"), "(not http://HOST:PORT)"),
        ]:
            assert result.returncode == 2
            assert result.stdout == ""
            (line,) = result.stderr.splitlines()
            assert line.startswith("distal: ")
            assert expected in line
            assert "0.0.0.0" not in line

    def test_a_token_in_a_file(self, head: Head, pool: Pool, tmp_path: Path) -> None:
        """The exit code of the job is that of --wait, and its log is shown."""
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(head.environment["RAY_AUTH_TOKEN"])
        overrides = small_overrides(tmp_path / "run", pool, None)
        ours = {
            "HOME": str(tmp_path),
            "RAY_AUTH_TOKEN": "",
            "RAY_ADDRESS": "10.0.0.1:6379",
        }  # not the one that is given
        result = head.submit(*overrides, "pool.path=/no/pool", "--wait", "--json", **ours)
        assert result.returncode == 2, result.stderr
        told = json.loads(result.stdout)
        assert (told["state"], told["exit_code"]) == ("failed", 2)
        assert "distal: /no/pool: no such pool" in result.stderr

    @pytest.mark.timeout(600)
    def test_a_comparison_and_scoring_that_waits(self, head: Head, pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
        """The section of a configuration says which command the job is."""
        strategies = {"random": {"measure": "random"}, "entropy": {"measure": "entropy"}}
        comparing = small_config(tmp_path / "comparison", pool, test_pool).to_record()
        comparing["compare"] = {"strategies": strategies, "seeds": 1}
        write_checkpoints(tmp_path / "checkpoints", pool, [0, 1])
        waiting = foreign_config(tmp_path / "scores", pool, tmp_path / "checkpoints", "checkpoints.idle=3").to_record()
        for record, options, told in [
            (comparing, (), f"report: {tmp_path}/comparison/report.md"),
            (waiting, ("--watch",), "no new checkpoint for 3 s"),
        ]:
            config = tmp_path / "config.yaml"
            config.write_text(yaml.safe_dump(record))
            result = head.submit("--wait", *options, config=config)
            assert result.returncode == 0, result.stderr
            assert told in result.stderr
        refused = head.submit("--watch", *small_overrides(tmp_path / "run", pool, None))
        assert refused.returncode == 2
        assert refused.stderr == f"distal: --watch: {QUICKSTART} is for `distal run`; leave it out\n"

    @pytest.mark.timeout(900)
    def test_stopped_in_the_middle_and_submitted_again(
        self, head: Head, pool: Pool, test_pool: Pool, tmp_path: Path
    ) -> None:
        """With a network of the user's own; the answer is that of a local run."""
        (tmp_path / "net.py").write_text(NET)
        (tmp_path / "widths.py").write_text("WIDTH = 12\n")
        run = tmp_path / "run"
        overrides = [*small_overrides(run, pool, test_pool), "model.name=net:build", "loop.cycles=3"]
        process = subprocess.Popen(
            head.command(*overrides, "--wait", "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=head.environment,
        )
        wait_until(lambda: process.poll() is not None or list(run.glob("cycles/000/checkpoints/*/manifest.json")))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == json.loads(output)["exit_code"] == 130, errors
        stop = errors.splitlines()[-1].partition("stopped by SIGINT; the job goes on, stop it with: ")[2]
        job = stop.split()[-1]

        refused = head.submit(*overrides, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith(
            f"distal: {run}: {job} is working on this run (running); wait"
        )

        head.shell(stop)
        assert f"{job}' was stopped" in head.shell(stop.replace(" stop ", " status "))
        assert "stopped by SIGTERM; submit it again to go on" in head.shell(stop.replace(" stop ", " logs "))
        assert not (run / "cycles" / "002" / "select.json").exists()

        again = head.submit(*overrides, "--wait", "--json", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        told = json.loads(again.stdout)
        assert (told["state"], told["exit_code"], told["run"]) == ("succeeded", 0, str(run))
        assert told["job"] != job
        assert f"{run}: complete" in again.stderr
        assert f"{run}: complete" in head.shell(told["commands"]["logs"])

        local = [sys.executable, "-m", "distal", "run", str(QUICKSTART), *overrides, f"run={tmp_path / 'local'}"]
        subprocess.run(local, cwd=tmp_path, env=head.environment, capture_output=True, timeout=280, check=True)
        assert content(run) == content(tmp_path / "local")
        assert [path.name for path in sorted(run.glob("cycles/*/selection.parquet"))] == ["selection.parquet"] * 3
