from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from distal.artifacts import checkpoints
from distal.errors import Damage

STATE = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}


def test_commit_and_load(tmp_path: Path) -> None:
    ref = checkpoints.commit(tmp_path, 7, 14, STATE, inputs="abc", metrics={"train_loss": 0.5})
    assert ref == checkpoints.read(tmp_path, 7)
    assert (ref.index, ref.epoch, ref.metrics) == (7, 14, {"train_loss": 0.5})
    assert ref.path == tmp_path / "0007" / f"weights-{ref.sha256[:12]}.pt"
    loaded = checkpoints.load(ref)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert torch.equal(torch.load(ref.path, weights_only=True)["w"], STATE["w"])


def test_the_first_commit_wins(tmp_path: Path) -> None:
    first = checkpoints.commit(tmp_path, 0, 1, STATE)
    late = checkpoints.commit(tmp_path, 0, 1, {"w": torch.zeros(2), "n": torch.tensor(0)})
    assert late == first
    assert torch.equal(checkpoints.load(late)["w"], STATE["w"])


def test_of_two_writers_at_once_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late one of an attempt that was killed: it saw no manifest, and commits after its successor did."""
    serialize = checkpoints.serialize

    def overtaken(value: object) -> bytes:
        monkeypatch.setattr(checkpoints, "serialize", serialize)
        winners.append(checkpoints.commit(tmp_path, 0, 1, STATE))
        return serialize(value)

    winners: list[object] = []
    monkeypatch.setattr(checkpoints, "serialize", overtaken)
    late = checkpoints.commit(tmp_path, 0, 1, {"w": torch.zeros(2), "n": torch.tensor(0)})
    assert [late] == winners
    assert torch.equal(checkpoints.load(checkpoints.read(tmp_path, 0))["w"], STATE["w"])


def test_weights_that_could_not_be_written_are_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is the commit: it comes last."""

    def fail(*_: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(checkpoints, "write_bytes", fail)
    with pytest.raises(OSError, match="input/output error"):
        checkpoints.commit(tmp_path, 0, 1, STATE)
    assert not checkpoints.is_committed(tmp_path, 0)


def test_weights_that_were_trained_from_something_else_are_not_taken_up(tmp_path: Path) -> None:
    checkpoints.commit(tmp_path, 0, 1, STATE, inputs="abc")
    with pytest.raises(Damage, match="0000: trained from other inputs than the cycle has now"):
        checkpoints.commit(tmp_path, 0, 1, STATE, inputs="xyz")


def test_weights_without_a_manifest_are_not_published(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        checkpoints.commit(tmp_path, index, index + 1, STATE)
    (tmp_path / "0001" / "manifest.json").unlink()
    assert checkpoints.committed(tmp_path) == [0, 2]
    assert checkpoints.committed(tmp_path / "missing") == []


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    ref = checkpoints.commit(tmp_path, 3, 4, STATE)
    data = bytearray(ref.path.read_bytes())
    data[-200] ^= 1
    ref.path.write_bytes(data)
    with pytest.raises(Damage, match="the bytes of checkpoint 3 have changed"):
        checkpoints.load(ref)
    ref.path.unlink()
    with pytest.raises(Damage, match="the weights of checkpoint 3 are missing"):
        checkpoints.load(ref)


class TestQueue:
    def test_checkpoints_as_they_appear(self, tmp_path: Path) -> None:
        queue = checkpoints.Queue(tmp_path, 2)
        assert queue.published() == []
        first = checkpoints.commit(tmp_path, 0, 1, STATE)
        assert queue.published() == [first]
        assert not queue.complete()
        second = checkpoints.commit(tmp_path, 1, 2, STATE)
        assert queue.complete()
        assert queue.published() == [first, second]

    def test_one_that_is_seen_late_is_waited_for_and_one_that_never_comes_is_missed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shared file system shows a new file to other nodes some time later."""
        monkeypatch.setattr(checkpoints, "VISIBLE_S", 0.2)
        queue = checkpoints.Queue(tmp_path, 2)
        checkpoints.commit(tmp_path, 1, 2, STATE)
        assert not queue.complete()
        time.sleep(0.3)
        with pytest.raises(Damage, match="training is complete, and checkpoint 0 is not here"):
            queue.complete()
        checkpoints.commit(tmp_path, 0, 1, STATE)
        assert queue.complete()
