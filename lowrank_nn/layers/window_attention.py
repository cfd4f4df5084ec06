"""Shifted window attention that is narrower inside than its inputs, because heads were removed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_nn.layers.narrow import register_narrow_form

MAX_SCALE = math.log(100.0)  # of the cosines
MASKED = -100.0  # added to the scores of pixels that are no neighbours


class NarrowWindowAttention(nn.Module):
    r"""Shifted window attention of the Swin transformer with fewer heads than ``channels / head_dim``.

    softmax(Q_h K_h^T / sqrt(head_dim) + B_h) V_h inside each window for each head h that is left, joined and projected
    back; B_h are learned biases of relative positions. torchvision's ``ShiftedWindowAttention`` computes
    head_dim as ``channels // num_heads``, so its heads have to fill the channels. One of these is not constructed but
    becomes one when heads are removed from it (:meth:`narrow_`); parameters and buffers keep their names.

    Shape:
        - Input and output: ``(N, H, W, channels)``; H and W are padded to whole windows.

    References:
        Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
    """

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    relative_position_index: Tensor

    @classmethod
    def narrow_(cls, attention: Any) -> None:
        """Turn a window attention whose tensors have lost heads or channels into one of this class, in place.

        It keeps its class if its heads fill its channels.

        Args:
            attention: With the number of heads that are left in ``num_heads``.
        """
        channels = attention.qkv.in_features
        if (attention.proj.in_features, attention.proj.out_features) != (channels, channels):
            attention.__class__ = cls

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.qkv.out_features // (3 * self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows: ``(N, H, W, channels)`` to the same."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        size = (x.shape[1], x.shape[2])
        # Where one window holds everything there is nothing to shift.
        shift = [s if window < n else 0 for s, window, n in zip(self.shift_size, self.window_size, size, strict=True)]
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        q, k, v = self._project(self._windows(x))  # each (N, windows, heads, pixels, head_dim)
        scores = q @ k.transpose(-2, -1) + self._position_bias()
        if any(shift):
            scores = scores + self._mask(scores, size, shift)
        y = F.dropout(scores.softmax(-1), self.attention_dropout, self.training) @ v
        y = F.dropout(self.proj(y.transpose(2, 3).flatten(3)), self.dropout, self.training)
        y = self._joined(y, size)
        if any(shift):
            y = y.roll((shift[0], shift[1]), (1, 2))
        return y[:, :height, :width].contiguous()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, such that q k^T are the scores without the biases of positions."""
        q, k, v = self._heads(self.qkv(x))
        return q * self.head_dim**-0.5, k, v

    def _position_bias(self) -> Tensor:
        """Return ``(heads, pixels, pixels)``."""
        return self._by_pairs(self.get_parameter("relative_position_bias_table"))

    def _by_pairs(self, table: Tensor) -> Tensor:
        """Return the rows of ``(relative positions, heads)`` for all pairs of pixels: ``(heads, pixels, pixels)``."""
        pixels = self.window_size[0] * self.window_size[1]
        return table[self.relative_position_index].reshape(pixels, pixels, -1).permute(2, 0, 1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.reshape(*qkv.shape[:3], 3, self.num_heads, self.head_dim).permute(3, 0, 1, 4, 2, 5)
        return q, k, v

    def _windows(self, x: Tensor) -> Tensor:
        """Return ``(N, windows, pixels, channels)`` of ``(N, H, W, channels)``."""
        height, width = self.window_size
        x = x.reshape(len(x), x.shape[1] // height, height, x.shape[2] // width, width, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _joined(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return ``(N, H, W, channels)`` of ``(N, windows, pixels, channels)``."""
        height, width = self.window_size
        x = x.reshape(len(x), size[0] // height, size[1] // width, height, width, x.shape[3])
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _mask(self, like: Tensor, size: tuple[int, int], shift: list[int]) -> Tensor:
        """Return what keeps pixels apart that the shift brought into one window: ``(windows, 1, pixels, pixels)``."""
        rows, columns = (torch.arange(n, device=like.device) >= n - s for n, s in zip(size, shift, strict=True))
        region = 2 * rows[:, None].int() + columns.int()
        region = self._windows(region[None, :, :, None])[0, :, :, 0]
        apart = region[:, None, :, None] != region[:, None, None, :]
        return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, MASKED)


class NarrowWindowAttentionV2(NarrowWindowAttention):
    r"""As :class:`NarrowWindowAttention`, with the scores of Swin transformer V2.

    softmax(s_h cos(Q_h, K_h) + B_h) V_h: the scale s_h of each head is learned, at most 100, and the biases of
    positions come from a small network, ``cpb_mlp``. Keys have no bias. What torchvision's ``ShiftedWindowAttentionV2``
    becomes.

    References:
        Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", CVPR 2022.
    """

    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias: Tensor | None = self.qkv.bias
        if bias is not None:
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        q, k, v = self._heads(F.linear(x, self.qkv.weight, bias))
        scale = self.get_parameter("logit_scale").clamp(max=MAX_SCALE).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v

    def _position_bias(self) -> Tensor:
        return 16 * self._by_pairs(self.cpb_mlp(self.relative_coords_table).flatten(0, -2)).sigmoid()


for _cls, _narrow in (
    ("ShiftedWindowAttention", NarrowWindowAttention),
    ("ShiftedWindowAttentionV2", NarrowWindowAttentionV2),
):
    register_narrow_form(f"torchvision.models.swin_transformer.{_cls}", _narrow.narrow_)
