"""Convolutions from the Tucker decomposition of their kernel along the two channel modes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, tucker2, weighted_tucker2
from lowrank_nn.errors import RankError
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._lowrank import LowRankLayer, Rank
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._shapes import CompressedConv2d, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages
from lowrank_nn.layers._tucker_ranks import TuckerProblem, kernel_blocks, tucker_limits

TuckerRank = tuple[int | None, int | None]


@register_layer
class TuckerConv2d(LowRankLayer, CompressedConv2d):
    r"""``nn.Conv2d`` as 1 x 1, k x k and 1 x 1 convolutions, from the Tucker-2 decomposition of the kernel.

    W[o, i, h, w] = sum_{a, b} E[o, a] G[a, b, h, w] R[b, i], with rank_in C_in + rank_out rank_in kh kw +
    rank_out C_out parameters. Where a rank is None that mode is left whole and its 1 x 1 convolution does not exist
    (Tucker-1). Grouped convolutions are decomposed group by group, with the same ranks in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride, on the core.
        padding: Padding (int, pair, ``"same"`` or ``"valid"``), on the core.
        dilation: Spacing of the kernel's taps, on the core.
        groups: Number of blocked connections, of all three convolutions.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: (rank_out, rank_in), channels per group after and before the core. rank_out is at most C_out / groups
            and rank_in kh kw, rank_in at most C_in / groups and rank_out kh kw. Either may be None, not both.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        reduce: 1 x 1 convolution to ``groups * rank_in`` channels, without bias: R; None where rank_in is None.
        core: k x k convolution: G; holds the bias where ``expand`` is None.
        expand: 1 x 1 convolution to the output channels: E and the bias; None where rank_out is None.

    Raises:
        RankError: ``rank`` is no such pair, or out of range.
        OptionError: ``groups`` does not divide the channels.

    References:
        Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications";
        Izenman 1975, "Reduced-Rank Regression for the Multivariate Linear Model" (the fit under a metric).
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
        rank: TuckerRank,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.rank: TuckerRank = _check_ranks(rank, self.weight_shape, groups)
        rank_out, rank_in = self.rank
        core_in = in_channels if rank_in is None else groups * rank_in
        core_out = out_channels if rank_out is None else groups * rank_out
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce: nn.Conv2d | None = None
        self.expand: nn.Conv2d | None = None
        if rank_in is not None:
            self.reduce = self.make_pointwise(in_channels, core_in, bias=False, **factory)
        self.core = self.make_spatial(core_in, core_out, bias=bias and rank_out is None, **factory)
        if rank_out is not None:
            self.expand = self.make_pointwise(core_out, out_channels, bias=bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls, layer: nn.Module, *, rank: TuckerRank | RankRule, metric: Metric | None = None
    ) -> Self:
        """Build the layer whose weight is near that of ``layer`` in Frobenius norm (HOSVD, then HOOI sweeps).

        Args:
            layer: A trained ``nn.Conv2d``; not changed.
            rank: (rank_out, rank_in) per group, or a rule that chooses them.
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
        return TuckerProblem(source)

    @classmethod
    def rank_argument(cls, ranks: tuple[int, ...], limits: tuple[int, ...]) -> Rank:
        """Return (rank_out, rank_in), None for a rank at its limit, whose factor would be square.

        At both limits the smaller one is kept, since a layer needs at least one factor.
        """
        out, inn = ranks
        whole_out, whole_in = out == limits[0], inn == limits[1]
        if whole_out and whole_in:
            return (out, None) if out <= inn else (None, inn)
        return (None if whole_out else out, None if whole_in else inn)

    @classmethod
    def resolve_rank(cls, rank: Any, source: Source, **options: Any) -> Any:
        """Return ``rank`` itself, or what it chooses where it is a rule.

        A rule that chooses mode by mode may ask for more than the other mode leaves; that mode is left whole.

        Raises:
            RankError: The rule finds no rank for this weight.
        """
        if not isinstance(rank, RankRule):
            return rank
        problem = TuckerProblem(source)
        out, inn = rank.choose(problem)
        if out >= inn * problem.taps:
            out = problem.limits[0]
        elif inn >= out * problem.taps:
            inn = problem.limits[1]
        return cls.rank_argument((out, inn), problem.limits)

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None) -> None:
        """Set the factors to the Tucker-2 decomposition, group by group, of ``weight``, shape ``weight_shape``.

        The 1 x 1 convolutions have orthonormal factors and the core carries the norm. Under a metric the decomposition
        is improved by reduced-rank regression.
        """
        parts = [tucker2(kernel, self.rank) for kernel in kernel_blocks(weight, self.groups)]
        out_factors = [part.out_factor for part in parts if part.out_factor is not None]
        in_factors = [part.in_factor for part in parts if part.in_factor is not None]
        core = torch.stack([part.core for part in parts])
        self._set_factors(
            core,
            torch.stack(out_factors) if out_factors else None,
            torch.stack(in_factors) if in_factors else None,
        )
        if metric is not None:
            self.refit_(weight, metric)

    @torch.no_grad()
    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Search for a better ``reduce`` under ``metric``, from the present one, and set the rest to what suits it."""
        start = None if self.reduce is None else kernel_blocks(self.reduce.weight.flatten(1), self.groups).mT
        self._set_factors(*weighted_tucker2(weight, metric, self.rank, start=start))

    def _set_factors(self, core: Tensor, out_factor: Tensor | None, in_factor: Tensor | None) -> None:
        """Take the factors of all groups, stacked."""
        # Orthonormal factors keep noise at its size: rounding inside the chain is not amplified by the outer stages.
        self.core.weight.copy_(core.flatten(0, 1))
        if self.reduce is not None and in_factor is not None:
            self.reduce.weight.copy_(in_factor.mT.flatten(0, 1)[:, :, None, None])
        if self.expand is not None and out_factor is not None:
            self.expand.weight.copy_(out_factor.flatten(0, 1)[:, :, None, None])

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=(self.rank[0] or 1) * (self.rank[1] or 1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the convolutions: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return run_stages(self._stages(), input)

    def dense_weight(self) -> Tensor:
        """Return the product of the factors, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        weight = kernel_blocks(self.core.weight, self.groups)  # (g, a, b, h, w)
        if self.reduce is not None:
            reduce = kernel_blocks(self.reduce.weight.flatten(1), self.groups)  # (g, b, i)
            weight = torch.einsum("gabhw,gbi->gaihw", weight, reduce)
        if self.expand is not None:
            expand = kernel_blocks(self.expand.weight.flatten(1), self.groups)  # (g, o, a)
            weight = torch.einsum("goa,gaihw->goihw", expand, weight)
        return weight.flatten(0, 1)

    def stage_rank(self) -> TuckerRank:
        """Return the channels of ``core`` per group, None where it stands at an end."""
        rank_out = None if self.expand is None else self.core.out_channels // self.groups
        rank_in = None if self.reduce is None else self.core.in_channels // self.groups
        return (rank_out, rank_in)

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``reduce``, ``core`` and ``expand``, as far as they exist."""
        yield from self._stages()

    def _stages(self) -> list[nn.Conv2d]:
        return [stage for stage in (self.reduce, self.core, self.expand) if stage is not None]


def _check_ranks(rank: object, weight_shape: tuple[int, int, int, int], groups: int) -> TuckerRank:
    name = "TuckerConv2d"
    if isinstance(rank, str) or not isinstance(rank, Sequence) or len(rank) != 2 or list(rank) == [None, None]:
        raise RankError(
            f"{name}: rank must be a pair (rank_out, rank_in) of integers, at most one of them None, got {rank!r}. "
            "Pass one rank for each channel mode; rank rules work in from_pretrained_layer."
        )
    out, inn, height, width = weight_shape
    out, taps = out // groups, height * width
    limits = tucker_limits(out, inn, taps)
    rank_out = None if rank[0] is None else check_rank(name, rank[0], limits[0], "rank_out (rank[0])")
    rank_in = None if rank[1] is None else check_rank(name, rank[1], limits[1], "rank_in (rank[1])")
    if rank_out is not None and rank_in is not None:
        for what, value, other in (("rank_out", rank_out, rank_in), ("rank_in", rank_in, rank_out)):
            if value > other * taps:
                raise RankError(
                    f"{name}: {what} must be at most {other} * {height} * {width} = {other * taps} where the other "
                    f"rank is {other}, got {value}. Pass a smaller rank, or None to leave that mode whole."
                )
    return rank_out, rank_in
