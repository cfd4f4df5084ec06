"""High biases are absorbed where that is right on all data seen, and nowhere else."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_nn.graph.absorption import absorb_, find_absorbable
from lowrank_nn.planning.extremes import collect_extremes

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Two layers, and what stands between them."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Conv2d(3, 6, 3), second or nn.Conv2d(6, 4, 3)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def high(model, seed=1):
    """Give half the channels of every layer biases far above what their weights can make of X."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
                nn.init.uniform_(layer.weight, -0.2, 0.2, generator=generator)
                if layer.bias is not None:
                    nn.init.uniform_(layer.bias, 5, 9, generator=generator)
                    layer.bias[1::2] -= 7
    return model.eval()


def absorbed(model, x=X):
    """Return a copy of the model after absorption on ``x``, what was absorbed, and what stays."""
    model = copy.deepcopy(model)
    found = find_absorbable(model, x)
    extremes = collect_extremes(model, x, [channels.computed[0].path for channels, _ in found])
    return (model, *absorb_(model, found, extremes, x))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def assert_same_function(model, other, x):
    expected = outputs(model, x)
    torch.testing.assert_close(outputs(other, x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_biases_are_the_formula_and_only_values_below_the_least_differ():
    model = high(Chain(nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 4))).double()
    x = torch.rand(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    small, paths, _ = absorbed(model, x)
    w1, b1, w2, b2 = (t.detach().numpy() for t in (*model.first.parameters(), *model.second.parameters()))
    c = np.maximum((x.numpy() @ w1.T + b1).min(0), 0)
    assert 0 < (c > 0).sum() < 6
    assert paths == ("first",)
    np.testing.assert_allclose(small.first.bias.detach(), b1 - c, rtol=1e-12)
    np.testing.assert_allclose(small.second.bias.detach(), b2 + w2 @ c, rtol=1e-12)
    assert torch.equal(small.first.weight, model.first.weight)
    assert torch.equal(small.second.weight, model.second.weight)
    far = 30 * torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = far.numpy() @ w1.T + b1
    assert (h < c).any()
    np.testing.assert_allclose(outputs(small, far), np.maximum(h, c) @ w2.T + b2, rtol=1e-10, atol=1e-10)


PASS_ON = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(6),
    "nothing": nn.Identity(),
    "max-pool": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "average": nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)),
    "dropout": nn.Sequential(nn.ReLU(), nn.Dropout()),
}
READERS = {
    "plain": nn.Conv2d(6, 4, 3),
    "strided and dilated": nn.Conv2d(6, 4, 2, stride=2, dilation=2),
    "depthwise": nn.Conv2d(6, 6, 2, groups=6),
    "grouped": nn.Conv2d(6, 4, 2, groups=2),
    "reflecting": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    "1 x 1, same": nn.Conv2d(6, 4, 1, padding="same"),
}


@pytest.mark.parametrize("between", PASS_ON.values(), ids=PASS_ON)
def test_what_passes_positive_values_on(between):
    model = high(Chain(between))
    small, paths, left = absorbed(model)
    assert (paths, left) == (("first",), {})
    assert_same_function(model, small, X)
    assert float(outputs(small.first, X).amax()) < float(outputs(model.first, X).amax()) - 3


@pytest.mark.parametrize("second", READERS.values(), ids=READERS)
def test_what_makes_up_for_it(second):
    model = high(Chain(nn.ReLU(), second=copy.deepcopy(second)))
    small, paths, left = absorbed(model)
    assert (paths, left) == (("first",), {})
    assert_same_function(model, small, X)


def test_chains_flattening_and_three_dimensions():
    layers = [nn.Conv3d(3, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    x = X.reshape(4, 3, 4, 8, 8)[..., :4, :4]
    model = high(nn.Sequential(*layers))
    small, paths, _ = absorbed(model, x)
    assert paths == ("0", "2")
    assert_same_function(model, small, x)


class Joined(nn.Module):
    """Two layers whose outputs are concatenated for one reader, and a residual sum."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(6, 4, 1)
        self.one, self.two, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.both(torch.cat([self.left(x), self.right(x)], 1).relu()).relu()
        return self.head((x + self.two(self.one(x).relu())).relu())


def test_concatenations_are_followed_and_residual_sums_stay():
    model = high(Joined())
    small, paths, _ = absorbed(model)
    assert paths == ("left", "right", "one")
    assert_same_function(model, small, X)
    assert all(torch.equal(p, small.get_parameter(n)) for n, p in model.named_parameters() if "weight" in n)


STAYS = {
    "zero padding": (Chain(nn.ReLU(), second=nn.Conv2d(6, 4, 3, padding=1)), "second pads with zeros"),
    "same": (Chain(nn.ReLU(), second=nn.Conv2d(6, 4, 3, padding="same")), "second pads with zeros"),
    "transposed": (Chain(nn.ReLU(), second=nn.ConvTranspose2d(6, 4, 3)), "transposed"),
    "no bias": (Chain(nn.ReLU(), second=nn.Conv2d(6, 4, 3, bias=False)), "second has no bias"),
    "relu6": (Chain(nn.ReLU6()), "does not leave positive values as they are"),
    "a bound far off": (Chain(lambda y: y.clamp(0, 30)), "does not leave positive values as they are"),
    "silu": (Chain(nn.SiLU()), "does not leave positive values as they are"),
    "a padded average": (Chain(nn.AvgPool2d(3, 1, 1)), "does not leave positive values as they are"),
    "a factor": (Chain(lambda y: 2 * y), "does not leave positive values as they are"),
    "unseen": (Chain(lambda y: 0 * y), "does not leave positive values|do not depend"),
    "batch norm": (Chain(nn.BatchNorm2d(6)), "fold batch norms first"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_and_why(name):
    model, reason = STAYS[name]
    model = high(copy.deepcopy(model))
    small, paths, left = absorbed(model)
    assert paths == ()
    assert re.search(reason, left["first"])
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), model.parameters(), strict=True))


def test_channels_that_reach_zero_stay_without_a_word():
    model = high(Chain(F.relu))
    with torch.no_grad():
        model.first.bias.fill_(-3)
    small, paths, left = absorbed(model)
    assert (paths, left) == ((), {})
    assert torch.equal(small.second.bias, model.second.bias)


def test_extremes_are_those_of_all_batches_by_channel():
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(245, 4)).eval()
    found = collect_extremes(model, X.split(5), ["0", "3"])
    y = outputs(model[0], X)
    torch.testing.assert_close(found["0"].least, y.amin((0, 2, 3)).double(), rtol=1e-6, atol=1e-6)
    assert found["0"].largest == pytest.approx(float(y.abs().max()), rel=1e-6)
    torch.testing.assert_close(found["3"].least, outputs(model, X).amin(0).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_cuda(device):
    model = high(Chain(nn.ReLU()))
    small, paths, _ = absorbed(model.to(device), X.to(device))
    assert paths == ("first",)
    assert small.first.bias.device == device
    assert_same_function(model, small, X.to(device))
