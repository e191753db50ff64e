from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distal.artifacts import checkpoints
from distal.errors import ModelError, RunConflict
from distal.model.weights import Location, check_fits, find_weights, within
from distal.train.folder import FolderCheckpoints, matching, versions


def write(folder: Path, name: str, value: float = 0.0) -> Path:
    """A state_dict that was written an hour ago."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    state = {"weight": torch.full((2, 3), float(value)), "bias": torch.zeros(2)}
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    age(path)
    return path


def age(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


ANYWHERE = Location()
NETWORK = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}


def looking(tmp_path: Path, pattern: str = "*", location: Location = ANYWHERE) -> FolderCheckpoints:
    return FolderCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck", pattern, NETWORK, location)


def opened(tmp_path: Path, pattern: str = "*", location: Location = ANYWHERE) -> FolderCheckpoints:
    found = looking(tmp_path, pattern, location)
    found.settle()
    found.keep()
    return found


def names(found: FolderCheckpoints) -> list[str]:
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
    write(tmp_path / "ck", "epoch2.pt", 2)
    assert names(opened(tmp_path)) == ["epoch2.pt"]
    write(tmp_path / "ck", "epoch10.pt", 10)
    write(tmp_path / "ck", "epoch1.pt", 1)
    assert names(opened(tmp_path)) == ["epoch2.pt", "epoch1.pt", "epoch10.pt"]


def test_nothing_is_written_before_it_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "ck", "a.pt")
    looking(tmp_path).settle()
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
    monkeypatch.setattr("distal.train.folder._SETTLED_S", 0.5)
    whole = write(tmp_path, "whole.pt").read_bytes()
    (tmp_path / "ck").mkdir()
    path = tmp_path / "ck" / "slow1.pt"

    def slowly() -> None:
        with path.open("wb") as file:
            for start in range(0, len(whole), len(whole) // 9):
                file.write(whole[start : start + len(whole) // 9])
                file.flush()
                time.sleep(0.1)

    writer = threading.Thread(target=slowly)
    writer.start()
    found = looking(tmp_path)
    while not found.look(patient=True) or not found.refs:
        assert not writer.is_alive() or not found.refs
        time.sleep(0.02)
    writer.join()
    assert checkpoints.load(found.refs[0])["bias"].tolist() == [0, 0]


def test_a_later_file_does_not_overtake_one_that_is_being_written(tmp_path: Path) -> None:
    write(tmp_path / "ck", "epoch2.pt")
    (tmp_path / "ck" / "epoch1.pt").write_bytes(b"half")  # now
    found = looking(tmp_path)
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
    torch.save({"state_dict": NETWORK, "hyper_parameters": {"path": Path("x")}}, tmp_path / "ck" / "a b.ckpt")
    age(tmp_path / "ck" / "a b.ckpt")
    with pytest.raises(ModelError, match="a b.ckpt: holds an object of pathlib.* if you trust it") as raised:
        opened(tmp_path)
    assert "\n" not in str(raised.value)
    command = str(raised.value).partition("convert with: python")[2].rpartition(" and set checkpoints.path=")[0]
    subprocess.run(sys.executable + command, shell=True, check=True)
    assert (tmp_path / "ck" / "a b.ckpt").stat().st_size > 0
    found = FolderCheckpoints(tmp_path / "checkpoints.json", tmp_path / "ck" / "converted", "*.pt", NETWORK)
    age(tmp_path / "ck" / "converted" / "a b.pt")
    found.settle()
    assert names(found) == ["a b.pt"]


def save(folder: Path, name: str, **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(more, folder / name)
    age(folder / name)
    return folder / name


def lightning(value: float, **more: object) -> dict[str, object]:
    """What Lightning saves, as far as it matters here."""
    state = {
        "model.weight": torch.full((2, 3), float(value)),
        "model.bias": torch.zeros(2),
        "loss.scale": torch.ones(1),
    }
    return {"epoch": 3, "state_dict": state, "callbacks": {"ModelCheckpoint": {"best_k_models": {}}}, **more}


def test_a_directory_as_lightning_leaves_it(tmp_path: Path) -> None:
    """Names in natural order, a second version after the first, weights once; `last` when no more will come."""
    for name, value in (("epoch=10-step=110", 10), ("epoch=2-step=30", 2), ("epoch=2-step=30-v1", 2.5), ("last", 10)):
        save(tmp_path / "ck", f"{name}.ckpt", **lightning(value, seconds=name))
    found = looking(tmp_path)
    assert found.look(patient=True)
    assert names(found) == ["epoch=2-step=30.ckpt", "epoch=2-step=30-v1.ckpt", "epoch=10-step=110.ckpt"]
    found.keep()
    assert opened(tmp_path).repeated == [("last.ckpt", "epoch=10-step=110.ckpt")]
    loaded = checkpoints.load(found.refs[2])
    assert loaded.keys() == NETWORK.keys()
    assert (loaded["weight"] == 10).all()
    assert versions(names(found)) == ["epoch=2-step=30-v1.ckpt"]

    save(tmp_path / "ck", "epoch=11-step=120.ckpt", **lightning(11))
    save(tmp_path / "ck", "last.ckpt", **lightning(12))  # written again, with weights of its own
    assert [ref.index for ref in opened(tmp_path).refs] == [0, 1, 2, 3, 4]
    assert names(opened(tmp_path))[3:] == ["epoch=11-step=120.ckpt", "last.ckpt"]


def test_names_without_a_number_wait_until_no_more_will_come(tmp_path: Path) -> None:
    """`best` and `last` are written over and over, also with a number in the name, and with nothing else there yet."""
    for value, name in enumerate(("best-epoch=2.pt", "late.pt")):
        write(tmp_path / "ck", name, value)
    found = looking(tmp_path)
    assert found.look(patient=True)
    assert names(found) == []
    assert found.no_more(2)
    assert found.look(patient=True, closing=True)
    assert names(found) == ["best-epoch=2.pt", "late.pt"]
    assert found.n_taken == 2


def test_names_in_no_order_of_training_are_refused(tmp_path: Path) -> None:
    for step, name in ((30, "val_loss=0.9-epoch=2"), (20, "val_loss=1.1-epoch=1")):
        save(tmp_path / "ck", f"{name}.ckpt", **lightning(step, global_step=step))
    with pytest.raises(
        ModelError, match=r"epoch=1.ckpt \(global_step 20\) comes after .* \(global_step 30\) by name; rename"
    ):
        opened(tmp_path)


def test_what_counts_towards_the_number_that_is_expected(tmp_path: Path) -> None:
    for name, value in (("epoch=0", 0), ("epoch=1", 1), ("epoch=2", 1), ("last", 1)):
        write(tmp_path / "ck", f"{name}.pt", value)
    found = opened(tmp_path)
    assert len(found.refs) == 2  # weights count once, and `last` never adds to what is expected
    assert found.n_taken == 3
    assert found.no_more(3)
    assert not found.no_more(4)


def test_what_lies_about_in_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "ck", "epoch1.pt")
    (tmp_path / "ck" / "last.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "ck" / "export").mkdir()
    (tmp_path / "ck" / "export" / "manifest.json").write_text("{}")
    (tmp_path / "ck" / "1").mkdir()
    (tmp_path / "ck" / "1" / "manifest.json").write_text("{}")
    assert names(opened(tmp_path, "*.pt")) == ["epoch1.pt"]
    (tmp_path / "ck" / "epoch2.pt").mkdir()
    age(tmp_path / "ck" / "epoch2.pt")
    with pytest.raises(ModelError, match="epoch2.pt: a folder: a sharded checkpoint; consolidate it"):
        opened(tmp_path, "*.pt")


def test_equal_weights_are_equal_however_they_are_stored(tmp_path: Path) -> None:
    buffer = torch.arange(20, dtype=torch.float32)
    (tmp_path / "ck").mkdir()
    torch.save({"weight": buffer[:6].view(2, 3), "bias": buffer[6:8]}, tmp_path / "ck" / "1.pt")
    save_file({"bias": buffer[6:8].clone(), "weight": buffer[:6].view(2, 3).clone()}, tmp_path / "ck" / "2.safetensors")
    age(tmp_path / "ck" / "1.pt")
    age(tmp_path / "ck" / "2.safetensors")
    assert opened(tmp_path).repeated == [("2.safetensors", "1.pt")]


def test_published_checkpoints(tmp_path: Path) -> None:
    for index in (1, 0):
        checkpoints.commit(tmp_path / "ck", index, index + 1, NETWORK | {"bias": torch.full((2,), float(index))})
    assert [ref.path.parent.name for ref in opened(tmp_path, "*.pt").refs] == ["0000", "0001"]
    assert matching(tmp_path / "ck", "*.ckpt") == []


@pytest.mark.parametrize(
    ("value", "location", "expected"),
    [
        (NETWORK, Location(), (None, "")),
        ({"state_dict": NETWORK, "epoch": 1}, Location(), ("state_dict", "")),
        ({"state_dict": NETWORK, "ema": {"shadow": NETWORK}}, Location("ema.shadow"), ("ema.shadow", "")),
        ({"a.b": NETWORK, "a": 1}, Location("a.b"), ("a.b", "")),
        (
            {"a": {"EMA{'decay': 0.9}": {"x": NETWORK}}},
            Location("a.EMA{'decay': 0.9}.x"),
            ("a.EMA{'decay': 0.9}.x", ""),
        ),
        ({"model_state_dict": NETWORK, "optimizer": {"m": torch.zeros(1)}}, Location(), ("model_state_dict", "")),
        ({f"module.{key}": value for key, value in NETWORK.items()}, Location(), (None, "module.")),
        (
            {f"{p}.{key}": value for key, value in NETWORK.items() for p in ("net", "teacher")},
            Location(None, "net."),
            (None, "net."),
        ),
    ],
)
def test_where_the_weights_are(value: object, location: Location, expected: tuple[str | None, str]) -> None:
    assert find_weights("a.pt", value, NETWORK, location) == expected
    assert within(value, *expected).keys() == NETWORK.keys()


@pytest.mark.parametrize(
    ("value", "location", "message"),
    [
        (
            {"student": NETWORK, "teacher": NETWORK, "optimizer": {"state": {"m": torch.zeros(1)}}},
            Location(),
            r"it has student, teacher, optimizer\); set checkpoints.key to student or teacher$",
        ),
        ({"state_dict": NETWORK, "epoch": 1}, Location("ema"), "has no 'ema'; state_dict would fit"),
        ({"epoch": 1}, Location("epoch.x"), "has no 'epoch.x'; nothing in it fits model.name: set it to null"),
        (NETWORK, Location(None, "net."), "no key of a.pt begins with 'net.': weight, bias"),
        (
            {f"{p}.{key}": value for key, value in NETWORK.items() for p in ("net", "teacher")},
            Location(),
            "more than once, under net. and teacher.; set checkpoints.strip_prefix",
        ),
    ],
)
def test_weights_that_are_not_found(value: object, location: Location, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_weights("a.pt", value, NETWORK, location)


def test_other_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="checkpoints.path: .*ck: no such directory"):
        opened(tmp_path)
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "notes.txt").write_text("hello")
    age(tmp_path / "ck" / "notes.txt")
    with pytest.raises(
        ModelError, match=r"'\*' matches notes.txt; checkpoints are .pt, .pth, .ckpt, .safetensors files"
    ):
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
