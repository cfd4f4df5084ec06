"""Small layers to quantize, plain and pruned."""

import torch
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.layers import PrunedConv2d, PrunedLinear

SCHEMES = ["symmetric", "affine"]
schemes, bit_counts = st.sampled_from(SCHEMES), st.integers(2, 8)


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_linear(in_features=12, out_features=9, dtype=torch.float64, seed=0):
    layer = nn.Linear(in_features, out_features, device="meta", dtype=dtype).to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(randn(out_features, in_features, seed=seed))
        layer.bias.copy_(randn(out_features, seed=seed + 1))
    return layer


def pruned(layer, how):
    """The layer with an element mask, as a window, or as a window with a mask in it."""
    cls = PrunedConv2d if isinstance(layer, nn.Conv2d) else PrunedLinear
    if how in ("window", "window and mask"):
        layer = cls.from_pretrained_layer(layer, sparsity=1 / 3, granularity="window")
    if how in ("mask", "window and mask"):
        layer = cls.from_pretrained_layer(layer, sparsity=0.6)
    return layer


def train(layer, x, steps=4):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
