"""Convolutions split into a vertical and a horizontal one, from the SVD of their rearranged kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, truncated_svd, weighted_tucker1, weighted_tucker1_errors
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._lowrank import LowRankLayer
from lowrank_nn.layers._matrix import MatrixProblem
from lowrank_nn.layers._rank_problem import IntArray, Positions, RankProblem, RankTable
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._shapes import CompressedConv2d, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages

# Ranks that are fitted for the table, as shares of the rank that costs as much as the dense layer.
_FITTED_SHARES = np.geomspace(0.01, 0.5, 4)


class _SpatialProblem(MatrixProblem):
    """The rank of the matrix of (input channel, row) x (output channel, column) of each group."""

    def __init__(self, source: Source) -> None:
        super().__init__("SpatialSVDConv2d", source, _unfold(source.weight, source.arguments["groups"]))

    def macs(self, positions: Positions, *ranks: IntArray | int) -> IntArray:
        per_rank = self.rows * positions.between + self.columns * positions.outputs
        return np.asarray(ranks[0]) * self.groups * per_rank

    def table(self, metric: Metric | None = None) -> RankTable:
        """Return all ranks; none for a kernel of one row or one column, on which this format is ``SVDConv2d``.

        Under a metric a few ranks are fitted, and the others estimated from their starts and these.
        """
        if 1 in self.weight.shape[2:]:
            return RankTable.empty()
        return super().table(metric)

    def _errors_under(self, metric: Metric) -> Tensor:
        break_even = self.weight.numel() / int(self.params(1))
        wanted = np.minimum(np.ceil(_FITTED_SHARES * break_even), self.limits[0])
        return weighted_tucker1_errors(_merge_rows(self.weight), metric, np.unique(wanted.astype(np.int64)).tolist())


def _unfold(weight: Tensor, groups: int) -> Tensor:
    """Return the matrix of each group, ``(groups, I/g kh, O/g kw)``."""
    out, inn, height, width = weight.shape
    return weight.reshape(groups, out // groups, inn * height, width).transpose(1, 2).flatten(2)


def _merge_rows(weight: Tensor) -> Tensor:
    """Return the kernel as one of a single row, ``(O, I/g kh, kw)``: its rows as further channels.

    That makes the vertical convolution one of channels only, and so the fit under a metric a Tucker-1 decomposition.
    """
    return weight.flatten(1, 2)


@register_layer
class SpatialSVDConv2d(LowRankLayer, CompressedConv2d):
    r"""``nn.Conv2d`` as a kh x 1 convolution and a 1 x kw, from the SVD of the rearranged kernel.

    W[o, i, h, w] = sum_r B[o, r, w] A[r, i, h], with rank (C_in kh + C_out kw) parameters: the best A and B are the
    truncated SVD of the matrix of (i, h) x (o, w). On a kernel of one row or one column this is the ``SVDConv2d`` of
    the same rank. Grouped convolutions are factorised group by group, ``rank`` in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride; along rows on the vertical convolution, along columns on the horizontal one.
        padding: Padding (int, pair, ``"same"`` or ``"valid"``), divided in the same way.
        dilation: Spacing of the kernel's taps, divided in the same way.
        groups: Number of blocked connections, of both convolutions.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: Channels between the two, per group, up to ``min(C_in / g kh, C_out / g kw)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        vertical: kh x 1 convolution to ``groups * rank`` channels, without bias: A.
        horizontal: 1 x kw convolution to the output channels: B and the bias.

    Raises:
        RankError: ``rank`` is out of range.
        OptionError: ``groups`` does not divide the channels.

    References:
        Jaderberg et al. 2014, "Speeding up Convolutional Neural Networks with Low Rank Expansions"; Tai et al. 2016,
        "Convolutional neural networks with low-rank regularization" (the closed form).
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
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        out, inn, height, width = self.weight_shape
        self.rank: int = check_rank(type(self).__name__, rank, min(inn * height, out // groups * width))
        between = groups * self.rank
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vertical = self.make_spatial(in_channels, between, columns=False, bias=False, **factory)
        self.horizontal = self.make_spatial(between, out_channels, rows=False, bias=bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(cls, layer: nn.Module, *, rank: int | RankRule, metric: Metric | None = None) -> Self:
        """Build the layer whose weight is nearest to that of ``layer`` in Frobenius norm (Eckart-Young).

        Args:
            layer: A trained ``nn.Conv2d``; not changed.
            rank: The rank per group, or a rule that chooses it.
            metric: What is to be small of the weight's change; its Frobenius norm if left out. Under a metric no
                closed form is known; the search starts from the SVD of the weighted kernel, and ends no worse than
                the best that goes with the data-free vertical factor.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none.
        """
        source = read_layer(layer, cls)
        return cls.fitted(source, metric, rank=cls.resolve_rank(rank, source))

    @classmethod
    def rank_problem(cls, source: Source, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        return _SpatialProblem(source)

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set the factors to the truncated SVD, group by group, of ``weight``, shape ``weight_shape``.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference; None for its Frobenius norm.
        """
        factors = [truncated_svd(matrix, self.rank) for matrix in _unfold(weight, self.groups)]
        self._set(torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors]))
        if metric is not None:
            self.refit_(weight, metric)

    @torch.no_grad()
    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Fit the factors to ``weight`` under a metric, no worse than the best with the present vertical factor.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference.
        """
        start = self.vertical.weight.reshape(self.groups, self.rank, -1).mT
        self._set(*weighted_tucker1(_merge_rows(weight), metric, start))

    def _set(self, left: Tensor, right: Tensor) -> None:
        """Take over factors ``(groups, I/g kh, rank)`` and ``(groups, rank, O/g kw)`` of the matrices."""
        out = self.out_channels // self.groups
        horizontal = right.reshape(self.groups, self.rank, out, -1).transpose(1, 2)
        self.vertical.weight.copy_(left.mT.reshape(self.vertical.weight.shape))
        self.horizontal.weight.copy_(horizontal.reshape(self.horizontal.weight.shape))

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both convolutions: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return run_stages((self.vertical, self.horizontal), input)

    def dense_weight(self) -> Tensor:
        """Return the product of the factors, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        vertical = self.vertical.weight.reshape(self.groups, self.rank, -1, self.kernel_size[0])
        horizontal = self.horizontal.weight.reshape(self.groups, -1, self.rank, self.kernel_size[1])
        return torch.einsum("gorw,grih->goihw", horizontal, vertical).flatten(0, 1)

    def stage_rank(self) -> int:
        """Return the width of ``vertical``, per group."""
        return self.vertical.out_channels // self.groups

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``vertical`` and ``horizontal``."""
        yield self.vertical
        yield self.horizontal
