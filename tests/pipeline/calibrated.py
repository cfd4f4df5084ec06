"""A small residual network with normalisation that fits its data, and images to calibrate and judge it on."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


def images(count, seed=0):
    """Smooth images: neighbouring pixels and channels go together, as in photographs."""
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    mix = torch.tensor([[1.0, 0.8, 0.6], [0.1, 0.5, 0.2], [0.0, 0.1, 0.2]])
    return nn.functional.avg_pool2d(torch.einsum("nchw,cd->ndhw", noise, mix), 3, 1, 1) + 0.3


def make_net():
    torch.manual_seed(0)
    model = Net()
    for norm in (model.stem_norm, model.norm1, model.norm2):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        for _ in range(2):
            model.train()(images(256, seed=7))
    return model.eval()


BATCHES = images(240).split(48)
TEST = images(200, seed=1)
