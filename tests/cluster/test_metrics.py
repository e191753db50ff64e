"""What Prometheus gets to see, and the board and the alerts that are made from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distal.cluster import metrics
from distal.cluster.metrics import METRICS, Meter
from distal.pool import Pool
from distal.records import Progress
from tests.helpers import small_overrides

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
EXPORTED = {metric.exported: metric for metric in METRICS}

TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+(?:\.\d+)?)(?![a-z])|(?P<duration>\[\d+[smhd]\])|(?P<string>"[^"]*")"""
    r"""|(?P<name>[a-z_][a-z0-9_]*)|(?P<sign>=~|!=|==|>=|<=|[-+*/<>(){},=]))"""
)
AGGREGATIONS = {"sum", "max", "min", "avg", "count"}
OF_COUNTERS, OF_GAUGES = {"rate", "increase"}, {"delta", "deriv"}
OPERATORS = {"+", "-", "*", "/", ">", "<", ">=", "<=", "==", "!=", "and", "or", "unless"}


class PromQL:
    """Reads the part of the language that the board and the rules use; whatever else is said is an error.

    Attributes:
        names: the metrics that an expression reads.
    """

    def __init__(self, text: str) -> None:
        self.names: list[str] = []
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            found = TOKEN.match(text, at)
            assert found, f"{text}: cannot be read at {text[at:]!r}"
            at = found.end()
            assert found.lastgroup is not None
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
        self._expression()
        assert not self._tokens, f"{text}: ends before {self._tokens[0]}"

    def _next(self) -> str:
        return self._tokens[0][1] if self._tokens else ""

    def _take(self, *expected: str) -> str:
        kind, text = self._tokens.pop(0)
        assert not expected or kind in expected or text in expected, f"{text!r}, where {expected} should be"
        return text

    def _expression(self) -> None:
        self._term()
        while self._next() in OPERATORS:
            self._take()
            self._term()

    def _term(self) -> None:
        if self._tokens[0][0] == "number":
            self._take()
        elif self._next() == "(":
            self._take()
            self._expression()
            self._take(")")
        elif self._next() in AGGREGATIONS:
            self._take()
            labels = self._labels() if self._next() == "by" else []
            before = len(self.names)
            self._take("(")
            self._expression()
            self._take(")")
            for name in self.names[before:]:
                assert set(labels) <= set(EXPORTED[name].tags), f"{name} has no label {labels}"
        elif self._next() == "time":
            for part in ("time", "(", ")"):
                self._take(part)
        elif self._next() in OF_COUNTERS | OF_GAUGES:
            function = self._take()
            self._take("(")
            self._selector()
            self._take("duration")
            self._take(")")
            assert EXPORTED[self.names[-1]].kind == ("counter" if function in OF_COUNTERS else "gauge")
        else:
            self._selector()
            assert EXPORTED[self.names[-1]].kind == "gauge", "a counter alone says nothing"

    def _labels(self) -> list[str]:
        self._take("by")
        self._take("(")
        labels = [self._take("name")]
        while self._next() == ",":
            self._take()
            labels.append(self._take("name"))
        self._take(")")
        return labels

    def _selector(self) -> None:
        name = self._take("name")
        assert name in EXPORTED, f"{name} is not in distal/cluster/metrics.py"
        self.names.append(name)
        if self._next() == "{":
            self._take()
            assert self._take("name") in EXPORTED[name].tags
            self._take("=", "=~", "!=")
            self._take("string")
            self._take("}")


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(ray_distal_images_scored_total[1m])",
        "ray_distal_images_scored_total > 0",
        "rate(ray_distal_cycle[1m])",
        "rate(ray_distal_images_scored_total)",
        "max by (shard) (ray_distal_cycle)",
        "ray_distal_cycles",
        "ray_distal_cycle ? 1",
        "ray_distal_cycle 1",
        "time() - ray_distal_images_scored_total",
        "time(1) - ray_distal_cycle",
    ],
)
def test_the_reader_of_expressions_refuses(wrong: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        PromQL(wrong)


def board_names() -> set[str]:
    """Every metric of the board, its expressions read."""
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "run"}
    names = re.findall(r"label_values\((\w+), run\)", json.dumps(board["templating"]))
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["description"].endswith(".")
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            found = PromQL(target["expr"]).names
            assert target["expr"].count('{run=~"$run"}') == len(found), "it would show every run"
            names += found
    return set(names)


def test_the_board_shows_what_there_is() -> None:
    assert board_names() == set(EXPORTED)


