"""Multi-head attention whose projections are linear layers of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers._attention import ProjectedAttention
from lowrank_nn.layers._shapes import CompressedLinear
from lowrank_nn.layers.attention import in_projections
from lowrank_nn.layers.narrow import register_narrow_form

_RAW = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


class SplitMultiheadAttention(ProjectedAttention):
    r"""``nn.MultiheadAttention`` with a linear layer for each projection, which can be compressed like any other.

    O (softmax(Q_h K_h^T / sqrt(head_dim) + mask) V_h)_h with Q = q_proj(query), K = k_proj(key), V = v_proj(value) and
    O = out_proj, over the heads h. Torch's own class keeps the first three as bare parameters and never calls the
    fourth. Same arguments, calls and results; the weights have other names (``q_proj.weight`` and so on in place of
    ``in_proj_weight``), and torch's fused kernels for encoder layers do not apply. A trained attention becomes one
    in place (:meth:`split_`); :func:`lowrank_nn.split_attention` does so for all of a model.

    Args:
        embed_dim: Width of queries and outputs, divided among the heads.
        num_heads: Number of heads.
        dropout: Probability that an attention weight is dropped in training.
        bias: Whether the projections have biases.
        add_bias_kv: Whether a learned key and value are added to those given.
        add_zero_attn: Whether a key and value of zeros are added.
        kdim: Width of keys; ``embed_dim`` if left out.
        vdim: Width of values; ``embed_dim`` if left out.
        batch_first: Whether inputs and outputs are ``(N, L, E)`` and not ``(L, N, E)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input and output: as of ``nn.MultiheadAttention``.

    Attributes:
        q_proj: ``nn.Linear`` from ``embed_dim`` to all heads.
        k_proj: ``nn.Linear`` from ``kdim`` to all heads.
        v_proj: ``nn.Linear`` from ``vdim`` to all heads.
        out_proj: ``nn.Linear`` from all heads to ``embed_dim``.

    References:
        Vaswani et al. 2017, "Attention Is All You Need".
    """

    q_proj: nn.Linear | CompressedLinear
    k_proj: nn.Linear | CompressedLinear
    v_proj: nn.Linear | CompressedLinear

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        _split_projections(self)

    @staticmethod
    def split_(attention: nn.MultiheadAttention) -> None:
        """Turn an attention into one of this class, in place; one that is stays as it is.

        Values, ``requires_grad`` flags, mode and hooks are kept; no random number is drawn.

        Args:
            attention: An ``nn.MultiheadAttention`` or :class:`lowrank_nn.NarrowMultiheadAttention`.

        Raises:
            UnsupportedLayerError: It has a forward of its own, or weights that are computed before each call.
        """
        if isinstance(attention, SplitMultiheadAttention):
            return
        _refuse_altered(attention)
        _split_projections(attention)
        attention.__class__ = SplitMultiheadAttention

    @staticmethod
    def resize_(attention: SplitMultiheadAttention) -> None:
        """Read the sizes of an attention that lost heads or inputs from its projections, in place."""
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        attention.num_heads = q.out_features // attention.head_dim
        attention.embed_dim, attention.kdim, attention.vdim = q.in_features, k.in_features, v.in_features

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)


def _split_projections(attention: nn.MultiheadAttention) -> None:
    """Give an attention linear layers in place of its bare parameters."""
    weights, bias = in_projections(attention), attention.in_proj_bias
    joined = attention.in_proj_weight
    trains = [(own if joined is None else joined).requires_grad for own in weights]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    for name, weight, part, train in zip("qkv", weights, biases, trains, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.detach().clone(), train)
        if bias is not None and part is not None:
            layer.bias = nn.Parameter(part.detach().clone(), bias.requires_grad)
        attention.add_module(f"{name}_proj", layer.train(attention.training))
    for name in _RAW:
        attention.register_parameter(name, None)
    out = attention.get_submodule("out_proj")
    was_hidden = type(out) is NonDynamicallyQuantizableLinear
    if was_hidden:
        out.__class__ = nn.Linear  # the name kept torch's own quantization away, as it was not called
    # Encoder layers hand weights of one size to a kernel that reads in_proj_weight; they leave others alone.
    attention._qkv_same_embed_dim = False


def _refuse_altered(attention: nn.MultiheadAttention) -> None:
    name = type(attention).__name__
    plain = (nn.MultiheadAttention.forward, ProjectedAttention.forward)
    if type(attention).forward not in plain or "forward" in vars(attention):
        raise UnsupportedLayerError(
            f"SplitMultiheadAttention: {name} overrides nn.MultiheadAttention.forward, which would be lost. Leave it "
            "as it is, or turn it into a plain nn.MultiheadAttention first."
        )
    if parametrize.is_parametrized(attention) or any(name not in attention._parameters for name in _RAW):
        raise UnsupportedLayerError(
            f"SplitMultiheadAttention: weights of {name} are computed before each call (a parametrization, weight_norm "
            "or torch.nn.utils.prune), which would be lost. Make them permanent first."
        )


register_narrow_form(SplitMultiheadAttention, SplitMultiheadAttention.resize_)
