"""Training by a command of the user's own: it gets the labels, and publishes checkpoints that are scored as they come.

The command runs beside the driver, once per cycle. It calls `distal.publish_checkpoint`, which needs no Ray.
"""

from __future__ import annotations

import ctypes
import operator
import os
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

import pyarrow as pa

from distal.artifacts import checkpoints
from distal.artifacts.cycles import Cycle
from distal.artifacts.ledger import Ledger
from distal.errors import ConfigError, ModelError, RunConflict, Superseded, TrainingFailed
from distal.model.weights import check_fits, serialize
from distal.pool import Pool
from distal.pool.images import write_png
from distal.records import CheckpointRef
from distal.storage import disk_errors, sha256, write_table
from distal.train.rank import TrainJob, check_owner, claim

if TYPE_CHECKING:
    from distal.model.weights import StateDict

_PLACEHOLDERS = ("labels", "images", "checkpoints", "epochs", "seed", "cycle")
OWNER, _INPUTS = "DISTAL_OWNER", "DISTAL_INPUTS"
_OUT, _ERR = "stdout.log", "stderr.log"
_LAST_LINES = 20
_POLL_S = 0.2  # between two checks whether the command has ended

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def check_command(command: str) -> None:
    """Raise ConfigError when a command cannot be run."""
    try:
        words = shlex.split(command)
        names = [name for word in words for _, name, _, _ in Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise ConfigError(f"train.command: {command!r} cannot be split into words ({error})") from None
    unknown = [name for name in names if name not in _PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise ConfigError(f"train.command: unknown placeholder {{{unknown[0]}}}; known: {known}")
    if "checkpoints" not in names:
        raise ConfigError("train.command: does not say {checkpoints}, the folder to publish to")


def run_command(
    command: str,
    job: TrainJob,
    pool: Pool,
    dest: Path,
    given_up: threading.Event,
    fits: threading.Event,
    still_ours: Callable[[], None] = lambda: None,
) -> None:
    """Run the command of a cycle; returns when it has ended and every checkpoint is published.

    Args:
        command: with `_PLACEHOLDERS` in braces.
        pool: that of the job, with the classes of the run.
        dest: the folder that this start publishes to, and no other.
        given_up: ends the command when it is set.
        fits: set once the weights of the first checkpoint are known to fit.
        still_ours: raises when another driver has the run.

    Raises:
        TrainingFailed: it exited with another code than 0; the message has the end of its output.
        ModelError: it published other checkpoints than expected, or weights that do not fit `model.name`.
        Superseded: given up.
    """
    train = job.folder / "train"
    words = shlex.split(command)
    ledger = Ledger.read(job.labels)
    values = {
        "labels": str(_write_labels(pool, ledger, train / "labels.parquet")),
        "images": str(_write_images(pool, ledger, train / "images")) if "{images}" in command else "",
        "checkpoints": str(dest),
        "epochs": job.config.epochs,
        "seed": job.seed,
        "cycle": job.cycle,
    }
    owner = f"{job.owner_prefix}{uuid.uuid4().hex[:8]}"
    claim(job.folder, owner, still_ours)
    environment = {**os.environ, OWNER: owner, _INPUTS: job.inputs}
    with disk_errors(train), (train / _OUT).open("ab") as out, (train / _ERR).open("ab") as err:
        try:
            process = subprocess.Popen(
                [word.format(**values) for word in words],
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise ConfigError(f"train.command: {words[0]}: {error.strerror}") from None
        try:
            code = _wait(job, dest, process, given_up, fits)
        finally:
            _end(process)
    if code:
        raise TrainingFailed(
            f"train.command ended with {code} in cycle {job.cycle}; {train / _ERR} ends with:\n"
            + "\n".join(_last_lines(train / _ERR))
        )
    _check_first(job, dest, fits)
    published, wanted = checkpoints.committed(dest), range(len(job.config.checkpoint_epochs))
    if published != list(wanted):
        raise _other_than_wanted(job, published)


def _other_than_wanted(job: TrainJob, published: Sequence[int]) -> ModelError:
    n_wanted = len(job.config.checkpoint_epochs)
    indices = f", with the indices {_runs(published)}," if published else ""
    return ModelError(
        f"train.command published {len(published)} checkpoints{indices} in cycle {job.cycle}, and train.epochs and "
        f"checkpoint_every say {n_wanted}, with the indices {_runs(range(n_wanted))}; publish these with "
        "distal.publish_checkpoint(folder, state_dict, index), or change train.epochs or train.checkpoint_every"
    )


def _runs(indices: Sequence[int]) -> str:
    """Ascending numbers in words: `0 to 2, 5`."""
    firsts = [index for index in indices if index - 1 not in indices]
    lasts = [index for index in indices if index + 1 not in indices]
    shown = [str(a) if a == b else f"{a} to {b}" for a, b in zip(firsts, lasts, strict=True)]
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def _wait(
    job: TrainJob, dest: Path, process: subprocess.Popen[bytes], given_up: threading.Event, fits: threading.Event
) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_S)
        if given_up.is_set():
            raise Superseded(f"{job.folder}: training was given up")
        _check_first(job, dest, fits)
        published = checkpoints.committed(dest)
        if published and published[-1] >= len(job.config.checkpoint_epochs):  # hours may pass before it ends
            raise _other_than_wanted(job, published)


def _check_first(job: TrainJob, dest: Path, fits: threading.Event) -> None:
    """Check the weights of the first checkpoint, once it is published."""
    there = [] if fits.is_set() else checkpoints.committed(dest)
    if there:
        ref = checkpoints.read(dest, there[0])
        check_fits(ref.path.name, checkpoints.load(ref), job.model.build(pretrained=False).state_dict())
        fits.set()


def _die_with_parent() -> None:
    """Have the kernel end this process when the driver goes, however it goes; on Linux."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and its child processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _write_labels(pool: Pool, ledger: Ledger, path: Path) -> Path:
    """The labelled samples, as the command reads them."""
    assert pool.classes is not None
    samples = pool.take_samples(ledger.indices, ["sample_id", "uri"])
    names = [pool.classes[label] for label in ledger.labels]
    columns = {"sample_index": ledger.indices, "sample_id": samples["sample_id"], "uri": samples["uri"]}
    write_table(path, pa.table({**columns, "label": ledger.labels, "class_name": names}))
    return path


def _write_images(pool: Pool, ledger: Ledger, folder: Path) -> Path:
    """The labelled images as files, for a pool that was packed from something that has none."""
    for index in ledger.indices.tolist():
        write_png(pool, index, folder / f"{index}.png")
    return folder


def _last_lines(path: Path) -> Sequence[str]:
    with path.open(errors="replace") as lines:
        return [line.rstrip("\n") for line in deque(lines, _LAST_LINES)]


def publish_checkpoint(
    folder: str | Path, state_dict: StateDict, index: int, *, metrics: dict[str, float] | None = None
) -> None:
    """Publish weights from a training script that `distal run` started (`train.command`). Needs no Ray.

    The file appears whole or not at all, and an index is published once; the same weights again change nothing.

    Args:
        folder: the value of `{checkpoints}`.
        state_dict: of the network that `model.name` builds.
        index: 0 for the first checkpoint, and so on, without a gap.
        metrics: such as the training loss, for people: numbers.

    Raises:
        ValueError: `index` is no index, `state_dict` is none, or a metric is no number.
        Superseded: another attempt has taken over; this script should end.
        RunConflict: the folder has another checkpoint of that index.
    """
    folder, index = Path(folder), _checked_index(index)
    _check_state(state_dict)
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"publish_checkpoint: metrics must map names to numbers ({error})") from None
    _check_still_ours(folder)
    data = serialize(dict(state_dict))
    ref = checkpoints.commit_bytes(folder, index, index + 1, data, inputs=os.environ.get(_INPUTS, ""), metrics=numbers)
    if sha256(data) != ref.sha256:
        raise RunConflict(
            f"{folder}: checkpoint {index} is published already, with other weights; publish each index once, from one "
            "process, or give another folder"
        )


def resume_checkpoints(folder: str | Path, n: int | None = None) -> list[Path]:
    """Resume an interrupted training: its first checkpoints count for this start of the script as well.

    Every start of `train.command` publishes to a folder of its own. A script that resumes instead of starting over
    calls this first; otherwise its earlier checkpoints are ignored.

    Args:
        folder: the value of `{checkpoints}`, or any folder that checkpoints are published to.
        n: at most so many of them; None: all.

    Returns:
        Their weights files, in order: the argument of `publish_checkpoint`, saved by `torch.save`. The next index to
        publish is their number. Empty when there is nothing to resume.

    Raises:
        Damage: the bytes of one have changed.
        Superseded: another attempt has taken over; this script should end.
    """
    folder = Path(folder)
    _check_still_ours(folder)
    folders = Cycle(folder.parent).published_to() if OWNER in os.environ else [folder]
    refs = _longest([checkpoints.unbroken(each, os.environ.get(_INPUTS, "")) for each in folders])[:n]
    for ref in refs:
        if ref.path.parents[1].name != folder.name:
            checkpoints.take_over(ref, folder)
    return [checkpoints.read(folder, ref.index).path for ref in refs]


def _longest(starts: Sequence[Sequence[CheckpointRef]]) -> Sequence[CheckpointRef]:
    """The checkpoints of the latest start that has some, continued by those of an earlier start of the same training:
    a start may have been interrupted while it took them over.

    Args:
        starts: the checkpoints of each, the latest first.
    """
    found: Sequence[CheckpointRef] = []
    for refs in starts:
        common = [ref.sha256 for ref in refs[: len(found)]]
        if len(refs) > len(found) and common == [ref.sha256 for ref in found]:
            found = refs
    return found


def _check_still_ours(folder: Path) -> None:
    owner = os.environ.get(OWNER)
    if owner is not None:
        check_owner(folder.parent, owner)


def _checked_index(index: object) -> int:
    if isinstance(index, bool) or not hasattr(index, "__index__") or operator.index(index) < 0:
        raise ValueError(f"publish_checkpoint: index must be an integer from 0, got {index!r}")
    return operator.index(index)


def _check_state(state_dict: object) -> None:
    import torch

    if not isinstance(state_dict, Mapping) or not state_dict:
        what = "an empty one" if isinstance(state_dict, Mapping) else f"a {type(state_dict).__name__}"
        raise ValueError(f"publish_checkpoint: state_dict must map names to tensors, got {what}; give net.state_dict()")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"publish_checkpoint: state_dict must map names to tensors, and {key!r} is a {type(value).__name__}; "
                "give net.state_dict()"
            )
