"""A language model with tied embeddings (Press and Wolf 2017) and one convolution shared by two blocks."""

from torch import Tensor, nn


class ConvBlock(nn.Module):
    def __init__(self, conv: nn.Conv1d, dim: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.conv(x.transpose(1, 2)).transpose(1, 2).relu())


class TiedNet(nn.Module):
    def __init__(self, vocabulary: int = 40, dim: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        conv = nn.Conv1d(dim, dim, 3, padding=1)
        self.block1 = ConvBlock(conv, dim)
        self.block2 = ConvBlock(conv, dim)
        self.mix = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block2(self.block1(self.embed(tokens)))
        x = x + self.mix(x).relu()
        x = x + self.mix(x).relu()  # a reused layer, besides the shared one
        return self.output(x)
