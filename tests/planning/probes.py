"""Networks whose curvature is measured, and a spy that keeps the probes that they got."""

import types

import torch
import torch.nn.functional as F
from torch import nn


class Spy(torch.autograd.Function):
    """The identity, which keeps the gradients that pass through it."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept.append(gradient.clone())
        return gradient, None


class Spied(nn.Module):
    """A network whose probes are kept, output by output."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.kept = types.SimpleNamespace(parts={})  # a dict of the module's own would be put back after the forward

    def forward(self, x):
        output = self.net(x)
        if isinstance(output, torch.Tensor):
            return Spy.apply(output, self.kept.parts.setdefault(0, []))
        return [Spy.apply(part, self.kept.parts.setdefault(i, [])) for i, part in enumerate(output)]

    def probes(self):
        return [torch.cat(parts) for parts in self.kept.parts.values()]


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(self.conv(self.first(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.left(x)
        y += F.relu(self.right(x), inplace=True)
        return self.drop(self.norm(y.relu_())).flatten(1)


class Tokens(nn.Module):
    """Linear layers with extra dims, and outputs of several shapes."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.pooled = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, x):
        hidden = self.inner(x).tanh()
        return [self.outer(hidden), self.pooled(hidden.mean(1))]


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (5,)),
    "relu": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (5,)),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), (5,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (2, 7, 7),
    ),
    "dense prediction": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)), (2, 5, 5)),
    "reused": (Reused, (2, 4, 4)),
    "in place": (InPlace, (2, 3, 3)),
    "tokens": (Tokens, (4, 3)),
}
