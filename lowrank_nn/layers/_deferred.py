"""Tensors that are computed when it is known in which form they are wanted.

A quantized layer that hands its output to other quantized layers would compute floats that the next layer rounds to
bytes again. Instead it can return a :class:`Deferred` tensor: a ``torch.Tensor`` that knows how to compute itself. What
follows in the user's own code (a ReLU, the addition of a shortcut, a max-pooling) is noted; the next quantized layer
asks for bytes on its own grid, and one kernel computes all of it. Any other function gets ordinary floats, so a
deferred tensor is right wherever it goes, and fast where it stays among quantized layers.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank_nn.layers._onednn import NONE, Activation, CodeGrid, PackedWeight, decode, encode

RELU: Activation = ("relu", ())
RELU6: Activation = ("hardtanh", (0.0, 6.0))
HARDSWISH: Activation = ("hardswish", ())
SILU: Activation = ("swish", ())

_MONOTONE = (RELU, RELU6)  # these commute with the maximum
_UNIT = CodeGrid(1.0, 0, 255)


class Source(abc.ABC):
    """How a tensor comes about, and its bytes once somebody asked for them.

    Attributes:
        shape: Shape of the tensor.
        channels_last: Memory format in which its floats are wanted.
        grid: What the bytes stand for; None as long as there are none.
        makers: Weights of the layers whose output this is, activated, pooled or joined.
    """

    def __init__(self, shape: tuple[int, ...], channels_last: bool, makers: tuple[PackedWeight, ...]) -> None:
        self.shape, self.channels_last, self.makers = shape, channels_last, makers
        self.grid: CodeGrid | None = None
        self._codes: Tensor | None = None

    def codes(self, grid: CodeGrid) -> Tensor:
        """Return the tensor as bytes on ``grid``; not to be changed in place."""
        if self._codes is None:
            self._codes, self.grid = self.compute(grid), grid
            self.release()
        if grid == self.grid:
            return self._codes
        return encode(self.values(), grid)

    def values(self) -> Tensor:
        """Return the tensor as new floats. Where there are bytes, what they stand for."""
        if self._codes is None:
            return self.compute(None)
        assert self.grid is not None
        return decode(self._codes, self.grid)

    @abc.abstractmethod
    def compute(self, grid: CodeGrid | None) -> Tensor:
        """Compute the bytes on ``grid``, or, without one, the floats."""

    @abc.abstractmethod
    def release(self) -> None:
        """Let go of what was needed to compute: the bytes are there."""

    def activated(self, activation: Activation) -> Source | None:
        """Return this tensor with ``activation`` applied, or None where no kernel does it."""
        return None

    def plus(self, other: Source) -> Source | None:
        """Return the sum of this tensor and another one of its shape, or None where no kernel does it."""
        return None


class Product(Source):
    """A convolution or a matrix product, what is added to it, and the activation of that."""

    def __init__(
        self,
        weight: PackedWeight,
        codes: Tensor,
        shape: tuple[int, ...],
        channels_last: bool,
        added: Source | None = None,
        activation: Activation = NONE,
    ) -> None:
        super().__init__(shape, channels_last, (weight,))
        self._weight, self._input = weight, codes
        self._added, self._activation = added, activation

    def compute(self, grid: CodeGrid | None) -> Tensor:
        """Run the kernel."""
        if self._added is None:
            y = self._weight.run(self._input, grid, self._activation)
            # A view of a batch of one would not count as channels-last any more.
            return y if y.shape == self.shape else y.view(self.shape)
        if grid is not None and self._added.grid is not None:
            added = self._added.codes(self._added.grid).clone(memory_format=torch.channels_last)
            return self._weight.run_and_add(self._input, grid, added, self._added.grid, self._activation)
        added = self._added.values().contiguous(memory_format=torch.channels_last)
        y = self._weight.run_and_add(self._input, None, added, _UNIT, self._activation)
        return y if grid is None else encode(y, grid)

    def release(self) -> None:
        """Let go of the input and the tensor added."""
        del self._input, self._added

    def activated(self, activation: Activation) -> Source | None:
        """Have the kernel apply it, if it has none to apply yet."""
        if self.grid is not None or self._activation != NONE or (self._added is not None and activation != RELU):
            return None
        return Product(self._weight, self._input, self.shape, self.channels_last, self._added, activation)

    def plus(self, other: Source) -> Source | None:
        """Have the kernel add it, if it is a convolution that does nothing else yet."""
        if self.grid is not None or self._activation != NONE or self._added is not None:
            return None
        if self._weight.geometry is None:
            return None
        return Product(self._weight, self._input, self.shape, self.channels_last, other)


class Pooled(Source):
    """The largest of each window of a tensor (max-pooling)."""

    def __init__(
        self,
        source: Source,
        shape: tuple[int, ...],
        size: tuple[int, int],
        stride: tuple[int, int],
        pad: tuple[int, int],
    ) -> None:
        super().__init__(shape, source.channels_last, source.makers)
        self._source, self._window = source, (size, stride, pad)

    def compute(self, grid: CodeGrid | None) -> Tensor:
        """Take the maxima: of bytes, their order is that of the numbers."""
        if grid is None:
            return F.max_pool2d(self._source.values(), *self._window)
        return _largest(self._source.codes(grid), *self._window)

    def release(self) -> None:
        """Let go of what was pooled."""
        del self._source

    def activated(self, activation: Activation) -> Source | None:
        """Apply an increasing function before the maximum, which gives the same."""
        if self.grid is not None or activation not in _MONOTONE:
            return None
        inner = self._source.activated(activation)
        return None if inner is None else Pooled(inner, self.shape, *self._window)


def _largest(codes: Tensor, size: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int]) -> Tensor:
    """Max-pool bytes: torch's own kernel refuses bytes on maps of more than 255 entries."""
    if any(pad):
        codes = F.pad(codes, (pad[1], pad[1], pad[0], pad[0]))  # no byte is below 0
    for dim in (3, 2):
        length, step = size[dim - 2], stride[dim - 2]
        count = (codes.shape[dim] - length) // step + 1
        shifted = [codes.narrow(dim, first, (count - 1) * step + 1) for first in range(length)]
        taps = [part[..., ::step] if dim == 3 else part[..., ::step, :] for part in shifted]
        codes = taps[0]
        for tap in taps[1:]:
            codes = torch.maximum(codes, tap)
    return codes


