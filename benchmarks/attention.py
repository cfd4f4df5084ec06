"""Attentions split or not: accuracy of a small transformer at a share of its parameters, speed of a ViT-B block.

python benchmarks/attention.py

A transformer of three layers, 64 wide, on scikit-learn's digits, 2 x 2 pixels a token; compressed with 512 unlabelled
training images, nothing trained after.
"""

from __future__ import annotations

import argparse
import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import lowrank_nn as lnn
from lowrank_nn.cost import compare_speed

SHARES = (0.6, 0.4, 0.3, 0.2)


class DigitTransformer(nn.Module):
    """Torch's own encoder on the 16 patches of an 8 x 8 image."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, shape ``(N, 8, 8)``."""
        patches = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        y: Tensor = self.head(self.norm(self.encoder(self.embed(patches) + self.position)).mean(1))
        return y


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train with AdamW and one cycle of the learning rate."""
    batches = [torch.randperm(len(images)).split(64) for _ in range(epochs)]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(batches[0]))
    for batch in (batch for epoch in batches for batch in epoch):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified rightly, in per cent."""
    return 100 * float((model(images).argmax(1) == labels).float().mean())


def compressed_accuracy(model: nn.Module, share: float, images: Tensor, test: tuple[Tensor, Tensor]) -> str:
    """Return the accuracy at a share of the parameters, as a cell of the table."""
    try:
        result = lnn.compress_model(model, images[:1], budget=lnn.Budget(params=share), calibration=[images])
    except lnn.errors.BudgetError:
        return "out of reach"
    return f"{accuracy(result.model, *test):.1f} %"


def print_speed() -> None:
    """Print how long a ViT-B block takes, split and compressed, beside the fused one."""
    block = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True, norm_first=True).eval()
    x = torch.randn(1, 197, 768)
    split, recipe = lnn.split_attention(block), [lnn.Apply(lnn.SVDLinear, rank=128)]
    blocks = {
        "split": split,
        "split, rank 128": lnn.compress_model(split, x, recipe).model,
        "not split, rank 128": lnn.compress_model(block, x, recipe).model,
    }
    with torch.no_grad():
        for name, other in blocks.items():
            timing = compare_speed(functools.partial(block, x), functools.partial(other, x))
            print(f"{name}: {timing.ratio:.2f} times as fast as the fused block ({timing.first:.1f} ms)")


def main() -> None:
    """Read the command line, train, compress, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    known, test = order[:1297], order[1297:]
    model = DigitTransformer()
    train(model, images[known], labels[known], arguments.epochs)
    held_out = (images[test], labels[test])
    print(f"dense: {accuracy(model, *held_out):.1f} %")
    for name, given in (("not split", model), ("split", lnn.split_attention(model))):
        cells = [compressed_accuracy(given, share, images[known[:512]], held_out) for share in SHARES]
        print(f"| {name} | {' | '.join(cells)} |")
    print_speed()


if __name__ == "__main__":
    main()
