"""Images to calibrate on, networks to compress, and how far these are from the dense ones."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.graph import call_model, replace_module
from lowrank_nn.graph.inputs import tensors


def images(count, channels, size, seed=0):
    """Smooth random images with some noise: patches of the kind that compression lives on."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, max(2, size // 4), max(2, size // 4), generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear")
    return smooth + 0.2 * torch.randn(count, channels, size, size, generator=generator)


def compressed(model, ranks):
    small = copy.deepcopy(model)
    for path, (cls, rank) in ranks.items():
        small = replace_module(small, path, cls.from_pretrained_layer(model.get_submodule(path), rank=rank))
    return small


@torch.no_grad()
def error(dense, small, batches):
    """Mean squared difference of all that the networks return."""
    pairs = zip(*([t for b in batches for t in tensors(call_model(net, b))] for net in (dense, small)), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def chain():
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5))


class Residual(nn.Module):
    """Two residual branches on one wide sum; the second ends in a normalisation with channels of all scales."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1e-4, 0.1, 0.3, 1, -1, 2, 3, -0.5]))
            self.norm.running_var.uniform_(0.3, 3)
            self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.one(x)
        return x + self.norm(self.two(x.tanh()))
