"""Reading all of a trained layer, or refusing it: the first and last lines of every ``from_pretrained_layer``."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowrank_nn.decompose import Metric
from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.layers._base import CompressedLayer
from lowrank_nn.layers._packed import is_channels_last

AnyCompressed = TypeVar("AnyCompressed", bound=CompressedLayer)

CONV_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
LINEAR_ARGUMENTS = ("in_features", "out_features")


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a trained layer is, apart from its class.

    Attributes:
        layer: The layer itself; never changed.
        weight: Its dense weight, detached.
        bias: Its bias, detached, or None.
        arguments: The dense constructor arguments (geometry, bias) that a replacement takes over.
    """

    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    arguments: dict[str, Any]

    def empty(self, cls: type[AnyCompressed], **options: Any) -> AnyCompressed:
        """Build ``cls`` with this layer's shape, device and dtype, its memory not yet filled."""
        return cls.empty(device=self.weight.device, dtype=self.weight.dtype, **self.arguments, **options)

    @torch.no_grad()
    def copy_bias_to(self, new: CompressedLayer) -> None:
        """Give ``new`` the bias of this layer, for weights that are chosen by it; :meth:`finish` does so too."""
        if self.bias is not None:
            assert isinstance(new.bias, nn.Parameter)
            new.bias.copy_(self.bias)

    def seen_by(self, metric: Metric | None) -> Metric | None:
        """Return the metric that the weight is fitted under: without a bias a change of the mean output is an error.

        Raises:
            OptionError: The metric is of a layer of another shape, or none at all.
        """
        if metric is None:
            return None
        groups = self.arguments.get("groups", 1)
        shape = (groups, len(self.weight) // groups, self.weight[0].numel())
        if not (isinstance(metric, Metric) and metric.fits(*shape)):
            raise OptionError(
                f"{type(self.layer).__name__}: the metric must be one of this layer, finite, of {shape[0]} groups with "
                f"{shape[1]} outputs and {shape[2]} inputs each. Collect it with lowrank_nn.planning.collect_metrics."
            )
        return metric if self.bias is not None else metric.with_mean()

    def finish(self, new: AnyCompressed, metric: Metric | None = None) -> AnyCompressed:
        """Give ``new`` the bias, memory format, train/eval mode and requires_grad flags of this layer.

        With a metric the bias also takes up the change of the mean output.
        """
        weight_trains, bias_trains = _trains(self.layer, "weight"), _trains(self.layer, "bias")
        new.requires_grad_(weight_trains)
        self.copy_bias_to(new)
        if self.bias is not None:
            assert isinstance(new.bias, nn.Parameter)
            if metric is not None and not new.bias.is_meta:
                with torch.no_grad():
                    new.bias.add_(metric.mean_output(self.weight - new.dense_weight()).to(new.bias.device))
            new.bias.requires_grad_(bias_trains)
        if is_channels_last(self.weight):
            new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return new.train(self.layer.training)


def read_layer(layer: nn.Module, cls: type[CompressedLayer]) -> Source:
    """Read every attribute of ``layer`` that ``cls`` must carry over.

    Args:
        layer: A dense layer of class ``cls.replaces``, or one of the compressed classes in ``cls.stacks_on``.
        cls: The compressed class it is to become.

    Raises:
        UnsupportedLayerError: The layer is of another class, changes how its weight or forward works
            (parametrization, weight norm, overridden forward), or holds a weight that is not finite or not float.
    """
    if isinstance(layer, CompressedLayer):
        _refuse_unstackable(layer, cls)
        source = Source(layer, layer.dense_weight().detach(), _bias(layer), layer.dense_arguments())
    else:
        _refuse_foreign(layer, cls)
        _refuse_altered(layer, cls)
        names = CONV_ARGUMENTS if isinstance(layer, nn.Conv2d) else LINEAR_ARGUMENTS
        arguments = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
        assert isinstance(layer.weight, Tensor)
        source = Source(layer, layer.weight.detach(), _bias(layer), arguments)
    _refuse_bad_values(source.weight, cls)
    return source


def _bias(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _trains(layer: nn.Module, name: str) -> bool:
    """Whether the layer trains: its own parameter where it has one, any parameter of a factorised one."""
    own = layer._parameters.get(name)
    if own is not None:
        return own.requires_grad
    return any(p.requires_grad for p in layer.parameters() if p is not layer.bias)


def _refuse_unstackable(layer: CompressedLayer, cls: type[CompressedLayer]) -> None:
    if not isinstance(layer, cls.stacks_on):
        takes = " or ".join([cls.replaces.__name__, *(c.__name__ for c in cls.stacks_on)])
        raise UnsupportedLayerError(
            f"{cls.__name__}: the layer is a {type(layer).__name__} already, expected {takes}. "
            "Put low-rank steps first, then pruning, then quantization; or compress the layers inside it."
        )


def _refuse_foreign(layer: nn.Module, cls: type[CompressedLayer]) -> None:
    dense = cls.replaces
    if not isinstance(layer, dense):
        raise UnsupportedLayerError(
            f"{cls.__name__}: expected an nn.{dense.__name__}, got {type(layer).__name__}. "
            "Choose the compressed class that fits the layer."
        )
    if isinstance(layer._parameters.get("weight"), nn.parameter.UninitializedParameter):
        raise UnsupportedLayerError(
            f"{cls.__name__}: {type(layer).__name__} has no weight yet. Run the model once before compressing it."
        )


def _refuse_altered(layer: nn.Module, cls: type[CompressedLayer]) -> None:
    name, dense = type(layer).__name__, cls.replaces
    if parametrize.is_parametrized(layer):
        raise UnsupportedLayerError(
            f"{cls.__name__}: {name} has a parametrized weight, which would be lost. Call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first."
        )
    if "weight" not in layer._parameters:
        raise UnsupportedLayerError(
            f"{cls.__name__}: the weight of {name} is computed before each call (weight_norm, spectral_norm or "
            "torch.nn.utils.prune), which would be lost. Make it permanent first: remove_weight_norm, "
            "remove_spectral_norm or prune.remove(layer, 'weight')."
        )
    for method in ("forward", "_conv_forward"):
        own = getattr(type(layer), method, None)
        if own is not getattr(dense, method, None) or method in vars(layer):
            raise UnsupportedLayerError(
                f"{cls.__name__}: {name} overrides nn.{dense.__name__}.{method}, which would be lost. Keep the layer "
                "dense (but_not=...), or turn it into a plain layer first."
            )


def _refuse_bad_values(weight: Tensor, cls: type[CompressedLayer]) -> None:
    if not weight.is_floating_point():
        raise UnsupportedLayerError(f"{cls.__name__}: expected a real floating-point weight, got {weight.dtype}.")
    if weight.numel() == 0:
        raise UnsupportedLayerError(f"{cls.__name__}: the weight is empty, shape {tuple(weight.shape)}.")
    if not weight.is_meta and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise UnsupportedLayerError(
            f"{cls.__name__}: the weight holds NaN or infinite values. Look for the diverged training or the damaged "
            "checkpoint that they come from."
        )
