"""The trainable regressor of FitNets' hints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowrank_nn.distill.features import resolve_channel_dim
from lowrank_nn.errors import OptionError

WIDTH_ATTRIBUTES = ("out_channels", "out_features", "num_features", "embed_dim")
"""Where a layer says how many channels its output has, in order of preference."""


class HintRegressor(nn.Module):
    """A linear map of the channels at every position: on images a 1x1 convolution with bias.

    Starts from a fixed draw with the bounds of ``nn.Linear``; the global random state is not used.

    Args:
        in_channels: The student's width.
        out_channels: The teacher's width.
        channel_dim: Dimension of the channels. None: 1 for four dimensions or more, else the last.
        device: Where the parameters are.
        dtype: Their dtype; None is float32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channel_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        generator = torch.Generator("cpu").manual_seed(0)
        bound = 1 / math.sqrt(in_channels)
        drawn = (
            torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            for shape in ((out_channels, in_channels), (out_channels,))
        )
        self.weight, self.bias = (nn.Parameter(values.to(device, dtype)) for values in drawn)

    def forward(self, features: Tensor) -> Tensor:
        """Map the student's features to the teacher's width.

        Args:
            features: Features with ``in_channels`` channels.

        Returns:
            Features of the same shape, but with ``out_channels`` channels, in the parameters' dtype.

        Raises:
            OptionError: The features have another number of channels.
        """
        dim = resolve_channel_dim(features, self.channel_dim)
        in_channels = self.weight.shape[1]
        if features.shape[dim] != in_channels:
            raise OptionError(
                f"hint: the regressor expects {in_channels} channels in dimension {dim}, got features of shape "
                f"{tuple(features.shape)}. Pass widths=(student, teacher) or channel_dim."
            )
        moved = features.to(self.weight.dtype).movedim(dim, -1)
        return nn.functional.linear(moved, self.weight, self.bias).movedim(-1, dim)

    def extra_repr(self) -> str:
        """Show the widths."""
        return f"in_channels={self.weight.shape[1]}, out_channels={self.weight.shape[0]}"


def output_width(layer: nn.Module) -> int:
    """Return the number of channels of a layer's output, as its attributes state it.

    Raises:
        OptionError: The layer does not state it.
    """
    for name in WIDTH_ATTRIBUTES:
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    raise OptionError(
        f"hint: {type(layer).__name__} does not state the width of its output (none of {', '.join(WIDTH_ATTRIBUTES)}). "
        "Pass widths=(student, teacher)."
    )