class Joined(Source):
    """Tensors one after the other along the channels (concatenation)."""

    def __init__(self, sources: Sequence[Source], shape: tuple[int, ...]) -> None:
        super().__init__(shape, sources[0].channels_last, tuple(maker for s in sources for maker in s.makers))
        self._sources = tuple(sources)

    def compute(self, grid: CodeGrid | None) -> Tensor:
        """Join the bytes, or the floats."""
        return torch.cat([s.values() if grid is None else s.codes(grid) for s in self._sources], 1)

    def release(self) -> None:
        """Let go of the parts."""
        del self._sources


class Floats(Source):
    """An ordinary tensor: one that somebody asked for the floats of, and may have changed since."""

    def __init__(self, tensor: Tensor, makers: tuple[PackedWeight, ...]) -> None:
        super().__init__(tuple(tensor.shape), False, makers)
        self.tensor = tensor

    def codes(self, grid: CodeGrid) -> Tensor:
        """Round the floats as they are now."""
        return encode(self.tensor, grid)

    def values(self) -> Tensor:
        """Return a copy."""
        return self.tensor.clone()

    def compute(self, grid: CodeGrid | None) -> Tensor:
        """As :meth:`codes` or :meth:`values`."""
        return self.values() if grid is None else self.codes(grid)

    def release(self) -> None:
        """Nothing: the floats may change, so bytes of them are not kept."""


def computed(source: Source) -> Tensor:
    """Return the floats in the memory format in which the simulated layer returns them: user code may call view()."""
    y = source.values()
    return y if source.channels_last or y.dim() != 4 else y.contiguous()