def test_the_alerts_ask_for_what_there_is() -> None:
    configuration = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (file,) = configuration["rule_files"]
    (group,) = yaml.safe_load((MONITORING / file).read_text())["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert PromQL(rule["expr"]).names
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    assert [rule["alert"] for rule in group["rules"]] == [
        "DistalNoProgress", "DistalScoringLagGrows", "DistalBlocksRetried", "DistalQuarantined",
    ]  # fmt: skip


def test_the_documentation_lists_them() -> None:
    assert metrics.table() in (ROOT / "docs" / "monitoring.md").read_text(), (
        "python -m distal.cluster.metrics prints the table"
    )


def test_names_say_what_they_count_and_in_which_unit() -> None:
    assert len(EXPORTED) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"distal_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total"), "Ray puts it there, and once only"


def test_a_meter_hands_on_once_a_second_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    told: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    for kind in (metrics.Counter, metrics.Gauge):
        method = "inc" if kind is metrics.Counter else "set"
        monkeypatch.setattr(kind, method, lambda self, value, tags: told.append((self.info["name"], value, tags)))
    actor, driver = Meter("mine", 3), Meter("mine")
    for meter in (actor, driver):
        meter.tell()
    actor.add(metrics.READ_BYTES, 5)
    actor.add(metrics.READ_BYTES, 6)
    actor.add(metrics.WAIT_SECONDS, 0.0)
    driver.progress(Progress(1, "score", published=4, rows_scored=1, train_loss=0.25))
    actor.tell()
    assert told == []
    now += 1
    actor.tell()
    actor.tell(now=True)
    assert told == [("distal_read_bytes", 11, {"run": "mine", "shard": "3"})]
    told.clear()
    driver.tell()
    expected = [3, 1, 0.25]
    names = [f"distal_{name}" for name in ("scoring_lag_checkpoints", "cycle", "train_loss")]
    values = {name: value for name, value, tags in told if tags == {"run": "mine"}}
    assert [values[name] for name in names] == expected
    told.clear()
    now += 1
    driver.tell()
    assert {name: value for name, value, _ in told} == values, "a gauge is set again, and again"


def test_progress_is_what_was_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the driver; a look that finds nothing new is none."""
    now = 1000.0
    monkeypatch.setattr(metrics.time, "time", lambda: now)
    meter = Meter("mine")
    seen = []
    states = [
        Progress(0, "score", published=1),
        Progress(0, "score", published=1, images_per_s=7.0, actors=2, actors_starting=1, blocks_retried=3),
        Progress(0, "score", published=2),
        Progress(0, "score", published=2, blocks_done=1),
        Progress(0, "score", published=2, blocks_done=1, blocks_pending=9),
        Progress(0, "reduce", published=2, blocks_done=1),
        Progress(0, "reduce", published=2, blocks_done=1, images_scored=5),
        Progress(1, "reduce", published=2, blocks_done=1, images_scored=5),
    ]
    for state in states:
        now += 1
        meter.follow(state)
        seen.append(meter._gauges[metrics.LAST_PROGRESS])
    assert seen == [1001, 1001, 1003, 1004, 1004, 1006, 1007, 1008]
    now += 1
    meter.progressed()
    assert meter._gauges[metrics.LAST_PROGRESS] == 1009


SCRAPE_LATE = """
import json, time, urllib.request
import ray
from distal.cluster import metrics

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, namespace="distal")
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

def page():
    try:
        return urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        return ""  # the agent is starting

with metrics.Meter("mine") as meter:
    for number, metric in enumerate(metrics.METRICS, 1):
        if metric.kind == "gauge":
            meter.set(metric, number)
    while "ray_distal" not in page():
        time.sleep(0.2)
    time.sleep(3)  # three report intervals in which nothing changes
    late = page()
while "ray_distal" in page():
    time.sleep(0.2)
print(json.dumps(late))
"""


def test_a_gauge_is_there_however_long_nothing_changes() -> None:
    """Scraped late, and until the gauges end with the driver's work, from a Ray that reports once a second."""
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRAPE_LATE], capture_output=True, text=True, env=environment, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    late = json.loads(ran.stdout.splitlines()[-1])
    found = {
        sample.name: (sample.value, sample.labels["run"])
        for family in text_string_to_metric_families(late)
        for sample in family.samples
        if sample.name.startswith("ray_distal")
    }
    numbered = enumerate(METRICS, 1)
    assert found == {metric.exported: (number, "mine") for number, metric in numbered if metric.kind == "gauge"}


