"""Tensors that are computed when it is known in which form they are wanted.

A quantized layer that hands its output to other quantized layers would compute floats that the next layer rounds to
bytes again. Instead it can return a :class:`Deferred` tensor: a ``torch.Tensor`` that knows how to compute itself. What
follows in the user's own code (a ReLU, the addition of a shortcut, a max-pooling) is noted; the next quantized layer
says on which grid it wants bytes, and one kernel computes all of it. Any other function gets ordinary floats, and only
then the layers behind them are computed, so a deferred tensor is right wherever it goes, and fast where it stays among
quantized layers. A slice is a view: it is noted with the tensor that it is of, whose later changes it shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowrank_nn.layers._deferred_moves import Joined, Moved, Pooled
from lowrank_nn.layers._deferred_sources import HARDSWISH, RELU, RELU6, SILU, Floats, Source, Weight, computed
from lowrank_nn.layers._onednn import Activation

Slices = tuple[slice, ...]


class Deferred(Tensor):
    """A float32 tensor on the CPU that is not computed yet.

    Quantized layers make it (``chained=True``) and ask it for bytes; to all other code it is an ordinary tensor that
    needs no gradient.

    Args:
        source: How it comes about.
        whole: The tensor that it is a slice of; None where it is none.
        slices: Which slice.
    """

    _source: Source
    _whole: Deferred | None
    _slices: Slices

    @staticmethod
    def __new__(cls: type[Deferred], source: Source, whole: Deferred | None = None, slices: Slices = ()) -> Deferred:
        """Make a tensor of the source's shape, without memory."""
        new = Tensor._make_wrapper_subclass(cls, source.shape, dtype=torch.float32)
        new._source, new._whole, new._slices = source, whole, slices
        return new

    @property
    def source(self) -> Source:
        """How the tensor comes about, with all changes in place so far."""
        if self._whole is None:
            return self._source
        return _sliced(self._whole.source, self._source.shape, self._slices)

    def plain(self) -> Tensor:
        """Return the tensor, computed; at every call the same memory."""
        if self._whole is not None:
            return self._whole.plain()[self._slices]
        if not isinstance(self._source, Floats):
            if self._source.grid is not None:
                for makers in _ROUNDED:
                    makers.update(self._source.makers)
            with _mode_of(self):
                self._source = Floats(computed(self._source), self._source.makers)
        return self._source.tensor

    def become(self, source: Source) -> Deferred | None:
        """Change in place; return the tensor, or None for a slice, whose changes show elsewhere too."""
        if self._whole is not None:
            return None
        self._source = source
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what a kernel can do later; compute the tensor for everything else."""
        kwargs = kwargs or {}
        if not (torch.is_grad_enabled() and any(map(_tracked, tree_leaves((args, kwargs))))):
            noted = _NOTED.get(func) if args else None  # torch has several names for its arguments
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


_ROUNDED: list[set[Weight]] = []


@contextlib.contextmanager
def rounded_tensors() -> Iterator[set[Weight]]:
    """Collect in a block the makers of tensors whose floats were wanted when they had been rounded to bytes already."""
    makers: set[Weight] = set()
    _ROUNDED.append(makers)
    try:
        yield makers
    finally:
        _ROUNDED.remove(makers)


def _mode_of(x: Deferred) -> contextlib.AbstractContextManager[Any]:
    """Leave inference mode where ``x`` was made outside: its floats are changed, or learned from, out there."""
    with torch._C.DisableTorchFunctionSubclass():
        outside = torch.is_inference_mode_enabled() and not x.is_inference()
    return torch.inference_mode(False) if outside else contextlib.nullcontext()


def _plain(x: Any) -> Any:
    return x.plain() if isinstance(x, Deferred) else x


def _tracked(x: Any) -> bool:
    """Whether somebody asked for the gradient of a deferred tensor, which kernels do not give."""
    return isinstance(x, Deferred) and isinstance(x._source, Floats) and x._source.tensor.requires_grad


def _activation(activation: Activation, *, in_place: bool = False) -> Callable[..., Tensor | None]:
    def note(x: Any, inplace: bool = False) -> Tensor | None:
        source = x.source.activated(activation)
        return None if source is None else _put(x, source, in_place or inplace)

    return note


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor | None:
    source = x.source.activated(RELU6) if (min_val, max_val) == RELU6[1] else None
    return None if source is None else _put(x, source, inplace)


def _put(x: Deferred, source: Source, in_place: bool) -> Deferred | None:
    return x.become(source) if in_place else Deferred(source)


def _addition(*, in_place: bool = False) -> Callable[..., Tensor | None]:
    def note(x: Any, other: Any = None, **options: Any) -> Tensor | None:
        if options or not (isinstance(x, Deferred) and isinstance(other, Deferred)) or x.source is other.source:
            return None
        one, two = x.source, other.source
        if one.shape != two.shape:
            return None
        # What has its bytes already can only be added to what has not.
        source = one.plus(two.as_now()) or two.plus(one.as_now())
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
    return Deferred(Pooled(x.source.as_now(), (*shape[:2], *size_after), size, step, pad))


def _two(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return (int(values[0]), int(values[-1]))


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training else cast(Tensor, x)


def _join(tensors: Any, dim: int = 0, **options: Any) -> Tensor | None:
    if options or not all(isinstance(t, Deferred) and t.dim() == 4 for t in tensors) or dim not in (1, -3):
        return None
    first = tensors[0].shape
    if any((t.shape[0], *t.shape[2:]) != (first[0], *first[2:]) for t in tensors):  # symbolic sizes have no hash
        return None
    shape = (first[0], sum(t.shape[1] for t in tensors), *first[2:])
    return Deferred(Joined([t.source.as_now() for t in tensors], shape))


def _slice(x: Any, index: Any) -> Tensor | None:
    shape = x.source.shape
    slices = index if type(index) is tuple else (index,)
    if len(shape) != 4 or len(slices) > 4 or not all(type(one) is slice for one in slices):
        return None
    sizes = [_length_of(one, length) for one, length in zip(slices, shape, strict=False)]
    if None in sizes:
        return None
    return Deferred(_sliced(x.source, (*sizes, *shape[len(sizes) :]), slices), x, slices)


def _length_of(one: slice, length: Any) -> Any:
    """Return how much a slice leaves of ``length``; None where that is nothing, an error, or left open in an export."""
    if one == slice(None):
        return length
    if type(length) is not int or not all(n is None or type(n) is int for n in (one.start, one.stop, one.step)):
        return None
    if one.step is not None and one.step <= 0:
        return None  # the plain function says what is wrong
    return len(range(*one.indices(length))) or None


def _sliced(source: Source, shape: tuple[int, ...], slices: Slices) -> Moved:
    return Moved(source, shape, lambda values, fill: values[slices])


def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor | None:
    shape, amounts = x.source.shape, tuple(pad)
    if len(shape) != 4 or mode != "constant" or value or not all(type(n) is int and n >= 0 for n in amounts):
        return None
    if len(amounts) % 2 or len(amounts) > 8:
        return None  # the plain function says what is wrong
    added = [first + last for first, last in zip(amounts[::2], amounts[1::2], strict=True)][::-1]
    size = (*shape[: 4 - len(added)], *(n + more for n, more in zip(shape[4 - len(added) :], added, strict=True)))
    return Deferred(Moved(x.source.as_now(), size, lambda values, fill: F.pad(values, amounts, value=fill)))


_relu, _relu_ = _activation(RELU), _activation(RELU, in_place=True)
_add, _add_ = _addition(), _addition(in_place=True)

_NOTED: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    F.relu6: _activation(RELU6),
    F.hardtanh: _hardtanh,
    F.hardswish: _activation(HARDSWISH),
    F.silu: _activation(SILU),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    F.dropout: _dropout,
    torch.cat: _join,
    Tensor.__getitem__: _slice,
    F.pad: _pad,
}
"""Functions that deferred tensors note, with how; those that return None leave it to the plain function."""

_LOOKS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")),
    }
)
"""Functions that look at what is known of a tensor before it is computed."""
