"""A language model as large ones are built: norms written out, rotary positions, shared keys and values, gated layers.

After Zhang and Sennrich 2019 (RMSNorm), Su et al. 2021 (RoFormer), Ainslie et al. 2023 (GQA) and Shazeer 2020 (GLU).
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass
class LanguageOutput:
    logits: Tensor
    cache: tuple[Tensor, ...] | None = None


class RootMeanSquareNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of channels of (N, heads, L, head_dim) by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = (nn.Linear(dim, groups * self.head_dim, bias=False) for _ in range(2))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = rotated(q), rotated(k)
        shared = q.shape[1] // k.shape[1]
        attended = F.scaled_dot_product_attention(
            q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), is_causal=True
        )
        return self.out(attended.transpose(1, 2).flatten(2)), k


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.before, self.attention = RootMeanSquareNorm(dim), Attention(dim, heads, groups)
        self.between = RootMeanSquareNorm(dim)
        self.gate, self.up = (nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, keys = self.attention(self.before(x))
        x = x + attended
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), keys


class LanguageModel(nn.Module):
    def __init__(self, words: int = 50, dim: int = 32, heads: int = 4, groups: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, groups) for _ in range(depth))
        self.norm, self.head = RootMeanSquareNorm(dim), nn.Linear(dim, words, bias=False)

    def forward(self, tokens: Tensor, use_cache: bool = False) -> LanguageOutput:
        """Score the word after each of ``tokens``, shape ``(N, L)``."""
        x, cache = self.embed(tokens), []
        for block in self.blocks:
            x, keys = block(x)
            cache.append(keys)
        return LanguageOutput(self.head(self.norm(x)), tuple(cache) if use_cache else None)
