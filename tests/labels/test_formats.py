"""What is exported comes back as it was; nothing else is taken for an answer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distal.artifacts.ledger import LABELED, SKIPPED, UNSURE
from distal.errors import ConfigError, SourceError
from distal.labels.formats import Format, labelling_xml, read_annotations, unsure_word, write_batch

CLASSES = ("circle", "cross")

ids = st.text(min_size=1).filter(lambda text: text.strip() != "")
formulas = st.tuples(st.sampled_from(["", "'"]), st.sampled_from(list("=+-@\t\r\n")), ids).map("".join)


@settings(deadline=None)
@given(st.lists(st.one_of(ids, formulas), min_size=1, max_size=10, unique=True), st.sampled_from(["csv", "parquet"]))
def test_ids_come_back_as_they_were(names: list[str], fmt: Format) -> None:
    """Any text: formulas, quotes, line breaks, control characters. In CSV no cell begins like a formula."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"batch.{fmt}")
        write_batch(
            path, fmt, [{"sample_id": name, "image": name, "uri": name, "flips": -1.5} for name in names], CLASSES
        )
        if fmt == "csv":
            newlines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            text = pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in ("sample_id", "image", "uri")}
            )
            table = pyarrow.csv.read_csv(path, parse_options=newlines, convert_options=text)
            cells = [cell for name in ("sample_id", "image", "uri") for cell in table[name].to_pylist()]
            assert not any(cell[0] in "=+-@\t\r\n" for cell in cells)
            assert table["flips"].to_pylist() == [-1.5] * len(names)
        said = read_annotations(path)
    assert [each.sample_id for each in said] == names
    assert {each.status for each in said} == {SKIPPED}


@settings(deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=5, unique=True))
def test_the_labelling_configuration_parses_or_is_refused(classes: list[str]) -> None:
    cannot_hold = any((ord(c) < 32 and c not in "\t\n\r") or ord(c) >> 1 == 0x7FFF for name in classes for c in name)
    if cannot_hold:  # https://www.w3.org/TR/xml/#charsets, surrogates aside, which `st.text` has not
        with pytest.raises(ConfigError, match="cannot hold; export with --format csv"):
            labelling_xml(classes)
        return
    xml = labelling_xml(classes)
    found = [choice.get("value") for choice in ElementTree.fromstring(xml).iter("Choice")]
    assert found == [*classes, unsure_word(classes)]


@pytest.mark.parametrize("name", ["a\x00b", "a\x1bb", "\ufffe", "\ud800"])
def test_a_class_that_xml_cannot_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pool.classes: .* has a character that XML"):
        write_batch(tmp_path / "tasks.json", "label-studio", [], [*CLASSES, name])
    assert not list(tmp_path.iterdir())


def test_a_class_called_cannot_tell(tmp_path: Path) -> None:
    """Then another word says so, in what is exported and in what is imported."""
    assert unsure_word(CLASSES) == "cannot tell"
    for name in ("cannot tell", " Cannot Tell "):
        classes = [*CLASSES, name]
        word = unsure_word(classes)
        assert word not in [each.strip().casefold() for each in classes]
        assert word.encode() in labelling_xml(classes)
        (tmp_path / "a.csv").write_text(f"sample_id,label\na,{name}\nb,{word}\n")
        said = read_annotations(tmp_path / "a.csv", word)
        assert [(each.status, each.label) for each in said] == [(LABELED, name.strip()), (UNSURE, None)]


def result(*choices: str, control: str = "choice") -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": "choices", "value": {"choices": [*choices]}}


def tasks(folder: Path, *annotations: dict[str, Any]) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps([{"data": {"sample_id": "a"}, "annotations": [*annotations]}]))
    return path


class TestLabelStudio:
    def test_other_controls_are_ignored(self, tmp_path: Path) -> None:
        other = result("1", control="quality")
        said = read_annotations(tasks(tmp_path, {"result": [other, result("cross")]}, {"result": [other]}))
        assert [(each.label, each.status) for each in said] == [("cross", LABELED), (None, SKIPPED)]
        flat = [{"sample_id": "a", "quality": "circle", "choice": "cross"}, {"sample_id": "b", "quality": "circle"}]
        (tmp_path / "flat.json").write_text(json.dumps(flat))
        assert [each.label for each in read_annotations(tmp_path / "flat.json")] == ["cross", None]

    def test_the_control_has_another_name(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no answer of the control 'choice', which the exported"):
            read_annotations(tasks(tmp_path, {"result": [result("cross", control="class")]}))
        (tmp_path / "flat.json").write_text(json.dumps([{"sample_id": "a", "label": "cross"}]))
        with pytest.raises(SourceError, match="no answer of the control 'choice', which the exported"):
            read_annotations(tmp_path / "flat.json")

    def test_two_choices(self, tmp_path: Path) -> None:
        for results in ([result("cross", "circle")], [result("cross"), result("circle")]):
            with pytest.raises(SourceError, match="2 choices of a; a sample has one class"):
                read_annotations(tasks(tmp_path, {"result": results}))

    def test_who_and_when(self, tmp_path: Path) -> None:
        said = read_annotations(
            tasks(
                tmp_path,
                {"result": [result("cross")], "completed_by": 3, "updated_at": "1970-01-01T00:00:01.000002Z"},
                {"result": [result("cross")], "completed_by": {"id": 4, "email": "a@example.com"}},
                {"result": [result("cross")], "completed_by": {"id": 4}, "updated_at": "1970-01-01T01:00:01+01:00"},
                {"result": [], "was_cancelled": True},
            )
        )
        assert [(each.annotator, each.time, each.row) for each in said] == [
            ("3", 1_000_002, 1),
            ("a@example.com", None, 2),
            ("4", 1_000_000, 3),
            (None, None, 4),
        ]
        assert said[-1].status == SKIPPED


def test_times_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "sample_id,label,updated_at\na,cross,1970-01-01T00:00:01Z\nb,cross,\nc,cross,1970-01-01 00:00:02\n"
    )
    assert [each.time for each in read_annotations(tmp_path / "a.csv")] == [1_000_000, None, 2_000_000]
    times = pa.array([3_000_000, None], pa.timestamp("us"))
    pq.write_table(
        pa.table({"sample_id": ["a", "b"], "label": ["x", "y"], "updated_at": times}), tmp_path / "a.parquet"
    )
    assert [each.time for each in read_annotations(tmp_path / "a.parquet")] == [3_000_000, None]
