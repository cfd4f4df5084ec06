"""What functions do otherwise while a removal is proven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
    """Has layer norms leave out the channels that are held at zero, and normalise the others alone."""

    def __init__(self, model: nn.Module, cuts: Cuts) -> None:
        super().__init__()
        tensors = named_tensors(model)
        self._cuts = {id(tensors[name]): dims for name, dims in cuts.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        given = {**dict(zip(_LAYER_NORMS.get(func, ()), args, strict=False)), **(kwargs or {})}
        dims = self._cuts.get(id(given.get("weight")))
        if func not in _LAYER_NORMS or not dims:
            return func(*args, **(kwargs or {}))
        x, weight = given["input"], given["weight"]
        inner = {dim + x.dim() - weight.dim(): cut for dim, cut in dims.items()}
        for name in given.keys() & {"weight", "bias"}:
            given[name] = None if given[name] is None else cut_tensor(given[name], dims)
        y = func(**{**given, "input": cut_tensor(x, inner), "normalized_shape": given["weight"].shape})
        for dim, cut in inner.items():
            zeros = y.new_zeros((*y.shape[:dim], cut.size, *y.shape[dim + 1 :]))
            y = zeros.index_copy(dim, torch.tensor(cut.kept, device=y.device), y)
        return y
