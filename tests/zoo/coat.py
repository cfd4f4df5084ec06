"""Attention that convolves its values, some heads with one window, some with another (CoaT, Xu et al. 2021)."""

import torch
from torch import Tensor, nn


class HeadConvolutions(nn.Module):
    """A depthwise convolution for each part of the heads; blocks share it."""

    def __init__(self, parts: dict[int, int], width: int) -> None:
        super().__init__()
        self.channels = [heads * width for heads in parts.values()]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, window, padding=window // 2, groups=channels)
            for window, channels in zip(parts, self.channels, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.convolutions, torch.split(x, self.channels, dim=1), strict=True)
        return torch.cat([convolution(part) for convolution, part in parts], 1)


class ConvAttention(nn.Module):
    """The width of a head is computed from that of the input."""

    def __init__(self, dim: int, heads: int, shared: HeadConvolutions) -> None:
        super().__init__()
        self.num_heads, self.shared = heads, shared
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int) -> Tensor:
        batch, pixels, dim = x.shape
        qkv = self.qkv(x).reshape(batch, pixels, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = q @ (k.softmax(2).transpose(-1, -2) @ v)
        image = v.transpose(-1, -2).reshape(batch, dim, height, pixels // height)
        position = self.shared(image).reshape(batch, self.num_heads, -1, pixels).transpose(-1, -2)
        y = self.scale * attention + q * position
        return self.proj(y.transpose(1, 2).reshape(batch, pixels, dim))


class CoaT(nn.Module):
    def __init__(self, parts: dict[int, int], width: int = 4, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        heads = sum(parts.values())
        dim = heads * width
        shared = HeadConvolutions(parts, width)
        self.embed = nn.Conv2d(3, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.attentions = nn.ModuleList(ConvAttention(dim, heads, shared) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        height = x.shape[2]
        x = x.flatten(2).transpose(1, 2)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), height)
        return self.head(x.mean(1))
