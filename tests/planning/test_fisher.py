"""The diagonal Fisher information against gradients written out by hand."""

import collections
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear, SVDConv2d
from lowrank_nn.planning import diagonal_fisher


def squared(model, batch):
    x, y = batch
    return (model(x) - y).square().sum() / 2 / len(x)


def linear_problem(n=7, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 3))
    layer = nn.Linear(4, 3, dtype=torch.float64)
    residual = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy() - y
    return layer, torch.from_numpy(x), torch.from_numpy(y), residual[:, :, None] * x[:, None, :]


def test_mean_of_squares_of_each_samples_gradient():
    layer, x, y, gradients = linear_problem()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    fisher = diagonal_fisher(nn.Sequential(layer), batches, squared)
    assert list(fisher) == ["0"]
    np.testing.assert_allclose(fisher["0"].numpy(), (gradients**2).mean(0), rtol=1e-12)


def test_per_batch_squares():
    layer, x, y, gradients = linear_problem()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    fisher = diagonal_fisher(layer, batches, squared, per_sample=False)
    expected = (gradients[:3].mean(0) ** 2 + gradients[3:].mean(0) ** 2) / 2
    np.testing.assert_allclose(fisher[""].numpy(), expected, rtol=1e-12)


def test_max_batches_and_endless_batches():
    layer, x, y, gradients = linear_problem()
    fisher = diagonal_fisher(layer, itertools.repeat((x[:2], y[:2])), squared, max_batches=3)
    np.testing.assert_allclose(fisher[""].numpy(), (gradients[:2] ** 2).mean(0), rtol=1e-12)


