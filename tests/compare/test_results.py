"""A comparison told from a synthetic table: planted effects are shown, absent ones are not denied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from pyarrow import csv

from distal.compare.render import plot_curves
from distal.compare.results import report
from distal.compare.statistics import aubc, holm, signed_rank
from distal.errors import ConfigError
from distal.storage import read_table

CONDITIONS = {"pool": "Fashion-MNIST", "cycles": 3, "initial_set": "class-balanced"}
GAIN = {"random": 0.0, "same": 0.0, "better": 0.05, "entropy": 0.0}
Row = dict[str, Any]


def rows_of(n_seeds: int, *, noise: float = 0.004, gain: dict[str, float] = GAIN) -> list[Row]:
    """Three cycles; all strategies share the first, later ones gain what is planted."""
    rng = np.random.default_rng(0)
    return [
        {
            "seed": seed, "strategy": name, "cycle": cycle, "n_labeled": 100 * (cycle + 1),
            "accuracy": 0.7 + 0.05 * cycle + (gain[name] + noise * rng.normal() if cycle else 0) + 0.01 * (seed % 3),
            "auroc": 0.9, "seconds": 10.0 + cycle, "images_scored": 50 * cycle,
        }
        for seed in range(n_seeds) for name in gain for cycle in range(3)
    ]  # fmt: skip


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=pa.schema([
        ("seed", pa.int64()), ("strategy", pa.string()), ("cycle", pa.int64()), ("n_labeled", pa.int64()),
        ("accuracy", pa.float64()), ("auroc", pa.float64()), ("seconds", pa.float64()), ("images_scored", pa.int64()),
    ]))  # fmt: skip


def compared(told: Row) -> dict[tuple[str, str], Row]:
    return {(each["strategy"], each["reference"]): each for each in told["tests"]["each"]}


def test_a_planted_effect_is_shown_and_an_absent_one_not_denied(tmp_path: Path) -> None:
    rows = rows_of(9)
    told = report(table(rows), {}, out=tmp_path, conditions=CONDITIONS).to_record()
    tests = compared(told)
    # Two references meet once: three strategies against random, and two against entropy.
    assert list(tests) == [
        ("same", "random"), ("better", "random"), ("entropy", "random"), ("same", "entropy"), ("better", "entropy"),
    ]  # fmt: skip
    areas = {
        name: [
            aubc([100, 200, 300], [r["accuracy"] for r in rows if (r["seed"], r["strategy"]) == (seed, name)])
            for seed in range(9)
        ]
        for name in GAIN
    }
    p = [signed_rank(np.subtract(areas[first], areas[second]))[1] for first, second in tests]
    assert [each["p"] for each in tests.values()] == pytest.approx(p)
    assert [each["corrected_p"] for each in tests.values()] == pytest.approx(holm(p))
    better = tests["better", "random"]
    assert better["shown"] is True
    assert better["verdict"].startswith("shown: mean difference +0.03")  # 0.05 on three quarters of the area
    assert better["interval"][0] < 0.0375 < better["interval"][1]
    same = tests["same", "random"]
    assert same["shown"] is False
    assert same["verdict"].startswith("not shown: mean difference ")
    assert ", smallest detectable difference 0.00" in same["verdict"]
    assert same["verdict"].endswith(" at 9 seeds")

    text = (tmp_path / "report.md").read_text()
    assert "no difference" not in text
    assert f"| better | random | {better['p']:.2g} | {better['corrected_p']:.2g} | {better['verdict']} |" in text
    assert "p corrected by Holm over 5 tests at level 0.05, so none is run with fewer than 8 seeds" in text
    assert text.count("Initial set: class-balanced.") == text.count("\n## ")  # below every heading
    assert "labels were read that nobody paid for" in text
    last = [r["accuracy"] for r in rows if (r["strategy"], r["cycle"]) == ("same", 2)]
    mean, sd = np.mean(last), np.std(last, ddof=1)
    assert f"| {mean:.4f} ± {sd:.4f} |" in next(line for line in text.splitlines() if line.startswith("| 300 |"))
    assert told["aubc"][2]["each"] == pytest.approx(areas["better"])
    assert told["aubc"][2]["low"] < np.mean(areas["better"]) < told["aubc"][2]["high"]
    assert told["cost"][0]["seconds"] == {"n": 9, "mean": 33.0, "sd": 0.0}
    assert told["cost"][0]["images_scored"]["mean"] == 150


def test_what_is_written(tmp_path: Path) -> None:
    rows = rows_of(2)
    rows[4]["auroc"] = None
    results = table(rows)
    chosen = {(0, "random", 0): (np.array([1, 2]), np.array([0, 1]))}
    told = report(results, chosen, out=tmp_path / "a", conditions=CONDITIONS).to_record()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "results.parquet", "results.csv", "comparison.json", "report.md", "curves.png", "curves.svg", "classes.png",
    }  # fmt: skip
    assert read_table(tmp_path / "a" / "results.parquet").equals(results)
    assert csv.read_csv(tmp_path / "a" / "results.csv")["auroc"].to_pylist() == results["auroc"].to_pylist()
    written = json.loads((tmp_path / "a" / "comparison.json").read_text())
    assert {**written, "out": str(tmp_path / "a")} == json.loads(json.dumps(told))
    for name in ("curves.png", "classes.png"):
        with Image.open(tmp_path / "a" / name) as figure:
            assert min(figure.size) > 500
    report(results, chosen, out=tmp_path / "b", conditions=CONDITIONS)
    for name in ("comparison.json", "report.md", "curves.svg", "results.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_order_of_the_seeds_changes_nothing(tmp_path: Path) -> None:
    rows = rows_of(6)
    told = report(table(rows), {}, out=tmp_path / "a", conditions=CONDITIONS).to_record()
    turned = sorted(rows, key=lambda row: -row["seed"])
    again = report(table(turned), {}, out=tmp_path / "b", conditions=CONDITIONS).to_record()
    assert {**told, "out": 0} == {**again, "out": 0}
    assert (tmp_path / "a" / "report.md").read_bytes() == (tmp_path / "b" / "report.md").read_bytes()


def test_one_seed_tells_how_many_are_needed(tmp_path: Path) -> None:
    told = report(table(rows_of(1)), {}, out=tmp_path, conditions={}).to_record()
    text = (tmp_path / "report.md").read_text()
    assert "One seed: no spread, no interval and no test; tests need 8 seeds" in text
    assert "±" not in text.split("## Cost")[0]
    assert told["aubc"][0]["low"] is None
    assert {each["verdict"] for each in told["tests"]["each"]} == {"not tested: needs 8 seeds, has 1"}
    assert not (tmp_path / "classes.png").exists()


def test_too_few_seeds_are_not_tested(tmp_path: Path) -> None:
    told = report(table(rows_of(5)), {}, out=tmp_path, conditions={}, references=["random", "nobody"]).to_record()
    assert [each["p"] for each in told["tests"]["each"]] == [None] * 3
    assert told["tests"]["each"][1]["verdict"].startswith(
        "not tested: needs 7 seeds, has 5; so far mean difference +0.03"
    )
    assert told["missing"]["references"] == ["nobody"]
    assert "Reference nobody is not among the strategies" in (tmp_path / "report.md").read_text()


def test_only_complete_pairs_are_compared(tmp_path: Path) -> None:
    rows = rows_of(10)
    rows = [row for row in rows if (row["seed"], row["strategy"], row["cycle"]) != (3, "better", 2)]
    for row in rows:
        if (row["seed"], row["strategy"], row["cycle"]) == (4, "random", 1):
            row["accuracy"] = None
        if (row["seed"], row["strategy"]) == (5, "same"):
            row["n_labeled"] += 1
    told = report(table(rows), {}, out=tmp_path, conditions={}).to_record()
    tests = compared(told)
    assert [tests[pair]["n"] for pair in (("better", "random"), ("same", "random"), ("better", "entropy"))] == [8, 8, 9]
    clean = [row for row in rows if row["seed"] not in (3, 4)]
    other = report(table(clean), {}, out=tmp_path / "clean", conditions={}).to_record()
    assert tests["better", "random"]["difference"] == pytest.approx(compared(other)["better", "random"]["difference"])
    assert told["missing"]["cycles"] == [{"seed": 3, "strategy": "better", "cycles": 2, "of": 3}]
    assert told["missing"]["values"] == {"accuracy": [{"seed": 4, "strategy": "random", "cycle": 1}], "auroc": []}
    assert told["aubc"][0]["each"][4] is None
    second = told["budgets"]["accuracy"][2]
    assert second["n_labeled"] == 200
    assert (second["strategies"]["random"]["n"], second["strategies"]["random"]["rows"]) == (9, 10)
    text = (tmp_path / "report.md").read_text()
    assert "better seed 3 (2 of 3 cycles)" in text
    assert "No accuracy in 1 cycle(s) (random seed 4 cycle 1)" in text
    assert "(2 seeds left out)" in text
    assert "(n = 9)" in text
    assert [each["n"] for each in told["cost"]] == [10, 10, 9, 10]


def test_labels_saved(tmp_path: Path) -> None:
    """Seed 0: b has the last value of a, 0.7, half-way from 100 to 200. Seed 1: never."""
    curves = {
        (0, "a"): [0.5, 0.6, 0.7],
        (0, "b"): [0.5, 0.9, 0.9],
        (1, "a"): [0.5, 0.6, 0.7],
        (1, "b"): [0.5, 0.6, 0.6],
    }
    rows = [
        {"seed": seed, "strategy": name, "cycle": c, "n_labeled": 100 * c + 100, "accuracy": value, "auroc": 1 - value,
         "seconds": 1.0, "images_scored": 0}
        for (seed, name), values in curves.items() for c, value in enumerate(values)
    ]  # fmt: skip
    told = report(table(rows), {}, out=tmp_path, conditions={}, references=["a"]).to_record()
    (saved,) = told["labels_saved"]
    assert saved["each"] == [{"seed": 0, "saved": pytest.approx(150)}, {"seed": 1, "saved": None}]
    assert (saved["mean"], saved["n"], saved["not_reached"]) == (pytest.approx(150), 2, 1)
    assert "| b | +150 (not reached in 1 of 2) |" in (tmp_path / "report.md").read_text()
    ece = table(rows).rename_columns(
        {name: "ece" if name == "auroc" else name for name in table(rows).column_names}
    )  # smaller is better
    assert report(ece, {}, out=tmp_path, conditions={}, references=["a"], metric="ece").to_record()["labels_saved"] == [
        {**saved, "each": [{"seed": 0, "saved": pytest.approx(150)}, {"seed": 1, "saved": None}]}
    ]


def test_classes_and_overlap(tmp_path: Path) -> None:
    rows = rows_of(2, gain={"random": 0, "better": 0})
    chosen = {
        (0, "random", 0): (np.array([1, 2, 3, 4]), np.array([0, 0, 1, 1])),
        (0, "better", 0): (np.array([3, 4, 5, 6]), np.array([0, 0, 0, 0])),
        (1, "random", 0): (np.array([1, 2, 3, 4]), np.array([0, 1, 0, 1])),
        (1, "better", 0): (np.array([4, 5, 6, 7]), np.array([0, 0, 0, -1])),
        (1, "better", 1): (np.array([1, 2]), np.array([0, 0])),  # not of the first cycle
    }
    told = report(table(rows), chosen, out=tmp_path, conditions={}, classes=["cat", "dog"]).to_record()
    assert told["overlap"]["mean"] == [[1.0, (2 / 4 + 1 / 4) / 2], [(2 / 4 + 1 / 4) / 2, 1.0]]
    random, better = told["classes"]["strategies"]
    assert (random["counts"], random["balance"], random["unknown"]) == ([4, 4], pytest.approx(1), 0)
    assert (better["counts"], better["balance"], better["unknown"]) == ([9, 0], pytest.approx(0), 1)
    text = (tmp_path / "report.md").read_text()
    assert "| better | 9 | 0.000 | 0.0% | 100.0% | 100.0% | 0.0% |" in text
    assert "1 selected sample(s) have no known class" in text
    assert "| better | 0.38 | 1.00 |" in text


HOSTILE = (
    "$\\frac$", "$$", "_mine", "_a_b_", "cat|dog", "<script>alert(1)</script>", "&lt;b&gt;", "\\", "\\|", "`a`", "**bold**",
    "[a](javascript:b)", "![x](y)", "# head", "a\nb | c\r\n| d |", "\x1b[31mred\x00", "-->", "=cmd|' /C calc'!A0", "@SUM(A1)",
    "+1", "-1", "\t=1", "x" * 300,
)  # fmt: skip


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown page as a reader sees them: rows of cells; nothing in a cell may be markup."""
    found: list[list[list[str]]] = []
    inline = ""
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        assert not token.type.startswith("html")
        for child in token.children or ():
            assert child.type in ("text", "softbreak", "image", "text_special"), child
            assert child.type != "image" or child.attrs["src"] in ("curves.png", "classes.png")
        if token.type in ("th_close", "td_close"):
            found[-1][-1].append(inline)
        inline = "".join(child.content for child in token.children or ())
    return found


