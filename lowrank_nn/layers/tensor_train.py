"""Convolutions from the tensor train of their kernel: four in a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._folding import Folding, conv_folding
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule
from lowrank_nn.layers._shapes import CompressedConv2d, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages
from lowrank_nn.layers._tensor_train import TensorTrainLayer, check_ranks
from lowrank_nn.layers._tensor_train_ranks import TTConvProblem


@register_layer
class TTConv2d(TensorTrainLayer, CompressedConv2d):
    r"""``nn.Conv2d`` as 1 x 1, kh x 1, 1 x kw and 1 x 1 convolutions, from the tensor train of the kernel.

    W[o, i, h, w] = sum_{a, b, c} R[a, i] V[b, a, h] H[c, b, w] E[o, c], with r1 C_in + r1 r2 kh + r2 r3 kw + r3 C_out
    parameters: a Tucker-2 decomposition whose core is split into rows and columns. Grouped convolutions are decomposed
    group by group, with the same ranks in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride; along rows on the vertical convolution, along columns on the horizontal one.
        padding: Padding (int, pair, ``"same"`` or ``"valid"``), divided in the same way.
        dilation: Spacing of the kernel's taps, divided in the same way.
        groups: Number of blocked connections, of all four convolutions.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: (r1, r2, r3), channels per group between the four, or one number that none of them exceeds. With
            I = C_in / g and O = C_out / g, r1 is at most min(I, kh kw O), r2 min(I kh, kw O), r3 min(I kh kw, O); a
            rank that its neighbours cannot fill (r2 above r1 kh, say) is lowered to what they can.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        reduce: 1 x 1 convolution to ``groups * r1`` channels, without bias: R.
        vertical: kh x 1 convolution to ``groups * r2`` channels, without bias: V.
        horizontal: 1 x kw convolution to ``groups * r3`` channels, without bias: H.
        expand: 1 x 1 convolution to the output channels: E and the bias.

    Raises:
        RankError: ``rank`` is no such ranks, or out of range.
        OptionError: ``groups`` does not divide the channels.

    References:
        Oseledets 2011, "Tensor-Train Decomposition"; Garipov et al. 2016, "Ultimate Tensorization: Compressing
        Convolutional and FC Layers Alike"; Gabor and Zdunek 2023, "Compressing Convolutional Neural Networks with
        Hierarchical Tucker-2 Decomposition" (the four convolutions).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        rank: int | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.rank = check_ranks(type(self).__name__, rank, self.folding().shape)
        first, second, third = (groups * rank for rank in self.rank)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce = self.make_pointwise(in_channels, first, bias=False, **factory)
        self.vertical = self.make_spatial(first, second, columns=False, bias=False, **factory)
        self.horizontal = self.make_spatial(second, third, rows=False, bias=False, **factory)
        self.expand = self.make_pointwise(third, out_channels, bias=bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls, layer: nn.Module, *, rank: int | Sequence[int] | RankRule, metric: Metric | None = None
    ) -> Self:
        """Build the layer whose weight is near that of ``layer`` in Frobenius norm (TT-SVD, then sweeps).

        Args:
            layer: A trained ``nn.Conv2d``; not changed.
            rank: The ranks per group, or a rule that chooses them.
            metric: What is to be small of the weight's change; its Frobenius norm if left out.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none.
        """
        source = read_layer(layer, cls)
        return cls.fitted(source, metric, rank=cls.resolve_rank(rank, source))

    @classmethod
    def rank_problem(cls, source: Source, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        return TTConvProblem(cls, source, conv_folding(source.weight.shape, source.arguments["groups"]), {})

    def folding(self) -> Folding:
        """Return how the weight is folded: a core for each of input channels, rows, columns and output channels."""
        return conv_folding(self.weight_shape, self.groups)

    def _set_cores(self, cores: Sequence[Tensor]) -> None:
        reduce, vertical, horizontal, expand = (core.movedim(-1, 1) for core in cores)  # (g, r_k, r_{k-1}, n_k)
        for stage, factor in ((self.reduce, reduce), (self.vertical, vertical), (self.horizontal, horizontal)):
            stage.weight.copy_(factor.reshape(stage.weight.shape))
        self.expand.weight.copy_(expand.transpose(1, 3).reshape(self.expand.weight.shape))

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=math.prod(self.rank))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the convolutions: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return run_stages((self.reduce, self.vertical, self.horizontal, self.expand), input)

    def dense_weight(self) -> Tensor:
        """Return the product of the factors, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        reduce, vertical, horizontal, expand = (
            stage.weight.reshape(self.groups, -1, *stage.weight.shape[1:]) for stage in self.stages()
        )
        rows = torch.einsum("gbah,gai->gbih", vertical.squeeze(-1), reduce.flatten(2))
        columns = torch.einsum("goc,gcbw->gobw", expand.flatten(2), horizontal.squeeze(3))
        return torch.einsum("gobw,gbih->goihw", columns, rows).flatten(0, 1)

    def stage_rank(self) -> tuple[int, ...]:
        """Return the widths of ``reduce``, ``vertical`` and ``horizontal``, per group."""
        return tuple(stage.out_channels // self.groups for stage in (self.reduce, self.vertical, self.horizontal))

    def stages(self) -> Iterator[nn.Conv2d]:
        """Yield ``reduce``, ``vertical``, ``horizontal`` and ``expand``."""
        yield from (self.reduce, self.vertical, self.horizontal, self.expand)
