"""What each weight format keeps of trained kernels, how fast large linear layers are in it, and how they train.

python benchmarks/formats.py --weights DIR/weights/cifar10_resnet20.safetensors
python benchmarks/formats.py --speed
python benchmarks/formats.py --mnist DIR/MNIST/raw

The first prints the mean relative error ||W - W'|| / ||W|| over the 3 x 3 kernels behind the stem, each format fitted
without data at (nearly) the same share of the parameters. The second times a linear layer of 4096 x 4096: medians, all
layers in turn in one process. The third trains a network of 784-256-10 whose first layer has the format, from scratch.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mnist_data import Shuffled, error, read_digits
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lowrank_nn as lnn

SHARES = (0.5, 0.3, 0.2, 0.1)
FITS: dict[str, Callable[[nn.Conv2d, float], lnn.CompressedLayer]] = {
    **{
        cls.__name__: lambda conv, share, cls=cls: cls.from_pretrained_layer(conv, rank=lnn.Params(share))
        for cls in (
            lnn.CPConv2d,
            lnn.TuckerConv2d,
            lnn.SpatialSVDConv2d,
            lnn.TTConv2d,
            lnn.SVDConv2d,
            lnn.KroneckerConv2d,
        )
    },
    "TransferredConv2d": lambda conv, share: lnn.TransferredConv2d.from_pretrained_layer(
        conv, base_filters=max(1, round(share * conv.out_channels - conv.out_channels / conv.weight[0].numel()))
    ),
    "HashedConv2d": lambda conv, share: lnn.HashedConv2d.from_pretrained_layer(conv, share=share),
    "CirculantConv2d": lambda conv, share: lnn.CirculantConv2d.from_pretrained_layer(
        conv, block_size=math.ceil(1 / share)
    ),
}
WIDE: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": lambda: nn.Linear(4096, 4096),
    "SVDLinear, rank 32": lambda: lnn.SVDLinear(4096, 4096, rank=32),
    "KroneckerLinear, rank 4": lambda: lnn.KroneckerLinear(4096, 4096, rank=4),
    "TTLinear, 3 cores, rank 8": lambda: lnn.TTLinear(4096, 4096, rank=8),
    "CirculantLinear, blocks of 16": lambda: lnn.CirculantLinear(4096, 4096, block_size=16),
    "CirculantLinear, blocks of 64": lambda: lnn.CirculantLinear(4096, 4096, block_size=64),
    "CirculantLinear, blocks of 256": lambda: lnn.CirculantLinear(4096, 4096, block_size=256),
}
FIRST: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": lambda: nn.Linear(784, 256),
    "SVDLinear, rank 4": lambda: lnn.SVDLinear(784, 256, rank=4),
    "KroneckerLinear, rank 4": lambda: lnn.KroneckerLinear(784, 256, rank=4),
    "KroneckerLinear, rank 1": lambda: lnn.KroneckerLinear(784, 256, rank=1),
    "TTLinear, 3 cores, rank 8": lambda: lnn.TTLinear(784, 256, rank=8),
    "CirculantLinear, blocks of 56": lambda: lnn.CirculantLinear(784, 256, block_size=56),
    "HashedLinear": lambda: lnn.HashedLinear(784, 256, buckets=3584),
}


def errors(weights: Path) -> None:
    """Print the mean relative error of every format at every share of the parameters."""
    net = cifar_resnet_from(load_file(weights))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)][1:]
    dense = sum(conv.weight.numel() for conv in convs)
    print(
        "| parameters left |" + "".join(f" {share:.0%} |" for share in SHARES) + "\n| --- |" + " ---: |" * len(SHARES)
    )
    for name, fit in FITS.items():
        cells = []
        for share in SHARES:
            layers = [fit(conv, share) for conv in convs]
            lost = [
                ((layer.weight - conv.weight).norm() / conv.weight.norm()).item()
                for layer, conv in zip(layers, convs, strict=True)
            ]
            left = sum(sum(p.numel() for p in layer.parameters()) for layer in layers) / dense
            cells.append(f"{statistics.mean(lost):.2f}" + ("" if abs(left - share) < 0.01 else f" ({left:.0%})"))
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


def speed(rounds: int) -> None:
    """Print the time of one call and of one training step of every wide layer."""
    layers = {name: make() for name, make in WIDE.items()}
    one, many = torch.randn(1, 4096), torch.randn(32, 4096)
    columns = {
        "batch 1": in_turn(layers, lambda layer: forward(layer, one), rounds, training=False),
        "batch 32": in_turn(layers, lambda layer: forward(layer, many), rounds, training=False),
        "training step, batch 32": in_turn(layers, lambda layer: step(layer, many), rounds, training=True),
    }
    print(f"{torch.get_num_threads()} threads, medians of {rounds} rounds, ms.\n")
    print("| | parameters |" + "".join(f" {name} |" for name in columns) + "\n| --- |" + " ---: |" * (len(columns) + 1))
    for name, layer in layers.items():
        cells = [f"{column[name]:.2f}" for column in columns.values()]
        print(f"| {name} | {sum(p.numel() for p in layer.parameters()):,} | " + " | ".join(cells) + " |")


def in_turn(
    layers: dict[str, nn.Module], run: Callable[[nn.Module], Any], rounds: int, *, training: bool
) -> dict[str, float]:
    """Return the median milliseconds of ``run`` on every layer; all run once a round."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        run(layer.train(training))  # packs, transforms, warms up
    for _ in range(rounds):
        for name, layer in layers.items():
            start = time.perf_counter()
            run(layer)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


@torch.no_grad()
def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer without gradients."""
    result: torch.Tensor = layer(x)
    return result


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Compute the gradients of a loss."""
    layer(x).square().mean().backward()


def from_scratch(folder: Path, epochs: int, seeds: int) -> None:
    """Print the test error of 784-256-10 networks by the format of their first layer."""
    images, labels = read_digits(folder, "train")
    test, answers = read_digits(folder, "t10k")
    print(f"60,000 training images, {epochs} epochs, {seeds} seeds.\n\n| first layer | its weight | test error, % |")
    print("| --- | ---: | ---: |")
    for name, make in FIRST.items():
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            layer = make()
            net = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(256, 10))
            optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
            batches = Shuffled(images, labels, 128)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(batches))
            for _ in range(epochs):
                for x, y in batches:
                    optimizer.zero_grad()
                    F.cross_entropy(net(x), y).backward()
                    optimizer.step()
                    schedule.step()
            found.append(f"{error(net, test, answers):.1f}")
        count = sum(p.numel() for p in layer.parameters()) - 256
        print(f"| {name} | {count:,} | {', '.join(found)} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--speed", action="store_true", help="time wide linear layers")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's four files")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.weights:
        errors(arguments.weights)
    if arguments.speed:
        speed(arguments.rounds)
    if arguments.mnist:
        from_scratch(arguments.mnist, arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()
