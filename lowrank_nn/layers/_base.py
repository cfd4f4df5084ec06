"""The contract of every compressed layer.

A compressed layer looks like the dense layer it replaces (same constructor arguments, same shapes, ``weight`` and
``bias`` to read) and does its work through ordinary leaves that it owns (``nn.Conv2d``, ``nn.Linear``), so that
pruning and quantizing reach them with no code of their own. ``docs/write_your_own_layer.md`` walks through one.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lowrank_nn.accelerator import full_precision
from lowrank_nn.cost import Cost, conv_output_size, dense_cost, tensor_cost
from lowrank_nn.errors import LowRankError, UnsupportedLayerError

LAYERS: dict[str, type[CompressedLayer]] = {}
"""Every registered layer class by name: what save / load, the planner and the contract checks go through."""

LayerClass = TypeVar("LayerClass", bound="type[CompressedLayer]")


def register_layer(cls: LayerClass) -> LayerClass:
    """Class decorator that adds a layer to :data:`LAYERS`.

    Args:
        cls: The class, which is returned as it is.

    Raises:
        LowRankError: Another class is registered under this name.
    """
    known = LAYERS.setdefault(cls.__name__, cls)
    if known is not cls:
        raise LowRankError(
            f"{cls.__name__}: a layer of this name is registered already ({known.__module__}); rename yours."
        )
    return cls


@dataclasses.dataclass(frozen=True)
class Packing:
    """How ``save`` may store one of a layer's own tensors in fewer bytes than its dtype takes.

    Attributes:
        bits: Width that every entry of an integer tensor fits in: n entries take ceil(n * bits / 8) bytes.
        mask: Name of the layer's own bool tensor, of the same shape or one that broadcasts to it, that marks the
            entries that matter. The others are not stored and come back as zeros. The mask itself takes
            ceil(n / 8) bytes.
    """

    bits: int | None = None
    mask: str | None = None


class CompressedLayer(nn.Module, abc.ABC):
    """Base class of all compressed layers.

    Attributes:
        replaces: The dense class this layer stands in for.
        stacks_on: Compressed classes that may be its source too, and whose effect (zeros, grid) it keeps.
        main_options: The constructor arguments that a report shows, and ``repr`` at their defaults too.
        tables: Names of own parameters that say what stored integers stand for, such as a codebook: like scales they
            count among the bytes of a layer, and not among its params.
        rearranges: Whether what goes between the stages is rearranged, so that the channels of the last one are not
            those of the output.
    """

    replaces: ClassVar[type[nn.Module]]
    stacks_on: ClassVar[tuple[type[CompressedLayer], ...]] = ()
    main_options: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]] = ()
    rearranges: ClassVar[bool] = False

    from_pretrained_layer: ClassVar[Callable[..., CompressedLayer]]
    """The factory, ``from_pretrained_layer(layer, **options)``; every class has its own signature."""

    @classmethod
    @abc.abstractmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Options of an ordinary use on ``layer``: what contract checks, docs and benchmarks call it with."""

    @classmethod
    @abc.abstractmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """Options with which nothing of ``layer`` is lost, or None where the format always rounds."""

    @abc.abstractmethod
    def approximate_(self, weight: Tensor) -> None:
        """Set this layer's tensors so that :meth:`dense_weight` is as near to ``weight`` as its format allows.

        Args:
            weight: Tensor of the replaced layer's weight shape.
        """

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh weights whose equivalent dense weight has the variance of torch's default."""

    @abc.abstractmethod
    def dense_weight(self) -> Tensor:
        """Return the equivalent dense weight, in the replaced layer's shape; differentiable."""

    @abc.abstractmethod
    def stages(self) -> Iterator[nn.Module]:
        """Yield the leaves that do the work, in order; nothing where the layer is a leaf itself."""

    def stage_calls(self, input_shape: Sequence[int]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
        """Yield the stages, each with the shape of the input that it is called with.

        A layer that reshapes between its stages overrides this.

        Args:
            input_shape: Shape of the layer's own input, batched or not.
        """
        shape = tuple(input_shape)
        for stage in self.stages():
            yield stage, shape
            shape = layer_output_shape(stage, shape)

    @abc.abstractmethod
    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output for an input of shape ``input_shape``."""

    @abc.abstractmethod
    def dense_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of the dense layer of the same shape."""

    def resize_to_stages_(self) -> None:
        """Read sizes back from the stages, after channels of these were removed.

        Raises:
            UnsupportedLayerError: The layer has no stages, or the class does not say how.
        """
        raise UnsupportedLayerError(
            f"{type(self).__name__}: channels cannot be removed from a layer of this class. Leave it out "
            "(but_not=...), or remove channels before it is put in place."
        )

    def fill_buffers(self) -> None:
        """Fill the buffers that are never saved, as they follow from the configuration; most layers have none.

        Whoever gives a layer its memory otherwise than through the constructor calls it.
        """

    def packing(self) -> Mapping[str, Packing]:
        """Return how ``save`` stores own tensors, by name; those not named are stored whole.

        A layer whose tensors hold less than their dtype overrides this, and counts the same bytes in its cost.
        """
        return {}

    @property
    def weight(self) -> Tensor:
        """The equivalent dense weight, read-only: edits of it are lost."""
        return self.dense_weight()

    def cost(self, input_shape: Sequence[int]) -> Cost:
        """Return params, MACs, bytes and nonzeros of one call.

        Args:
            input_shape: Shape of the input, batched or not.
        """
        total = tensor_cost(self)
        for stage, shape in self.stage_calls(input_shape):
            total += layer_cost(stage, shape)
        return total

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON-able values: ``type(layer)(**config)`` is the empty layer."""
        names = inspect.signature(type(self)).parameters
        values = {name: getattr(self, name) for name in names if name not in ("device", "dtype", "bias")}
        return values | {"bias": self.bias is not None}

    @full_precision()
    def to_dense_layer(self) -> nn.Module:
        """Return an ordinary dense layer of the replaced class that computes the same; no memory is shared."""
        weight = self.dense_weight().detach()
        dense = self.replaces(**self.dense_arguments(), device="meta", dtype=weight.dtype)
        dense = dense.to_empty(device=weight.device)
        with torch.no_grad():
            for name, value in (("weight", weight), ("bias", self.bias)):
                if isinstance(value, Tensor):
                    dense.get_parameter(name).copy_(value)
        trainable = any(p.requires_grad for p in self.parameters())
        dense.requires_grad_(trainable)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Show the constructor's arguments: the main options, and what is not at its default."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        pairs = {name: (default, default) for name, default in defaults.items()}  # a stride of 1 is kept as (1, 1)
        shown = (
            f"{name}={value!r}"
            for name, value in self.config().items()
            if name in self.main_options or value not in (defaults[name], pairs[name])
        )
        return ", ".join(shown)

    @classmethod
    def empty(cls, *, device: torch.device | str | None, dtype: torch.dtype | None, **config: Any) -> Self:
        """Build a layer from its ``config`` with memory not yet filled; no random number is drawn."""
        with _NoDraws():
            new = cls(**config, device="meta", dtype=dtype)
        device = torch.device(device or "cpu")
        return new if device.type == "meta" else new.to_empty(device=device)


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are where an initialisation would fill them: on the meta device that is slow."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def layer_cost(layer: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Return the cost of one call of any leaf layer, compressed or dense."""
    return layer.cost(input_shape) if isinstance(layer, CompressedLayer) else dense_cost(layer, input_shape)


def layer_output_shape(layer: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the output shape of a compressed layer, an ``nn.Conv2d`` or an ``nn.Linear``."""
    if isinstance(layer, CompressedLayer):
        return layer.output_shape(input_shape)
    if isinstance(layer, nn.Linear):
        return (*input_shape[:-1], layer.out_features)
    assert isinstance(layer, nn.Conv2d)
    size = conv_output_size(input_shape[-2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (*input_shape[:-3], layer.out_channels, *size)
