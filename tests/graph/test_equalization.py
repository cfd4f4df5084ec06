"""Channels are rescaled between layers where that is proven to change nothing, and nowhere else."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lowrank_nn as lnn
from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph.equalization import equalize_
from tests.zoo import ZOO

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 8, 8, generator=GENERATOR)


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, way, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def uneven(model):
    """Give the output channels of every layer very different scales, in a way that is not the same for any two."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            for tensor, bound in ((layer.weight, 1.0), (layer.bias, 0.5)):
                if tensor is not None:
                    nn.init.uniform_(tensor, -bound, bound, generator=GENERATOR)
            dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            size = layer.weight.shape[dim]
            scale = 10.0 ** (4 * torch.rand(size, generator=GENERATOR) - 2)
            with torch.no_grad():
                layer.weight.mul_(scale.reshape([-1 if d == dim else 1 for d in range(layer.weight.dim())]))
    return model.eval()


def rows(layer):
    """Return the largest weight of each output channel as a share of the largest of all."""
    peaks = layer.weight.detach().double().abs().flatten(1).amax(1)
    return peaks / peaks.max()


def columns(layer, taps=1):
    """Return the largest weight of each input channel, ``taps`` columns each, as a share of the largest of all."""
    peaks = layer.weight.detach().double().abs().transpose(0, 1).flatten(1).amax(1).reshape(-1, taps).amax(1)
    return peaks / peaks.max()


def assert_same_function(model, equal, x, tolerance):
    with torch.no_grad():
        expected, got = model.eval()(x), equal.eval()(x)
    assert (got - expected).norm() <= tolerance * expected.norm()


def assert_close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-3, atol=0)


CHAINS = {
    "relu": lambda net, x: net.second(net.first(x).relu()),
    "nothing": lambda net, x: net.second(net.first(x)),
    "leaky": lambda net, x: net.second(F.leaky_relu(net.first(x), 0.1)),
    "prelu": lambda net, x: net.second(net.prelu(net.first(x))),
    "clamp": lambda net, x: net.second(net.first(x).clamp(min=0)),
    "max-pooling": lambda net, x: net.second(F.max_pool2d(net.first(x).relu(), 2)),
    "mean": lambda net, x: net.second(F.avg_pool2d(net.first(x).relu(), 2)),
    "dropout": lambda net, x: net.second(F.dropout(net.first(x).relu(), 0.5, net.training)),
    "padding": lambda net, x: net.second(F.pad(net.first(x).relu(), (1, 1, 1, 1))),
    "shuffle": lambda net, x: net.second(F.channel_shuffle(net.first(x).relu(), 3)),
}


@pytest.mark.parametrize("name", list(CHAINS))
def test_ways_that_let_channels_take_any_factor(name):
    model = uneven(Net(CHAINS[name], first=nn.Conv2d(3, 6, 3), prelu=nn.PReLU(6), second=nn.Conv2d(6, 4, 3)))
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    order = torch.arange(6).reshape(3, 2).T.flatten() if name == "shuffle" else torch.arange(6)
    assert_close(rows(equal.first)[order], columns(equal.second))
    assert not torch.allclose(rows(model.first)[order], columns(model.second), rtol=0.1)
    equal = lnn.equalize(model.double(), X.double())
    assert_same_function(model, equal, X.double(), 1e-12)


