"""Layers from the singular value decomposition: a matrix of rank r as two smaller ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, truncated_svd, weighted_svd, weighted_tucker1
from lowrank_nn.errors import OptionError
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._lowrank import LowRankLayer
from lowrank_nn.layers._matrix import ConvProblem, LinearProblem, Order, unfold_kernel
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages


@register_layer
class SVDLinear(LowRankLayer, CompressedLinear):
    r"""``nn.Linear`` with a weight of rank at most ``rank``: y = B (A x) + b.

    Needs rank * (in_features + out_features) parameters in place of in_features * out_features.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        rank: Inner size, from 1 to ``min(in_features, out_features)``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Attributes:
        reduce: ``nn.Linear`` from ``in_features`` to ``rank``, without bias: A.
        expand: ``nn.Linear`` from ``rank`` to ``out_features``: B and b.

    Raises:
        RankError: ``rank`` is out of range.

    References:
        Denton et al. 2014, "Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.rank: int = check_rank(type(self).__name__, rank, min(in_features, out_features))
        self.reduce = nn.Linear(in_features, self.rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(self.rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(cls, layer: nn.Module, *, rank: int | RankRule, metric: Metric | None = None) -> Self:
        """Build the layer whose weight is nearest to that of ``layer`` in Frobenius norm (Eckart-Young).

        Args:
            layer: A trained ``nn.Linear``; not changed.
            rank: The rank, or a rule that chooses it: ``VBMF()``, ``Energy(0.95)``, ``Params(0.3)``, ``SpeedUp(2)``.
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
        return LinearProblem(cls.__name__, source)

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set the factors to the best of their rank for ``weight``, shape ``(out_features, in_features)``.

        That is the truncated SVD; under a metric, the one in coordinates in which the metric is the Frobenius norm.
        """
        if metric is None:
            left, right = truncated_svd(weight, self.rank)
        else:
            (left,), (right,) = weighted_svd(weight, metric, self.rank)
        self.expand.weight.copy_(left)
        self.reduce.weight.copy_(right)

    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Set the factors to the best under ``metric``: the closed form needs no start."""
        self.approximate_(weight, metric)

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Linear``'s default weight."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both factors: ``(*, in_features)`` to ``(*, out_features)``."""
        y: Tensor = self.expand(self.reduce(input))
        return y

    def dense_weight(self) -> Tensor:
        """Return B A, shape ``(out_features, in_features)``."""
        return self.expand.weight @ self.reduce.weight

    def stage_rank(self) -> int:
        """Return the width of ``reduce``."""
        return self.reduce.out_features

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``reduce`` and ``expand``."""
        yield self.reduce
        yield self.expand


@register_layer
class SVDConv2d(LowRankLayer, CompressedConv2d):
    r"""``nn.Conv2d`` as a k x k convolution and a 1 x 1, from the SVD of the unfolded kernel.

    With ``order="spatial_first"`` the k x k convolution maps to ``rank`` channels per group, then a 1 x 1 expands:
    W[o, i, h, w] = sum_r B[o, r] A[r, i, h, w], with rank (C_in K^2 + C_out) parameters. With
    ``order="pointwise_first"`` a 1 x 1 reduces first: W[o, i, h, w] = sum_r B[o, r, h, w] A[r, i], with
    rank (C_in + C_out K^2) parameters. On a 1 x 1 kernel both are the plain SVD of the matrix. Grouped
    convolutions are factorised group by group, ``rank`` in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride, on the k x k convolution.
        padding: Zero padding (int, pair, ``"same"`` or ``"valid"``), on the k x k convolution.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: Channels between the two, per group; up to ``min(C_out / g, C_in / g K^2)`` spatial first,
            ``min(C_in / g, C_out / g K^2)`` pointwise first.
        order: Which of the two convolutions comes first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        reduce: The first convolution, without bias: A.
        expand: The second convolution: B and the bias.

    Raises:
        RankError: ``rank`` is out of range.
        OptionError: ``order`` is neither of the two, or ``groups`` does not divide the channels.

    References:
        Zhang et al. 2016, "Accelerating Very Deep Convolutional Networks for Classification and Detection" (of which
        the fit under a metric, spatial first, is the linear case);
        Izenman 1975, "Reduced-Rank Regression for the Multivariate Linear Model".
    """

    formats: ClassVar[tuple[dict[str, Any], ...]] = ({"order": "spatial_first"}, {"order": "pointwise_first"})

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
        order: Order = "spatial_first",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if order not in ("spatial_first", "pointwise_first"):
            raise OptionError(f"SVDConv2d: order must be 'spatial_first' or 'pointwise_first', got {order!r}.")
        out, inn, height, width = self.weight_shape
        spatial_first, taps = order == "spatial_first", height * width
        rows, columns = (out // groups, inn * taps) if spatial_first else (inn, out // groups * taps)
        self.order: Order = order
        self.rank: int = check_rank(type(self).__name__, rank, min(rows, columns))
        between = groups * self.rank
        first, second = self.make_pointwise, self.make_spatial
        if spatial_first:
            first, second = second, first
        self.reduce = first(in_channels, between, bias=False, device=device, dtype=dtype)
        self.expand = second(between, out_channels, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        rank: int | RankRule,
        order: Order = "spatial_first",
        metric: Metric | None = None,
    ) -> Self:
        """Build the layer whose weight is nearest to that of ``layer`` in Frobenius norm (Eckart-Young).

        Args:
            layer: A trained ``nn.Conv2d``; not changed.
            rank: The rank per group, or a rule that chooses it.
            order: Which of the two convolutions comes first.
            metric: What is to be small of the weight's change; its Frobenius norm if left out.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none.
            OptionError: ``order`` is neither of the two.
        """
        source = read_layer(layer, cls)
        return cls.fitted(source, metric, rank=cls.resolve_rank(rank, source, order=order), order=order)

    @classmethod
    def rank_problem(cls, source: Source, *, order: Order = "spatial_first", **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        return ConvProblem(source, order)

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set the factors to the best of their rank for ``weight``, shape ``weight_shape``, group by group.

        That is the truncated SVD. Under a metric, spatial first has a closed form too, the principal components of the
        output; pointwise first, its first factor sees the channels alone: Tucker-1, by second-order steps.
        """
        if metric is not None and self.order == "spatial_first":
            self._set_factors(*weighted_svd(weight, metric, self.rank))
            return
        factors = [truncated_svd(m, self.rank) for m in unfold_kernel(weight, self.groups, self.order)]
        self._set_factors(torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors]))
        if metric is not None:
            self.refit_(weight, metric)

    @torch.no_grad()
    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Set the factors to the best under ``metric``, pointwise first from the present one of the channels."""
        if self.order == "spatial_first":
            self.approximate_(weight, metric)
            return
        start = self.reduce.weight.reshape(self.groups, self.rank, -1).mT
        self._set_factors(*weighted_tucker1(weight, metric, start))

    def _set_factors(self, left: Tensor, right: Tensor) -> None:
        """Take the factors (groups, m, rank) and (groups, rank, n) of each group's unfolding."""
        if self.order == "pointwise_first":
            self.reduce.weight.copy_(left.transpose(1, 2).reshape(self.reduce.weight.shape))
            out = right.reshape(self.groups, self.rank, self.out_channels // self.groups, -1).transpose(1, 2)
            self.expand.weight.copy_(out.reshape(self.expand.weight.shape))
        else:
            self.reduce.weight.copy_(right.reshape(self.reduce.weight.shape))
            self.expand.weight.copy_(left.reshape(self.expand.weight.shape))

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply both convolutions: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return run_stages((self.reduce, self.expand), input)

    def dense_weight(self) -> Tensor:
        """Return the product of the factors, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        first = self.reduce.weight.reshape(self.groups, self.rank, -1, *self.reduce.kernel_size)
        second = self.expand.weight.reshape(self.groups, -1, self.rank, *self.expand.kernel_size)
        if self.order == "spatial_first":
            return torch.einsum("gor,grihw->goihw", second.flatten(3).squeeze(3), first).flatten(0, 1)
        return torch.einsum("gorhw,gri->goihw", second, first.flatten(3).squeeze(3)).flatten(0, 1)

    def stage_rank(self) -> int:
        """Return the width of ``reduce``, per group."""
        return self.reduce.out_channels // self.groups

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``reduce`` and ``expand``."""
        yield self.reduce
        yield self.expand
