from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from distal.artifacts import checkpoints
from distal.config import ModelSection, TrainSection
from distal.errors import Superseded
from distal.hashing import mix64
from distal.model.augment import crop_flip
from distal.model.spec import ModelSpec
from distal.storage import write_bytes
from distal.train import rank as rank_module
from distal.train.rank import TrainJob, _Rank, batches, claim, initial_network, learning_rate


@pytest.mark.parametrize(
    ("config", "scheduler"),
    [
        (TrainSection(epochs=10, lr=0.3), lambda o: CosineAnnealingLR(o, T_max=10)),
        (
            TrainSection(epochs=10, lr=0.3, schedule="milestones", milestones=(3, 7), gamma=0.1),
            lambda o: MultiStepLR(o, milestones=[3, 7], gamma=0.1),
        ),
        (TrainSection(epochs=10, lr=0.3, schedule="constant"), lambda o: MultiStepLR(o, milestones=[])),
    ],
)
def test_learning_rates_are_those_of_torch(config: TrainSection, scheduler) -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    reference = scheduler(optimizer)
    for epoch in range(1, config.epochs + 1):
        assert learning_rate(config, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        reference.step()


def numbered(n: int, height: int, width: int) -> torch.Tensor:
    """Images whose every pixel is different and not zero."""
    image = torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, 1, height, width)
    return image.expand(n, -1, -1, -1).clone()


def test_crop_flip_shifts_and_mirrors() -> None:
    """Every output is the padded image at some offset, mirrored or not; all offsets occur."""
    height, width, n = 8, 16, 400
    images = numbered(n, height, width)
    out = crop_flip(images, mix64("augment", 0, np.arange(n)))
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 1, 1))
    possible = {}
    for dy in range(3):
        for dx in range(5):
            crop = padded[dy : dy + height, dx : dx + width]
            for flip in (False, True):
                possible[(crop.flip(1) if flip else crop).numpy().tobytes()] = (dy, dx, flip)
    found = {possible[image[0].contiguous().numpy().tobytes()] for image in out}
    assert len(found) == 3 * 5 * 2


def test_what_happens_to_an_image_depends_on_its_draw_alone() -> None:
    images = torch.randint(0, 256, (20, 3, 9, 7), dtype=torch.uint8)
    draws = mix64("augment", 0, np.arange(20))
    whole = crop_flip(images, draws)
    order = np.random.default_rng(0).permutation(20)
    assert torch.equal(crop_flip(images[order], draws[order]), whole[order])
    assert torch.equal(crop_flip(images[3:5], draws[3:5]), whole[3:5])