class Deferred(Tensor):
    """A float32 tensor on the CPU that is not computed yet.

    Quantized layers make it (``chained=True``) and ask it for bytes; to all other code it is an ordinary tensor that
    needs no gradient.

    Attributes:
        source: How it comes about.
    """

    source: Source

    @staticmethod
    def __new__(cls: type[Deferred], source: Source) -> Deferred:
        """Make a tensor of the source's shape, without memory."""
        new = Tensor._make_wrapper_subclass(cls, source.shape, dtype=torch.float32)
        new.source = source
        return new

    def plain(self) -> Tensor:
        """Return the tensor, computed; the same one at every call."""
        if not isinstance(self.source, Floats):
            if self.source.grid is not None:
                for makers in _ROUNDED:
                    makers.update(self.source.makers)
            self.source = Floats(computed(self.source), self.source.makers)
        return self.source.tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what a kernel can do later; compute the tensor for everything else."""
        kwargs = kwargs or {}
        noted = _NOTED.get(func)
        result = None if noted is None else noted(*args, **kwargs)
        if result is not None:
            return result
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(_plain, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute the tensor for operators that are called out of sight of Python."""
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)


_ROUNDED: list[set[PackedWeight]] = []


@contextlib.contextmanager
def rounded_tensors() -> Iterator[set[PackedWeight]]:
    """Collect in a block the makers of tensors whose floats were wanted when they had been rounded to bytes already."""
    makers: set[PackedWeight] = set()
    _ROUNDED.append(makers)
    try:
        yield makers
    finally:
        _ROUNDED.remove(makers)


def _plain(x: Any) -> Any:
    return x.plain() if isinstance(x, Deferred) else x


def _activation(activation: Activation, *, in_place: bool = False) -> Callable[..., Tensor | None]:
    def note(x: Any, inplace: bool = False) -> Tensor | None:
        source = x.source.activated(activation)
        return None if source is None else _put(x, source, in_place or inplace)

    return note


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor | None:
    source = x.source.activated(RELU6) if (min_val, max_val) == RELU6[1] else None
    return None if source is None else _put(x, source, inplace)


def _put(x: Deferred, source: Source, in_place: bool) -> Deferred:
    if not in_place:
        return Deferred(source)
    x.source = source
    return x


def _addition(*, in_place: bool = False) -> Callable[..., Tensor | None]:
    def note(x: Any, other: Any, **options: Any) -> Tensor | None:
        if options or not (isinstance(x, Deferred) and isinstance(other, Deferred)) or x.source is other.source:
            return None
        if x.source.shape != other.source.shape:
            return None
        # What has its bytes already can only be added to what has not.
        source = x.source.plus(other.source) or other.source.plus(x.source)
        return None if source is None else _put(x, source, in_place)

    return note


def _max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *options: Any, **others: Any
) -> Tensor | None:
    shape = x.source.shape
    if len(shape) != 4 or any(options) or any(others.values()) or _two(dilation) != (1, 1):
        return None
    size, pad = _two(kernel_size), _two(padding)
    step = _two(stride) if stride else size
    room = [n + 2 * p - k for n, p, k in zip(shape[2:], pad, size, strict=True)]
    if min(room) < 0 or any(2 * p > k for p, k in zip(pad, size, strict=True)):
        return None  # the plain function says what is wrong
    size_after = (r // s + 1 for r, s in zip(room, step, strict=True))
    return Deferred(Pooled(x.source, (*shape[:2], *size_after), size, step, pad))


def _two(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return (int(values[0]), int(values[-1]))


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training else cast(Tensor, x)


def _join(tensors: Any, dim: int = 0) -> Tensor | None:
    if not all(isinstance(t, Deferred) and t.dim() == 4 for t in tensors) or dim not in (1, -3):
        return None
    if len({(t.shape[0], *t.shape[2:]) for t in tensors}) > 1:
        return None
    first = tensors[0].shape
    shape = (first[0], sum(t.shape[1] for t in tensors), *first[2:])
    return Deferred(Joined([t.source for t in tensors], shape))


_relu, _relu_ = _activation(RELU), _activation(RELU, in_place=True)
_add, _add_ = _addition(), _addition(in_place=True)

ACTIVATIONS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    F.relu6: _activation(RELU6),
    F.hardtanh: _hardtanh,
    F.hardswish: _activation(HARDSWISH),
    F.silu: _activation(SILU),
}
ADDITIONS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_),
}
OTHERS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.dropout: _dropout,
    torch.cat: _join,
}
"""Functions that deferred tensors note, with how; those that return None leave it to the plain function."""

_NOTED = {**ACTIVATIONS, **ADDITIONS, **OTHERS}

_LOOKS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")),
    }
)
"""Functions that look at what is known of a tensor before it is computed."""
