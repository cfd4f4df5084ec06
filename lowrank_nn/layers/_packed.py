"""What is made from a layer's tensors for its kernels: kept beside the layer, until one of them changes.

It is neither saved nor copied: packed weights are opaque, and are made anew where they are needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lowrank_nn.layers._deferred import Deferred
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear

Made = TypeVar("Made")
Stamp = tuple[Tensor, int, int]


class Derived(Generic[Made]):
    """A table of what was made from layers, which forgets a layer's when the layer goes, learns or has other tensors.

    Args:
        make: Makes it from a layer; called without gradients.
    """

    tables: ClassVar[list[Derived[Any]]] = []
    """All there are."""

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self.tables.append(self)
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[list[Stamp], Made]] = weakref.WeakKeyDictionary()

    def of(self, layer: nn.Module) -> Made:
        """Return what belongs to ``layer`` as it is now."""
        known = self._known.get(layer)
        if known is None or not _is_current(layer, known[0]):
            with torch.inference_mode(False), torch.no_grad():
                known = _stamps(layer), self._make(layer)
            self._known[layer] = known
        return known[1]

    def forget(self, layer: nn.Module) -> None:
        """Let go of what belongs to ``layer``."""
        self._known.pop(layer, None)


def own_tensors(layer: nn.Module) -> list[Tensor]:
    """Return a layer's own parameters and buffers, and those that parametrizations compute them from."""
    own = [t for table in (layer._parameters, layer._buffers) for t in table.values() if t is not None]
    for module in layer._modules.values():
        own += [*module.parameters(), *module.buffers()] if module is not None else []
    return own


def may_use_kernel(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer may be computed on ``x`` by a kernel that knows nothing of gradients and tracing.

    That is in eval mode, for ordinary float32 tensors on the CPU, where no gradient is wanted, and nobody records or
    transforms what is computed.
    """
    if layer.training or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # of torch.func: it may have wrapped the parameters
        return False
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or _has_gradient(layer)):
        for table in Derived.tables:
            table.forget(layer)  # it may be learning, in eval mode: the steps of fused optimizers do not show
        return False
    if forward_ad._current_level >= 0:  # derivatives that go forward do not ask for gradients
        return False
    if type(x) is Deferred:
        return True
    if torch._C._is_tracing():
        return False
    return type(x) is Tensor and x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0


def takes(layer: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a layer takes inputs of this shape: of others kernels do not say what is wrong, as torch's functions do.

    Args:
        layer: A compressed convolution or linear layer.
        shape: Shape of an input, batched or not.
    """
    if isinstance(layer, CompressedConv2d):
        fits = len(shape) in (3, 4) and shape[-3] == layer.in_channels
        return fits and min(layer.output_shape(shape)[-2:]) > 0
    assert isinstance(layer, CompressedLinear)
    return len(shape) > 0 and shape[-1] == layer.in_features


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor is a map in channels-last order and in no other."""
    # Not by is_contiguous(memory_format=...), which torch.func.vmap refuses.
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def _has_gradient(layer: nn.Module) -> bool:
    return any(tensor.requires_grad for tensor in own_tensors(layer))


def _stamps(layer: nn.Module) -> list[Stamp]:
    """Return by what changes of the layer's tensors show; nothing for tensors that do not show them."""
    tensors = own_tensors(layer)
    if any(tensor.is_inference() for tensor in tensors):
        return []
    return [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]


def _is_current(layer: nn.Module, stamps: list[Stamp]) -> bool:
    """Whether the layer has the same tensors as then, unchanged."""
    tensors = own_tensors(layer)
    if len(tensors) != len(stamps):
        return False
    for tensor, (known, version, place) in zip(tensors, stamps, strict=True):
        if tensor is not known or tensor._version != version or tensor.data_ptr() != place:
            return False
    return True
