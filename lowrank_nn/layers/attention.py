"""Multi-head attention that is narrower inside than its inputs, because heads were removed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers.narrow import register_narrow_form


class NarrowMultiheadAttention(nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` with fewer heads than ``embed_dim / head_dim``.

    softmax(Q_h K_h^T / sqrt(head_dim) + mask) V_h for each head h that is left, joined and projected to ``embed_dim``.
    Torch's own class takes only as many heads as fill ``embed_dim``. One of these is not constructed but becomes one
    when heads are removed from it (:meth:`narrow_`); parameters keep their names, with fewer rows in
    ``in_proj_weight`` and fewer columns in ``out_proj.weight``.

    Shape:
        - Input and output: as of ``nn.MultiheadAttention``; an ``attn_mask`` of three dims has one for each head left.
    """

    @staticmethod
    def narrow_(attention: nn.MultiheadAttention) -> None:
        """Turn an attention whose tensors have lost heads or inputs into one of this class, in place.

        The sizes are read from the tensors. It keeps its class if its heads fill its width.

        Args:
            attention: With ``head_dim`` as it was.

        Raises:
            UnsupportedLayerError: It adds keys and values of its own.
        """
        width = len(_matrices(attention)[0])  # out_proj may be a compressed layer
        q, k, v = (w.shape[1] for w in _matrices(attention))
        if width != q and (attention.bias_k is not None or attention.add_zero_attn):
            raise UnsupportedLayerError(
                "nn.MultiheadAttention: heads cannot be removed where it has add_bias_kv or add_zero_attn."
            )
        attention.num_heads = width // attention.head_dim
        attention.embed_dim, attention.kdim, attention.vdim = q, k, v
        if width != q:
            attention.__class__ = NarrowMultiheadAttention

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
        """Attend: as ``nn.MultiheadAttention.forward``, with ``is_causal`` as a hint that is not needed."""
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, len(q), q.dtype)
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

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), _matrices(self), biases))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return ``(N, heads, L, head_dim)``."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, batch: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what is added to the scores, ``(N or 1, heads or 1, L or 1, S)``; None where nothing is."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, dtype)
            whole = total.dim() == 3
            total = total.reshape(batch, self.num_heads, *total.shape[1:]) if whole else total[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, dtype)
            padding = (padding if padding.dim() == 2 else padding[None])[:, None, None]
            total = padding if total is None else total + padding
        return total


def _matrices(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Return the projections of queries, keys and values, whichever way they are kept."""
    joined = attention._parameters["in_proj_weight"]
    if joined is not None:
        return joined.chunk(3)
    return tuple(attention.get_parameter(f"{name}_proj_weight") for name in "qkv")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


for _cls in (nn.MultiheadAttention, NarrowMultiheadAttention):
    register_narrow_form(_cls, NarrowMultiheadAttention.narrow_)
