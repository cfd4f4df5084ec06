"""Attributes of modules that say how large their tensors are: kept right when channels are removed."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowrank_nn.errors import PlanError
from lowrank_nn.layers import narrow_module


@dataclasses.dataclass(frozen=True)
class Cut:
    """What was removed of one tensor along one dim.

    Attributes:
        size: Size of the dim before.
        removed: The positions that went, in ascending order.
    """

    size: int
    removed: tuple[int, ...]

    @property
    def kept(self) -> list[int]:
        """The positions that stayed, in ascending order."""
        gone = set(self.removed)
        return [position for position in range(self.size) if position not in gone]


MARK = "_resized_attributes"
"""Where a module that lost channels keeps the names of the attributes that changed: a saved file needs them."""

AttributeUpdate = Callable[[Any, Mapping[str, Mapping[int, Cut]]], None]
"""``update(module, cuts)``: ``cuts`` maps names of tensors inside the module, and dims, to what was removed there."""

_UPDATES: dict[type[nn.Module], AttributeUpdate] = {}


def register_attributes(cls: type[nn.Module], update: AttributeUpdate) -> None:
    """Say how the attributes of a module class follow its tensors when channels are removed.

    Torch's own layers are registered. A class of your own needs this where its forward reads a size from an attribute
    (a number of heads, a width); the proof of every removal rolls back what is not kept right.

    Example: ``register_attributes(Attention, update)`` with ::

        def update(module, cuts):
            module.num_heads = module.qkv.out_features // (3 * module.head_dim)

    Args:
        cls: The class; its subclasses are meant too, unless they are registered themselves.
        update: ``update(module, cuts)``, called when the tensors are smaller already, inner modules first. ``cuts``
            has, by name of a tensor as seen from the module (``"qkv.weight"``) and by dim, a :class:`Cut` with
            ``size``, ``removed`` and ``kept``. It may set plain attributes of the module.
    """
    _UPDATES[cls] = update


def update_attributes(module: nn.Module, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    """Call what is registered for the class of ``module``, if anything is; give it its narrow form if it needs that."""
    cls = next((cls for cls in type(module).__mro__ if cls in _UPDATES), None)
    if cls is not None:
        _UPDATES[cls](module, cuts)
    narrow_module(module)


def mark_resized(module: nn.Module, names: Iterable[str]) -> None:
    """Note that ``module`` has lost channels, and which of its attributes say so."""
    vars(module)[MARK] = tuple(sorted({*names, *vars(module).get(MARK, ())}))


def resized_attributes(module: nn.Module) -> dict[str, Any] | None:
    """Return the attributes that tell the size of a module that lost channels; None for one that did not."""
    names = vars(module).get(MARK)
    return None if names is None else {name: vars(module)[name] for name in names if name in vars(module)}


def groups_left(groups: int, cut: Cut | None) -> int:
    """Return the number of blocks of a grouped convolution after a cut along the dim that the blocks divide.

    Raises:
        PlanError: What is left of the blocks is not of one size.
    """
    if cut is None or groups == 1:
        return groups
    block = cut.size // groups
    lost = collections.Counter(position // block for position in cut.removed)
    left = [block - lost[index] for index in range(groups)]
    sizes = {size for size in left if size}
    if len(sizes) != 1:
        raise PlanError(f"{groups} groups of channels would keep {sorted(sizes)} channels each, not all the same.")
    return sum(size > 0 for size in left)


def _convolution(module: _ConvNd, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.groups = groups_left(module.groups, cuts.get("weight", {}).get(0))
    first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    module.in_channels, module.out_channels = (first, second) if transposed else (second, first)


def _linear(module: nn.Linear, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(module: nn.Bilinear, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _embedding(module: nn.Embedding | nn.EmbeddingBag, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _norm(module: _NormBase, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    tensors = (module.weight, module.running_mean)
    module.num_features = next(len(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def _group_norm(module: nn.GroupNorm, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.num_groups = groups_left(module.num_groups, cuts["weight"][0])
    module.num_channels = len(module.weight)


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    assert module.weight is not None
    module.normalized_shape = tuple(module.weight.shape)


def _prelu(module: nn.PReLU, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    module.num_parameters = len(module.weight)


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, cuts: Mapping[str, Mapping[int, Cut]]) -> None:
    layer = "_l0" if isinstance(module, nn.RNNBase) else ""
    of_inputs = cuts.get(f"weight_ih{layer}", {})
    module.input_size = module.get_parameter(f"weight_ih{layer}").shape[1]
    if 0 in of_inputs:  # rows of every gate
        module.hidden_size = module.hidden_size * len(of_inputs[0].kept) // of_inputs[0].size
    if isinstance(module, nn.RNNBase):
        if module.proj_size:
            module.proj_size = module.get_parameter("weight_hr_l0").shape[0]
        module.flatten_parameters()


for _cls, _update in (
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (_NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent),
):
    register_attributes(_cls, _update)
