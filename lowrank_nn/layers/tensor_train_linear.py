"""Linear layers from the tensor train of their weight, folded into a tensor: they compute core by core."""

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
from lowrank_nn.layers._folding import Folding, Shape, linear_folding, resolve_shape
from lowrank_nn.layers._rank_problem import RankProblem
from lowrank_nn.layers._ranks import RankRule
from lowrank_nn.layers._shapes import CompressedLinear, draw_factors_
from lowrank_nn.layers._source import Source, read_layer
from lowrank_nn.layers._tensor_train import TensorTrainLayer, check_ranks
from lowrank_nn.layers._tensor_train_ranks import TTLinearProblem


@register_layer
class TTLinear(TensorTrainLayer, CompressedLinear):
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
        self.hold_bias(bias, out_features, device=device, dtype=dtype)
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
        return TTLinearProblem(cls, source, linear_folding(resolved), {"shape": resolved})

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
        n = len(leading)
        outputs_first = (*range(n), n + 3, n, n + 1, n + 2)  # axes from the front: the older ONNX exporter needs it
        for core, folded, unfolded in self._steps():
            y = core(y.reshape(*leading, *folded))
            y = y.reshape(*leading, *folded[:2], *unfolded).permute(outputs_first)
        y = y.reshape(*leading, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _steps(self) -> Iterator[tuple[nn.Module, tuple[int, int, int], tuple[int, int]]]:
        """Yield the cores from the last to the first, each with what its input and its output are folded into.

        Those are (outputs there are, inputs left to other cores, i_k r_k) and, in place of the last, (r_{k-1}, o_k).
        """
        (outputs, inputs), bonds, cores = self.shape, (1, *self.rank, 1), self._in_order()
        for k in reversed(range(self.cores)):
            folded = math.prod(outputs[k + 1 :]), math.prod(inputs[:k]), inputs[k] * bonds[k + 1]
            yield cores[k], folded, (bonds[k], outputs[k])

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
        for core, folded, _ in self._steps():
            yield core, (*input_shape[:-1], *folded)

    def resize_to_stages_(self) -> None:
        """Refuse: a channel of a core is not one of the layer.

        Raises:
            UnsupportedLayerError: Always.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__}: channels cannot be removed from it, since its cores hold products of sizes. Leave "
            "the layer out (but_not=...), or remove channels before it is put in place."
        )
