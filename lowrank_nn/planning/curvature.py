"""The curvature of a network's output in the outputs of its layers, by random probes."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import first_shape, tensors
from lowrank_nn.planning.moments import LayerMoments

FILTER_SEED = 1_000_003  # added to the seed, so that filters and output directions have nothing in common

_logger = logging.getLogger(__name__)


class CurvatureProbes:
    r"""Estimates, for each layer, what a change of its weight does to the network's output.

    Let z be the network's output and v standard normal, drawn once per image. All floating-point tensors in the output
    count. Of a matrix (n, k) of logits a common shift means nothing, so there v has its mean over k removed (k > 1).
    A change Delta of a layer's weight changes v . z to first order by <Delta, G>, where, for one image,

    .. math:: G = \sum_s g_s (u_s - \mu)^T, \qquad g_s = \partial (v \cdot z) / \partial y_s

    sums over the layer's outputs y_s at all positions and calls. The curvature is

    .. math:: H = \tfrac12 (T + \kappa S), \quad T = E[G G^T] / \operatorname{tr} C, \quad S = E \sum_s g_s g_s^T,
              \quad \kappa = \operatorname{tr} T / \operatorname{tr} S

    T makes tr(H Delta C Delta^T) the expected squared change of z on average over changes Delta = a r^T with r of
    random direction, however much patches at neighbouring positions resemble each other. S would do so if they were
    uncorrelated, and independent of g (Grosse & Martens); it has by far less noise. So it gives half of the shape, and
    T the size. Of T only products G r with random r are needed: the sum of g times the layer's output with r for a
    weight.

    One forward and one backward of the whole network serve all layers; weights take no part in the backward. Memory:
    the graph of one batch, and 16 o^2 bytes per group and layer.

    Args:
        model: The network, inside :func:`lowrank_nn.graph.preserve.evaluating`.
        moments: The moments of each layer's inputs, which are to hold every batch before it is probed.
        max_features: Layers with more outputs per group are left out.
        seed: Seed of v and r, which are drawn on the CPU.

    Attributes:
        images: Images seen so far. A batch whose inputs and outputs differ in their first dim counts as one.

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent"; Grosse & Martens
        2016, "A Kronecker-factored approximate Fisher matrix for convolution layers".
    """

    def __init__(
        self, model: nn.Module, moments: Mapping[nn.Module, LayerMoments], max_features: int, seed: int
    ) -> None:
        self.images = 0
        self._model = model
        self._seed = seed
        self._generators: dict[int, torch.Generator] = {}
        self._sums = {
            layer: LayerCurvature(seen.layer, seen, seed)
            for layer, seen in moments.items()
            if _outputs(seen.layer) <= max_features
        }
        self._forwards = {layer: self._tapped(layer, sums) for layer, sums in self._sums.items()}
        self._anchors: list[Tensor] = []
        self._failed = False

    def probe(self, inputs: Any) -> None:
        """Take one batch into account; what cannot be differentiated is logged and left out.

        Args:
            inputs: What the model is called with; see :func:`lowrank_nn.graph.call_model`.
        """
        rows = (first_shape(inputs) or (1,))[0]
        for sums in self._sums.values():
            sums.begin(rows)
        try:
            with self._tapping():
                outputs = [t for t in _distinct(tensors(call_model(self._model, inputs))) if _has_gradient(t)]
                if outputs:
                    self.images += rows if outputs[0].shape[:1] == (rows,) else 1
                    directions = [self._direction(index, output) for index, output in enumerate(outputs)]
                    torch.autograd.grad(outputs, self._anchors, directions, allow_unused=True)
        except Exception as error:  # whatever a backward of the user's may raise: the metrics do without it
            if not self._failed:
                _logger.info("curvature: %s: %s. Layers ahead of it have none.", type(error).__name__, error)
            self._failed = True
        finally:
            self._anchors.clear()
        for sums in self._sums.values():
            sums.end()

    def curvature(self, layer: nn.Module) -> Tensor | None:
        """Return H of a layer, shape (groups, o, o); None where no finite gradient reached it."""
        return self._sums[layer].curvature(self.images) if layer in self._sums else None

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

    def _tapped(self, layer: nn.Module, sums: LayerCurvature) -> Callable[..., Any]:
        forward = layer.forward

        @functools.wraps(forward)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            x = next(tensors((args, kwargs)), None)
            output = forward(*args, **kwargs)
            if x is None or not isinstance(output, Tensor) or output.is_nested or not torch.is_grad_enabled():
                return output
            # A sum with something that needs a gradient needs one too, and may be changed in place, as a leaf may not.
            anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._anchors.append(anchor)
            output = output + anchor
            # Responses now, not in the backward: the network may change x in place.
            output.register_hook(functools.partial(sums.add, sums.respond(x.detach())))  # type: ignore[no-untyped-call]
            return output

        return tapped

    def _direction(self, index: int, output: Tensor) -> Tensor:
        """Draw v for one of the outputs, image by image: the same for every split of the images into batches."""
        generator = self._generators.setdefault(index, torch.Generator().manual_seed(self._seed + index))
        v = torch.empty(output.shape, dtype=torch.float32, device="cpu")
        for image in v:
            image.normal_(generator=generator)
        if output.dim() == 2 and output.shape[1] > 1:
            v -= v.mean(1, keepdim=True)
        return v.to(output)


class LayerCurvature:
    """The sums that the curvature of one layer is made of; see :class:`CurvatureProbes`.

    Args:
        layer: The layer.
        moments: The moments of its inputs.
        seed: Seed of the filters r.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, moments: LayerMoments, seed: int) -> None:
        self._layer = layer
        self._moments = moments
        self._generator = torch.Generator().manual_seed(seed + FILTER_SEED)
        self._rows = 1
        self._filters: Tensor | None = None
        self._products: list[Tensor] = []
        self._coherent: Tensor | None = None
        self._by_position: Tensor | None = None

    def begin(self, rows: int) -> None:
        """Start a batch with so many images; call :meth:`end` after it."""
        self._rows, self._filters = max(rows, 1), None
        self._products.clear()

    def respond(self, x: Tensor) -> Tensor:
        """Return r . (u - mu) for some random r at every position: (n, groups, filters, positions)."""
        mean = self._moments.mean()
        groups, x = len(mean), x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.no_grad():
            if self._filters is None:
                # A batch of 100 images gets 12, so that 1000 images get 120 at least.
                shape = (groups * min(64, max(8, self._rows // 8)), *_filter_shape(self._layer))
                self._filters = random_filters(shape, self._generator).to(x)
            offset = self._filters.reshape(groups, -1, mean.shape[1]) @ mean.to(x)[:, :, None]
            if isinstance(self._layer, nn.Conv2d):
                responses: Tensor = self._layer._conv_forward(x if x.dim() == 4 else x[None], self._filters, None)
                return responses.reshape(len(responses), groups, -1, responses[0, 0].numel()) - offset
            return (_tokens(x) @ self._filters.mT).mT[:, None] - offset

    def add(self, responses: Tensor, gradient: Tensor) -> None:
        """Take in the gradient at the outputs of one call."""
        wide = gradient.to(responses.dtype)
        if isinstance(self._layer, nn.Conv2d):
            g = wide.reshape(len(responses), responses.shape[1], -1, responses.shape[3])
        else:
            g = _tokens(wide).mT[:, None]
        self._products.append(g @ responses.mT)
        self._by_position = _plus_squares(self._by_position, g)

    def end(self) -> None:
        """Take in what the calls of a batch come to for each image."""
        totals: dict[int, Tensor] = {}
        for product in self._products:
            if len(product) % self._rows == 0:  # windows or tokens of the images, one image after another
                product = product.reshape(self._rows, -1, *product.shape[1:]).sum(1)
            totals[len(product)] = totals[len(product)] + product if len(product) in totals else product
        for total in totals.values():
            self._coherent = _plus_squares(self._coherent, total / total.shape[3] ** 0.5)
        self._products.clear()

    def curvature(self, images: int) -> Tensor | None:
        """Return H, or None where no finite gradient came."""
        if self._by_position is None or self._coherent is None:
            return None
        T = self._coherent / self._moments.total_variance()[:, None, None]
        S = self._by_position
        ratio = (_trace(T) / _trace(S)).nan_to_num(0.0)
        H = torch.where(torch.isfinite(T), (T + ratio * S) / 2, S) / images
        return H if bool(torch.isfinite(H).all()) else None


def random_filters(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return standard normal weights for :class:`LayerCurvature`."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _outputs(layer: nn.Conv2d | nn.Linear) -> int:
    """Return the number of outputs per group."""
    return layer.out_channels // layer.groups if isinstance(layer, nn.Conv2d) else layer.out_features


def _filter_shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, ...]:
    """Return the shape of the weights of one output."""
    if isinstance(layer, nn.Conv2d):
        return (layer.in_channels // layer.groups, *layer.kernel_size)
    return (layer.in_features,)


def _tokens(x: Tensor) -> Tensor:
    """Return what a linear layer takes or gives as (n, positions, features)."""
    return x.reshape(1 if x.dim() == 1 else len(x), -1, x.shape[-1])


def _plus_squares(total: Tensor | None, values: Tensor) -> Tensor:
    """Add the products of values (n, groups, o, m) with themselves, summed over n and m: (groups, o, o) in float64."""
    columns = values.permute(1, 2, 0, 3).flatten(2)
    squares = (columns @ columns.mT).double()
    return squares if total is None else total.add_(squares)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _has_gradient(output: Tensor) -> bool:
    return output.requires_grad and output.is_floating_point() and not output.is_nested and output.numel() > 0


def _distinct(values: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(value): value for value in values}.values()
