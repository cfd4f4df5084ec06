"""Convolutions whose stored kernel covers only a rectangle of the dense kernel, the rest being zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lowrank_nn.errors import OptionError

Window = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle of kernel positions."""

Pads = tuple[int, int, int, int]
"""Columns and rows around a map: left, right, top, bottom, in the order of ``F.pad``."""


def check_window(name: str, window: Sequence[int] | None, kernel_size: tuple[int, int]) -> Window | None:
    """Return ``window`` as a tuple of ints, or None where it is None or covers the whole kernel.

    Args:
        name: Class that the message names.
        window: (top, left, height, width) in the dense kernel.
        kernel_size: Height and width of the dense kernel.

    Raises:
        OptionError: It is not a rectangle inside the kernel.
    """
    if window is None:
        return None
    entries = tuple(window)
    whole = len(entries) == 4 and all(isinstance(v, int) and not isinstance(v, bool) for v in entries)
    if not whole or not _fits(entries, kernel_size):
        raise OptionError(
            f"{name}: window must be (top, left, height, width) of a rectangle inside the {kernel_size[0]}x"
            f"{kernel_size[1]} kernel, got {window!r}. Pass None to store the whole kernel."
        )
    top, left, height, width = entries
    return None if (height, width) == kernel_size else (top, left, height, width)


def _fits(window: tuple[int, ...], kernel_size: tuple[int, int]) -> bool:
    starts, lengths = window[:2], window[2:]
    return all(s >= 0 and n >= 1 and s + n <= k for s, n, k in zip(starts, lengths, kernel_size, strict=True))


def embed_window(kernel: Tensor, window: Window | None, kernel_size: tuple[int, int]) -> Tensor:
    """Return the dense kernel: ``kernel`` at its place, zeros around it; differentiable.

    Args:
        kernel: Stored kernel, ``(out_channels, in_channels / groups, height, width)``.
        window: Its place in the dense kernel; None where it is the dense kernel.
        kernel_size: Height and width of the dense kernel.
    """
    if window is None:
        return kernel
    top, left, height, width = window
    return F.pad(kernel, (left, kernel_size[1] - left - width, top, kernel_size[0] - top - height))


def crop_window(weight: Tensor, window: Window | None) -> Tensor:
    """Return the part of a dense kernel (last two dims: positions) that lies in ``window``; a view."""
    if window is None:
        return weight
    top, left, height, width = window
    return weight[..., top : top + height, left : left + width]


def explicit_padding(kernel_size: tuple[int, int], padding: str | tuple[int, int], dilation: tuple[int, int]) -> Pads:
    """Return the rows and columns that ``padding`` adds: (left, right, top, bottom), in the order of ``F.pad``.

    ``"same"`` adds dilation * (k - 1) in all, the odd one at the right or bottom, as torch does.
    """
    pads: list[int] = []
    for dim in (1, 0):
        total = dilation[dim] * (kernel_size[dim] - 1)
        if padding == "same":
            pads += (total // 2, total - total // 2)
        else:
            pads += (0, 0) if isinstance(padding, str) else (padding[dim], padding[dim])
    return (pads[0], pads[1], pads[2], pads[3])


def window_padding(
    window: Window, kernel_size: tuple[int, int], padding: str | tuple[int, int], dilation: tuple[int, int]
) -> Pads:
    """Return the padding (left, right, top, bottom) with which the smaller convolution equals the dense one.

    The taps before the window start dilation * top rows further down, those behind it end dilation * (kh - top -
    height) rows further up, so that much less padding is needed; a negative number means rows or columns to cut off.
    The output has the dense convolution's size for every stride, since padding and reach shrink alike.
    """
    top, left, height, width = window
    pads = explicit_padding(kernel_size, padding, dilation)
    unused = (left, kernel_size[1] - left - width, top, kernel_size[0] - top - height)
    steps = (dilation[1], dilation[1], dilation[0], dilation[0])
    needed = [p - d * n for p, d, n in zip(pads, steps, unused, strict=True)]
    return (needed[0], needed[1], needed[2], needed[3])


def windowed_conv2d(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    *,
    window: Window | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: str | tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """Convolve as ``nn.Conv2d`` would with the dense kernel ``embed_window(kernel, window, kernel_size)``.

    Args:
        x: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        kernel: The stored part of the kernel, ``(out_channels, in_channels / groups, height, width)``.
        bias: ``(out_channels,)`` or None.
        window: Place of the stored part in the dense kernel; None where it is all of it.
        kernel_size: Height and width of the dense kernel.
        stride: Stride of the dense convolution.
        padding: Its padding: a pair, ``"same"`` or ``"valid"``.
        dilation: Its dilation.
        groups: Its groups.
        padding_mode: Its padding mode.

    Returns:
        ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``; computed by the smaller convolution.
    """
    if window is None or window[2:] == kernel_size:
        if padding_mode == "zeros":
            return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
        pads = explicit_padding(kernel_size, padding, dilation)
        return F.conv2d(F.pad(x, pads, mode=padding_mode), kernel, bias, stride, 0, dilation, groups)
    left, right, top, bottom = window_padding(window, kernel_size, padding, dilation)
    if padding_mode == "zeros" and left == right >= 0 and top == bottom >= 0:
        return F.conv2d(x, kernel, bias, stride, (top, left), dilation, groups)
    x = pad_and_crop(x, (left, right, top, bottom), "constant" if padding_mode == "zeros" else padding_mode)
    return F.conv2d(x, kernel, bias, stride, 0, dilation, groups)


def pad_and_crop(x: Tensor, pads: Pads, mode: str, value: int | None = None) -> Tensor:
    """Pad ``x`` by ``pads``, where negative numbers cut off; ``mode`` as for ``F.pad``, ``value`` for "constant"."""
    # Grow first: what is cut off on one side may be more than there was before the other side grew.
    grow = [max(p, 0) for p in pads]
    if any(grow):
        x = F.pad(x, grow, mode=mode, value=value if mode == "constant" else None)
    if min(pads) >= 0:
        return x
    left, right, top, bottom = (max(-p, 0) for p in pads)
    # narrow() refuses a negative length, which an input smaller than the kernel gives; slices would wrap around.
    return x.narrow(-2, top, x.shape[-2] - top - bottom).narrow(-1, left, x.shape[-1] - left - right)
