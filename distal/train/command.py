"""Training by a command of the user's own: it gets the labels, and publishes checkpoints that are scored as they come.

The command runs beside the driver, once per cycle. It calls `distal.publish_checkpoint`, which needs no Ray.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

import pyarrow as pa

from distal import checkpoints
from distal.errors import ConfigError, ModelError, RunConflict, Superseded, TrainingFailed
from distal.foreign import check_fits
from distal.ledger import Ledger
from distal.pool import Pool
from distal.pool.images import write_png
from distal.storage import disk_errors, sha256, write_table
from distal.train.loop import TrainJob, check_owner, claim

if TYPE_CHECKING:
    from distal.checkpoints import StateDict

PLACEHOLDERS = ("labels", "images", "checkpoints", "epochs", "seed", "cycle")
OWNER, INPUTS = "DISTAL_OWNER", "DISTAL_INPUTS"
OUT, ERR = "stdout.log", "stderr.log"
LAST_LINES = 20
POLL_S = 0.2

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def check_command(command: str) -> None:
    """Raise ConfigError when a command cannot be run."""
    try:
        words = shlex.split(command)
        names = [name for word in words for _, name, _, _ in Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise ConfigError(f"train.command: {command!r} cannot be split into words ({error})") from None
    unknown = [name for name in names if name not in PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ConfigError(f"train.command: unknown placeholder {{{unknown[0]}}}; known: {known}")
    if "checkpoints" not in names:
        raise ConfigError("train.command: does not say {checkpoints}, the folder to publish to")


def run_command(
    command: str,
    job: TrainJob,
    pool: Pool,
    given_up: threading.Event,
    still_ours: Callable[[], None] = lambda: None,
) -> None:
    """Run the command of a cycle; returns when it has ended and every checkpoint is published.

    Args:
        command: with `PLACEHOLDERS` in braces.
        pool: that of the job, with the classes of the run.
        given_up: ends the command when it is set.
        still_ours: raises when another driver has the run.

    Raises:
        TrainingFailed: it ended with another code than 0; the message has the end of what it said.
        ModelError: it published too few checkpoints, or weights that do not fit `model.name`.
        Superseded: given up.
    """
    train = job.folder / "train"
    words = shlex.split(command)
    ledger = Ledger.read(job.labels)
    values = {
        "labels": str(_write_labels(pool, ledger, train / "labels.parquet")),
        "images": str(_write_images(pool, ledger, train / "images")) if "{images}" in command else "",
        "checkpoints": str(job.checkpoints),
        "epochs": job.config.epochs,
        "seed": job.seed,
        "cycle": job.cycle,
    }
    owner = f"{job.owner_prefix}{uuid.uuid4().hex[:8]}"
    claim(job.folder, owner, still_ours)
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, OWNER: owner, INPUTS: job.inputs}
    with disk_errors(train), (train / OUT).open("ab") as out, (train / ERR).open("ab") as err:
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
            code = _wait(job, process, given_up)
        finally:
            _end(process)
    if code:
        raise TrainingFailed(
            f"train.command ended with {code} in cycle {job.cycle}; {train / ERR} ends with:\n"
            + "\n".join(_last_lines(train / ERR))
        )
    _check(job)
    n, n_wanted = len(checkpoints.committed(job.checkpoints)), len(job.config.checkpoint_epochs)
    if n < n_wanted:
        raise ModelError(
            f"train.command published {n} checkpoints in cycle {job.cycle}, and train.epochs and checkpoint_every say "
            f"{n_wanted}; publish them with distal.publish_checkpoint(folder, state_dict, index)"
        )


def _wait(job: TrainJob, process: subprocess.Popen[bytes], given_up: threading.Event) -> int:
    checked = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_S)
        if given_up.is_set():
            raise Superseded(f"{job.folder}: training was given up")
        checked = checked or _check(job)


def _check(job: TrainJob) -> bool:
    """Whether there is a checkpoint; refuses one that does not fit."""
    there = checkpoints.committed(job.checkpoints)
    if there:
        ref = checkpoints.read(job.checkpoints, there[0])
        try:
            check_fits(ref.path.name, checkpoints.load(ref), job.model.build(pretrained=False).state_dict())
        except ModelError as error:
            raise ModelError(f"{error}; then remove {job.checkpoints} to train again") from None
    return bool(there)


def _die_with_parent() -> None:
    """Have the kernel end this process when the driver goes, however it goes; on Linux."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have the command and what it started end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _write_labels(pool: Pool, ledger: Ledger, path: Path) -> Path:
    """What is labelled, as the command reads it."""
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
        return [line.rstrip("\n") for line in deque(lines, LAST_LINES)]


def publish_checkpoint(
    folder: str | Path, state_dict: StateDict, index: int, *, metrics: dict[str, float] | None = None
) -> None:
    """Publish weights from a training script that `distal run` started (`train.command`). Needs no Ray.

    The file appears whole or not at all, and the first one of an index stays.

    Args:
        folder: what `{checkpoints}` came to.
        state_dict: of the network that `model.name` builds.
        index: 0 for the first checkpoint, and so on, without a gap.
        metrics: such as the training loss, for people.

    Raises:
        Superseded: another attempt has taken over; this script should end.
        RunConflict: outside of `distal run`, the folder has another checkpoint of that index.
    """
    folder = Path(folder)
    owner = os.environ.get(OWNER)
    if owner is not None:
        check_owner(folder.parent, owner)
    is_new = index not in checkpoints.committed(folder)
    ref = checkpoints.commit(
        folder, index, index + 1, state_dict, inputs=os.environ.get(INPUTS, ""), metrics=metrics or {}
    )
    if owner is None and not is_new and sha256(checkpoints.serialize(state_dict)) != ref.sha256:
        raise RunConflict(f"{folder}: checkpoint {index} is published already, with other weights; give another folder")