@pytest.mark.parametrize("n", [2, 12, 41, 97, 300])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_share_every_batch(n: int, world_size: int) -> None:
    """Together they train on the batches of a single rank, in the same order; only the end of an epoch differs."""
    batch_size = 12
    shares = [batches(n, batch_size, rank, world_size, seed=7) for rank in range(world_size)]
    alone = batches(n, batch_size, 0, 1, seed=7)
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1  # all ranks step together
    assert set(np.concatenate([batch for share in shares for batch in share])) == set(range(n))
    for step in range(n // batch_size - 1):
        together = np.concatenate([share[step] for share in shares])
        assert np.array_equal(np.sort(together), np.sort(alone[step]))
        assert len(together) == batch_size
    repeated = sum(len(batch) for share in shares for batch in share) - n
    assert 0 <= repeated < world_size


@pytest.mark.parametrize("n", range(2, 60))
def test_no_batch_has_one_image(n: int) -> None:
    """Batch norm cannot learn from it."""
    assert min(map(len, batches(n, 12, 0, 1, seed=0))) > 1


def test_every_epoch_has_its_own_order() -> None:
    first, again, other = (np.concatenate(batches(50, 12, 0, 1, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


SPEC = ModelSpec(ModelSection(), 4, (1, 12, 12), (0.5,), (0.5,))
N = 60


def data() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Images, labels and `sample_index` of a labelled set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 1, 12, 12), dtype=torch.uint8, generator=generator)
    return images, torch.arange(N) % 4, np.arange(1000, 1000 + N)


def job(folder: Path, **config: object) -> TrainJob:
    settings = {"epochs": 3, "batch_size": 12, "threads": 1, **config}
    claim(folder, "me")
    return TrainJob(
        folder, "", folder, (), SPEC, TrainSection(**settings), seed=0, cycle=0, threads=1, warm_from=None,
        inputs="inputs", owner="me",
    )  # fmt: skip


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Sees(nn.Module):
    """A network that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(144, 4)
        self.seen: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += list(inputs)
        return self.layer(inputs.flatten(1))


def seen(folder: Path, epoch: int, seed: int = 0, cycle: int = 0, **config: object) -> dict[int, bytes]:
    """What the network is shown of each sample in an epoch, in that order, by the training loop itself."""
    net, (images, labels, indices) = Sees(), data()
    of = replace(job(folder, **config), seed=seed, cycle=cycle)
    rank = _Rank(of, net, torch.device("cpu"), images, labels, indices)
    order = []
    take, rank._augmented = rank._augmented, lambda positions, epoch: order.extend(positions) or take(positions, epoch)  # type: ignore[method-assign]
    rank.train_epoch(epoch)
    assert len(order) == len(net.seen) == N
    return {int(position): image.numpy().tobytes() for position, image in zip(order, net.seen, strict=True)}


def test_what_training_sees_is_a_function_of_seed_cycle_epoch_and_sample(alone: None, tmp_path: Path) -> None:
    """Whatever ran before, and whatever else is in the batch; each of them alone changes most images."""
    first = seen(tmp_path, epoch=1)
    assert seen(tmp_path, epoch=1) == first
    assert list(seen(tmp_path, epoch=1)) == list(first)
    in_other_batches = seen(tmp_path, epoch=1, batch_size=7)
    assert in_other_batches == first
    for other in ({"epoch": 2}, {"epoch": 1, "seed": 1}, {"epoch": 1, "cycle": 1}):
        changed = seen(tmp_path, **other)
        assert list(changed) != list(first)  # another order
        assert sum(changed[sample] != first[sample] for sample in range(N)) > 0.7 * N
    plain = seen(tmp_path, epoch=1, augment="none")
    assert seen(tmp_path, epoch=2, augment="none") == plain
    images, _, indices = data()
    expected = SPEC.preprocess()(crop_flip(images, mix64("augment", 0, 0, 1, indices)))
    assert first == {sample: expected[sample].numpy().tobytes() for sample in range(N)}


class Draws(Sees):
    """A network that draws, as dropout does."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs + torch.rand(len(inputs), 1, 1, 1))


def test_what_layers_draw_is_a_function_of_seed_cycle_epoch_and_rank(alone: None, tmp_path: Path) -> None:
    """Whatever was drawn before."""

    def drawn(epoch: int, seed: int = 0, cycle: int = 0, rank: int = 0, before: int = 0) -> torch.Tensor:
        of, net = replace(job(tmp_path), seed=seed, cycle=cycle), Draws()
        one = _Rank(of, net, torch.device("cpu"), *data())
        one.rank, one.world_size = rank, 2
        inputs: list[torch.Tensor] = []
        net.layer.register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments[0][:, 0]))
        one._augmented = lambda positions, epoch: torch.zeros(len(positions), 1, 12, 12)  # type: ignore[method-assign]
        torch.rand(before)
        one.train_epoch(epoch)
        return torch.stack(inputs)

    first = drawn(1)
    assert torch.equal(drawn(1, before=5), first)
    for other in ({"epoch": 2}, {"epoch": 1, "seed": 1}, {"epoch": 1, "cycle": 1}, {"epoch": 1, "rank": 1}):
        assert not torch.isin(drawn(**other), first).any()


def test_the_state_is_written_before_the_checkpoint_and_by_the_owner_alone(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A committed epoch is never trained again, and an attempt that was superseded writes neither."""
    made = job(tmp_path)
    rank = _Rank(made, Sees(), torch.device("cpu"), *data())

    def fail(*_: object) -> None:
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(rank_module, "write_sealed", fail)
        with pytest.raises(OSError, match="input/output error"):
            rank.save(1, 0.5)
    claim(tmp_path, "another")
    with pytest.raises(Superseded):
        rank.save(1, 0.5)
    assert checkpoints.committed(made.checkpoints) == []
    assert not made.state_path.exists()
    claim(tmp_path, "me")
    rank.save(1, 0.5)
    assert checkpoints.committed(made.checkpoints) == [0]
    assert made.state_path.exists()


def train_and_resume(folder: Path, rank: int, world_size: int) -> None:
    """One of several ranks: trains, and from the state after its first epoch does the others again with a new DDP."""
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for name in ("whole", "resumed"):
        torch.manual_seed(0)
        model = DistributedDataParallel(initial_network(job(folder / name)))
        one = _Rank(job(folder / name), model, torch.device("cpu"), *data())
        save = one.save

        def keep(epoch: int, loss: float, one: _Rank = one, save=save) -> None:  # type: ignore[no-untyped-def]
            save(epoch, loss)
            if rank == 0 and epoch == 1:
                write_bytes(folder / "resumed" / "train" / "state.pt", one.job.state_path.read_bytes())

        if name == "whole":
            one.save = keep  # type: ignore[method-assign]
        one.train()
        dist.barrier()
    dist.destroy_process_group()


def test_three_ranks_that_resume_give_the_same_bits(tmp_path: Path) -> None:
    """DDP orders its sums by the gradients of its first backward pass, which three ranks show and two do not."""
    code = (  # one import for three processes
        "import os, sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from tests.train.test_rank import train_and_resume\n"
        "rank = 0 if os.fork() else 1 if os.fork() else 2\n"
        "train_and_resume(Path(sys.argv[1]), rank, 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank < 2 else 0)"
    )
    for name in ("whole", "resumed"):
        job(tmp_path / name)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=200)
    refs = [
        [checkpoints.read(tmp_path / name / "checkpoints", row) for row in range(3)] for name in ("whole", "resumed")
    ]
    assert [ref.sha256 for ref in refs[0]] == [ref.sha256 for ref in refs[1]]