def test_containers_are_cut_alike():
    layer, x, y, _ = linear_problem()
    Pair = collections.namedtuple("Pair", "inputs targets")
    expected = diagonal_fisher(layer, [(x, y)], squared)[""]

    def by_name(model, batch):
        return squared(model, (batch["x"], batch["rest"][0]))

    def by_field(model, batch):
        return squared(model, (batch.inputs, batch.targets))

    scale = torch.tensor(1.0)  # without dims: not cut
    mapping = collections.defaultdict(int, x=x, rest=[y, scale], name="ids")
    assert torch.equal(diagonal_fisher(layer, [mapping], by_name)[""], expected)
    assert torch.equal(diagonal_fisher(layer, [Pair(x, y)], by_field)[""], expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.fc(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def data(n=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 5, 5, generator=generator), torch.arange(n) % 3


def by_autograd(model, parameter, batch):
    total = 0
    for x, y in zip(*batch, strict=True):
        (gradient,) = torch.autograd.grad(classify(model, (x[None], y[None])), parameter)
        total = total + gradient.square()
    return total / len(batch[0])


def test_layers_of_a_network():
    net = Net().eval()
    fisher = diagonal_fisher(net, [data()], classify)
    assert list(fisher) == ["conv", "fc"]  # the loss does not depend on the third
    for path in fisher:
        expected = by_autograd(net, net.get_submodule(path).weight, data())
        torch.testing.assert_close(fisher[path], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails):
    net = Net().train()
    net.bn.eval()
    net.fc.requires_grad_(False)
    net.conv.weight.grad = kept = torch.ones_like(net.conv.weight)
    calls = net.calls
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random_state, python_state = torch.get_rng_state(), random.getstate()

    def loss(model, batch):
        torch.rand(3)
        assert not model.training
        return classify(model, batch) * (float("nan") if fails else 1)

    if fails:
        with pytest.raises(CalibrationError):
            diagonal_fisher(net, [data()], loss)
    else:
        assert "fc" in diagonal_fisher(net, [data()], loss)  # frozen layers are measured too
    assert net.training
    assert net.conv.training
    assert not net.bn.training
    assert [p.requires_grad for p in net.fc.parameters()] == [False, False]
    assert net.conv.weight.requires_grad
    assert net.conv.weight.grad is kept
    assert bool((kept == 1).all())
    assert net.fc.weight.grad is None
    assert net.calls is calls
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(torch.get_rng_state(), random_state)
    assert random.getstate() == python_state


def test_works_without_gradients_around_it():
    net = Net().eval()
    with torch.no_grad():
        fisher = diagonal_fisher(net, [data()], classify)
    assert fisher["conv"].any()


def test_repeats_bit_for_bit():
    net = Net()
    first, second = (diagonal_fisher(net, [data()], classify) for _ in range(2))
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_half_precision_widens():
    layer = nn.Linear(4, 3, dtype=torch.bfloat16)
    x, y = torch.randn(2, 4, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    assert diagonal_fisher(layer, [(x, y)], squared)[""].dtype == torch.float32


def test_pruned_layers_give_the_dense_shape():
    net = Net().eval()
    net.conv = PrunedConv2d.from_pretrained_layer(net.conv, sparsity=1 / 3, granularity="window")
    net.fc = PrunedLinear.from_pretrained_layer(net.fc, sparsity=0.5)
    fisher = diagonal_fisher(net, [data()], classify)
    assert net.conv.window is not None
    for path in ("conv", "fc"):
        layer = net.get_submodule(path)
        assert fisher[path].shape == layer.weight.shape
        assert not fisher[path][layer.weight == 0].any()
    top, left, height, width = net.conv.window
    inside = fisher["conv"][..., top : top + height, left : left + width]
    torch.testing.assert_close(inside, by_autograd(net, net.conv.kernel, data()))
    further = PrunedLinear.from_pretrained_layer(net.fc, sparsity=0.75, criterion="obd", fisher=fisher["fc"])
    assert further.nonzeros == 3


def test_inside_low_rank_layers_and_tied_weights():
    net = Net().eval()
    net.conv = SVDConv2d.from_pretrained_layer(net.conv, rank=2)
    net.fc = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    net.fc[1].weight = net.fc[0].weight
    fisher = diagonal_fisher(net, [data()], classify, paths=["conv.reduce", "fc.0", "fc.1"])
    torch.testing.assert_close(fisher["conv.reduce"], by_autograd(net, net.conv.reduce.weight, data()))
    torch.testing.assert_close(fisher["fc.1"], by_autograd(net, net.fc[0].weight, data()))
    assert torch.equal(fisher["fc.0"], fisher["fc.1"])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"paths": ["bn"]}, OptionError, "at 'bn'; there are: 'conv', 'fc', 'unused'"),
        ({"paths": ["nowhere"]}, OptionError, "'nowhere'"),
        ({"max_batches": 0}, OptionError, "max_batches must be at least 1, got 0"),
        ({"batches": []}, CalibrationError, "batches gave nothing"),
        ({"batches": [(data(4)[0], data(3)[1])]}, CalibrationError, r"first dims of \[3, 4\]"),
        ({"loss": lambda m, b: m(b[0])}, CalibrationError, r"one finite number, got shape \(1, 3\)"),
        ({"loss": lambda m, b: classify(m, b) * float("inf")}, CalibrationError, "got inf"),
        ({"loss": lambda m, b: classify(m, b).detach()}, CalibrationError, "does not depend"),
    ],
)
def test_errors(arguments, error, match):
    given = {"batches": [data()], "loss": classify} | arguments
    with pytest.raises(error, match=match):
        diagonal_fisher(Net(), given.pop("batches"), given.pop("loss"), **given)


def hadamard(n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_optimal_brain_damage_is_exact_on_a_quadratic():
    # Orthogonal inputs and residuals of size one: F is the second derivative, which is diagonal, and the gradient is
    # zero. So the weights to prune are those that raise the loss least, found here by trying every subset.
    table, scales = hadamard(8), np.array([0.3, 3.0, 1.0, 0.5, 2.0, 0.2])
    w = np.array([2.0, 0.25, 0.5, -1.5, 0.4, 3.5])
    x, residual = table[:, 1:7] * scales, table[:, 7]
    layer = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w))
    batch = torch.from_numpy(x), torch.from_numpy(x @ w - residual)[:, None]
    fisher = diagonal_fisher(layer, [batch], squared)[""]
    np.testing.assert_allclose(fisher.numpy()[0], scales**2, rtol=1e-12)

    def loss(kept):
        return float(np.mean((x @ (w * np.isin(range(6), kept)) - batch[1].numpy()[:, 0]) ** 2) / 2)

    for kept in range(1, 6):
        best = min(itertools.combinations(range(6), kept), key=loss)
        pruned = PrunedLinear.from_pretrained_layer(layer, sparsity=1 - kept / 6, criterion="obd", fisher=fisher)
        assert tuple(pruned.mask[0].nonzero().flatten().tolist()) == best
        by_size = PrunedLinear.from_pretrained_layer(layer, sparsity=1 - kept / 6)
        assert not torch.equal(by_size.mask, pruned.mask)
