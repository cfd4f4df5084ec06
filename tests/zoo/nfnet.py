"""Residual networks without norms (Brock et al. 2021): convolutions standardise their weights (Qiao et al. 2019)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StandardisedConv2d(nn.Conv2d):
    """Every filter has mean 0 and variance 1 / fan-in, times a gain of its own."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups)
        self.gain = nn.Parameter(0.5 + torch.rand(out_channels, 1, 1, 1))
        self.scale = self.weight[0].numel() ** -0.5

    def standardised(self) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, eps=1e-6).reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.standardised()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByStatistics(StandardisedConv2d):
    """The same by mean and variance."""

    def standardised(self) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return (self.weight - mean) * torch.rsqrt(variance + 1e-6) * self.gain * self.scale


class InSteps(StandardisedConv2d):
    """The same once more, one dimension after the other."""

    def standardised(self) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
        variance = weight.view(len(weight), -1).var(1, unbiased=False).view(-1, 1, 1, 1)
        return weight / torch.sqrt(variance + 1e-6).expand_as(weight) * (self.gain * self.scale)


class Block(nn.Module):
    def __init__(self, conv: type[StandardisedConv2d], channels: int, groups: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv(channels, channels // 2, 1), conv(channels // 2, channels, 1)
        self.spatial = conv(channels // 2, channels // 2, 3, groups=groups)
        self.strength = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(F.silu(self.spatial(F.silu(self.reduce(F.silu(x))))))
        return x + self.strength * y


class NFNet(nn.Module):
    def __init__(
        self, conv: type[StandardisedConv2d] = StandardisedConv2d, channels: int = 16, groups: int = 2
    ) -> None:
        super().__init__()
        self.stem = conv(3, channels, 3)
        self.blocks = nn.Sequential(*(Block(conv, channels, groups) for _ in range(2)))
        self.last = conv(channels, 2 * channels, 1)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.last(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))
