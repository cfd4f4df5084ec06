"""The forward of multi-head attentions whose projections are not those that torch's function takes."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_nn.errors import OptionError


class ProjectedAttention(nn.MultiheadAttention, abc.ABC):
    """``nn.MultiheadAttention`` with projections of its own; as many heads of ``head_dim`` as these compute."""

    @abc.abstractmethod
    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of all heads, joined along the last dim."""

    def forward(  # the signature is torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: as ``nn.MultiheadAttention.forward``, with ``is_causal`` as a hint that is not needed.

        Raises:
            OptionError: ``is_causal`` without the ``attn_mask`` that it is a hint about.
        """
        if is_causal and attn_mask is None:
            raise OptionError(
                f"{type(self).__name__}: is_causal is a hint about attn_mask, which is missing. Pass the mask too, "
                "such as nn.Transformer.generate_square_subsequent_mask(length)."
            )
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, q)
        k, v, mask = self._with_own_keys(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return ``(N, heads, L, head_dim)``."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)

    def _mask(self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return what is added to the scores, ``(N or 1, heads or 1, L or 1, S)``; None where nothing is."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            total = total.reshape(*q.shape[:2], *total.shape[1:]) if total.dim() == 3 else total[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            padding = (padding if padding.dim() == 2 else padding[None])[:, None, None]
            total = padding if total is None else total + padding
        return total

    def _with_own_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the keys and values that no input gives: learned ones, and zeros; nothing masks them."""
        given = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            learned = (self._heads(bias, True) for bias in (self.bias_k, self.bias_v))
            k, v = (torch.cat([x, b.expand(len(x), -1, -1, -1)], 2) for x, b in zip((k, v), learned, strict=True))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v, None if mask is None else F.pad(mask, (0, k.shape[2] - given))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
