"""Labels from people, played by scripts: real runs, real files."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distal.artifacts.ledger import LABELED, SKIPPED
from distal.artifacts.runs import Run
from distal.cli.tables import waiting_table
from distal.driver import preflight
from distal.driver import run as driver
from distal.errors import ConfigError, Damage, PoolError, RunConflict, SourceError
from distal.labels.answers import Answer, settle
from distal.labels.waiting import ImportResult, Waiting, export_labels, import_labels
from distal.pool import Pool
from distal.pool.build import build
from distal.report.repair import repair
from distal.report.status import status
from distal.report.verify import verify
from distal.storage import read_json, write_json
from tests.helpers import CLASSES, flip, small_config, write_source

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.fixture(scope="module")
def unlabelled(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, dict[str, int]]:
    """240 images without labels; what people would say of each."""
    folder = tmp_path_factory.mktemp("unlabelled")
    source = write_source(folder / "a.parquet", 240, seed=1)
    table = pq.read_table(source)
    truth = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
    pq.write_table(table.drop_columns(["label", "class_name"]), folder / "b.parquet")
    return build(str(folder / "b.parquet"), folder / "pool"), truth


FILES = ("label.oracle=files", f"pool.classes=[{', '.join(CLASSES)}]")


def config(run: Path, pool: Pool, *overrides: str):
    return small_config(run, pool, None, *FILES, *overrides)


def play(run: Path, truth: dict[str, int], rng: random.Random, files: int = 1, repeat: bool = False) -> None:
    """Annotators answer the batch: one in ten is passed over, one in ten gets two opinions, of which three win."""
    told = export_labels(run, run.parent / "batch.csv")
    with (run.parent / "batch.csv").open() as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: row["sample_id"])
    assert len(rows) == told.samples
    said: list[tuple[str, str, str]] = []
    for number, row in enumerate(rows):
        name = CLASSES[truth[row["sample_id"]]]
        other = CLASSES[(truth[row["sample_id"]] + 1) % 4]
        if number % 10 == 3:
            said.append((row["sample_id"], "", "ann"))
        elif number % 10 == 6:
            said.append((row["sample_id"], "cannot tell", "ann"))
        elif number % 10 == 8:
            said += [(row["sample_id"], other, "ann"), (row["sample_id"], name, "bob"), (row["sample_id"], name, "cy")]
        else:
            said.append((row["sample_id"], name, "ann"))
    size = -(-len(said) // files)
    parts = [said[start : start + size] for start in range(0, len(said), size)]
    for part in parts + (parts[:1] if repeat else []):
        path = run.parent / "answers.csv"
        text = "\n".join(",".join(each) for each in [("sample_id", "label", "annotator"), *part])
        path.write_text(text + "\n")
        import_labels(run, path)


def ledgers(run: Path, cycles: int) -> list[str]:
    return [Run.open(run).ledger(before=index).sha256 for index in range(cycles)]


@pytest.mark.slow
def test_a_run_that_people_label(unlabelled: tuple[Pool, dict[str, int]], tmp_path: Path) -> None:
    """From nothing to three cycles; whether the answers come in one file or in many, twice or once."""
    pool, truth = unlabelled
    told = {}
    for name, files, repeat in (("one", 1, False), ("many", 4, True)):
        run = tmp_path / name / "run"
        run.parent.mkdir()
        made = config(run, pool, "loop.cycles=3")
        for step in range(3):
            waiting = driver.run(made)
            assert (waiting.state, waiting.cycle) == ("waiting_for_labels", step - 1)
            assert waiting.answered == 0
            assert waiting.asked == waiting.needed == (24 if step == 0 else 16)
            with pytest.MonkeyPatch.context() as patch:  # from storage alone: no cluster is looked at
                patch.delattr(preflight, "check")
                assert driver.run(made) == waiting
            play(run, truth, random.Random(step), files, repeat)
        assert driver.run(made).state == "complete"
        told[name] = ledgers(run, 3)
        ledger = Run.open(run).ledger(before=2)
        assert [truth[pool.samples(i, i + 1)["sample_id"][0].as_py()] for i in ledger.indices] == ledger.labels.tolist()
        assert len(ledger.declined) > 0
        last = Run.open(run).cycle(2)
        assert not set(last.chosen().indices.tolist()) & set(ledger.declined.tolist())  # not asked again
    assert told["one"] == told["many"]


@pytest.fixture(scope="module")
def selected(unlabelled: tuple[Pool, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that waits for the labels of its first batch; the file of the labels that it began with."""
    pool, truth = unlabelled
    folder = tmp_path_factory.mktemp("selected")
    lines = "\n".join(f"{name},{CLASSES[label]}" for name, label in [*truth.items()][:30])
    (folder / "known.csv").write_text(f"sample_id,label\n{lines}\n")
    assert driver.run(config(folder / "run", pool, f"loop.initial={folder / 'known.csv'}")).cycle == 0
    return folder / "run", folder / "known.csv"


