"""The keys of `--json`, command by command: programs read them, so they stay.

After a change that adds a key: `python -m tests.cli.test_json FOUND`, where FOUND is the file that the failed test
names; look at the difference before it is committed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from distal.artifacts.runs import Run
from distal.cli.app import app
from distal.pool import Pool
from tests.helpers import flip, foreign_config, small_config, write_checkpoints
from tests.labels.waiting import waiting_run

KEYS = Path(__file__).with_name("json_keys.json")


def keys(value: Any) -> Any:
    """The keys of an object and of those in it; of a list those of its elements, each once."""
    if isinstance(value, dict):
        return {name: keys(each) for name, each in value.items()}
    if isinstance(value, list):
        found = [keys(each) for each in value]
        return [each for place, each in enumerate(found) if each not in found[:place]]
    return "value"


def answer(*command: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, command), "--json"])
    return keys(json.loads(result.stdout))


@pytest.fixture(autouse=True)
def _keep_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distal.cli.answer._stop_on_signals", lambda *_: None)


def written(path: Path, config: BaseModel) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)))
    return path


def check(section: str, found: dict[str, Any], folder: Path) -> None:
    expected = json.loads(KEYS.read_text())
    kept = folder / "keys.json"
    kept.write_text(json.dumps({**expected, section: found}, indent=1) + "\n")
    assert found == expected[section], f"the keys that were found are in {kept}"


def test_the_keys_stay(small_run: Path, pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    of_run = written(tmp_path / "run.yaml", small_config(run, pool, test_pool, "score.actors=auto"))
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    first = Run.open(run).cycle(0).chosen().sample_ids[0]
    found: dict[str, Any] = {
        "init": answer("init", tmp_path / "new.yaml"),
        "pool info": answer("pool", "info", pool.path),
        "run": answer("run", of_run),
        "plan run": answer("plan", of_run),
        "status": answer("status", run),
        "status --watch": answer("status", run, "--watch"),
        "explain chosen": answer("explain", run, first),
        "explain unreadable": answer("explain", run, ids[7]),
        "explain others": [answer("explain", run, name) for name in ids[20:24]],
        "diff": answer("diff", run, run),
        "reduce": answer("reduce", run, "--measure=gini", "--measure=flips@last=0.75"),
        "select": answer("select", run, "--measure=gini", "--budget=9"),
        "informativeness": answer("informativeness", run, f"--out={tmp_path / 'out'}"),
        "tensorboard": answer("tensorboard", run, f"--out={tmp_path / 'board'}"),
        "verify": answer("verify", run),
        "verify pool": answer("verify", pool.path),
        "repair sound": answer("repair", run),
        "repair pool": answer("repair", pool.path),
        "refused": answer("status", tmp_path / "nothing"),
    }
    flip(run / "cycles/001/select.json")
    (run / "cycles/000/labels.parquet").unlink()
    found["verify damaged"] = answer("verify", run)
    found["repair"] = answer("repair", run)
    found["status repaired"] = answer("status", run)

    waiting = waiting_run(tmp_path / "waiting", pool, range(20, 40))
    found["labels export"] = answer("labels", "export", waiting.path, f"--out={tmp_path / 'batch.csv'}")
    rows = [f"{name},circle" for name in ids[20:25]]
    (tmp_path / "answers.csv").write_text("\n".join(["sample_id,label", *rows]) + "\n")
    found["labels import"] = answer("labels", "import", waiting.path, tmp_path / "answers.csv")
    found["status waiting"] = answer("status", waiting.path)
    check("run", found, tmp_path)


def test_the_keys_of_score_stay(cluster: str, pool: Pool, tmp_path: Path) -> None:
    ids = pool.samples(0, 240)["sample_id"].to_pylist()
    found: dict[str, Any] = {}
    write_checkpoints(tmp_path / "ck", pool, range(3))
    scored = written(tmp_path / "score.yaml", foreign_config(tmp_path / "scored", pool, tmp_path / "ck"))
    found["plan score"] = answer("plan", scored)
    found["score"] = answer("score", scored)
    found["score again"] = answer("score", scored)
    found["score --no-select"] = answer("score", scored, "--no-select")
    found["status of score"] = answer("status", tmp_path / "scored")
    found["explain of score"] = answer("explain", tmp_path / "scored", ids[7])
    check("score", found, tmp_path)


if __name__ == "__main__":
    shutil.copyfile(sys.argv[1], KEYS)
