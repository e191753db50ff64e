"""The command line: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distal.cli import answer, app
from distal.errors import ConfigError
from distal.pool import Pool
from tests.helpers import distal, small_overrides, write_checkpoints, write_source

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
SCORE = str(ROOT / "configs" / "score.yaml")


def test_help_and_version() -> None:
    """That help answers quickly is held by tests/test_imports.py: nothing heavy is imported for it."""
    assert "Find the few thousand images" in distal("--help").stdout
    assert distal("--version").stdout.strip() == __import__("distal").__version__


def test_a_whole_run_on_its_own_ray(tmp_path: Path) -> None:
    """As a user types it: a Parquet file is packed, a cycle runs, and the same command again is complete.

    No environment is set here: the run starts a Ray of its own and secures it.
    """
    source = write_source(tmp_path / "train.parquet", 200, seed=1)
    command = [
        "run", CONFIG, "--json", f"run={tmp_path / 'run'}", f"pool.path={tmp_path / 'pool'}", f"pool.source={source}",
        f"eval.test={write_source(tmp_path / 'test.parquet', 60, seed=2)}", "loop.cycles=1", "loop.initial=20",
        "loop.budget=10", "train.epochs=2", "train.batch_size=10", "train.threads=1",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)  # Ray keeps its token there
    first = subprocess.run(
        [sys.executable, "-m", "distal", *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=250,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["state"] == "complete"
    assert [cycle["n_labeled"] for cycle in result["cycles"]] == [20]
    assert "cycle 0" in first.stderr
    assert (tmp_path / ".ray" / "auth_token").exists()

    again = distal(*command, "--log-json")
    assert again.returncode == 0
    assert json.loads(again.stderr)["line"].endswith(": complete")
    assert json.loads(again.stdout) == result

    told = distal("status", str(tmp_path / "run"), "--json")
    assert json.loads(told.stdout)["state"] == "complete"
    info = json.loads(distal("pool", "info", str(tmp_path / "pool"), "--json").stdout)
    assert (info["n_samples"], info["image_shape"]) == (200, [1, 12, 12])

    table = distal("run", *command[1:2], *command[3:])
    assert "ties: share of the batch that a tie-break decided" in table.stdout
    assert max(map(len, table.stdout.splitlines()[1:])) <= 80 + len(str(tmp_path))


def test_pool_build_with_other_columns(cluster: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = write_source(tmp_path / "a.parquet", 20, seed=3)
    pq.write_table(pq.read_table(source).rename_columns(["key", "picture", "target", "name"]), source)
    arguments = [
        "--image-column=picture",
        "--id-column=key",
        "--label-column=target",
        "--class-column=name",
        "--size=10x8",
    ]
    built = distal(
        "pool", "build", str(source), str(tmp_path / "pool"), *arguments, "--json", f"--ray-address={cluster}"
    )
    assert built.returncode == 0, built.stderr
    described = json.loads(built.stdout)
    assert described["image_shape"] == [1, 8, 10]
    assert list(described["classes"]) == ["circle", "cross", "dot", "line"]
    assert sum(described["classes"].values()) == described["n_labeled"] == 20


def test_score_then_reduce_and_select(cluster: str, pool: Pool, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "ck", pool, range(5))
    config = ROOT / "configs" / "score.yaml"
    overrides = [f"run={tmp_path / 'run'}", f"pool.path={pool.path}", f"checkpoints.path={tmp_path / 'ck'}"]
    overrides += ["model.name=small_cnn", "model.num_classes=4", "score.budget=10", f"ray.address={cluster}"]
    refused = distal("score", str(config), *overrides)
    assert refused.returncode == 2
    assert "model.normalize: 3 values of mean and std, and the images have 1 channel" in refused.stderr
    overrides += ["model.normalize=pool", "score.precision=fp32", "score.batch_size=32"]
    result = distal("score", str(config), *overrides, "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["state"], told["checkpoints"], told["images_scored"]) == ("complete", 5, 5 * 238)
    assert json.loads(distal("status", told["run"], "--json").stdout)["state"] == "complete"
    reduced = json.loads(distal("reduce", told["run"], "--measure=gini", "--last=0.5", "--json").stdout)
    assert reduced["analyses"][0]["checkpoints"] == 3
    chosen = json.loads(distal("select", told["run"], "--budget=10", "--json").stdout)
    assert chosen["selection_sha256"] == told["selection_sha256"]
    empty = distal("select", told["run"], "--budget=10", "--from=9")
    assert empty.returncode == 2
    assert "window from=9 selects no checkpoint: there are 5" in empty.stderr
    plan = json.loads(distal("plan", str(config), *overrides, "--json").stdout)
    assert plan["forwards"] == told["images_scored"]


def test_init_writes_a_configuration_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mine.yaml"
    assert json.loads(distal("init", str(tmp_path / "other.yaml"), "--json").stdout) == {
        "path": str(tmp_path / "other.yaml")
    }
    assert f"next: distal run {path}" in " ".join(distal("init", str(path)).stdout.split())
    from distal.config import load

    load(path)
    again = distal("init", str(path))
    assert again.returncode == 2
    assert "there is a file already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "missing.yaml: no such file; `distal init missing.yaml` writes one for `distal run`"),
        (["run", CONFIG, "trian.lr=1"], "unknown key trian; known keys: device, durable, eval, label, loop"),
        (["run", CONFIG, "loop.budget=0"], "loop.budget must be greater than or equal to 1, got 0"),
        (["run", CONFIG, "pool.source=null", "pool.path=/no/pool"], "/no/pool: no such pool; make it with"),
        (["run", CONFIG, "pool.path=s3://bucket/pool"], "only local and shared file systems"),
        (["run", CONFIG, f"run={CONFIG}"], "quickstart.yaml"),
        (["score", CONFIG], "model.num_classes is missing; set it in the file or as model.num_classes=..."),
        (["score", SCORE, "pool.classes=[a]"], "unknown key pool.classes; known keys: pool.block_size, pool.exclude"),
        (["score", SCORE, "--expect-accuracy=0.5"], "--expect-accuracy needs --check FILE"),
        (["score", SCORE, "pool.path=/no/pool"], "/no/pool: no such pool"),
        (["submit", CONFIG, "--address=http://127.0.0.1:1"], "run: 'runs/quickstart' is relative, and a submitted job"),
        (
            ["submit", CONFIG, "--address=http://127.0.0.1:1", "run=/r", "pool.path=/p"],
            "no dashboard of a Ray cluster at http://127.0.0.1:1 ([Errno 111] Connection refused)",
        ),
        (["init", f"{CONFIG}/mine.yaml"], "quickstart.yaml: file exists; give a path that can be used"),
        (["status", CONFIG], "quickstart.yaml/run.yaml: not a directory"),
        (["status", "/no/run"], "/no/run: no run here (run.yaml is missing)"),
        (["pool", "info", "/no/pool"], "/no/pool: no such pool"),
        (["pool", "build", "builtin:fashion-mnist-12k", "/tmp/x", "--size=0x5"], "--size must be WIDTHxHEIGHT"),
    ],
)
def test_mistakes_get_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    result = distal(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("distal: ")
    assert message in line


def test_mistakes_as_json() -> None:
    result = distal("status", "/no/run", "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout) == {
        "state": "error",
        "error": "/no/run: no run here (run.yaml is missing); start one with `distal run CONFIG`",
        "exit_code": 2,
    }


def test_a_fault_of_ours_is_json_too_and_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answer, "_stop_on_signals", lambda *_: None)

    def fail() -> dict[str, object]:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        answer.answer(fail, True, str)
    assert json.loads(capsys.readouterr().out) == {"state": "error", "error": "'a bug'", "exit_code": 1}


def test_a_parquet_without_the_image_column(cluster: str, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    source = write_source(tmp_path / "a.parquet", 5, seed=3)
    pq.write_table(pq.read_table(source).rename_columns(["sample_id", "picture", "label", "class_name"]), source)
    result = distal("pool", "build", str(source), str(tmp_path / "pool"), f"--ray-address={cluster}")
    assert result.returncode == 2
    assert "no column 'image'; it has sample_id, picture, label, class_name" in result.stderr
    assert not (tmp_path / "pool").exists()


def test_damage_exits_4(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text("{")
    result = distal("pool", "info", str(tmp_path))
    assert result.returncode == 4
    assert "pool.json: not valid JSON" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once_and_says_how_to_continue(
    cluster: str, pool: Pool, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    overrides = [*small_overrides(tmp_path / "run", pool, None), f"ray.address={cluster}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "distal", "run", CONFIG, *overrides, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "run.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert json.loads(output)["exit_code"] == code
    assert f"stopped by {number.name}; continue with: distal run {CONFIG}" in errors.splitlines()[-1]


def test_a_window_that_is_none_takes_one_line() -> None:
    done = distal("reduce", "nowhere", "--last=nan")
    assert done.returncode == 2
    assert "--last=nan: must be a whole number of checkpoints" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for last in (float("inf"), -1.0, 0.0, 2.5):
        with pytest.raises(ConfigError, match=r"^--last=\S+: must be a whole number"):
            app._window(0, last, 1)
