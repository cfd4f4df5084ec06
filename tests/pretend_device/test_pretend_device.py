"""The device is one: what mixes it with the CPU fails, and what stays on it gives the CPU's results."""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.cuda

MIXTURES = {
    "sum": lambda x, y: x + y,
    "product": lambda x, y: x @ y,
    "in place": lambda x, y: y.add_(x),
    "convolution": lambda x, y: torch.conv2d(x[None, None], y[None, None]),
    "concatenation": lambda x, y: torch.cat([x, y]),
    "norm": lambda x, y: torch.batch_norm(x, y[0], y[1], None, None, True, 0.1, 1e-5, False),
    "choice": lambda x, y: torch.where(x > 0, y, x),
}

IN_PLACE = {
    "slice": lambda x: x[1:3].mul_(2),
    "transposed": lambda x: x.T.add_(torch.arange(4.0, device=x.device)),
    "diagonal": lambda x: x.diagonal().fill_(3),
    "window": lambda x: x.unfold(0, 2, 2).sub_(1),
    "data": lambda x: setattr(x, "data", x.data[:2] + 1),
    "set": lambda x: x.set_(torch.ones(2, 2, device=x.device)),
    "larger": lambda x: x.resize_(2, 8).fill_(1),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixing_devices_fails(name, device):
    x = torch.eye(4)
    with pytest.raises(RuntimeError, match=r"same device|should be the same"):
        MIXTURES[name](x.to(device), x)
    with pytest.raises(RuntimeError, match=r"same device|should be the same"):
        MIXTURES[name](x, x.to(device))


@pytest.mark.parametrize("name", IN_PLACE)
def test_changes_through_views(name, device):
    expected = torch.arange(16.0).reshape(4, 4)
    there = expected.to(device, copy=True)
    IN_PLACE[name](expected)
    IN_PLACE[name](there)
    assert there.device == device
    assert torch.equal(there.cpu(), expected)


def test_training_step(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(5, 2, 6, 6)
    results = []
    for place in ("cpu", device):
        model.to(place)
        model.zero_grad()
        model(x.to(place)).square().sum().backward()
        results.append([tensor.cpu() for tensor in (*(p.grad for p in model.parameters()), model[1].running_var)])
    torch.testing.assert_close(results[0][:-1], results[1][:-1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0][-1], results[1][-1]), "the second step changes the running statistics again"
