"""Window attention of Swin transformers (Liu et al. 2021, 2022) over all pixels at once, and a small network of it.

Names and shapes of tensors and attributes are torchvision's; so is that a head is ``channels // num_heads`` wide.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pairs(first: Tensor) -> Tensor:
    return first[:, None] - first


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window: list[int], shift: list[int], heads: int, bias: bool = True) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.num_heads = window, shift, heads
        self.attention_dropout = self.dropout = 0.0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        self.define_table()
        rows, columns = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, window), indexing="ij"))
        self.register_buffer("relative_position_index", self.index(pairs(rows), pairs(columns)).flatten())

    def define_table(self) -> None:
        (a, b), heads = self.window_size, self.num_heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * a - 1) * (2 * b - 1), heads))

    def table(self) -> Tensor:
        return self.relative_position_bias_table

    def index(self, rows: Tensor, columns: Tensor) -> Tensor:
        a, b = self.window_size
        return (rows + a - 1) * (2 * b - 1) + columns + b - 1

    def biases(self, height: int, width: int) -> Tensor:
        """Return ``(heads, pixels, pixels)``; minus infinity where pixels share no window."""
        same, near, inside = True, True, []
        grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        for place, size, window, shift in zip(grid, (height, width), self.window_size, self.shift_size, strict=True):
            place, shift = place.flatten(), shift if window < size else 0
            moved = (place - shift) % size
            same = same & (pairs(moved // window) == 0)
            near = near & (pairs((place < shift).int()) == 0)
            inside.append(pairs(moved % window))
        bias = self.table()[self.index(*inside)].permute(2, 0, 1)
        return torch.where(near, bias, bias - 100).masked_fill(~same, -math.inf)

    def scores(self, q: Tensor, k: Tensor, width: int) -> Tensor:
        return q @ k.transpose(-2, -1) / math.sqrt(width)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        head_dim = dim // self.num_heads
        qkv = self.project(x.flatten(1, 2)).reshape(batch, -1, 3, self.num_heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (self.scores(q, k, head_dim) + self.biases(x.shape[1], x.shape[2])).softmax(-1)
        y = F.linear((attention @ v).transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias)
        return y.reshape(x.shape)[:, :height, :width]


class WindowAttentionV2(WindowAttention):
    def define_table(self) -> None:
        self.logit_scale = nn.Parameter(torch.linspace(1, 6, self.num_heads).reshape(-1, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, self.num_heads, bias=False))
        grid = torch.meshgrid(*(torch.arange(1.0 - w, w) / w for w in self.window_size), indexing="ij")
        self.register_buffer("relative_coords_table", torch.stack(grid, -1)[None])

    def table(self) -> Tensor:
        return 16 * self.cpb_mlp(self.relative_coords_table).reshape(-1, self.num_heads).sigmoid()

    def scores(self, q: Tensor, k: Tensor, width: int) -> Tensor:
        q, k = (x / x.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt() for x in (q, k))
        return q @ k.transpose(-2, -1) * self.logit_scale.clamp(max=math.log(100)).exp()

    def project(self, x: Tensor) -> Tensor:
        if self.qkv.bias is None:
            return F.linear(x, self.qkv.weight)
        q, _, v = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat([q, torch.zeros_like(q), v]))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self, attention: type[WindowAttention], dim: int = 16, heads: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, stride=2)
        self.blocks = nn.Sequential(*(Block(attention(dim, [4, 4], s, heads), dim) for s in ([0, 0], [2, 2])))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).permute(0, 2, 3, 1)).mean((1, 2)))
