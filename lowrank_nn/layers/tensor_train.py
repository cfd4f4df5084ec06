"""Layers from the tensor train of their weight: four convolutions in a row, or a linear layer core by core."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.decompose import Metric, tt_tensor
from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers._base import register_layer
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._stages import run_stages
from lowrank_nn.layers._train import TrainLayer, check_ranks
from lowrank_nn.layers._train_ranks import (
    ConvTrainProblem,
    Folding,
    LinearTrainProblem,
    Shape,
    conv_folding,
    linear_folding,
    resolve_shape,
)


@register_layer
class TTConv2d(TrainLayer, CompressedConv2d):
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
        return ConvTrainProblem(cls, source, conv_folding(source.weight.shape, source.arguments["groups"]), {})

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


@register_layer
class TTLinear(TrainLayer, CompressedLinear):
    r"""``nn.Linear`` whose weight, folded into a tensor, is a train of ``cores`` cores.

    With out_features = o_1 ... o_d and in_features = i_1 ... i_d,
    W[(j_1 ... j_d), (l_1 ... l_d)] = G_1[j_1, l_1] G_2[j_2, l_2] ... G_d[j_d, l_d], each G_k[j, l] a matrix of
    r_{k-1} x r_k, with sum_k r_{k-1} o_k i_k r_k parameters. The input passes through one core after the other, from
    the last to the first; the dense weight is never put together. With two cores this is a sum of r_1 Kronecker
    products.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        rank: (r_1, ..., r_{d-1}), or one number that none of them exceeds. r_k is at most the smaller of
            o_1 i_1 ... o_k i_k and o_{k+1} i_{k+1} ... o_d i_d; a rank that its neighbours cannot fill is lowered to
            what they can.
        shape: ((o_1, ..., o_d), (i_1, ..., i_d)). If left out, both sizes are split into factors as equal as they can
            be, those of the outputs in falling and those of the inputs in rising order.
        cores: Number of cores d, from 2; if left out that of ``shape``, or 3.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Attributes:
        core1: ``nn.Linear`` from i_1 r_1 to o_1 without bias, G_1; then core2, from i_2 r_2 to r_1 o_2; and so on.
        bias: The bias, which belongs to no core.

    Raises:
        RankError: ``rank`` is no such ranks, or out of range.
        OptionError: ``shape`` does not factor the sizes, or not into ``cores`` factors.

    References:
        Novikov et al. 2015, "Tensorizing Neural Networks".
    """

    formats: ClassVar[tuple[dict[str, Any], ...]] = ({"cores": 2}, {"cores": 3})
    rearranges: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int | Sequence[int],
        shape: Sequence[Sequence[int]] | None = None,
        cores: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.shape: Shape = resolve_shape(self.weight_shape, shape, cores)
        self.cores = len(self.shape[0])
        self.rank = check_ranks(type(self).__name__, rank, self.folding().shape)
        self._hold_bias(bias, out_features, device=device, dtype=dtype)
        bonds = (1, *self.rank, 1)
        for k, (out, inn) in enumerate(zip(*self.shape, strict=True)):
            core = nn.Linear(inn * bonds[k + 1], bonds[k] * out, bias=False, device=device, dtype=dtype)
            self.add_module(f"core{k + 1}", core)
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        rank: int | Sequence[int] | RankRule,
        shape: Sequence[Sequence[int]] | None = None,
        cores: int | None = None,
        metric: Metric | None = None,
    ) -> Self:
        """Build the layer whose weight is near that of ``layer`` in Frobenius norm (TT-SVD, then sweeps).

        Args:
            layer: A trained ``nn.Linear``; not changed.
            rank: The ranks, or a rule that chooses them.
            shape: The factors of both sizes, ((o_1, ..., o_d), (i_1, ..., i_d)); nearly equal ones if left out.
            cores: Number of cores.
            metric: What is to be small of the weight's change; its Frobenius norm if left out.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            RankError: ``rank`` is out of range, or the rule finds none.
            OptionError: ``shape`` does not factor the sizes, or not into ``cores`` factors.
        """
        source = read_layer(layer, cls)
        chosen = cls.resolve_rank(rank, source, shape=shape, cores=cores)
        return cls.fitted(source, metric, rank=chosen, shape=shape, cores=cores)

    @classmethod
    def rank_problem(
        cls, source: Source, *, shape: Sequence[Sequence[int]] | None = None, cores: int | None = None, **options: Any
    ) -> RankProblem:
        """Return what rank rules and the planner ask about ``source`` in this format."""
        out, inn = source.weight.shape
        resolved = resolve_shape((out, inn), shape, cores)
        return LinearTrainProblem(cls, source, linear_folding(resolved), {"shape": resolved})

    def folding(self) -> Folding:
        """Return how the weight is folded: a core for each pair of an output and an input factor."""
        return linear_folding(self.shape)

    def _set_cores(self, cores: Sequence[Tensor]) -> None:
        for stage, core, out in zip(self._in_order(), cores, self.shape[0], strict=True):
            stage.weight.copy_(core.reshape(len(core[0]) * out, -1))  # (r_{k-1} o_k, i_k r_k)

    def reset_parameters(self) -> None:
        """Draw cores whose product has the variance of ``nn.Linear``'s default weight."""
        draw_factors_(self, terms=math.prod(self.rank))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the cores: ``(*, in_features)`` to ``(*, out_features)``."""
        leading, y = input.shape[:-1], input
        for k, core, done, left in self._steps():
            y = core(y.reshape(*leading, done, left, -1))
            y = y.unflatten(-1, (-1, self.shape[0][k])).movedim(-1, -4)  # (*, o_k, done, left, r_{k-1})
        y = y.reshape(*leading, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _steps(self) -> Iterator[tuple[int, nn.Module, int, int]]:
        """Yield the cores from the last to the first: position, core, outputs there are, inputs left to other cores."""
        outputs, inputs = self.shape
        cores = self._in_order()
        for k in reversed(range(self.cores)):
            yield k, cores[k], math.prod(outputs[k + 1 :]), math.prod(inputs[:k])

    def _in_order(self) -> list[Any]:
        return [self.get_submodule(f"core{k + 1}") for k in range(self.cores)]

    def dense_weight(self) -> Tensor:
        """Return the product of the cores, shape ``(out_features, in_features)``."""
        bonds = (1, *self.rank, 1)
        cores = [core.weight.reshape(bonds[k], -1, bonds[k + 1]) for k, core in enumerate(self._in_order())]
        return self.folding().unfold(tt_tensor(cores)[None])

    def stages(self) -> Iterator[nn.Module]:
        """Yield the cores in the order in which they are applied, from the last to the first."""
        yield from reversed(self._in_order())

    def stage_calls(self, input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
        """Yield the cores, each with the shape of the input that it is called with."""
        bonds = (*self.rank, 1)
        for k, core, done, left in self._steps():
            yield core, (*input_shape[:-1], done, left, self.shape[1][k] * bonds[k])

    def resize_to_stages_(self) -> None:
        """Refuse: a channel of a core is not one of the layer.

        Raises:
            UnsupportedLayerError: Always.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__}: channels cannot be removed from it, since its cores hold products of sizes. Leave "
            "the layer out (but_not=...), or remove channels before it is put in place."
        )