def test_the_weights_are_the_formula():
    model = uneven(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double())
    equal = lnn.equalize(model, torch.randn(9, 5, dtype=torch.float64, generator=GENERATOR))
    first, bias, second = (t.detach().numpy() for t in (model[0].weight, model[0].bias, model[2].weight))
    p1 = np.abs(first).max(1) / np.abs(first).max()
    p2 = np.abs(second).max(0) / np.abs(second).max()
    s = np.sqrt(p1 * p2) / p2
    np.testing.assert_allclose(equal[0].weight.detach(), first / s[:, None], rtol=1e-4)
    np.testing.assert_allclose(equal[0].bias.detach(), bias / s, rtol=1e-4)
    np.testing.assert_allclose(equal[2].weight.detach(), second * s, rtol=1e-4)
    assert torch.equal(equal[2].bias, model[2].bias)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_depthwise_and_grouped_convolutions_are_rescaled_on_both_sides(kind, groups):
    layers = [kind(3, 4, 1), nn.ReLU(), kind(4, 8, 3, groups=groups, padding=1), nn.ReLU(), kind(8, 5, 1)]
    model = uneven(nn.Sequential(*layers))
    x = torch.randn(2, 3, *[6] * int(kind.__name__[4]), generator=GENERATOR)
    equal = lnn.equalize(model, x)
    assert_same_function(model, equal, x, 1e-6)
    middle = equal[2].weight.detach().double()
    peaks = middle.abs().flatten(2).amax(2)  # (8, 4 / groups): channel g * (4 / groups) + j is column j of group g
    reads = peaks.reshape(groups, 8 // groups, -1).amax(1).flatten()
    assert_close(rows(equal[0]), reads / reads.max())
    assert_close(rows(equal[2]), columns(equal[4]))


def test_residual_sums_share_their_factors():
    def way(net, x):
        x = net.stem(x).relu()
        return net.head((x + net.second(net.first(x).relu())).relu().mean((2, 3)))

    def conv(i):
        return nn.Conv2d(i, 6, 3, padding=1)

    model = uneven(Net(way, stem=conv(3), first=conv(6), second=conv(6), head=nn.Linear(6, 4)))
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    assert_close(rows(equal.first), columns(equal.second))
    written = torch.maximum(rows(equal.stem), rows(equal.second))
    assert_close(written, torch.maximum(columns(equal.first), columns(equal.head)))
    divided = rows(model.stem) / rows(equal.stem)
    multiplied = columns(equal.head) / columns(model.head)
    assert_close(divided / divided[0], multiplied / multiplied[0])


def test_concatenation_and_flattening():
    def way(net, x):
        both = torch.cat([net.first(x), net.second(x)], 1).relu()
        return net.head(F.max_pool2d(both, 4).flatten(1))

    model = uneven(Net(way, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 2, 1), head=nn.Linear(24, 5)))
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    reads = columns(equal.head, taps=4)
    assert_close(rows(equal.first), reads[:4])
    assert_close(rows(equal.second), reads[4:])


def test_transposed_convolutions():
    model = uneven(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2), nn.Conv2d(4, 2, 1))
    )
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    assert_close(rows(equal[0]), rows(equal[2]))
    assert_close(columns(equal[2]), columns(equal[3]))


@pytest.mark.parametrize("name", ["resnet20", "unet"])
def test_zoo(name):
    model, x = ZOO[name]()
    folded = lnn.fold_batchnorm(model, x)
    rescaling, left = equalize_(equal := copy.deepcopy(folded), x)
    assert_same_function(folded, equal, x, 1e-6)
    convolutions = [path for path, layer in folded.named_modules() if isinstance(layer, nn.Conv2d)]
    assert len(set(convolutions) & set(rescaling)) >= 0.9 * len(convolutions)
    assert any("reaches the output" in reason for reason in left.values())


def test_factors_of_low_rank_layers():
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), lnn.TuckerConv2d(8, 6, 3, rank=(4, 4)), nn.ReLU()))
    model.append(nn.Conv2d(6, 2, 1))
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    assert_close(rows(equal[0]), columns(equal[2].reduce))
    assert_close(rows(equal[2].core), columns(equal[2].expand))
    assert_close(rows(equal[2].expand), columns(equal[4]))


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def chain(between, first=None, **more):
    def way(net, x):
        return net.second(between(net, net.first(x)))

    return Net(way, first=first or nn.Conv2d(3, 6, 3), second=nn.Conv2d(6, 4, 3), **more)


def relu(net, y):
    return y.relu()


def hooked():
    model = chain(relu)
    model.second.register_forward_hook(lambda module, args, output: None)
    return model


def tied():
    model = chain(relu)
    model.other = nn.Conv2d(6, 4, 3)
    model.other.weight = model.second.weight
    return model


