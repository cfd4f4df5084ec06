"""What the examples share: scikit-learn's digits, a residual network for them, and ordinary training.

Nothing here is of lowrank_nn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return training and test set: 1,347 and 450 images of 1 x 8 x 8 pixels, shuffled with a fixed seed."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return TensorDataset(images[:1347], labels[:1347]), TensorDataset(images[1347:], labels[1347:])


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norms, and a shortcut around them (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + f(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class DigitNet(nn.Module):
    """A residual network of 112,000 parameters for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = Block(32)
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.layer2 = Block(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x = self.layer2(F.relu(self.down(x)))
        return self.fc(x.mean((2, 3)))


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train with AdamW and a one-cycle learning rate; leave the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs, steps_per_epoch=len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained_net(training: TensorDataset) -> DigitNet:
    """Return a :class:`DigitNet` after eight epochs."""
    torch.manual_seed(0)
    model = DigitNet()
    train(model, DataLoader(training, batch_size=64, shuffle=True), epochs=8)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the top-1 accuracy of ``model``, in eval mode, in percent."""
    images, labels = data.tensors
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()
