"""A small GoogLeNet (Szegedy et al. 2015): a stem and three inception modules."""

import torch
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2), nn.ReLU())


class Inception(nn.Module):
    def __init__(self, channels: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.one = conv(channels, one, 1)
        self.three = nn.Sequential(conv(channels, three[0], 1), conv(three[0], three[1], 3))
        self.five = nn.Sequential(conv(channels, five[0], 1), conv(five[0], five[1], 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class InceptionNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1), conv(16, 24, 3)
        )
        self.inception1 = Inception(24, 8, (12, 16), (4, 8), 8)
        self.inception2 = Inception(40, 16, (16, 24), (4, 12), 8)
        self.reduce = nn.MaxPool2d(3, stride=2, padding=1)
        self.inception3 = Inception(60, 24, (20, 32), (6, 12), 12)
        self.fc = nn.Linear(80, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception2(self.inception1(self.stem(x)))
        x = self.inception3(self.reduce(x))
        return self.fc(x.mean((2, 3)))
