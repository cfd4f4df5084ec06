"""A CRNN (Shi et al. 2017): convolutions read an image strip, an LSTM reads its columns."""

from torch import Tensor, nn


class CRNN(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16, classes: int = 11) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.rnn = nn.LSTM(8 * width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).flatten(1, 2).transpose(1, 2)
        sequence, _ = self.rnn(columns)
        return self.head(sequence)