def test_without_a_cluster_it_goes_nowhere_and_costs_nothing() -> None:
    """In a process of its own: here Ray may be connected."""
    code = """
from unittest.mock import patch
from distal.cluster import metrics
meter = metrics.Meter("alone", 0)
with (
    patch.object(metrics, "time") as clock,
    patch.object(metrics, "_instrument", wraps=metrics._instrument) as handed,
):
    clock.monotonic.side_effect = (n / 10_000 for n in range(20_000))  # two seconds
    for _ in range(10_000):
        meter.add(metrics.FORWARD_SECONDS, 0.1)
        meter.tell()
print(handed.call_count)
meter.set(metrics.CYCLE, 1)
meter.tell(now=True)
import ray
assert not ray.is_initialized()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert int(told.stdout) <= 3  # Ray is called once a second at most


RUN_AND_SCRAPE = """
import json, sys, threading, time, urllib.request
import numpy as np
import ray
from distal.driver import run as driver
from distal.config import load
from distal.cli.terminal import JsonLines

ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, namespace="distal")
(node,) = ray.nodes()
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
pages = []
done = threading.Event()

def scrape():
    while not done.wait(0.5):
        try:
            pages.append(urllib.request.urlopen(url, timeout=5).read().decode())
        except OSError:
            pass  # the agent is starting

class Slow:
    needs = ()

    def select(self, candidates, budget, rng):
        time.sleep(5)  # five report intervals
        late.append(len(pages))
        return np.arange(budget)

late = []
slow = type(sys)("slow")
slow.Slow = Slow
sys.modules["slow"] = slow
threading.Thread(target=scrape, daemon=True).start()
result = driver.run(load(sys.argv[1], sys.argv[2:]), JsonLines())
time.sleep(5)  # the driver's last word arrives
done.set()
late = [pages[n] for n in late]
print(json.dumps({"pages": [page for page in pages if "ray_distal" in page], "late": late, "result": result.to_record()}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_scraped_page_has_every_metric_of_the_board(pool: Pool, test_pool: Pool, tmp_path: Path) -> None:
    """A run on a Ray of its own, its metrics port read twice a second; its events come out as JSON lines."""
    overrides = [*small_overrides(tmp_path / "mine", pool, test_pool), "train.epochs=6", "select.batch=slow:Slow"]
    command = [sys.executable, "-c", RUN_AND_SCRAPE, str(ROOT / "configs" / "quickstart.yaml"), *overrides]
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "1000"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    seen: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    last: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for page in told["pages"]:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name.startswith("ray_distal"):
                    tags = tuple(sample.labels[name] for name in EXPORTED[sample.name].tags)
                    seen[sample.name].add(tags)
                    last[sample.name][(*tags, sample.labels["WorkerId"])] = sample.value
    assert board_names() <= set(seen), board_names() - set(seen)
    for name, tags in seen.items():
        assert {each[0] for each in tags} == {"mine"}
        assert len(tags) <= (3 if EXPORTED[name].kind == "counter" else 1), "as many series as there are actors"

    for page in told["late"]:  # at the end of a stage in which nothing changed
        there = {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}
        gauges = {metric.exported for metric in METRICS if metric.kind == "gauge"}
        assert gauges <= there, gauges - there
    assert len(told["late"]) == 2

    values = {name: next(iter(by.values())) for name, by in last.items() if EXPORTED[name].kind == "gauge"}
    first, second = told["result"]["cycles"]
    assert values["ray_distal_cycle"] == 1
    assert values["ray_distal_labelled_samples"] == second["n_labeled"] == 40
    assert values["ray_distal_test_accuracy"] == second["test"]["accuracy"]
    assert values["ray_distal_quarantined_samples"] == 2
    assert values["ray_distal_checkpoints_scored"] == values["ray_distal_checkpoints_published"] == 6
    assert (values["ray_distal_blocks_done"], values["ray_distal_blocks_pending"]) == (6 * 4, 0)
    counted = sum(last["ray_distal_images_scored_total"].values())
    n_images = first["images_scored"] + second["images_scored"] + 2 * 100
    assert 0.5 * n_images < counted <= n_images  # an actor that is stopped takes its last second with it
    assert sum(last["ray_distal_labels_written_total"].values()) <= n_images

    (log,) = (tmp_path / "mine" / "events").iterdir()
    lines = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("{")]
    events = [line for line in lines if line["event"] not in ("progress", "say")]
    assert events == [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line["event"] == "progress" and line["images"] for line in lines)
