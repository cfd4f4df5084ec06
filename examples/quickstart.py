"""Train a small CNN on scikit-learn's digits, compress it with a chain of steps, save it, load it in a new process.

Run it with ``python examples/quickstart.py``; it needs no download and less than 90 seconds on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from digits import digits, train
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank_nn as lnn


def small_cnn() -> nn.Module:
    """Return an untrained CNN of three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the class of each image."""
    return model.eval()(images).argmax(1)


def load_and_predict(path: Path) -> None:
    """Load a compressed model on a fresh instance and print its predictions: what the new process does."""
    model = lnn.load(path, small_cnn())
    images, _ = digits()[1].tensors
    print(" ".join(map(str, predict(model, images).tolist())))


def main() -> None:
    """Train, compress, report, save, load elsewhere, compare."""
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True)
    images, labels = test.tensors
    model = small_cnn()
    train(model, loader, epochs=15)
    dense_accuracy = 100 * (predict(model, images) == labels).float().mean().item()

    result = lnn.compress_model(
        model,
        images[:1],
        [
            lnn.LowRank(but_not="0"),
            lnn.Prune(0.5, but_not=["0", "14"]),
            lnn.FineTune(loader, epochs=8, lr=1e-3),
            lnn.Quantize("int8"),
        ],
        budget=lnn.Budget(params=0.4),
    )
    small_accuracy = 100 * (predict(result.model, images) == labels).float().mean().item()
    print(result.report)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.lrnn"
        dense_bytes, small_bytes = lnn.save(model, Path(folder) / "dense.lrnn"), lnn.save(result.model, path)
        command = [sys.executable, __file__, "--load", str(path)]
        elsewhere = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    equal = elsewhere.split() == [str(label) for label in predict(result.model, images).tolist()]
    print(f"\naccuracy {dense_accuracy:.2f} % dense, {small_accuracy:.2f} % compressed")
    print(
        f"file {dense_bytes:,} bytes dense, {small_bytes:,} bytes compressed: {dense_bytes / small_bytes:.1f}x smaller"
    )
    print(f"loaded in a new process: {'equal' if equal else 'DIFFERENT'} predictions on {len(labels)} test images")
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load", type=Path, help="load this file and print its predictions (used by the script itself)"
    )
    arguments = parser.parse_args()
    if arguments.load:
        load_and_predict(arguments.load)
    else:
        main()
