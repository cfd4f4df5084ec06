"""Models that the storage tests save, and a layer that a third party might register."""

import contextlib

import torch
from torch import nn

from lowrank_nn.layers import (
    LAYERS,
    CompressedLinear,
    Packing,
    PrunedConv2d,
    QuantConv2d,
    QuantLinear,
    SVDLinear,
    TuckerConv2d,
    register_layer,
)


class SmallNet(nn.Module):
    """Two convolutions, a norm and a classifier."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 12, 3, stride=2, padding=(1, 0), bias=False)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def seeded(make, seed=0):
    """What `make` returns, built from one seed; the global random state stays."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def compressed_net():
    """A SmallNet with two compressed layers, and statistics as after training."""
    net = seeded(SmallNet).eval()
    with torch.no_grad():
        net.norm.running_mean.copy_(torch.linspace(-1, 1, 8))
        net.norm.bias.copy_(torch.linspace(-0.5, 0.7, 8))
    net.conv2 = TuckerConv2d.from_pretrained_layer(net.conv2, rank=(4, 3))
    net.fc = SVDLinear.from_pretrained_layer(net.fc, rank=5)
    return net


class MaskedLinear(CompressedLinear):
    """Keeps a weight under a mask, and levels that take three bits."""

    def __init__(self, in_features, out_features, bias=True, *, scale=1.0, device=None, dtype=None):
        super().__init__(in_features, out_features)
        self.scale = scale
        self.kernel = nn.Parameter(torch.randn(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool, device=device))
        self.register_buffer("levels", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("steps", torch.arange(4.0, device=device), persistent=False)

    @classmethod
    def usual_options(cls, layer):
        return {}

    @classmethod
    def lossless_options(cls, layer):
        return None

    def approximate_(self, weight):
        raise NotImplementedError

    def reset_parameters(self):
        raise NotImplementedError

    def stages(self):
        yield from ()

    def packing(self):
        return {"kernel": Packing(mask="mask"), "levels": Packing(bits=3)}

    def dense_weight(self):
        return torch.where(self.mask, self.kernel, 0) * self.scale + self.levels + self.steps.sum()

    def forward(self, x):
        return nn.functional.linear(x, self.dense_weight(), self.bias)


def masked_linear(in_features, out_features):
    """A MaskedLinear with a third of its weight and levels -3..3."""
    layer = MaskedLinear(in_features, out_features, scale=0.5)
    with torch.no_grad():
        layer.kernel.normal_()
        layer.bias.normal_()
        layer.mask.copy_(torch.rand(out_features, in_features) < 1 / 3)
        layer.levels.copy_(torch.randint(-3, 4, (out_features, in_features)))
    return layer


@contextlib.contextmanager
def registered(cls):
    """Register a layer class for a while."""
    register_layer(cls)
    try:
        yield
    finally:
        del LAYERS[cls.__name__]


def bits_of(tensor):
    """The bytes of a tensor, in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_state(model, other):
    """Both have the same keys, dtypes, shapes and bits."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape), key
        assert bits_of(state[key]) == bits_of(value), key


class EveryEncoding(nn.Module):
    """Has a tensor for each way of storing one; see `every_encoding`."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Linear(64, 80)
        self.int8 = nn.Linear(64, 300)
        self.pruned = nn.Conv2d(16, 32, 3)
        self.both = nn.Conv2d(16, 32, 3)
        self.sparse = nn.Linear(40, 50, bias=False)
        self.factors = nn.Conv2d(6, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("wide", torch.zeros(60, 50, dtype=torch.int32))
        self.register_buffer("few", torch.zeros(30, 30))
        self.register_buffer("tied", self.few)
        self.register_buffer("counts", torch.zeros(300, dtype=torch.int64))


def every_encoding():
    """An EveryEncoding with compressed layers; saved, its tensors are stored in all ways that there are."""

    def make():
        net = EveryEncoding()
        nn.init.normal_(net.int8.weight)
        net.int8 = QuantLinear.from_pretrained_layer(net.int8, bits=8)
        net.pruned = PrunedConv2d.from_pretrained_layer(net.pruned, sparsity=0.8)
        net.both = PrunedConv2d.from_pretrained_layer(net.both, sparsity=0.6)
        net.both = QuantConv2d.from_pretrained_layer(net.both, bits=4)
        net.factors = TuckerConv2d.from_pretrained_layer(net.factors, rank=(4, 3))
        net.factors.core = QuantConv2d.from_pretrained_layer(net.factors.core, bits=3)
        with torch.no_grad():
            net.sparse.weight[torch.rand(50, 40) < 0.9] = 0
            net.few[torch.rand(30, 30) < 0.5] = 1.5
            net.wide.copy_((torch.randn(60, 50) * 500).round())
            net.counts[::7] = 3
        return net

    return seeded(make)
