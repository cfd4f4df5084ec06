"""The curvature of a network's output in the outputs of its layers, by random probes."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import first_shape, tensors

_logger = logging.getLogger(__name__)


class CurvatureProbes:
    r"""Estimates, for each layer, what changes of its output do to the network's output.

    .. math:: H = E_{images} \sum_{positions} g g^T, \qquad g = \partial (v \cdot z) / \partial y

    with z the network's output, y the layer's output at one position and v standard normal, drawn once per image.
    All floating-point tensors in the output count. Of a matrix (n, k) of logits a common shift means nothing, so there
    v has its mean over k removed (k > 1). Since E[v v^T] is the projection P that removes the mean (or the identity),
    H = E sum J^T P J with the Jacobian J = dz/dy: the Gauss-Newton matrix of the squared error of the output.

    One forward and one backward of the whole network serve all layers; weights take no part in the backward. Memory:
    the graph of one batch, and o x o float64 per group and layer.

    Args:
        model: The network, inside :func:`lowrank_nn.graph.preserve.evaluating`.
        layers: Convolutions and linear layers in it.
        max_features: Layers with more outputs per group are left out.
        seed: Seed of v, which is drawn on the CPU.

    Attributes:
        images: Images seen so far. A batch whose inputs and outputs differ in their first dim counts as one.

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent"; Grosse & Martens
        2016, "A Kronecker-factored approximate Fisher matrix for convolution layers", for the sum over positions.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Conv2d | nn.Linear], max_features: int, seed: int) -> None:
        self.images = 0
        self._model = model
        self._seed = seed
        self._generators: dict[int, torch.Generator] = {}
        self._sums: dict[nn.Module, Tensor] = {}
        self._anchors: list[Tensor] = []
        self._forwards = {layer: self._tapped(layer) for layer in layers if _outputs(layer) <= max_features}
        self._failed = False

    def probe(self, inputs: Any) -> None:
        """Take one batch into account; what cannot be differentiated is logged and left out.

        Args:
            inputs: What the model is called with; see :func:`lowrank_nn.graph.call_model`.
        """
        try:
            with self._tapping():
                outputs = [t for t in _distinct(tensors(call_model(self._model, inputs))) if _has_gradient(t)]
                self._backward(inputs, outputs)
        except Exception as error:  # whatever a backward of the user's may raise: the statistics do without it
            if not self._failed:
                _logger.info("curvature: %s: %s. Layers ahead of it have none.", type(error).__name__, error)
            self._failed = True
        finally:
            self._anchors.clear()

    def curvature(self, layer: nn.Module) -> Tensor | None:
        """Return H of a layer, shape (groups, o, o); None where no finite gradient reached it."""
        total = self._sums.get(layer)
        if total is None or not bool(torch.isfinite(total).all()):
            return None
        return total / self.images

    @contextlib.contextmanager
    def _tapping(self) -> Iterator[None]:
        """Run the block with gradients for the outputs of the layers, and for nothing else."""
        own = {layer: layer.forward for layer in self._forwards}
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            for layer, forward in self._forwards.items():
                vars(layer)["forward"] = forward
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of gradients that the user never asked for
                yield
        finally:
            for layer, forward in own.items():
                vars(layer)["forward"] = forward
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _tapped(self, layer: nn.Conv2d | nn.Linear) -> Callable[..., Any]:
        forward, add = layer.forward, functools.partial(self._add, layer)

        @functools.wraps(forward)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return output
            # A sum with something that needs a gradient needs one too, and may be changed in place, as a leaf may not.
            anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._anchors.append(anchor)
            output = output + anchor
            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        return tapped

    def _backward(self, inputs: Any, outputs: list[Tensor]) -> None:
        if not outputs:
            return
        images = first_shape(inputs)[:1]
        self.images += images[0] if images and images == tuple(outputs[0].shape[:1]) else 1
        directions = [self._direction(index, output) for index, output in enumerate(outputs)]
        torch.autograd.grad(outputs, self._anchors, directions, allow_unused=True)

    def _direction(self, index: int, output: Tensor) -> Tensor:
        """Draw v for one of the outputs, image by image: the same for every split of the images into batches."""
        generator = self._generators.setdefault(index, torch.Generator().manual_seed(self._seed + index))
        shape = output.shape[1:]
        v = torch.stack([torch.randn(shape, generator=generator) for _ in range(len(output))])
        if output.dim() == 2 and output.shape[1] > 1:
            v -= v.mean(1, keepdim=True)
        return v.to(output)

    def _add(self, layer: nn.Conv2d | nn.Linear, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if isinstance(layer, nn.Conv2d):
            rows = wide.reshape(-1, layer.groups, _outputs(layer), wide.shape[-2] * wide.shape[-1])
            columns = rows.permute(1, 2, 0, 3).flatten(2)
        else:
            columns = wide.reshape(-1, layer.out_features).mT[None]
        product = (columns @ columns.mT).double()
        self._sums[layer] = self._sums[layer].add_(product) if layer in self._sums else product


def _outputs(layer: nn.Conv2d | nn.Linear) -> int:
    """Return the number of outputs per group."""
    return layer.out_channels // layer.groups if isinstance(layer, nn.Conv2d) else layer.out_features


def _has_gradient(output: Tensor) -> bool:
    return output.requires_grad and output.is_floating_point() and not output.is_nested and output.numel() > 0


def _distinct(values: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(value): value for value in values}.values()
