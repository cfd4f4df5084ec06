"""A small network to fine-tune, its data, and how near it comes to its teacher."""

import torch
from torch import nn

import lowrank_nn as lnn

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(2))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.fc(torch.relu(x).mean((2, 3)))


def make_net(train=False):
    """The network, with normalisation that fits the data, as after training."""
    torch.manual_seed(0)
    net = Net()
    net.bn.momentum = 1.0
    with torch.no_grad():
        net.fc.weight *= 10
        net(X)
    net.bn.momentum = 0.1
    return net.train(train)


TUCKER = lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4))


def compress(model, *steps, example=None, **options):
    return lnn.compress_model(
        model, X[:2] if example is None else example, list(steps), progress=False, **options
    ).model


def same_bits(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def distance(model, teacher):
    with torch.no_grad():
        return float((model.eval()(X) - teacher(X)).pow(2).mean())
