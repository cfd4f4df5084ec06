"""Channel groups of plain sequential networks, read off the module list: no tracing, for tests of what uses groups."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lowrank_nn.graph.groups import ChannelGroup, Member


def each(size, width=1):
    """Positions of ``size`` units of ``width`` neighbours each."""
    return tuple(tuple(range(unit * width, (unit + 1) * width)) for unit in range(size))


def chain_groups(model):
    """One group for each convolution or linear layer of a sequential network, the last one frozen."""
    weighted = (nn.Conv2d, nn.Linear)
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, (*weighted, _NormBase))]
    groups = []
    for index, (path, layer) in enumerate(layers):
        if not isinstance(layer, weighted):
            continue
        size = len(layer.weight)
        members = [Member(f"{path}.weight", 0, each(size), "out")]
        if layer.bias is not None:
            members.append(Member(f"{path}.bias", 0, each(size), "out"))
        frozen = "reaches the output"
        for later, reader in layers[index + 1 :]:
            if isinstance(reader, weighted):
                members.append(Member(f"{later}.weight", 1, each(size, reader.weight.shape[1] // size), "in"))
                frozen = ""
                break
            names = ("weight", "bias", "running_mean", "running_var")
            members += [Member(f"{later}.{name}", 0, each(size), "through") for name in names]
        groups.append(ChannelGroup(path, size, tuple(members), frozen))
    return tuple(groups)
