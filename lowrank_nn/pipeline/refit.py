"""What is done for the layers that read removed channels: their weights made the best of what is left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_nn.graph import find_links
from lowrank_nn.graph.fold import computed_weight, last_leaf
from lowrank_nn.graph.surgery import Cuts, Removal, cuts_of, named_tensors
from lowrank_nn.layers import CompressedLayer, LowRankLayer
from lowrank_nn.pipeline.reconstruct import reconstruct
from lowrank_nn.pipeline.state import State
from lowrank_nn.planning.similar import nearest_kept, unit_rows


def refit_readers(state: State, before: nn.Module, removals: Sequence[Removal]) -> None:
    """Refit the layers that read removed units, in the order of execution, on the calibration data.

    Each is to give what it gave in ``before``, out of the channels it still has: see
    :func:`lowrank_nn.pipeline.reconstruct.reconstruct`. The report says where that was not possible.

    Args:
        state: The model on its way, its channels removed; changed.
        before: The model with them.
        removals: What was removed.
    """
    assert state.calibration is not None
    cuts = cuts_of(removals, named_tensors(before))
    names = [m.name for removal in removals for m in removal.group.members if m.role == "in" and m.name in cuts]
    paths = dict.fromkeys(_treated(before, name) for name in names)
    unfit = {path: why for path in paths if (why := _unfit(before.get_submodule(path)))}
    fitting = [path for path in paths if path not in unfit]
    notes = reconstruct(
        before,
        state.model,
        state.calibration,
        fitting,
        links=find_links(before, state.example_inputs),
        outputs={path: kept for path in fitting if (kept := _kept_outputs(before, path, cuts)) is not None},
        seed=state.seed,
        progress=state.progress,
    )
    notes |= {path: f"not refitted: {why}" for path, why in unfit.items()}
    for path, note in notes.items():
        state.remark(path, f"Prune: {note}")


def _unfit(layer: nn.Module) -> str:
    """Return why a layer cannot take another weight; empty where it can."""
    if isinstance(layer, LowRankLayer):
        return ""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        return computed_weight(layer)
    return "it is neither an nn.Conv2d, an nn.Linear nor a low-rank layer"


@torch.no_grad()
def merge_similar_(model: nn.Module, removals: Sequence[Removal]) -> None:
    """Have the readers of units that will go read the most similar unit that stays instead, in place."""
    tensors = named_tensors(model)
    for removal in removals:
        gone = torch.zeros(removal.group.size, dtype=torch.bool, device="cpu")
        gone[list(removal.units)] = True
        into = nearest_kept(unit_rows(tensors, removal.group), gone)
        for member in removal.group.members:
            if member.role == "in":
                positions = torch.tensor(member.positions, device=tensors[member.name].device)
                along = tensors[member.name].movedim(member.dim, 0)
                along.index_add_(0, positions[into].flatten(), along[positions[gone].flatten()])


def _treated(model: nn.Module, name: str) -> str:
    """Return the path of the layer that a weight belongs to: of the compressed layer that it is inside of, if any."""
    path = name.rpartition(".")[0]
    parts = path.split(".")
    for length in range(1, len(parts)):
        outer = ".".join(parts[:length])
        if isinstance(model.get_submodule(outer), CompressedLayer):
            return outer
    return "" if isinstance(model, CompressedLayer) else path


def _kept_outputs(model: nn.Module, path: str, cuts: Cuts) -> Tensor | None:
    """Return which outputs of a layer are left; None for all."""
    leaf = last_leaf(model.get_submodule(path)).weight
    names = [name for name, tensor in named_tensors(model).items() if tensor is leaf]
    cut = next((cuts[name][0] for name in names if 0 in cuts.get(name, {})), None)
    return None if cut is None else torch.tensor(cut.kept, device="cpu")