@pytest.mark.parametrize(
    "damaged",
    [
        "selection.parquet",
        pytest.param("scores.zarr/dispersion/c/1", marks=pytest.mark.slow),
        pytest.param("assignments.zarr/assignments/c/1/2", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_people_label_is_made_again_after_a_repair(
    unlabelled: tuple[Pool, dict[str, int]], selected: tuple[Path, Path], tmp_path: Path, damaged: str
) -> None:
    pool, truth = unlabelled
    run = tmp_path / "run"
    shutil.copytree(selected[0], run)
    made = config(run, pool, f"loop.initial={selected[1]}")
    batch = Run.open(run).cycle(0).chosen()
    flip(run / "cycles/000" / damaged)
    assert repair(run).state == "repaired"

    remade = f"{run}: the batch of cycle 0 is made again after a repair; call `distal run` first"
    told = status(run)
    assert (told.state, told.waiting.next) == ("stopped", remade)
    (tmp_path / "a.csv").write_text(f"sample_id,label\n{batch.sample_ids[0]},{CLASSES[truth[batch.sample_ids[0]]]}\n")
    for call in (lambda: import_labels(run, tmp_path / "a.csv"), lambda: export_labels(run, tmp_path / "b.csv")):
        with pytest.raises(RunConflict, match=remade):
            call()

    asked = driver.run(made)
    assert (asked.state, asked.cycle, asked.asked) == ("waiting_for_labels", 0, 16)
    assert Run.open(run).cycle(0).chosen().sha256 == batch.sha256
    assert status(run).state == "waiting_for_labels"
    assert import_labels(run, tmp_path / "a.csv").new == 1
    assert verify(run).damage == []


def test_what_is_waited_for_lacks_a_key(selected: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(selected[0], run)
    record = read_json(run / "waiting.json")
    write_json(run / "waiting.json", {name: value for name, value in record.items() if name != "workers"})
    with pytest.raises(Damage, match=r"waiting\.json: workers is missing"):
        Waiting.read(Run.open(run))


@pytest.mark.slow
def test_enough_is_enough(unlabelled: tuple[Pool, dict[str, int]], tmp_path: Path) -> None:
    """`label.min_labels`: the run goes on, and late answers count for the next cycle."""
    pool, truth = unlabelled
    run = tmp_path / "run"
    ids = list(truth)
    (tmp_path / "known.csv").write_text(
        "sample_id,label\n" + "\n".join(f"{name},{CLASSES[truth[name]]}" for name in ids[:30]) + "\n"
    )
    made = config(run, pool, "label.min_labels=5", f"loop.initial={tmp_path / 'known.csv'}", "loop.cycles=3")
    assert driver.run(made).needed == 5
    assert len(Run.open(run).ledger(before=0)) == 30
    batch = Run.open(run).cycle(0).chosen().sample_ids

    def say(names: list[str]) -> ImportResult:
        lines = "\n".join(f"{name},{CLASSES[truth[name]]}" for name in names)
        (tmp_path / "a.csv").write_text(f"sample_id,label\n{lines}\n")
        return import_labels(run, tmp_path / "a.csv")

    assert say(batch[:4]).answered == 4
    assert driver.run(made).answered == 4
    assert say(batch[4:6]).answered == 6
    assert driver.run(made).cycle == 1
    assert len(Run.open(run).ledger(before=1)) == 36
    second = Run.open(run).cycle(1).chosen().sample_ids
    assert say([name for name in batch[6:8] if name not in second]).new > 0
    say(second[:5])
    driver.run(made)
    assert set(find_ids(pool, batch[6:8])) <= set(Run.open(run).ledger(before=2).indices.tolist()) | set(
        find_ids(pool, second)
    )
    assert driver.run(made.with_values({"loop.cycles": 4})).cycle == 2  # the last cycle does not label
    before = Run.open(run).ledger(before=2).sha256
    (tmp_path / "a.csv").write_text(f"sample_id,label\n{batch[0]},{CLASSES[(truth[batch[0]] + 1) % 4]}\n")
    told = import_labels(run, tmp_path / "a.csv")
    assert (told.new, told.changed, told.too_late) == (1, [batch[0]], [batch[0]])
    assert import_labels(run, tmp_path / "a.csv").new == 0
    assert Run.open(run).ledger(before=2).sha256 == before


def find_ids(pool: Pool, names: list[str]) -> list[int]:
    ids = pool.samples(0, pool.n_samples)["sample_id"].to_pylist()
    return [ids.index(name) for name in names]


@pytest.mark.parametrize(
    ("policy", "said", "expected"),
    [
        ("majority", [("a", 1), ("b", 2), ("c", 1)], 1),
        ("majority", [("a", 1), ("b", 2)], "conflict"),
        ("majority", [("a", 1), ("a", 2)], 2),  # changed their mind
        ("first", [("a", 1), ("b", 2), ("c", 2)], 1),
        ("reask", [("a", 1), ("b", 2), ("c", 1)], "conflict"),
        ("reask", [("a", 1), ("b", 1)], 1),
        ("reask", [("a", None), ("b", 1)], 1),
        ("majority", [("a", None)], None),
    ],
)
def test_conflicts(policy: str, said: list[tuple[str, int | None]], expected: int | str | None) -> None:
    answers = [Answer(7, "x", label, SKIPPED if label is None else LABELED, who) for who, label in said]
    settled = settle(answers, policy)  # type: ignore[arg-type]
    assert settled.conflicts == (["x"] if expected == "conflict" else [])
    assert [answer.label for answer in settled.answers] == ([] if expected == "conflict" else [expected])


@pytest.fixture(scope="module")
def waiting(unlabelled: tuple[Pool, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for its first labels."""
    run = tmp_path_factory.mktemp("waiting") / "run"
    assert driver.run(config(run, unlabelled[0])).state == "waiting_for_labels"
    return run


def test_all_are_skipped(unlabelled: tuple[Pool, dict[str, int]], tmp_path: Path) -> None:
    """A run that nobody could label anything of waits, says why in one line, and is not stuck."""
    pool, truth = unlabelled
    run, made = tmp_path / "run", config(tmp_path / "run", pool)
    driver.run(made)
    names = pool.samples(0, pool.n_samples)["sample_id"].to_pylist()
    asked = sorted(Run.open(run).asked())
    (tmp_path / "a.csv").write_text("sample_id,label\n" + "".join(f"{names[index]},\n" for index in asked))
    import_labels(run, tmp_path / "a.csv")
    for again in range(2):
        waiting = driver.run(made)
        assert (waiting.state, waiting.answered, waiting.ready) == ("waiting_for_labels", 24, False), again
        lines = waiting_table(waiting).splitlines()
        assert sum("not enough to begin with: 0 labelled samples of 0 classes" in line for line in lines) == 1
    assert not (run / "initial.parquet").exists()
    assert export_labels(run, tmp_path / "again.csv").samples == 24
    lines = [f"{names[index]},{CLASSES[truth[names[index]]]}\n" for index in asked]
    (tmp_path / "b.csv").write_text("sample_id,label\n" + "".join(lines))
    import_labels(run, tmp_path / "b.csv")
    waiting = Waiting.read(Run.open(run))
    assert waiting is not None
    assert waiting.report(Run.open(run)).ready


@pytest.mark.slow
def test_a_run_goes_on_when_labels_come_late(unlabelled: tuple[Pool, dict[str, int]], tmp_path: Path) -> None:
    """All of the first set is skipped, then labelled; of the second one a label comes after the cycle is trained."""
    pool, truth = unlabelled
    run, made = tmp_path / "run", config(tmp_path / "run", pool, "loop.cycles=3")
    driver.run(made)
    names = pool.samples(0, pool.n_samples)["sample_id"].to_pylist()

    def say(indices: list[int], *, skip: bool) -> ImportResult:
        lines = [f"{names[index]},{'' if skip else CLASSES[truth[names[index]]]}\n" for index in indices]
        (tmp_path / "a.csv").write_text("sample_id,label\n" + "".join(lines))
        return import_labels(run, tmp_path / "a.csv")

    say(sorted(Run.open(run).asked()), skip=True)
    assert driver.run(made).cycle == -1
    say(sorted(Run.open(run).asked()), skip=False)
    assert driver.run(made).cycle == 0
    batch = Run.open(run).cycle(0).chosen().indices.tolist()
    say(batch, skip=True)
    assert driver.run(made).cycle == 1
    assert Run.open(run).ledger(before=1).declined.tolist() == sorted(batch)
    assert say(batch[:3], skip=False).new == 3
    say(Run.open(run).cycle(1).chosen().indices.tolist(), skip=False)
    assert driver.run(made).state == "complete"
    ledger = Run.open(run).ledger(before=2)
    assert len(ledger) == 24 + 3 + 16
    assert set(batch[:3]) <= set(ledger.indices.tolist())
    assert ledger.declined.tolist() == sorted(batch[3:])
    assert [cycle.n_labeled for cycle in driver.run(made).cycles] == [24, 24, 43]


@pytest.mark.slow
def test_more_ranks_than_the_labels_are_enough_for(unlabelled: tuple[Pool, dict[str, int]], tmp_path: Path) -> None:
    pool, truth = unlabelled
    lines = [f"{name},{CLASSES[truth[name]]}\n" for name in list(truth)[:4]]
    (tmp_path / "known.csv").write_text("sample_id,label\n" + "".join(lines))
    made = config(
        tmp_path / "run", pool, f"loop.initial={tmp_path / 'known.csv'}", "loop.budget=4", "label.min_labels=1"
    )
    assert driver.run(made).cycle == 0
    (tmp_path / "a.csv").write_text(f"sample_id,label\n{Run.open(tmp_path / 'run').cycle(0).chosen().sample_ids[0]},\n")
    import_labels(tmp_path / "run", tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="train.workers: 3 ranks need 6 labelled samples, 2 each, and cycle 1 has 4"):
        driver.run(made.with_values({"train.workers": 3, "train.batch_size": 15}))
    assert not (tmp_path / "run/cycles/001/cycle.yaml").exists()  # so a lower number can still be given


class TestExport:
    def test_order_is_shuffled_and_nothing_is_preselected(self, waiting: Path, tmp_path: Path) -> None:
        export_labels(waiting, tmp_path / "a.parquet", fmt="parquet")
        table = pq.read_table(tmp_path / "a.parquet")
        asked = Run.open(waiting).asked()
        assert len(table) == len(asked) == 24
        assert table["label"].null_count == 24
        assert table["sample_id"].to_pylist() != sorted(table["sample_id"].to_pylist())
        assert "prediction" not in table.column_names

    def test_label_studio(self, waiting: Path, tmp_path: Path) -> None:
        told = export_labels(
            waiting, tmp_path / "tasks.json", fmt="label-studio", copy_images=tmp_path / "png",
            url_map=(str(tmp_path), "http://images"),
        )  # fmt: skip
        assert told.files == [tmp_path / "tasks.json", tmp_path / "tasks.xml"]
        tasks = json.loads((tmp_path / "tasks.json").read_text())
        assert len(tasks) == 24
        assert tasks[0]["data"]["image"].startswith("http://images/png/")
        assert "predictions" not in tasks[0]
        assert len(list((tmp_path / "png").glob("*.png"))) == 24
        assert '<Choice value="circle"/>' in (tmp_path / "tasks.xml").read_text()

    def test_what_label_studio_gives_back(self, waiting: Path, unlabelled, tmp_path: Path) -> None:
        export_labels(waiting, tmp_path / "tasks.json", fmt="label-studio")
        ids = [task["data"]["sample_id"] for task in json.loads((tmp_path / "tasks.json").read_text())]

        def annotation(choice: str | None, who: int) -> dict:
            ours = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
            result = [] if choice is None else [ours]
            return {"result": result, "was_cancelled": choice is None, "completed_by": who}

        full = [
            {"data": {"sample_id": ids[0]}, "annotations": [annotation("dot", 1), annotation("dot", 2)]},
            {"data": {"sample_id": ids[1]}, "annotations": [annotation(None, 1)]},
            {"data": {"sample_id": ids[2]}, "annotations": [annotation("cannot tell", 1)]},
        ]
        (tmp_path / "full.json").write_text(json.dumps(full))
        told = import_labels(waiting, tmp_path / "full.json")
        assert (told.answers, told.new, told.answered) == (4, 4, 3)
        (tmp_path / "min.json").write_text(json.dumps([{"sample_id": ids[3], "choice": "line", "annotator": 1}]))
        assert import_labels(waiting, tmp_path / "min.json").answered == 4
        assert import_labels(waiting, tmp_path / "full.json").new == 0
        assert export_labels(waiting, tmp_path / "rest.csv").samples == 20


class TestMistakes:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sample_id,label\nnobody,dot\n", "sample nobody is not in the pool; nothing was imported"),
            ("sample_id,label\n{0},square\n", "label square is no class; the classes are circle, cross, dot, line"),
            ("sample_id,label\n{other},dot\n", "is not asked for by any batch; .* --allow-unasked takes them"),
            ("sample_id,label,choice\n{0},dot,dot\n", "label and choice could each be the label; keep one of them"),
            ("id,label\n{0},dot\n", "has no column sample_id; it has id, label"),
            ("", "empty"),
            ("sample_id,label\n", "says nothing of any sample"),
            ('sample_id,label\n"{0},do', "half-written, or not what annotators send"),
        ],
    )
    def test_files(self, waiting: Path, unlabelled, tmp_path: Path, text: str, message: str) -> None:
        pool, _ = unlabelled
        asked = Run.open(waiting).asked()
        ids = pool.samples(0, 240)["sample_id"].to_pylist()
        other = next(name for index, name in enumerate(ids) if index not in asked)
        (tmp_path / "a.csv").write_text(text.format(ids[min(asked)], other=other))
        before = sorted(Run.open(waiting).answers.glob("*"))
        with pytest.raises(SourceError, match=message):
            import_labels(waiting, tmp_path / "a.csv")
        assert sorted(Run.open(waiting).answers.glob("*")) == before

    def test_many_are_counted(self, waiting: Path, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("sample_id,label\n" + "\n".join(f"x{i},dot" for i in range(8)))
        with pytest.raises(SourceError, match=r"samples x0, x1, x2, x3, x4 and 3 more are not in the pool"):
            import_labels(waiting, tmp_path / "a.csv")

    def test_classes(self, unlabelled, pool: Pool, tmp_path: Path) -> None:
        bare, _ = unlabelled
        for base, overrides, kind, message in (
            (bare, ["label.oracle=files"], PoolError, "has no labels, so its classes are not known; name them"),
            (bare, ["pool.classes=[a, b, a]", "label.oracle=files"], ConfigError, "'a' is named twice"),
            (
                bare,
                ["pool.classes=[cat, 'cat ']", "label.oracle=files"],
                ConfigError,
                "'cat' and 'cat ' differ in surr",
            ),
            (bare, ["pool.classes=[a, ' ']", "label.oracle=files"], ConfigError, "a class has an empty name"),
            (bare, ["pool.classes=[a]", "label.oracle=files"], ConfigError, "one class only"),
            (bare, ["pool.classes=[a, b]"], PoolError, "label.oracle: pool needs a label for every image"),
            (
                pool,
                ["pool.classes=[dot, line]"],
                ConfigError,
                "must begin with those of the pool, in its order: circle",
            ),
        ):
            with pytest.raises(kind, match=message):
                driver.run(small_config(tmp_path / "run", base, None, *overrides))
        assert not (tmp_path / "run").exists()

    def test_a_run_that_waits_for_nothing(self, waiting: Path, tmp_path: Path) -> None:
        with pytest.raises(RunConflict, match="no run here"):
            export_labels(tmp_path, tmp_path / "a.csv")


@pytest.mark.slow
def test_a_class_is_appended_and_never_renumbered(unlabelled, tmp_path: Path) -> None:
    pool, truth = unlabelled
    names = list(truth)
    known = "\n".join(f"{name},{truth[name] % 3}" for name in names[:40])
    (tmp_path / "known.csv").write_text(f"sample_id,label\n{known}\n")
    three = ("label.oracle=files", f"loop.initial={tmp_path / 'known.csv'}", "loop.cycles=3")
    first = small_config(tmp_path / "run", pool, None, *three, "pool.classes=[circle, cross, dot]")
    assert driver.run(first).cycle == 0
    with pytest.raises(RunConflict, match="cycle 0 was begun with circle, cross, dot; keep them in this order"):
        driver.run(small_config(tmp_path / "run", pool, None, *three, "pool.classes=[cross, circle, dot, line]"))
    grown = small_config(tmp_path / "run", pool, None, *three, "pool.classes=[circle, cross, dot, line]")
    assert driver.run(grown).cycle == 0
    batch = Run.open(tmp_path / "run").cycle(0).chosen().sample_ids
    (tmp_path / "a.csv").write_text("sample_id,label\n" + "\n".join(f"{name},line" for name in batch) + "\n")
    import_labels(tmp_path / "run", tmp_path / "a.csv")
    assert driver.run(grown).cycle == 1
    ledger = Run.open(tmp_path / "run").ledger(before=1)
    assert set(ledger.labels.tolist()) == {0, 1, 2, 3}
    assert np.array_equal(pa.array(ledger.labels[ledger.labels == 3]).to_numpy(), [3] * 16)
