"""MNIST as the benchmarks read it, and the error of a model on it."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


def read_digits(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, 28, 28), from 0 to 1, and labels (n,) of ``name``: ``"train"`` or ``"t10k"``."""
    pixels = _read(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = _read(folder / f"{name}-labels-idx1-ubyte.gz", 8)
    return torch.from_numpy(pixels.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))


def _read(path: Path, header: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


class Shuffled:
    """Batches of images and labels, in a new order every time.

    Args:
        images: Shape (n, 1, 28, 28).
        labels: Shape (n,).
        batch_size: Images of a batch.
        distortion: How far images are turned (radians), scaled and sheared (shares), and shifted (pixels / 14), each
            at random up to this much; 0 leaves them as they are.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, distortion: float = 0.0) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.distortion = distortion

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield self._distorted(self.images[chosen]), self.labels[chosen]

    def _distorted(self, images: Tensor) -> Tensor:
        if not self.distortion:
            return images
        changes = self.distortion * (2 * torch.rand(len(images), 2, 3) - 1)
        grid = F.affine_grid(torch.eye(2, 3) + changes, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of wrong answers in percent."""
    model.eval()
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * wrong / len(labels)