def test_names_are_data(tmp_path: Path) -> None:
    """Through the real rendering: no name is markup, a formula, a column more, or missing from a legend."""
    rows = rows_of(2, gain=dict.fromkeys(HOSTILE, 0.0))
    chosen = {(0, name, 0): (np.array([1, 2]), np.array([0, 1])) for name in HOSTILE}
    told = report(
        table(rows), chosen, out=tmp_path, conditions={"pool": "<b>|$_$", "*a*": ["<i>"]}, references=["_mine"],
        classes=HOSTILE[:20],
    )  # fmt: skip
    for name in ("curves.png", "classes.png"):
        with Image.open(tmp_path / name) as figure:
            assert min(figure.size) > 500
    text = (tmp_path / "report.md").read_text()
    assert "<" not in text
    shown = ["".join(c if c.isprintable() else " " for c in name).strip() for name in HOSTILE]
    found = tables(text)
    assert len(found) == 8
    for rows_found in found:
        assert len({len(row) for row in rows_found}) == 1
    by_class = next(each for each in found if "most frequent" in each[0])
    assert by_class[0][5:] == shown[:20]
    assert [row[0] for row in by_class[1:]] == shown
    (overlap,) = [each for each in found if each[0][0] == ""]
    assert overlap[0][1:] == shown
    written = csv.read_csv(tmp_path / "results.csv", parse_options=csv.ParseOptions(newlines_in_values=True))
    names = dict.fromkeys(written["strategy"].to_pylist())
    assert [name.removeprefix("'") for name in names] == list(HOSTILE)
    assert not any(name[0] in "=+-@\t" for name in names)
    drawn = plot_curves(told)
    drawn.canvas.draw()
    assert [each.get_text()[:10] for each in drawn.legends[0].get_texts()] == [
        "".join(c if c.isprintable() else " " for c in name)[:10] for name in HOSTILE
    ]
    ElementTree.parse(tmp_path / "curves.svg")  # well-formed


def test_one_budget_has_no_area(tmp_path: Path) -> None:
    told = report(table([row for row in rows_of(3) if not row["cycle"]]), {}, out=tmp_path, conditions={}).to_record()
    assert told["aubc"][0]["mean"] is None
    assert "needs at least two cycles" in (tmp_path / "report.md").read_text()


def test_what_cannot_be_told(tmp_path: Path) -> None:
    results = table(rows_of(1))
    with pytest.raises(ConfigError, match="metric: 'f1' was not measured; measured were accuracy, auroc"):
        report(results, {}, out=tmp_path, conditions={}, metric="f1")
    with pytest.raises(ConfigError, match="nothing to compare"):
        report(results.slice(0, 0), {}, out=tmp_path, conditions={})
    with pytest.raises(ValueError, match="two rows of the same seed"):
        report(pa.concat_tables([results, results]), {}, out=tmp_path, conditions={})
    with pytest.raises(ValueError, match="lack the column seconds"):
        report(results.drop_columns(["seconds"]), {}, out=tmp_path, conditions={})
