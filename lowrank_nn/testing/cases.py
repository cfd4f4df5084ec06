"""The dense layers that the contract is checked on: every awkward configuration that a model may hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One dense layer and the input it is called with.

    Attributes:
        name: Short name, unique in a list of cases.
        kind: Class of the dense layer; a compressed class is checked on the cases whose kind it replaces.
        arguments: Constructor arguments of the layer.
        input_shape: Shape of the input, batched or not.
        dtype: Dtype of the layer and of the input.
        training: Whether the layer is in training mode.
        frozen: Names of the parameters that do not train.
        channels_last: Whether weight and input are stored channels last.
        options: Options of the compressed class, in place of its usual ones.
    """

    name: str
    kind: type[nn.Module]
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    training: bool = True
    frozen: tuple[str, ...] = ()
    channels_last: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def layer(self) -> nn.Module:
        """Return the dense layer, the same weights every time; the global random state is not touched."""
        layer = self.kind(**self.arguments, device="meta", dtype=self.dtype).to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                fan_in = math.prod(parameter.shape[1:])
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
                parameter.copy_(draw / math.sqrt(fan_in))
                parameter.requires_grad_(name not in self.frozen)
        if self.channels_last:
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return layer.train(self.training)

    def input(self, *, batched: bool = False) -> Tensor:
        """Return the input, the same values every time; ``batched`` adds the batch dimension where it lacks."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.input_shape, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
        if batched and not self.is_batched:
            x = x.unsqueeze(0)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    @property
    def is_batched(self) -> bool:
        """Whether the input has a batch dimension."""
        layer_dims = 2 if self.kind is nn.Linear else len(self.layer().get_parameter("weight").shape)
        return len(self.input_shape) >= layer_dims


def _conv(
    name: str,
    channels: tuple[int, int] = (6, 8),
    kernel_size: int | tuple[int, int] = 3,
    input_size: tuple[int, ...] = (2, 6, 9, 7),
    **options: Any,
) -> Case:
    fields = {field.name for field in dataclasses.fields(Case)}
    of_case = {key: options.pop(key) for key in tuple(options) if key in fields}
    arguments = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": kernel_size, **options}
    return Case(f"conv_{name}", nn.Conv2d, arguments, input_size, **of_case)


def _linear(
    name: str,
    features: tuple[int, int] = (12, 9),
    input_shape: tuple[int, ...] = (5, 12),
    bias: bool = True,
    **of_case: Any,
) -> Case:
    arguments = {"in_features": features[0], "out_features": features[1], "bias": bias}
    return Case(f"linear_{name}", nn.Linear, arguments, input_shape, **of_case)


CASES: tuple[Case, ...] = (
    _conv("plain"),
    _conv("no_bias", bias=False),
    _conv("stride_pair", stride=(2, 1)),
    _conv("padding_pair", padding=(1, 2)),
    _conv("same", padding="same"),
    _conv("valid", padding="valid"),
    _conv("same_even_kernel", kernel_size=(2, 4), padding="same"),
    _conv("dilation_pair", dilation=(2, 1), padding=1),
    _conv("stride_padding_dilation", stride=(1, 3), padding=(2, 1), dilation=(1, 2)),
    _conv("pointwise", kernel_size=1),
    _conv("pointwise_stride", kernel_size=1, stride=2),
    _conv("five", kernel_size=5, padding=2),
    _conv("one_column", kernel_size=(3, 1), padding=(1, 0)),
    _conv("circular", padding=1, padding_mode="circular"),
    _conv("reflect", padding=(1, 2), padding_mode="reflect"),
    _conv("replicate", padding=2, stride=2, padding_mode="replicate"),
    _conv("same_dilated_reflect", padding="same", dilation=2, padding_mode="reflect"),
    _conv("groups", groups=2, padding=1),
    _conv("depthwise", channels=(6, 6), groups=6),
    _conv("depthwise_multiplier", channels=(6, 12), groups=6, stride=(1, 2)),
    _conv("one_channel_in", channels=(1, 8), input_size=(2, 1, 9, 7)),
    _conv("one_channel_out", channels=(6, 1)),
    _conv("unbatched", input_size=(6, 9, 7), padding=1),
    _conv("float64", dtype=torch.float64, padding=1),
    _conv("bfloat16", dtype=torch.bfloat16, padding=1),
    _conv("float16", dtype=torch.float16, padding=1),
    _conv("channels_last", channels_last=True, padding=1),
    _conv("eval", training=False),
    _conv("frozen", frozen=("weight", "bias")),
    _conv("frozen_bias", frozen=("bias",)),
    _linear("plain"),
    _linear("no_bias", bias=False),
    _linear("input_1d", input_shape=(12,)),
    _linear("input_3d", input_shape=(2, 3, 12)),
    _linear("one_output", features=(12, 1)),
    _linear("one_input", features=(1, 9), input_shape=(5, 1)),
    _linear("wide", features=(24, 3), input_shape=(5, 24)),
    _linear("tall", features=(3, 24), input_shape=(5, 3)),
    _linear("float64", dtype=torch.float64),
    _linear("bfloat16", dtype=torch.bfloat16),
    _linear("float16", dtype=torch.float16),
    _linear("eval", training=False),
    _linear("frozen", frozen=("weight", "bias")),
    _linear("frozen_bias", frozen=("bias",)),
)
"""The cases that :func:`lowrank_nn.testing.layer_checks` goes over."""
