"""LeNet-5 (LeCun et al. 1998), on 28 x 28 digits."""

from torch import Tensor, nn


class LeNet5(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x).tanh())
        x = self.pool(self.conv2(x).tanh())
        x = self.fc1(x.flatten(1)).tanh()
        return self.fc3(self.fc2(x).tanh())
