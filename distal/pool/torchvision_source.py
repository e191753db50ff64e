"""Datasets that torchvision downloads, such as `torchvision:CIFAR10`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from distal.config import TORCHVISION
from distal.errors import SourceError, one_line
from distal.pool.rows import Row
from distal.records import Block


@dataclass(frozen=True, slots=True)
class _Download:
    """A part of a dataset of torchvision, as known before the download.

    Attributes:
        name: of torchvision's class.
        is_test: whether it is the test part; otherwise the training part.
        image_shape: (C, H, W).
    """

    name: str
    is_test: bool
    n_samples: int
    image_shape: tuple[int, int, int]
    n_classes: int

    @property
    def arguments(self) -> dict[str, bool | str]:
        """The arguments of its class for this part."""
        return {"split": "test" if self.is_test else "train"} if self.name == "SVHN" else {"train": not self.is_test}


# Datasets with a test part whose images have one size and fit in memory (240 MB at most).
_DOWNLOADS = {
    f"{TORCHVISION}{name}{'/test' if is_test else ''}": _Download(name, is_test, sizes[is_test], shape, n_classes)
    for name, sizes, shape, n_classes in (
        ("MNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("FashionMNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("KMNIST", (60_000, 10_000), (1, 28, 28), 10),
        ("CIFAR10", (50_000, 10_000), (3, 32, 32), 10),
        ("CIFAR100", (50_000, 10_000), (3, 32, 32), 100),
        ("SVHN", (73_257, 26_032), (3, 32, 32), 10),
    )
    for is_test in (False, True)
}


def find_download(location: str) -> _Download:
    """Look up `torchvision:NAME` or `torchvision:NAME/test`, without a download.

    Raises:
        SourceError: an unknown dataset.
    """
    try:
        return _DOWNLOADS[location]
    except KeyError:
        names = ", ".join(name for name, part in _DOWNLOADS.items() if not part.is_test)
        raise SourceError(f"{location}: unknown dataset; known: {names}; and each with /test") from None


@dataclass(eq=False)
class TorchvisionSource:
    """A dataset that torchvision downloads, whole in memory.

    Only the process that opens it downloads and reads files. Tasks get the arrays through Ray, on any node.

    Attributes:
        location: `torchvision:NAME`, the training part, or `torchvision:NAME/test`.
        images: (n, H, W) or (n, H, W, 3) uint8, as torchvision gives them.
        labels: (n,) int64.
        first: `sample_index` of the first one.
    """

    location: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None
    first: int = 0

    @classmethod
    def open(cls, location: str) -> Self:
        """Read the dataset, after downloading it if necessary.

        It is kept in torchvision's own folder, `$TORCH_HOME/datasets/vision`, by default in `~/.cache/torch`.

        Raises:
            SourceError: no such dataset, no network, or files that are damaged.
        """
        part = find_download(location)
        import torch
        import torchvision

        root = Path(torch.hub.get_dir()).parent / "datasets" / "vision"
        dataset_class = getattr(torchvision.datasets, part.name)
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Two runs that start together download once. A read-only folder needs no lock.
            lock = FileLock(root / f"{part.name}.lock") if os.access(root, os.W_OK) else nullcontext()
            with lock, redirect_stdout(sys.stderr):
                dataset = dataset_class(root, download=True, **part.arguments)
        except Exception as error:  # torchvision may raise anything on damaged files
            raise SourceError(
                f"{location}: torchvision can neither read it in {root} nor download it there ({one_line(error)}); run "
                "this once with a network, or copy its files there (TORCH_HOME moves the folder); remove damaged ones"
            ) from error
        images, labels = zip(*dataset, strict=True)
        classes = getattr(dataset, "classes", range(part.n_classes))  # SVHN: the digits
        return cls(location, np.stack(images), np.array(labels, np.int64), tuple(map(str, classes)))

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The samples [start, stop), in order, as PNG."""
        part = "test" if find_download(self.location).is_test else "train"
        for index in range(start, min(stop, self.first + len(self))):
            encoded = io.BytesIO()
            Image.fromarray(self.images[index - self.first]).save(encoded, "PNG", compress_level=1)
            uri = f"{self.location}#{index}"
            yield Row(f"{part}-{index:05d}", uri, encoded.getvalue(), int(self.labels[index - self.first]))

    def part(self, start: int, stop: int) -> Self:
        """The images and labels of [start, stop) alone."""
        here = slice(start - self.first, stop - self.first)
        return replace(self, images=self.images[here], labels=self.labels[here], first=start)

    def ranges(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """A task per block."""
        return [[block] for block in blocks]
