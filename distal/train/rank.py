"""What one DDP rank does. The same code runs with one rank and with many, on CPU and on GPU.

Nothing depends on what ran before: the initial weights, the order of the samples and every augmentation are
functions of (seed, cycle, epoch, rank, sample). `state.pt` is what a restarted rank needs; rank 0 replaces it
after every epoch and then commits the checkpoint, so no committed epoch is ever trained again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DistributedSampler

from distal.artifacts import checkpoints
from distal.artifacts.ledger import Ledger
from distal.config import TrainSection
from distal.errors import Damage, Diverged, Superseded
from distal.hashing import mix64, seed_for
from distal.model.augment import crop_flip
from distal.model.spec import ModelSpec, be_deterministic, seeded_build
from distal.model.weights import deserialize, serialize
from distal.pool import Pool
from distal.records import CheckpointRef
from distal.storage import Numbered, create_bytes, read_sealed, write_sealed

STATE, _OWNERS = "state.pt", "owners"


@dataclass(frozen=True)
class TrainJob:
    """One training run; picklable.

    Attributes:
        folder: `cycles/<cycle>`: checkpoints and state go there.
        labels: the label files of the ledger.
        threads: torch threads of a rank.
        warm_from: the checkpoint to start from, None for scratch.
        inputs: hash of everything that decides the result; a state or a checkpoint with another is not resumed.
        attempt: names the driver.
        owner: names the attempt; only the last one that `claim`ed may write.
    """

    pool: Path
    pool_sha256: str
    folder: Path
    labels: tuple[Path, ...]
    model: ModelSpec
    config: TrainSection
    seed: int
    cycle: int
    threads: int
    warm_from: CheckpointRef | None
    inputs: str
    attempt: str = ""
    owner: str = ""

    @property
    def owner_prefix(self) -> str:
        """How the owners of this driver's attempts begin."""
        return f"cycle-{self.cycle:03d}-{self.attempt}-"

    @property
    def state_path(self) -> Path:
        """Where the state of the last finished epoch is."""
        return self.folder / "train" / STATE

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are published."""
        return self.folder / "checkpoints"


def train_rank(
    job: TrainJob,
    device: torch.device,
    prepare: Callable[[nn.Module], nn.Module],
) -> None:
    """Train the remaining epochs. Every rank calls it, inside a process group.

    Args:
        prepare: moves the network to the device and, with several ranks, wraps it in DDP.

    Raises:
        Diverged: the mean loss of an epoch is not finite.
        Damage: `state.pt` or a checkpoint is from other inputs, or cannot be read.
        Superseded: a later attempt has taken over.
    """
    torch.set_num_threads(job.threads)
    be_deterministic(device)
    pool = Pool.open(job.pool).require(job.pool_sha256)
    ledger = Ledger.read(job.labels)
    images = torch.from_numpy(pool.take(ledger.indices))
    labels = torch.from_numpy(ledger.labels)

    model = prepare(initial_network(job))
    _Rank(job, model, device, images, labels, ledger.indices).train()


def initial_network(job: TrainJob) -> nn.Module:
    """The network before the first epoch: new weights, or those the job warm-starts from."""
    net = seeded_build(job.model, job.seed, job.cycle)
    if job.warm_from is not None:
        net.load_state_dict(checkpoints.load(job.warm_from))
    return net


class _Rank:
    """One rank: its network, optimizer and samples.

    Args:
        images: (n, C, H, W) uint8, all labelled samples. labels: (n,) int64.
        indices: (n,) their `sample_index`.
    """

    def __init__(
        self,
        job: TrainJob,
        model: nn.Module,
        device: torch.device,
        images: Tensor,
        labels: Tensor,
        indices: NDArray[np.int64],
    ) -> None:
        self.job = job
        self.config = job.config
        self.model = model
        # There is no DDP wrapper at world size 1.
        self.net: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.device = device
        self.images, self.labels, self.indices = images, labels, indices
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.preprocess = job.model.preprocess().to(device)
        self.optimizer = SGD(
            self.net.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
            nesterov=True,
        )

    def train(self) -> None:
        """All epochs that are still to do."""
        self.warm_up()
        finished = self.restore()
        for epoch in range(finished + 1, self.config.epochs + 1):
            loss = self.train_epoch(epoch)
            self.save(epoch, loss)

    def warm_up(self) -> None:
        """One forward and backward pass whose results are thrown away.

        DDP rebuilds its gradient buckets after the first backward pass, which changes the order of sums. With
        this pass every epoch of every attempt runs with rebuilt buckets, so a resumed run gives the same bits.
        """
        before = {key: value.clone() for key, value in self.net.state_dict().items()}
        positions = np.arange(min(len(self.labels), self.config.batch_size // self.world_size))
        inputs = self.preprocess(self.images[positions].to(self.device))
        self.model.train()
        cross_entropy(self.model(inputs), self.labels[positions].to(self.device)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
        self.net.load_state_dict(before)

    def restore(self) -> int:
        """Take up the state of the last finished epoch, and commit its checkpoint if that is missing.

        Rank 0 reads and the others are told, so all start from one state even while an attempt that was
        killed still writes.

        Returns:
            The number of finished epochs.
        """
        box: list[Any] = [read_state(self.job) if self.rank == 0 else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        if box[0] is None:
            return 0
        state = deserialize(box[0])
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._commit(state["epoch"], state["loss"])
        return int(state["epoch"])

    def train_epoch(self, epoch: int) -> float:
        """One pass over the labelled samples; returns the mean loss over all ranks."""
        # Layers that draw themselves, such as dropout, start every epoch from a state of their own.
        torch.manual_seed(seed_for("epoch", self.job.seed, self.job.cycle, epoch, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        self.model.train()
        total = torch.zeros(2, dtype=torch.float64)
        order = seed_for("order", self.job.seed, self.job.cycle, epoch)
        for positions in batches(len(self.labels), self.config.batch_size, self.rank, self.world_size, order):
            inputs = self.preprocess(self._augmented(positions, epoch).to(self.device))
            loss = cross_entropy(self.model(inputs), self.labels[positions].to(self.device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += torch.tensor([loss.item() * len(positions), len(positions)])
        if self.world_size > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        mean = float(total[0] / total[1])
        if not math.isfinite(mean):  # the sum is over all ranks, so all of them stop here
            raise Diverged(
                f"the loss of epoch {epoch} is {mean}: training diverged; remove {self.job.folder} to do the cycle "
                "again, with a lower train.lr"
            )
        return mean

    def save(self, epoch: int, loss: float) -> None:
        """Replace the state, then commit the checkpoint. Rank 0 only."""
        if self.rank == 0:
            check_owner(self.job.folder, self.job.owner)
            state = {
                "inputs": self.job.inputs,
                "epoch": epoch,
                "loss": loss,
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            write_sealed(self.job.state_path, serialize(state))
            self._commit(epoch, loss)

    def _commit(self, epoch: int, loss: float) -> None:
        epochs = self.config.checkpoint_epochs
        if self.rank == 0 and epoch in epochs:
            checkpoints.commit(
                self.job.checkpoints,
                epochs.index(epoch),
                epoch,
                self.net.state_dict(),
                inputs=self.job.inputs,
                metrics={"train_loss": loss},
            )

    def _augmented(self, positions: NDArray[np.int64], epoch: int) -> Tensor:
        images = self.images[positions]
        if self.config.augment == "none":
            return images
        draws = mix64("augment", self.job.seed, self.job.cycle, epoch, self.indices[positions])
        return crop_flip(images, draws)


def batches(n: int, batch_size: int, rank: int, world_size: int, seed: int) -> list[NDArray[np.int64]]:
    """What one rank trains on in one epoch: a share of every batch.

    The batches of all ranks together are those of a single rank with the same seed. Only the end of an epoch may
    differ: up to world_size - 1 samples are repeated so that all ranks have as many, and no rank's last batch is a
    single image.

    Args:
        n: labelled samples.
        batch_size: images per step over all ranks, a multiple of `world_size`.

    Returns:
        Positions in [0, n), batch by batch.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(
        range(n),  # type: ignore[arg-type]
        num_replicas=world_size,
        rank=rank,
        shuffle=True,
        seed=seed,
    )
    positions = np.fromiter(sampler, dtype=np.int64)
    share = batch_size // world_size
    borders = list(range(share, len(positions), share))
    if borders and len(positions) - borders[-1] == 1:
        borders.pop()  # batch norm cannot learn from a batch of one image: it joins the batch before
    return np.split(positions, borders)


