"""Counting the floating-point operations of whatever runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lowrank_nn.cost._dense import fourier_macs


class FlopCounter(TorchDispatchMode):
    """Counts flops by torch's own formulas, those of ``torch.utils.flop_counter.FlopCounterMode``, and a few more.

    That class is not used itself: it also tracks modules by hooks, which fail where a forward calls
    ``torch.autograd.grad``, and it does not take nested tensors.

    Attributes:
        flops: Operations so far: two for each multiply-accumulate.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count it, or the operations that it is made of."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if any(kind is not Tensor for kind in types):
            return NotImplemented  # a subclass runs plain operations inside, and those come here
        if any(isinstance(value, Tensor) and value.is_nested for value in args):
            return func(*args, **kwargs)  # nested tensors of the old layout have no shape to count with
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            packet = func.overloadpacket
            if formula := FORMULAS.get(packet):
                self.flops += formula(*args, **kwargs, out_val=result)
            elif formula := flop_registry.get(packet):
                # A product of complex numbers is four of real ones.
                factor = 4 if isinstance(result, Tensor) and result.is_complex() else 1
                self.flops += factor * formula(*args, **kwargs, out_val=result)
        return result


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _matrix_vector_flops(matrix: Tensor, vector: Tensor, **options: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector_flops(start: Tensor, matrix: Tensor, vector: Tensor, **options: Any) -> int:
    return 2 * matrix.numel()


def _dot_flops(left: Tensor, right: Tensor, **options: Any) -> int:
    return 2 * left.numel()


def _to_frequencies_flops(x: Tensor, dim: Sequence[int], *args: Any, **options: Any) -> int:
    return _fourier_flops(x, dim)


def _from_frequencies_flops(x: Tensor, dim: Sequence[int], *args: Any, out_val: Tensor) -> int:
    return _fourier_flops(out_val, dim)


def _complex_fourier_flops(x: Tensor, dim: Sequence[int], *args: Any, **options: Any) -> int:
    return 2 * _fourier_flops(x, dim)


def _fourier_flops(real: Tensor, dims: Sequence[int]) -> int:
    size = math.prod(real.shape[dim] for dim in dims)
    return real.numel() // max(1, size) * 2 * fourier_macs(max(1, size))


# Missing in the registry of torch 2.13, which would count them as nothing.
FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.addmv: _added_matrix_vector_flops,
    torch.ops.aten.dot: _dot_flops,
    torch.ops.aten._fft_r2c: _to_frequencies_flops,
    torch.ops.aten._fft_c2r: _from_frequencies_flops,
    torch.ops.aten._fft_c2c: _complex_fourier_flops,
}
