"""Published weights. Their folder is the queue between training and scoring.

::

    checkpoints/0007/weights-<sha12>.pt    a state_dict, plain tensors
    checkpoints/0007/manifest.json         the commit: index, epoch, file, sha256, metrics

The manifest is created exclusively: the first commit of an index wins, and a late writer of a killed attempt
cannot change it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from distal.errors import Damage, ModelError
from distal.model.weights import ANY_SIZE, LIGHTNING, Unreadable, deserialize, serialize, within
from distal.records import CheckpointRef
from distal.storage import Numbered, create_json, link, read_json, read_regular, sha256, write_bytes

if TYPE_CHECKING:
    from distal.model.weights import StateDict

MANIFEST = "manifest.json"
KEEP_ALL = "ModelCheckpoint(save_top_k=-1) in Lightning"
KINDS = {"index": int, "epoch": int, "file": str, "sha256": str, "inputs": str, "metrics": dict}
"""What a manifest says, and the type of each."""

VISIBLE_S = 60.0


def commit(
    folder: Path,
    index: int,
    epoch: int,
    state_dict: StateDict,
    *,
    inputs: str = "",
    metrics: dict[str, float] | None = None,
) -> CheckpointRef:
    """Publish weights under an index, unless that index is committed already.

    Args:
        folder: the `checkpoints` folder of a cycle.
        index: the row these weights get in the assignments.
        epoch: epochs completed, from 1.
        inputs: hash of what they were trained from.

    Returns:
        The committed checkpoint: this one, or the one that came first.

    Raises:
        Damage: the one that came first was trained from other inputs.
    """
    if is_committed(folder, index):
        return _of_same_inputs(folder, index, inputs)
    return commit_bytes(folder, index, epoch, serialize(state_dict), inputs=inputs, metrics=metrics)


def commit_bytes(
    folder: Path, index: int, epoch: int, data: bytes, *, inputs: str = "", metrics: dict[str, float] | None = None
) -> CheckpointRef:
    """Like `commit`, of weights that are serialized."""
    place = folder / f"{index:04d}"
    if not (place / MANIFEST).exists():
        checksum = sha256(data)
        file = f"weights-{checksum[:12]}.pt"
        write_bytes(place / file, data)
        record = {"index": index, "epoch": epoch, "file": file, "sha256": checksum, "inputs": inputs}
        create_json(place / MANIFEST, {**record, "metrics": metrics or {}})
    return _of_same_inputs(folder, index, inputs)


def _of_same_inputs(folder: Path, index: int, inputs: str) -> CheckpointRef:
    place = folder / f"{index:04d}"
    if read_json(place / MANIFEST)["inputs"] != inputs:
        raise Damage(
            f"{place}: trained from other inputs than the cycle has now; put back what was there, or remove "
            f"{folder.parent} to do the cycle again"
        )
    return read(folder, index)


def read(folder: Path, index: int) -> CheckpointRef:
    """The committed checkpoint with this index; raises FileNotFoundError when there is none."""
    place = folder / f"{index:04d}"
    record = read_json(place / MANIFEST, required=tuple(KINDS))
    for key, kind in KINDS.items():
        if type(record[key]) is not kind:
            raise Damage(f"{place / MANIFEST}: {key} is a {type(record[key]).__name__}, not of type {kind.__name__}")
    if record["index"] != index or record["file"] in ("", ".", "..") or Path(record["file"]).name != record["file"]:
        raise Damage(f"{place / MANIFEST}: not of checkpoint {index}, or its file is not beside it; put it back")
    return CheckpointRef(index, record["epoch"], place / record["file"], record["sha256"], record["metrics"])


def committed(folder: Path) -> list[int]:
    """Indices of the committed checkpoints, in order."""
    return [index for index in Numbered(folder, digits=4).numbers() if is_committed(folder, index)]


def unbroken(folder: Path, inputs: str = "") -> list[CheckpointRef]:
    """The committed checkpoints from the first to the last before a gap; raises Damage like `commit`."""
    indices = committed(folder)
    return [_of_same_inputs(folder, index, inputs) for place, index in enumerate(indices) if place == index]


def take_over(ref: CheckpointRef, folder: Path) -> None:
    """Commit a published checkpoint in another folder as well; raises Damage when its bytes have changed."""
    _check_bytes(ref, read_regular(ref.path, ANY_SIZE))
    place = folder / f"{ref.index:04d}"
    link(ref.path, place / ref.path.name)
    create_json(place / MANIFEST, read_json(ref.path.parent / MANIFEST))


def is_committed(folder: Path, index: int) -> bool:
    """Whether there is a checkpoint with this index."""
    return (folder / f"{index:04d}" / MANIFEST).is_file()


class Queue:
    """The checkpoints of a folder, as they appear.

    Args:
        n: their final number.
    """

    def __init__(self, folder: Path, n: int) -> None:
        self._folder, self._n = folder, n
        self._refs: dict[int, CheckpointRef] = {}
        self._missed_since: float | None = None

    def published(self) -> list[CheckpointRef]:
        """The committed checkpoints, in order."""
        for index in committed(self._folder):
            if index not in self._refs:
                self._refs[index] = read(self._folder, index)
        return [self._refs[index] for index in sorted(self._refs)]

    def complete(self) -> bool:
        """Whether all are visible, asked after the last was written: a shared file system may show it later.

        Raises:
            Damage: one is not visible after `VISIBLE_S` seconds.
        """
        missing = set(range(self._n)) - {ref.index for ref in self.published()}
        if not missing:
            return True
        self._missed_since = self._missed_since or time.monotonic()
        if time.monotonic() - self._missed_since > VISIBLE_S:
            raise Damage(
                f"{self._folder}: training is complete, and checkpoint {min(missing)} is not here; every node must see "
                "the same files; put it back, or start another run directory"
            )
        return False


def load(checkpoint: CheckpointRef) -> StateDict:
    """The weights of a checkpoint, on the CPU.

    Raises:
        ModelError: whoever else writes these files has removed it, or it holds no plain tensors.
        Damage: the file is missing, or its bytes are not those that were committed.
    """
    try:
        data = read_regular(checkpoint.path, ANY_SIZE)  # its size was looked at before it counted
    except FileNotFoundError:
        if checkpoint.path.suffix == LIGHTNING:
            raise ModelError(
                f"{checkpoint.path}: removed before it was scored; put it back, and have every checkpoint kept: "
                f"{KEEP_ALL}"
            ) from None
        raise Damage(
            f"{checkpoint.path}: the weights of checkpoint {checkpoint.index} are missing; put the file back"
        ) from None
    except OSError as error:
        raise Damage(f"{checkpoint.path}: {error.strerror}") from error
    _check_bytes(checkpoint, data)
    try:
        value = deserialize(data, checkpoint.path.suffix)
    except Unreadable as error:
        raise ModelError(f"{checkpoint.path}: not a state_dict of plain tensors ({error})") from error
    state: StateDict = within(value, checkpoint.key, checkpoint.prefix)
    return state


def _check_bytes(checkpoint: CheckpointRef, data: bytes) -> None:
    if sha256(data) != checkpoint.sha256:
        raise Damage(f"{checkpoint.path}: the bytes of checkpoint {checkpoint.index} have changed")