NOT_HOMOGENEOUS = "not homogeneous"
QUANT = lnn.QuantConv2d.from_pretrained_layer(nn.Conv2d(3, 6, 3))
PRUNED = lnn.PrunedConv2d.from_pretrained_layer(nn.Conv2d(3, 6, 3), sparsity=0.5)
REFUSED = {
    "relu6": (lambda: chain(lambda net, y: F.relu6(y)), NOT_HOMOGENEOUS),
    "silu": (lambda: chain(lambda net, y: F.silu(y)), NOT_HOMOGENEOUS),
    "gelu": (lambda: chain(lambda net, y: F.gelu(y)), NOT_HOMOGENEOUS),
    "sigmoid": (lambda: chain(lambda net, y: y.sigmoid()), NOT_HOMOGENEOUS),
    "constant": (lambda: chain(lambda net, y: y + 1), NOT_HOMOGENEOUS),
    "square": (lambda: chain(lambda net, y: y * y), NOT_HOMOGENEOUS),
    "absolute bound": (lambda: chain(lambda net, y: y.clamp(0, 100)), NOT_HOMOGENEOUS),
    "batch norm": (lambda: chain(lambda net, y: net.norm(y), norm=nn.BatchNorm2d(6)), "norm.*fold batch norms first"),
    "group norm": (lambda: chain(lambda net, y: net.norm(y), norm=nn.GroupNorm(6, 6)), "norm"),
    "quantized": (lambda: chain(relu, copy.deepcopy(QUANT)), "QuantConv2d"),
    "pruned": (lambda: chain(relu, copy.deepcopy(PRUNED)), "PrunedConv2d"),
    "overrides": (lambda: chain(relu, Doubling(3, 6, 3)), "Doubling overrides forward"),
    "parametrized": (lambda: chain(relu, parametrizations.weight_norm(nn.Conv2d(3, 6, 3))), "parametrized"),
    "hooks": (hooked, "hooks"),
    "tied": (tied, "shared"),
    "unseen": (lambda: chain(lambda net, y: 0 * y), "do not depend"),
}


@pytest.mark.filterwarnings("ignore:.*__torch_function__")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_stays_and_why(name):
    make, reason = REFUSED[name]
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    rescaling, left = equalize_(model, X)
    assert rescaling == {}
    assert any(re.search(reason, text) for path, text in left.items() if path.startswith("first"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bound_that_example_inputs_never_reach_is_found():
    model = chain(lambda net, y: F.relu6(y)).eval()
    with torch.no_grad():
        model.first.weight.mul_(1e-4)
    assert equalize_(model, X)[0] == {}
    assert equalize_(model, torch.zeros_like(X))[0] == {}


def test_only_the_channels_to_blame_stay():
    def way(net, x):
        return net.third(F.relu6(net.second(net.first(x).relu())))

    model = uneven(Net(way, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 4, 1), third=nn.Conv2d(4, 4, 1)))
    rescaling, left = equalize_(model, X)
    assert {path: set(factors) for path, factors in rescaling.items()} == {"first": {0}, "second": {1}}
    assert set(left) == {"second", "third"}


def test_a_model_that_checks_its_outputs():
    def way(net, x):
        y = net.second(net.first(x).relu())
        if y.abs().max() > 10000:
            raise ValueError("too large")
        return y

    model = uneven(Net(way, first=nn.Conv2d(3, 6, 3), second=nn.Conv2d(6, 4, 3)))
    equal = lnn.equalize(model, X)
    assert_same_function(model, equal, X, 1e-6)
    assert_close(rows(equal.first), columns(equal.second))


def test_dead_channels_keep_their_values():
    model = uneven(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    equal = lnn.equalize(model, X[:, 0, 0, :3])
    assert_same_function(model, equal, X[:, 0, 0, :3], 1e-6)
    for unit in (1, 2):
        assert torch.equal(equal[0].weight[unit], model[0].weight[unit])
        assert torch.equal(equal[0].bias[unit], model[0].bias[unit])
    assert all(bool(p.isfinite().all()) for p in equal.parameters())


def test_the_model_and_the_process_are_left_as_they_were():
    model = uneven(chain(relu)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.first.weight.requires_grad_(False)
    equal = lnn.equalize(model, X)
    assert model.training
    assert equal.training
    assert not equal.first.weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    again = lnn.equalize(model, X)
    assert all(torch.equal(a, b) for a, b in zip(equal.parameters(), again.parameters(), strict=True))


def test_bfloat16():
    model = uneven(chain(relu)).bfloat16()
    equal = lnn.equalize(model, X.bfloat16())
    assert equal.first.weight.dtype == torch.bfloat16
    torch.testing.assert_close(rows(equal.first), columns(equal.second), rtol=0.02, atol=0)
    assert_same_function(model, equal, X.bfloat16(), 0.05)


def test_errors():
    with pytest.raises(PlanError, match="the forward failed"):
        lnn.equalize(chain(relu), torch.zeros(1, 9, 8, 8))
    with pytest.raises(UnsupportedLayerError, match="no weight yet"):
        lnn.equalize(nn.LazyLinear(3), X)
    uncopyable = chain(relu)
    uncopyable.lock = (n for n in [1])
    with pytest.raises(PlanError, match=r"equalize.*deepcopy"):
        lnn.equalize(uncopyable, X)


@pytest.mark.cuda
def test_cuda(device):
    model = uneven(chain(relu))
    equal = lnn.equalize(model.to(device), X.to(device))
    assert equal.first.weight.device == device
    assert_same_function(model, equal, X.to(device), 1e-4)
