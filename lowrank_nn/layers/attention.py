"""Multi-head attention that is narrower inside than its inputs, because heads were removed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers._attention import ProjectedAttention
from lowrank_nn.layers.narrow import register_narrow_form


class NarrowMultiheadAttention(ProjectedAttention):
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
        width = len(in_projections(attention)[0])  # out_proj may be a compressed layer
        q, k, v = (w.shape[1] for w in in_projections(attention))
        if width != q and (attention.bias_k is not None or attention.add_zero_attn):
            raise UnsupportedLayerError(
                "nn.MultiheadAttention: heads cannot be removed where it has add_bias_kv or add_zero_attn."
            )
        attention.num_heads = width // attention.head_dim
        attention.embed_dim, attention.kdim, attention.vdim = q, k, v
        if width != q:
            attention.__class__ = NarrowMultiheadAttention

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), in_projections(self), biases))


def in_projections(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """Return the projections of queries, keys and values, whichever way they are kept."""
    joined = attention._parameters["in_proj_weight"]
    if joined is not None:
        return joined.chunk(3)
    return tuple(attention.get_parameter(f"{name}_proj_weight") for name in "qkv")


for _cls in (nn.MultiheadAttention, NarrowMultiheadAttention):
    register_narrow_form(_cls, NarrowMultiheadAttention.narrow_)
