"""Layers whose weights are few different numbers: a codebook, and an index of a few bits for each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lowrank_nn.cost import Cost
from lowrank_nn.decompose import kmeans_1d, nearest_centroid
from lowrank_nn.decompose.kmeans import Init
from lowrank_nn.errors import check_whole_number
from lowrank_nn.layers._base import Packing, register_layer
from lowrank_nn.layers._leaf import LeafLayer
from lowrank_nn.layers._masks import checked_fisher, draw_mask_, empty_mask
from lowrank_nn.layers._pruned import PrunedLayer, sparsity_options
from lowrank_nn.layers._shapes import CompressedConv2d, CompressedLinear, PaddingMode, Size, draw_bias_
from lowrank_nn.layers._shared import look_up
from lowrank_nn.layers._source import read_layer
from lowrank_nn.layers._window import Window, check_window, crop_window, embed_window
from lowrank_nn.layers.pruned import PrunedConv2d, PrunedLinear


class CodebookLayer(LeafLayer):
    """Base of the layers with a codebook: the weight is ``codebook[indices]``, and zero where a mask says so.

    Attributes:
        bits: Bits per index; the codebook has 2^bits entries.
        window: Place of the stored kernel in the dense weight, or None where it is all of it.
        nonzeros: Entries of the stored kernel that the mask keeps, or None where there is no mask.
        codebook: The centroids, a parameter, shape ``(2 ** bits,)``.
        indices: uint8 buffer of the stored kernel's shape; 0 where the mask is not set.
        mask: Bool buffer of that shape: which entries are not held at zero; or None.
    """

    main_options = ("bits",)
    tables = ("codebook",)

    codebook: nn.Parameter
    indices: Tensor
    mask: Tensor | None
    window: Window | None = None

    def _set_up(self, shape: tuple[int, ...], bias: bool, bits: int, nonzeros: int | None, **factory: Any) -> None:
        """Check the options and create the tensors; ``shape`` is that of the stored kernel."""
        name = type(self).__name__
        self.bits = check_whole_number(f"{name}: bits", bits, 1, 8)
        self.nonzeros = nonzeros
        self.codebook = nn.Parameter(torch.empty(2**bits, **factory))
        self.bias = nn.Parameter(torch.empty(shape[0], **factory)) if bias else None
        self.register_buffer("indices", torch.zeros(shape, dtype=torch.uint8, device=self.codebook.device))
        # Where there is no mask it is a plain attribute: torch.export (2.13) mixes up names where a buffer is None.
        if nonzeros is None:
            self.mask = None
        else:
            self.register_buffer("mask", empty_mask(name, shape, nonzeros, self.codebook.device))
        self.reset_parameters()

    @classmethod
    def from_pretrained_layer(
        cls,
        layer: nn.Module,
        *,
        bits: int = 4,
        init: Init = "optimal",
        fisher: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        r"""Build the layer from ``layer``, each weight replaced by the nearest of 2^bits centroids.

        The centroids make the squared change of the weights small (:func:`lowrank_nn.decompose.kmeans_1d`). On a
        pruned layer only the weights that are left are clustered: zeros stay exactly zero and take no index, and a
        kernel stored as a window stays the smaller one.

        Args:
            layer: A trained dense layer of the class replaced, or the pruned layer of that kind; not changed.
            bits: Bits per index, 1 to 8.
            init: ``"optimal"``, the least squared change; or where k-means starts from: ``"linear"``, evenly spaced
                values, which keeps large weights best (the choice of Han et al.), ``"density"`` or ``"random"``.
            fisher: Diagonal Fisher information F of each scalar of the dense weight, from
                :func:`lowrank_nn.planning.diagonal_fisher`: sum F (w - c)^2 is made small in place of the plain
                squares.
            seed: Seed of ``"random"``.

        Raises:
            UnsupportedLayerError: The layer cannot be carried over whole.
            OptionError: An option has a value that is not allowed.
            CalibrationError: ``fisher`` is of another shape, negative or not finite.
        """
        source = read_layer(layer, cls)
        new = source.empty(cls, bits=bits, **sparsity_options(layer))
        if new.mask is not None:
            assert isinstance(layer, PrunedLayer)
            new.mask.copy_(layer.mask)
        importance = None if fisher is None else checked_fisher(cls.__name__, fisher, source.weight)
        new._fit_(source.weight, init, importance, seed)
        return source.finish(new)

    @classmethod
    def usual_options(cls, layer: nn.Module) -> dict[str, Any]:
        """Indices of 4 bits."""
        return {"bits": 4}

    @classmethod
    def lossless_options(cls, layer: nn.Module) -> dict[str, Any] | None:
        """None: weights are always changed."""
        return None

    def approximate_(self, weight: Tensor) -> None:
        """Set codebook and indices to the nearest weight; masked entries stay zero."""
        self._fit_(weight)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each weight from 2^bits evenly spaced values of the variance of torch's default; the mask stays."""
        if self.mask is not None and self.nonzeros is not None:
            draw_mask_(self.mask, self.nonzeros)
        if not self.indices.is_meta:
            self.indices.copy_(self._masked(torch.randint_like(self.indices, 2**self.bits)))
            levels = torch.arange(2**self.bits, dtype=torch.float32, device=self.codebook.device)
            levels -= (2**self.bits - 1) / 2
            self.codebook.copy_(levels / (levels.square().mean() * 3 * self.fan_in).sqrt())
        draw_bias_(self.bias, self.fan_in)

    def stored_weight(self) -> Tensor:
        """Return the weight of the stored kernel's shape; differentiable."""
        kernel = look_up(self.codebook, self.indices)
        return kernel if self.mask is None else torch.where(self.mask, kernel, 0)

    def packing(self) -> Mapping[str, Packing]:
        """Store indices in the bits they need, and none of what a mask drops."""
        return {"indices": Packing(self.bits, None if self.mask is None else "mask")}

    def stored_cost(self) -> Cost:
        """Return params, bytes and nonzeros of the weight, and its MACs at one position of the output.

        ``params`` counts the weights, whatever their bits. ``bytes`` is what a file takes: ceil(n bits / 8) for n
        indices, the codebook, and with a mask the kept indices and ceil(n / 8) for the mask. The MACs are those of
        the stored kernel, which is put together anew in each forward.
        """
        stored = self.indices.numel()
        kept = stored if self.nonzeros is None else self.nonzeros
        size = -(-kept * self.bits // 8) + self.codebook.numel() * self.codebook.element_size()
        size += 0 if self.mask is None else -(-stored // 8)
        return Cost(params=stored, macs=stored, bytes=size, nonzeros=kept)

    @torch.no_grad()
    def _fit_(self, weight: Tensor, init: Init = "optimal", fisher: Tensor | None = None, seed: int = 0) -> None:
        if weight.is_meta:
            return
        kernel = crop_window(weight, self.window)
        importance = None if fisher is None else self._kept(crop_window(fisher, self.window))
        values = self._kept(kernel)
        self.codebook.copy_(kmeans_1d(values, 2**self.bits, weights=importance, init=init, seed=seed))
        self.indices.copy_(self._masked(nearest_centroid(kernel, self.codebook)))

    def _kept(self, kernel: Tensor) -> Tensor:
        return kernel if self.mask is None else kernel[self.mask]

    def _masked(self, indices: Tensor) -> Tensor:
        return indices if self.mask is None else torch.where(self.mask, indices, 0)


@register_layer
class CodebookConv2d(CompressedConv2d, CodebookLayer):
    r"""``nn.Conv2d`` whose weights are 2^bits different numbers: W = codebook[indices].

    The codebook trains, the indices stay: the gradient of a centroid is the sum of the gradients of its weights.
    Built by its constructor the layer has random indices and trains from scratch, like a hashed layer whose hash is
    stored. ``forward`` puts the weight together and convolves in floating point: the layer is smaller, not faster.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding: int, pair, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's taps.
        groups: Number of blocked connections.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bits: Bits per index, 1 to 8.
        window: (top, left, height, width) of the rectangle of the kernel that is stored, the rest being zero.
        nonzeros: Entries of the stored kernel that a mask keeps; None for no mask.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``
        - Output: ``(N, out_channels, H', W')`` or ``(out_channels, H', W')``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Han, Mao, Dally 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization
        and Huffman Coding".
    """

    stacks_on = (PrunedConv2d,)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        bits: int = 4,
        window: Sequence[int] | None = None,
        nonzeros: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        self.window = check_window(type(self).__name__, window, self.kernel_size)
        size = self.kernel_size if self.window is None else self.window[2:]
        self._set_up((*self.weight_shape[:2], *size), bias, bits, nonzeros, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""
        return self.convolve(input, self.stored_weight(), self.bias, self.window)

    def dense_weight(self) -> Tensor:
        """Return codebook[indices], shape ``(out_channels, in_channels / groups, kh, kw)``."""
        return embed_window(self.stored_weight(), self.window, self.kernel_size)


@register_layer
class CodebookLinear(CompressedLinear, CodebookLayer):
    r"""``nn.Linear`` whose weights are 2^bits different numbers: y = codebook[indices] x + b.

    Training and storage are those of :class:`CodebookConv2d`.

    Args:
        in_features: Size of each input sample.
        out_features: Size of each output sample.
        bias: Whether to add a learnable bias.
        bits: Bits per index, 1 to 8.
        nonzeros: Entries of the weight that a mask keeps; None for no mask.
        device: Device of the tensors.
        dtype: Dtype of the parameters.

    Shape:
        - Input: ``(*, in_features)``
        - Output: ``(*, out_features)``

    Raises:
        OptionError: An option has a value that is not allowed.

    References:
        Han, Mao, Dally 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization
        and Huffman Coding".
    """

    stacks_on = (PrunedLinear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        nonzeros: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self._set_up(self.weight_shape, bias, bits, nonzeros, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the shared weights: ``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, self.stored_weight(), self.bias)

    def dense_weight(self) -> Tensor:
        """Return codebook[indices], shape ``(out_features, in_features)``."""
        return self.stored_weight()