def learning_rate(config: TrainSection, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1: a pure function, so a resumed run needs no history."""
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
    return config.lr * config.gamma ** sum(milestone < epoch for milestone in config.milestones)


def read_state(job: TrainJob) -> bytes | None:
    """The state of the last finished epoch, serialized; None when none is finished."""
    try:
        data = read_sealed(job.state_path)
    except FileNotFoundError:
        return None
    except Damage as damage:
        raise Damage(f"{damage}; {_again(job)}") from None
    if deserialize(data)["inputs"] != job.inputs:
        raise Damage(f"{job.state_path}: trained from other inputs than the cycle has now; {_again(job)}")
    return data


def _again(job: TrainJob) -> str:
    return f"put back what was there, or remove {job.folder} to do the cycle again"


def check_owner(folder: Path, owner: str) -> None:
    """Stop when a later attempt has taken over: what a killed driver started lives on for some seconds.

    A rank may be paused between this and its write. Then it writes a checkpoint that is there already, which changes
    nothing, or the state of an earlier epoch, from which the same bits come again (on a CPU; checkpoints stay anyway).
    """
    if last_claim(folder)[1] != owner:
        raise Superseded(f"{folder}: another attempt has taken over training")


def last_claim(folder: Path) -> tuple[int, str]:
    """The number of the last claim on the folder of a cycle, 0 before the first, and who may write; "": nobody."""
    owners = _owners(folder)
    number = owners.last()
    return (0, "") if number is None else (number, owners.path(number).read_text())


def claim(folder: Path, owner: str, still_ours: Callable[[], None] = lambda: None) -> None:
    """Claim the folder of a cycle: from now on this attempt may write, and no earlier one.

    The last claim counts. Its number is chosen before the lease is checked, see `Numbered.append`, so a driver that
    was paused finds the number taken, checks the lease, and stops.

    Args:
        still_ours: raises when another driver has the run.
    """

    def content(_: int | None) -> bytes:
        still_ours()
        return owner.encode()

    _owners(folder).append(create_bytes, content)


def release(folder: Path, prefix: str) -> None:
    """End the claim of this driver: nobody may write from now on, unless another driver has claimed the folder.

    Args:
        prefix: of the names of this driver's attempts.
    """

    def content(_: int | None) -> bytes | None:
        return b"" if last_claim(folder)[1].startswith(prefix) else None

    _owners(folder).append(create_bytes, content)


def _owners(folder: Path) -> Numbered:
    return Numbered(folder / "train" / _OWNERS, digits=6)
