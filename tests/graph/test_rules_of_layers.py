"""Rules of operations with parameters: removing units must be the same as zeroing them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.graph import find_groups
from tests.graph.removal import assert_removable
from tests.graph.test_rules import APART, BOTH, Net, X, free_units, settled


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def normed(norm):
    return (lambda net, a, b: net.norm(a) + b), {"norm": norm}


def rows(x):
    return x.flatten(2).mT


def own(middle, **tensors):
    return middle, tensors


LAYERS = {
    "batch norm": (*normed(nn.BatchNorm2d(8)), BOTH),
    "batch norm without affine": (*normed(nn.BatchNorm2d(8, affine=False)), BOTH),
    "instance norm": (*normed(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), BOTH),
    "group norm": (*normed(nn.GroupNorm(4, 8)), {"a": 4}),
    "group norm of all": (*normed(nn.GroupNorm(1, 8)), BOTH),
    "group norm of each": (*normed(nn.GroupNorm(8, 8)), BOTH),
    "prelu": (*normed(nn.PReLU(8)), BOTH),
    "prelu with one slope": (*normed(nn.PReLU()), BOTH),
    "layer scale": (*own(lambda net, a, b: net.scale * a + b, scale=parameter(8, 1, 1)), BOTH),
    "one scale for all": (*own(lambda net, a, b: net.scale * a + b, scale=parameter(1)), BOTH),
    "frozen batch norm": (
        *own(
            lambda net, a, b: a * net.w.view(1, -1, 1, 1) + net.s[None, :, None, None],
            w=torch.randn(8),
            s=torch.randn(8),
        ),
        APART,
    ),
    "position embedding": (*own(lambda net, a, b: a + net.where, where=parameter(1, 8, 4, 4)), APART),
    "token": (
        *own(
            lambda net, a, b: torch.cat([net.token.expand(len(a), -1, -1), a.flatten(2).mT], 1),
            token=parameter(1, 1, 8),
        ),
        APART,
    ),
    "masked kernel": (
        *own(
            lambda net, a, b: F.conv2d(a, net.kernel * net.mask) + b,
            kernel=parameter(8, 8, 1, 1),
            mask=torch.ones(8, 8, 1, 1),
        ),
        {"a": 8, "b": 8},
    ),
    "straightened kernel": (
        *own(lambda net, a, b: F.linear(a.mean((2, 3)), net.kernel.flatten(1)), kernel=parameter(6, 8, 1, 1)),
        {"a": 8, "b": 8, "kernel": 6},
    ),
    "quantized kernel": (
        *own(
            lambda net, a, b: (
                F.conv2d(
                    a,
                    torch.fake_quantize_per_channel_affine(
                        net.kernel.float(), net.scale.float(), net.zero, 0, -128, 127
                    ).double(),
                )
                + b
            ),
            kernel=parameter(8, 8, 1, 1),
            scale=torch.rand(8),
            zero=torch.zeros(8, dtype=torch.int32),
        ),
        {"a": 8, "b": 8},
    ),
    "grouped by two": (
        *own(lambda net, a, b: net.conv(a), conv=nn.Conv2d(8, 12, 3, groups=2)),
        {"a": 4, "b": 8, "conv": 6},
    ),
    "grouped by eight": (
        *own(lambda net, a, b: net.conv(torch.cat([a, b], 1)), conv=nn.Conv2d(16, 24, 3, groups=8)),
        {"a": 4, "b": 4},
    ),
    "depthwise": (*own(lambda net, a, b: net.conv(a), conv=nn.Conv2d(8, 8, 3, groups=8)), APART),
    "depthwise, two for one": (*own(lambda net, a, b: net.conv(a), conv=nn.Conv2d(8, 16, 3, groups=8)), APART),
    "transposed": (
        *own(lambda net, a, b: net.conv(a), conv=nn.ConvTranspose2d(8, 6, 2, 2)),
        {"a": 8, "b": 8, "conv": 6},
    ),
    "transposed, by two": (
        *own(lambda net, a, b: net.conv(a), conv=nn.ConvTranspose2d(8, 12, 2, 2, groups=2)),
        {"a": 4, "b": 8, "conv": 6},
    ),
    "transposed depthwise": (*own(lambda net, a, b: net.conv(a), conv=nn.ConvTranspose2d(8, 8, 2, groups=8)), APART),
    "three dimensions": (
        *own(lambda net, a, b: net.conv(a[:, :, None])[:, :, 0], conv=nn.Conv3d(8, 6, (1, 3, 3))),
        {"a": 8, "b": 8, "conv": 6},
    ),
    "one dimension": (
        *own(lambda net, a, b: net.conv(a.flatten(2))[..., None], conv=nn.Conv1d(8, 6, 3)),
        {"a": 8, "b": 8, "conv": 6},
    ),
    "called twice": (*own(lambda net, a, b: net.conv(a) + net.conv(b), conv=nn.Conv2d(8, 8, 1)), {"a": 8, "conv": 8}),
    "called on itself": (*own(lambda net, a, b: net.conv(net.conv(a)), conv=nn.Conv2d(8, 8, 1)), {"a": 8, "b": 8}),
    "linear on channels last": (
        *own(lambda net, a, b: net.fc(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), fc=nn.Linear(8, 6)),
        {"a": 8, "b": 8, "fc": 6},
    ),
    "linear over tokens": (*own(lambda net, a, b: net.fc(a.flatten(2)).mean(2), fc=nn.Linear(16, 6)), APART),
    "times a matrix": (*own(lambda net, a, b: a.flatten(2).mT @ net.w, w=parameter(8, 6)), {"a": 8, "b": 8, "w": 6}),
    "addmm": (
        *own(lambda net, a, b: torch.addmm(net.bias, a.mean((2, 3)), net.w), w=parameter(8, 6), bias=parameter(6)),
        {"a": 8, "b": 8, "bias": 6},
    ),
    "einsum": (
        *own(lambda net, a, b: torch.einsum("nchw,dc->ndhw", a, net.w), w=parameter(6, 8)),
        {"a": 8, "b": 8, "w": 6},
    ),
    "einsum without arrow": (
        *own(lambda net, a, b: torch.einsum("...c,cd", a.flatten(2).mT, net.w), w=parameter(8, 6)),
        {"a": 8, "b": 8, "w": 6},
    ),
    "scored": (
        *own(
            lambda net, a, b: F.scaled_dot_product_attention(*(x.flatten(2).mT[:, None] for x in (a, a, b)), scale=1.0)[
                :, 0
            ]
        ),
        APART,
    ),
    "bilinear": (*own(lambda net, a, b: net.both(rows(a), rows(b)), both=nn.Bilinear(8, 8, 5)), {**APART, "both": 5}),
    "outer product": (
        *own(lambda net, a, b: rows(a) @ torch.outer(net.u, net.v), u=parameter(8), v=parameter(6)),
        {**APART, "v": 6},
    ),
    "tensordot": (
        *own(lambda net, a, b: torch.tensordot(rows(a), net.w, dims=1), w=parameter(8, 6)),
        {**APART, "w": 6},
    ),
    "embedding bag": (
        *own(
            lambda net, a, b: rows(a) + net.table(torch.arange(32).view(2, 16) % 5)[:, None],
            table=nn.EmbeddingBag(5, 8),
        ),
        APART,
    ),
    "layer norm": (
        lambda net, a, b: net.norm((a + b).movedim(1, -1)).movedim(-1, 1),
        {"norm": nn.LayerNorm(8)},
        BOTH,
    ),
}


@pytest.mark.parametrize(("middle", "tensors", "expected"), LAYERS.values(), ids=LAYERS)
def test_channels_that_can_go(middle, tensors, expected):
    assert free_units(middle, **copy.deepcopy(tensors)) == expected


MIXED = {
    "layer norm without a weight": (
        lambda net, a, b: net.norm(a.movedim(1, -1)),
        {"norm": nn.LayerNorm(8, elementwise_affine=False)},
        "mixed by layer_norm in norm",
    ),
    "kernel scaled by its largest weight": (
        lambda net, a, b: F.conv2d(a, net.kernel / (net.kernel.abs().amax((1, 2, 3), keepdim=True) + 0.1)),
        {"kernel": parameter(8, 8, 1, 1)},
        "mixed by amax",
    ),
    "linear over channels and space": (
        lambda net, a, b: net.fc(a.flatten(1)[:, None]).unflatten(2, (8, 16)).softmax(1),
        {"fc": nn.Linear(128, 128)},
        "",
    ),
    "efficient attention": (
        lambda net, a, b: a * net.conv(a.mean((2, 3))[:, None]).mT[..., None],
        {"conv": nn.Conv1d(1, 1, 3, padding=1)},
        "mixed by conv1d in conv",
    ),
}


@pytest.mark.parametrize(("middle", "tensors", "reason"), MIXED.values(), ids=MIXED)
def test_channels_that_stay(middle, tensors, reason):
    model = settled(Net(middle, **copy.deepcopy(tensors)))
    groups = find_groups(model, X)
    assert_removable(model, X, groups)
    assert reason in groups[0].frozen, groups[0]
