"""The round trip through a real Label Studio server, in an environment of its own, on loopback."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distal.artifacts.runs import Run
from distal.driver import run as driver
from distal.labels.waiting import export_labels, import_labels
from distal.pool import Pool
from distal.pool.build import build
from tests.helpers import CLASSES, free_ports, small_config, write_source

TOKEN = "0123456789abcdef0123456789abcdef01234567"
N = 100

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("stand_ins")]


class LabelStudio:
    """What a client needs of its API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, body: object = None) -> Any:
        return json.loads(self.read(path, method, None if body is None else json.dumps(body).encode()) or "null")

    def read(self, path: str, method: str = "GET", data: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def annotate(self, task: int, choice: str | None) -> int:
        """Choose, or skip; returns the id of the annotation."""
        body = {"result": self.results(choice), "was_cancelled": choice is None}
        return self.call("POST", f"/api/tasks/{task}/annotations/", body)["id"]

    def change(self, annotation: int, choice: str) -> None:
        self.call("PATCH", f"/api/annotations/{annotation}/", {"result": self.results(choice)})

    @staticmethod
    def results(choice: str | None) -> list[dict[str, Any]]:
        """Of our control, behind one of the project's own whose choices are called like our classes."""
        said = [("quality", CLASSES[0]), ("choice", choice)]
        return [
            {"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": [value]}}
            for name, value in said
            if choice is not None
        ]


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    folder = tmp_path_factory.mktemp("label-studio")
    venv.create(folder / "venv", with_pip=True)
    subprocess.run([folder / "venv/bin/pip", "install", "--quiet", "label-studio"], check=True, timeout=900)
    (port,) = free_ports(1)
    environment = {
        **os.environ, "LABEL_STUDIO_BASE_DATA_DIR": str(folder), "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false", "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
    }  # fmt: skip
    command = [
        folder / "venv/bin/label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port),
        "--username", "annotator@example.com", "--password", "not-a-secret", "--user-token", TOKEN,
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
    try:
        client, deadline = LabelStudio(f"http://127.0.0.1:{port}"), time.monotonic() + 300
        while True:
            try:
                client.call("GET", "/api/projects")
                break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()) from None
                time.sleep(1)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder of images, as annotators' browsers see it."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hundred_images(label_studio: LabelStudio, cluster: str, tmp_path: Path) -> None:
    """Out through its API, looked at, answered, and back: some at once, some later, some skipped."""
    source = write_source(tmp_path / "a.parquet", 240, seed=1)
    table = pq.read_table(source)
    truth = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    pq.write_table(table.drop_columns(["label", "class_name"]), tmp_path / "b.parquet")
    pool = build(str(tmp_path / "b.parquet"), tmp_path / "pool")
    files = ("label.oracle=files", f"pool.classes=[{', '.join(CLASSES)}]", f"loop.initial={N}", "loop.cycles=1")
    made = small_config(tmp_path / "run", pool, None, *files)
    assert driver.run(made).asked == N

    png = tmp_path / "png"
    with served(png) as url:
        export_labels(
            tmp_path / "run", tmp_path / "tasks.json", fmt="label-studio", copy_images=png, url_map=(str(png), url)
        )
        quality = f'<Choices name="quality" toName="image"><Choice value="{CLASSES[0]}"/></Choices></View>'
        xml = (tmp_path / "tasks.xml").read_text().replace("</View>", quality)
        project = label_studio.call("POST", "/api/projects", {"title": "batch 0", "label_config": xml})["id"]
        told = label_studio.call(
            "POST", f"/api/projects/{project}/import", json.loads((tmp_path / "tasks.json").read_text())
        )
        assert told["task_count"] == N
        tasks = label_studio.call("GET", f"/api/tasks?project={project}&page_size={2 * N}")["tasks"]
        assert len(tasks) == N
        index_of = {name: i for i, name in enumerate(pool.samples(0, pool.n_samples)["sample_id"].to_pylist())}
        for task in tasks:  # the image that is shown is the one that the answer will be for
            with urllib.request.urlopen(task["data"]["image"]) as answer:
                shown = np.asarray(Image.open(BytesIO(answer.read())))
            index = index_of[task["data"]["sample_id"]]
            assert np.array_equal(shown, pool.read(index, index + 1)[0].transpose(1, 2, 0).squeeze())

    def name_of(task: dict[str, Any]) -> str:
        return CLASSES[truth[task["data"]["sample_id"]]]

    def answer(some: list[dict[str, Any]]) -> list[int]:
        numbers = [task["id"] - tasks[0]["id"] for task in some]
        said = [{7: None, 8: "cannot tell"}.get(n % 10, name_of(task)) for n, task in zip(numbers, some, strict=True)]
        return [label_studio.annotate(task["id"], name) for task, name in zip(some, said, strict=True)]

    def export(kind: str) -> Path:
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(label_studio.call("GET", f"/api/projects/{project}/export?exportType={kind}")))
        return path

    answered = answer(tasks[: N // 2])
    first = import_labels(tmp_path / "run", export("JSON_MIN"))
    assert first.answered == N // 2 - N // 20  # JSON-MIN has no skipped ones
    assert driver.run(made).state == "waiting_for_labels"
    answer(tasks[N // 2 :])
    told = import_labels(tmp_path / "run", export("JSON"))
    assert (told.answered, told.new) == (N, N - first.new)  # the same annotator and times in both formats
    other = next(name for name in CLASSES if name != name_of(tasks[0]))
    for name in (other, name_of(tasks[0])):  # a correction that is taken back
        label_studio.change(answered[0], name)
        told = import_labels(tmp_path / "run", export("JSON"))
        assert (told.new, told.changed) == (1, [tasks[0]["data"]["sample_id"]])
    assert import_labels(tmp_path / "run", tmp_path / "JSON_MIN.json").new == 0  # an old export
    csv = tmp_path / "export.csv"
    csv.write_bytes(label_studio.read(f"/api/projects/{project}/export?exportType=CSV"))
    assert import_labels(tmp_path / "run", csv).new == 0
    assert driver.run(made).state == "complete"
    ledger = Run.open(tmp_path / "run").ledger(before=0)
    assert len(ledger) == N - N // 5
    assert len(ledger.declined) == N // 5
    names = pool.samples(0, pool.n_samples)["sample_id"].to_pylist()
    assert [truth[names[i]] for i in ledger.indices] == ledger.labels.tolist()


def test_predictions_are_taken(label_studio: LabelStudio, pool: Pool, cluster: str, tmp_path: Path) -> None:
    made = small_config(tmp_path / "run", pool, None, "label.oracle=files", "loop.initial=24", "loop.cycles=2")
    driver.run(made)
    names = pool.samples(0, pool.n_samples)["sample_id"].to_pylist()
    asked = sorted(Run.open(tmp_path / "run").asked())
    lines = [f"{names[index]},{CLASSES[place % 4]}" for place, index in enumerate(asked)]
    (tmp_path / "a.csv").write_text("sample_id,label\n" + "\n".join(lines) + "\n")
    import_labels(tmp_path / "run", tmp_path / "a.csv")
    assert driver.run(made).cycle == 0
    told = export_labels(tmp_path / "run", tmp_path / "tasks.json", fmt="label-studio", predictions=True)
    xml = (tmp_path / "tasks.xml").read_text()
    project = label_studio.call("POST", "/api/projects", {"title": "batch 1", "label_config": xml})["id"]
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    made = label_studio.call("POST", f"/api/projects/{project}/import", tasks)
    assert (made["task_count"], made["prediction_count"]) == (told.samples, told.samples)
