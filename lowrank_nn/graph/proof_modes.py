"""What functions do otherwise while a removal is proven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_nn.graph.attributes import Cut
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.graph.rules import RULES, normal_dims
from lowrank_nn.graph.rules.elementwise import FIRST_ONLY, elementwise
from lowrank_nn.graph.rules.mixing import STATISTICS, batch_norm
from lowrank_nn.graph.rules.movement import RESHAPES, expansion, movement, reshape
from lowrank_nn.graph.surgery import Cuts, cut_tensor, named_tensors

_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
)
_LAYER_NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
    torch.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}
_GROUP_NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    torch.group_norm: ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
}
_NORMS = _LAYER_NORMS | _GROUP_NORMS


_FOLLOWED = frozenset({elementwise, movement, reshape, expansion, batch_norm})
"""Rules of the functions through which weights are followed."""


class NoDropout(TorchFunctionMode):
    """Leaves out what draws one random number per channel, which would differ where there are fewer of these."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {**dict(zip(("dropout_p", "is_causal"), args[4:], strict=False)), **kwargs}
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class NormaliseKept(TorchFunctionMode):
    """Has layer norms, and group norms of one group, normalise the channels alone that are not held at zero."""

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        super().__init__()
        tensors = named_tensors(model)
        self._cuts = {id(tensors[name]): dims for name, dims in cuts.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        given = {**dict(zip(_NORMS.get(func, ()), args, strict=False)), **(kwargs or {})}
        dims = self._cuts.get(id(given.get("weight")))
        if func not in _NORMS or not dims or given.get("num_groups", 1) != 1:  # of several groups whole ones go
            return func(*args, **(kwargs or {}))
        x, weight = given["input"], given["weight"]
        first = 1 if func in _GROUP_NORMS else x.dim() - weight.dim()
        inner = {first + dim: cut for dim, cut in dims.items()}
        given["input"] = cut_tensor(x, inner)
        for name in given.keys() & {"weight", "bias"}:
            given[name] = None if given[name] is None else cut_tensor(given[name], dims)
        if func in _LAYER_NORMS:
            given["normalized_shape"] = given["weight"].shape
        y = func(**given)
        for dim, cut in inner.items():
            y = _refilled(y, dim, torch.tensor(cut.kept, device=y.device), cut.size)
        return y


class StandardiseKept(TorchFunctionMode):
    """Has statistics of weights leave out what is held at zero: a weight that is standardised goes on being so.

    What is computed of parameters and buffers alone, by moving elements, element by element or as statistics, is
    followed: which of its elements are held at zero.
    """

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        super().__init__()
        named = named_tensors(model)
        self._cuts: dict[int, dict[int, Cut]] = {id(tensor): {} for tensor in named.values()}
        self._cuts |= {id(named[name]): dims for name, dims in cuts.items()}
        self._gone: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        gone = self._held_at_zero(func, args, kwargs) if RULES.get(func) in _FOLLOWED or func in STATISTICS else []
        if not gone:
            return func(*args, **kwargs)
        if func in STATISTICS:
            return self._statistics(func, args, kwargs, gone[0])
        if RULES[func] is batch_norm:
            return self._standardised(func, args, kwargs, gone[0])
        result = func(*args, **kwargs)
        if RULES[func] is elementwise:
            self._note(result, functools.reduce(torch.logical_or, gone))
        elif torch.dtype not in map(type, args):  # view(dtype)
            self._note(result, RESHAPES.get(func, func)(gone[0], *args[1:], **kwargs))
        return result

    def _held_at_zero(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return which elements of each argument are held at zero; nothing unless all come of weights alone."""
        operands = list(tensors((args, kwargs)))[: 1 if func in FIRST_ONLY else None] if args else []
        if not all(tensor in self._gone or id(tensor) in self._cuts for tensor in operands):
            return []
        return [self._of(tensor) for tensor in operands]

    def _of(self, tensor: Tensor) -> Tensor:
        known: Tensor | None = self._gone.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            known = torch.zeros((), dtype=torch.bool, device=tensor.device).expand(tensor.shape)
            for dim, cut in self._cuts[id(tensor)].items():
                known = known.index_fill(dim, torch.tensor(cut.removed, device=tensor.device), True)
        return known

    def _note(self, result: Any, gone: Tensor) -> None:
        if isinstance(result, Tensor) and result.shape == gone.shape:
            self._gone[result] = gone

    def _statistics(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], gone: Tensor) -> Any:
        x, *rest = args
        dims = normal_dims(rest[0] if rest else kwargs.get("dim", kwargs.get("axis")), x.dim())
        result = func(_without(x, gone, dims), *rest, **kwargs)
        for dim in dims:
            gone = gone.all(dim, keepdim=True)
        for tensor in tensors(result):
            self._gone[tensor] = gone.reshape(tensor.shape)
        return result

    def _standardised(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], gone: Tensor
    ) -> Tensor:
        x, *rest = args
        dims = [dim for dim in range(x.dim()) if dim != 1]
        y: Tensor = func(_without(x, gone, dims), *rest, **kwargs)
        for dim in dims:
            y = _refilled(y, dim, _there(gone, dim), x.shape[dim])
        self._gone[y] = gone
        return y


class MeansOfKept(TorchFunctionMode):
    """Has means and variances by which a forward itself normalises channels leave out those that are held at zero.

    Which these are shows in the argument of the first such call: all zeros. From there they are followed through what
    is computed element by element: less the mean, they are not zero any more.

    Args:
        calls: Each as the number of statistics computed ahead of it, and the dim of the channels.
    """

    def __init__(self, calls: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self._calls = set(calls)
        self._count = 0
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if func in STATISTICS:
            dims = {dim for call, dim in self._calls if call == self._count}
            self._count += 1
            if dims and args:
                args = (self._kept_of(args[0], dims), *args[1:])
            elif dims:
                kwargs = {**kwargs, "input": self._kept_of(kwargs["input"], dims)}
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if RULES.get(func) is elementwise and isinstance(result, Tensor):
            for operand in tensors(args):
                if operand.shape == result.shape and operand in self._kept:
                    self._kept[result] = self._kept[operand]
        return result

    def _kept_of(self, x: Tensor, dims: set[int]) -> Tensor:
        """Return ``x`` without what is held at zero along ``dims``, if it has these: in training calls may differ."""
        kept = self._kept.setdefault(x, {})  # type: ignore[no-untyped-call]
        left = x
        for dim in dims & set(range(x.dim())):
            if dim not in kept:
                kept[dim] = _there(x.detach() == 0, dim)
            left = left.index_select(dim, kept[dim])
        return left


def _there(gone: Tensor, dim: int) -> Tensor:
    """Return the positions along ``dim`` where not everything is gone."""
    return (~gone).movedim(dim, 0).reshape(gone.shape[dim], -1).any(1).nonzero()[:, 0]


def _without(x: Tensor, gone: Tensor, dims: Iterable[int]) -> Tensor:
    """Return ``x`` without the positions along ``dims`` where everything is gone."""
    for dim in dims:
        x = x.index_select(dim, _there(gone, dim))
    return x


def _refilled(y: Tensor, dim: int, kept: Tensor, size: int) -> Tensor:
    """Return ``y`` with zeros at the positions along ``dim`` that are not ``kept``."""
    return y.new_zeros((*y.shape[:dim], size, *y.shape[dim + 1 :])).index_copy(dim, kept, y)
