"""Convolutions from the canonical polyadic (CP) decomposition of their kernel: a sum of rank-one terms."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, cp, cp_full_rank, cp_tensor, weighted_cp
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._cp_ranks import CPProblem, Factors, check_factors, kernel_tensors
from lowrank_nn.layers._lowrank import LowRankLayer
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule, check_rank
from lowrank_nn.layers._shapes import CompressedConv2d, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages

_REFIT_ITERATIONS = 25


@register_layer
class CPConv2d(LowRankLayer, CompressedConv2d):
    r"""``nn.Conv2d`` as 1 x 1, depthwise k x k and 1 x 1 convolutions, from the CP decomposition of the kernel.

    With ``factors=3``, W[o, i, h, w] = sum_r E[o, r] S[r, h, w] R[r, i], with rank (C_in + kh kw + C_out) parameters.
    With ``factors=4`` the depthwise convolution is itself split in two, kh x 1 and 1 x kw:
    W[o, i, h, w] = sum_r E[o, r] V[r, h] H[r, w] R[r, i], with rank (C_in + kh + kw + C_out) parameters. Grouped
    convolutions are decomposed group by group, ``rank`` terms in each.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride, on the depthwise part.
        padding: Padding (int, pair, ``"same"`` or ``"valid"``), on the depthwise part.
        dilation: Spacing of the kernel's taps, on the depthwise part.
        groups: Number of blocked connections of the 1 x 1 convolutions.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        rank: Number of terms per group, up to min(C_out, C_in) / groups * kh kw, which holds every kernel.
        factors: 3 or 4.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Attributes:
        reduce: 1 x 1 convolution to ``groups * rank`` channels, without bias: R.
        spatial: Depthwise k x k convolution without bias: S; None with four factors.
        vertical: Depthwise kh x 1 convolution without bias: V; None with three factors.
        horizontal: Depthwise 1 x kw convolution without bias: H; None with three factors.
        expand: 1 x 1 convolution to the output channels: E and the bias.

    Raises:
        RankError: ``rank`` is out of range.
        OptionError: ``factors`` is neither 3 nor 4, or ``groups`` does not divide the channels.

    References:
        Lebedev et al. 2015, "Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition";
        Phan et al. 2020, "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network".
    """

    # Four factors save 2 % of the parameters of a 3 x 3 kernel with 64 channels, but fit it worse and run one more
    # convolution. They pay for large kernels, which hold few of a network's parameters: ask for them by hand.
    formats: ClassVar[tuple[dict[str, Any], ...]] = ({"factors": 3},)

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
        factors: Factors = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        check_factors(factors)
        self.factors: Factors = factors
        limit = cp_full_rank((out_channels // groups, *self.weight_shape[1:]))
        self.rank: int = check_rank(type(self).__name__, rank, limit)
        channels = groups * self.rank
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        depthwise = functools.partial(self.make_spatial, channels, channels, groups=channels, bias=False, **factory)
        self.reduce = self.make_pointwise(in_channels, channels, bias=False, **factory)
        self.spatial: nn.Conv2d | None = None
        self.vertical: nn.Conv2d | None = None
        self.horizontal: nn.Conv2d | None = None
        if factors == 3:
            self.spatial = depthwise()
        else:
            self.vertical = depthwise(columns=False)
            self.horizontal = depthwise(rows=False)
        self.expand = self.make_pointwise(channels, out_channels, bias=bias, **factory)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        rank: int | RankRule,
        factors: Factors = 3,
        epc: bool = True,
        metric: Metric | None = None,
    ) -> Self:
        """Build the layer whose weight is near that of ``layer``, by alternating least squares or under a metric.

        Args:
            layer: A trained ``nn.Conv2d``; not changed.
            rank: Number of terms per group, or a rule that chooses it: ``Params(0.3)`` or ``SpeedUp(2)``.
            factors: 3 or 4.
            epc: Whether to run the error-preserving correction, which keeps the factors from growing against one
                another at up to 5 % more error (Phan et al. 2020). Without it the layer may be hard to fine-tune
                and to quantize.
            metric: What is to be small of the weight's change; its Frobenius norm if left out.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none; VBMF and Energy never do.
            OptionError: ``factors`` is neither 3 nor 4.
        """
        source = read_layer(layer, cls)
        rank = cls.resolve_rank(rank, source, factors=factors)
        return cls.fitted(source, metric, fit={"epc": epc}, rank=rank, factors=factors)

    @classmethod
    def rank_problem(cls, source: Source, *, factors: Factors = 3, **options: Any) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        return CPProblem(source, factors)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """The rank that needs half of the dense parameters: half of the largest rank would need more than all."""
        problem = cls.rank_problem(read_layer(layer, cls))
        half = problem.dense(problem.typical_positions())[0] // (2 * int(problem.params(1)))
        return {"rank": min(max(1, half), problem.limits[0])}

    @torch.no_grad()
    def approximate_(self, weight: Tensor, metric: Metric | None = None, *, epc: bool = True) -> None:
        """Set the factors to the CP decomposition, group by group, of ``weight``, shape ``weight_shape``.

        Each term has the same norm in all factors. Factors that give this very weight already stay as they are.

        Args:
            weight: Tensor of the replaced layer's weight shape.
            metric: What is to be small of the difference; None for its Frobenius norm.
            epc: Whether to run the error-preserving correction.
        """
        # From a weight of exactly this rank the fit would find its factors only nearly.
        if not weight.is_meta and torch.equal(weight, self.dense_weight()):
            return
        tensors = kernel_tensors(weight, self.groups, self.factors)
        if metric is None:
            parts = [cp(tensor, self.rank, epc=epc) for tensor in tensors]
            self._set_factors([torch.stack(factor) for factor in zip(*parts, strict=True)])
        else:
            self._set_factors(weighted_cp(tensors.flatten(0, 1), metric, self.rank, epc=epc))

    @torch.no_grad()
    def refit_(self, weight: Tensor, metric: Metric) -> None:
        """Fit the present factors anew, to a somewhat different weight under a somewhat different metric.

        Never ends above the error, under ``metric``, of leaving the factors as they are.

        Args:
            weight: Of shape ``weight_shape``.
            metric: What is to be small of the difference.
        """
        if weight.is_meta:
            return
        tensors = kernel_tensors(weight, self.groups, self.factors)
        before, present = self._error(tensors, metric), self._factors()
        found = weighted_cp(tensors.flatten(0, 1), metric, self.rank, start=present, iterations=_REFIT_ITERATIONS)
        self._set_factors(found)
        if self._error(tensors, metric) > before:  # rounded to the layer's dtype, a better fit may be a worse one
            self._set_factors(present)

    def _factors(self) -> list[Tensor]:
        """Return copies of the factors: ``(groups, O/g, rank)``, ``(groups, I/g, rank)`` and those of the taps."""
        stages = (self.reduce, *self._spatial_stages())
        rest = [stage.weight.detach().reshape(self.groups, self.rank, -1).transpose(1, 2).clone() for stage in stages]
        return [self.expand.weight.detach().reshape(self.groups, -1, self.rank).clone(), *rest]

    def _set_factors(self, factors: list[Tensor]) -> None:
        first, *rest = factors
        self.expand.weight.copy_(first.reshape(self.expand.weight.shape))
        for stage, factor in zip((self.reduce, *self._spatial_stages()), rest, strict=True):
            stage.weight.copy_(factor.transpose(1, 2).reshape(stage.weight.shape))

    def _error(self, tensors: Tensor, metric: Metric) -> float:
        """Return the error of the present factors, computed in float64."""
        terms = [cp_tensor(group) for group in zip(*(factor.double() for factor in self._factors()), strict=True)]
        return metric.error((torch.stack(terms) - tensors).flatten(0, 1))

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of ``nn.Conv2d``'s default weight."""
        draw_factors_(self, terms=self.rank)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the convolutions: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return run_stages(self._stages(), input)

    def dense_weight(self) -> Tensor:
        """Return the sum of the terms, shape ``(out_channels, in_channels / groups, kh, kw)``."""
        shape = (self.groups, self.rank, -1)
        reduce = self.reduce.weight.reshape(shape)
        expand = self.expand.weight.reshape(self.groups, -1, self.rank)
        spatial = [stage.weight for stage in self._spatial_stages()]
        taps = math.prod(spatial, start=spatial[0].new_ones(())).reshape(self.groups, self.rank, *self.kernel_size)
        return torch.einsum("gor,grhw,gri->goihw", expand, taps, reduce).flatten(0, 1)

    def stage_rank(self) -> int:
        """Return the width of ``reduce``, per group."""
        return self.reduce.out_channels // self.groups

    def stages(self) -> Iterator[nn.Module]:
        """Yield ``reduce``, ``spatial`` (or ``vertical`` and ``horizontal``) and ``expand``."""
        yield from self._stages()

    def _stages(self) -> list[nn.Conv2d]:
        return [self.reduce, *self._spatial_stages(), self.expand]

    def _spatial_stages(self) -> list[nn.Conv2d]:
        return [stage for stage in (self.spatial, self.vertical, self.horizontal) if stage is not None]
