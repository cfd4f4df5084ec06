"""Numbers of heads that attention modules keep as attributes: recognised by their names and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lowrank_nn.graph.groups import ChannelGroup

COUNTS = (
    "num_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_attention_heads",
    "num_kv_heads",
    "num_key_value_heads",
)
WIDTHS = ("all_head_size", "inner_dim", "attn_dim", "attention_dim")


def update_heads(model: nn.Module, group: ChannelGroup, units: Sequence[int]) -> None:
    """Lower the numbers of heads that a module keeps beside the projections whose heads are removed.

    Attention modules reshape by such numbers. One is recognised by its name and by its value: a number of heads that
    the units of the group divide, or a width that their positions add up to. What is recognised wrongly, or not, the
    proof of the removal shows.

    Args:
        model: Changed in place; its tensors may be cut already.
        group: The group; units of one channel each are no heads.
        units: Its units that go.
    """
    kept = group.size - len(units)
    for owner, width in _owners(model, group):
        for name in COUNTS:
            value = vars(owner).get(name)
            if isinstance(value, int) and not value % group.size:
                setattr(owner, name, value // group.size * kept)
        for name in WIDTHS:
            if vars(owner).get(name) == width:
                setattr(owner, name, width // group.size * kept)


def _owners(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[nn.Module, int]]:
    """Yield the modules that hold the projections to heads, once, with the width of all heads together."""
    widths = [sum(map(len, member.positions)) for member in group.members if member.role == "in"]
    owners = {}
    for member in group.members:
        if member.role == "out" and min(map(len, member.positions)) > 1:
            layer = member.name.rpartition(".")[0]
            for path in (layer, layer.rpartition(".")[0]):
                owners[path] = min(widths, default=0)
    for path, width in owners.items():
        yield model.get_submodule(path), width
