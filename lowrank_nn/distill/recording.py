"""Forward hooks that record what a layer returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.errors import UnsupportedLayerError


class Recorder:
    """Records every output of a layer, call by call, until they are taken.

    Outputs are cloned, so that operations in place after the layer (``relu_``, ``+=``) do not reach the record.
    A copy or a pickle of the layer does not carry the recorder along: a hook that does nothing stands in its place.

    Args:
        layer: The layer to listen to. A hook is registered on it until :meth:`remove`.
        keep_graph: True for a student: outputs keep their graph, and are recorded only while gradients are enabled.
            False for a teacher: outputs are detached, and recorded always.
    """

    def __init__(self, layer: nn.Module, *, keep_graph: bool) -> None:
        self.layer = layer
        self.active = True
        self._keep_graph = keep_graph
        self._outputs: list[Tensor] = []
        self._handle = layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Record one output; torch calls this after the layer's forward.

        Raises:
            UnsupportedLayerError: The output is neither a tensor nor a tuple or list that starts with one.
        """
        if not self.active or (self._keep_graph and not torch.is_grad_enabled()):
            return
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor):
            raise UnsupportedLayerError(
                f"feature tap: {type(layer).__name__} returned {type(output).__name__}, and a tap needs a "
                "tensor or a tuple that starts with one. Tap a layer inside it."
            )
        self._outputs.append(first.clone() if self._keep_graph else first.detach().clone())

    def take(self) -> list[Tensor]:
        """Return the recorded outputs in the order of the calls, and forget them."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def remove(self) -> None:
        """Take the hook off the layer and forget the outputs."""
        self._handle.remove()
        self._outputs = []

    def __reduce__(self) -> tuple[type[Removed], tuple[()]]:
        return Removed, ()


class Removed:
    """The hook that stands for a recorder in a copy of its layer; it does nothing."""

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Do nothing."""
