"""Small layers to prune."""

import torch
from torch import nn


def conv(seed=0, **options):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    layer = nn.Conv2d(**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer


def linear(seed=0):
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return layer
