"""CIFAR-10 as the benchmarks read it, and the accuracy of a model on it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def read_images(folder: Path, pattern: str) -> tuple[Tensor, Tensor]:
    """Return normalised images (n, 3, 32, 32) and labels (n,) of all batches that match."""
    images, labels = [], []
    for path in sorted(folder.glob(pattern)):
        batch = pickle.loads(
            path.read_bytes(), encoding="latin1"
        )  # the data set's own format, read from a trusted disk
        images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels += list(batch["labels"])
    pixels = torch.from_numpy(np.concatenate(images)).float() / 255
    return (pixels - MEAN) / STD, torch.tensor(labels)


class Augmented:
    """Batches of randomly cropped and flipped images, each in its own way, in a new order every time."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        # All places that a window of 32 x 32 may take: (n, 3, 9, 9, 32, 32), a view.
        windows = torch.nn.functional.pad(self.images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            top, left = torch.randint(0, 9, (2, len(chosen)))
            batch = windows[chosen, :, top, left]
            flip = torch.rand(len(batch)) < 0.5
            yield torch.where(flip[:, None, None, None], batch.flip(3), batch), self.labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return 100 * right / len(labels)
