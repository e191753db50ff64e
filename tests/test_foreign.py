from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distal import checkpoints, foreign
from distal.errors import ModelError, RunConflict
from distal.foreign import ForeignCheckpoints, check_fits


def write(folder: Path, name: str, value: float = 0.0) -> Path:
    """A state_dict that was written an hour ago."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    state = {"weight": torch.full((2, 3), value), "bias": torch.zeros(2)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    age(path)
    return path


def age(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def opened(tmp_path: Path, pattern: str = "*") -> ForeignCheckpoints:
    found = ForeignCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck", pattern)
    found.settle()
    found.keep()
    return found


def names(found: ForeignCheckpoints) -> list[str]:
    return [ref.path.name for ref in found.refs]


def test_natural_order_and_both_formats(tmp_path: Path) -> None:
    for i, name in enumerate(["epoch10.pt", "epoch2.pth", "epoch1.safetensors", "notes.txt"]):
        write(tmp_path / "ck", name, i) if name != "notes.txt" else (tmp_path / "ck" / name).write_text("hello")
    found = opened(tmp_path, "epoch*")
    assert names(found) == ["epoch1.safetensors", "epoch2.pth", "epoch10.pt"]
    assert [ref.index for ref in found.refs] == [0, 1, 2]
    loaded = [checkpoints.load(ref)["weight"][0, 0].item() for ref in found.refs]
    assert loaded == [2, 1, 0]


def test_an_index_is_given_once(tmp_path: Path) -> None:
    """A file that comes later is added at the end, also when its name sorts before."""
    write(tmp_path / "ck", "epoch2.pt")
    assert names(opened(tmp_path)) == ["epoch2.pt"]
    write(tmp_path / "ck", "epoch10.pt")
    write(tmp_path / "ck", "epoch1.pt")
    assert names(opened(tmp_path)) == ["epoch2.pt", "epoch1.pt", "epoch10.pt"]


def test_nothing_is_written_before_it_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "ck", "a.pt")
    found = ForeignCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck", "*")
    found.settle()
    assert not (tmp_path / "checkpoints.json").exists()


def test_a_file_that_changes_is_refused_and_one_that_is_only_touched_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "ck", "a.pt", 1)
    opened(tmp_path)
    os.utime(path)
    found = opened(tmp_path)
    write(tmp_path / "ck", "a.pt", 2)
    with pytest.raises(RunConflict, match="a.pt: changed after it became checkpoint 0"):
        found.look(patient=True)
    with pytest.raises(RunConflict, match="a.pt: changed after it became checkpoint 0"):
        opened(tmp_path)
    path.unlink()  # rows that are scored do not need it any more
    assert names(opened(tmp_path)) == ["a.pt"]


def test_a_file_counts_when_it_has_stood_still_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows for a second, as a slow writer's does."""
    monkeypatch.setattr(foreign, "SETTLED_S", 0.5)
    whole = write(tmp_path, "whole.pt").read_bytes()
    (tmp_path / "ck").mkdir()
    path = tmp_path / "ck" / "slow.pt"

    def slowly() -> None:
        with path.open("wb") as file:
            for start in range(0, len(whole), len(whole) // 9):
                file.write(whole[start : start + len(whole) // 9])
                file.flush()
                time.sleep(0.1)

    writer = threading.Thread(target=slowly)
    writer.start()
    found = ForeignCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck", "*")
    while not found.look(patient=True) or not found.refs:
        assert not writer.is_alive() or not found.refs
        time.sleep(0.02)
    writer.join()
    assert checkpoints.load(found.refs[0])["bias"].tolist() == [0, 0]


def test_a_later_file_does_not_overtake_one_that_is_being_written(tmp_path: Path) -> None:
    write(tmp_path / "ck", "epoch2.pt")
    (tmp_path / "ck" / "epoch1.pt").write_bytes(b"half")  # now
    found = ForeignCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck", "*")
    assert not found.look(patient=True)
    assert found.refs == []


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "ck", name)
    path.write_bytes(path.read_bytes()[:-50])
    age(path)
    with pytest.raises(ModelError, match=f"{name}: truncated, or not a state_dict of plain tensors"):
        opened(tmp_path)


def test_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "ck").mkdir()
    torch.save({"path": Path("x")}, tmp_path / "ck" / "a.pt")
    age(tmp_path / "ck" / "a.pt")
    with pytest.raises(ModelError, match="a.pt: truncated, or not a state_dict of plain tensors"):
        opened(tmp_path)


def test_other_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="checkpoints.path: .*ck: no such directory"):
        opened(tmp_path)
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "notes.txt").write_text("hello")
    age(tmp_path / "ck" / "notes.txt")
    with pytest.raises(ModelError, match=r"'\*' matches notes.txt; checkpoints are .pt, .pth, .safetensors files"):
        opened(tmp_path)


TEMPLATE = {"fc.weight": torch.zeros(10, 4), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state_dict": TEMPLATE, "epoch": 3}, r"not a state_dict of plain tensors \(it holds dict, int\)"),
        (torch.zeros(3), r"not a state_dict of plain tensors \(it is a Tensor\)"),
        ({"fc.weight": torch.zeros(10, 4)}, "its keys do not fit model.name: missing fc.bias"),
        (TEMPLATE | {"x": torch.zeros(1)}, "do not fit model.name: unexpected x"),
        (
            {f"module.{key}": value for key, value in TEMPLATE.items()},
            "missing fc.weight, unexpected module.fc.weight; every key begins with 'module.': save it without",
        ),
        (
            {"fc.weight": torch.zeros(7, 4), "fc.bias": torch.zeros(7)},
            r"fc.weight has shape \(7, 4\), the network needs \(10, 4\); set model.num_classes=7",
        ),
        ({"fc.weight": torch.zeros(10, 5), "fc.bias": torch.zeros(10)}, r"has shape \(10, 5\), the network needs"),
    ],
)
def test_weights_that_do_not_fit(state: object, message: str) -> None:
    with pytest.raises(ModelError, match=f"epoch1.pt: .*{message}"):
        check_fits("epoch1.pt", state, TEMPLATE)
    check_fits("epoch1.pt", dict(TEMPLATE), TEMPLATE)
