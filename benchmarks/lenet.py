"""Deep Compression of LeNet-300-100 and LeNet-5 on MNIST, in bytes that ``save`` wrote.

python benchmarks/lenet.py --data DIR

DIR holds ``MNIST/raw`` as torchvision downloads it. Trains each network, prunes it by magnitude in rounds with
training in between, makes the weights that are left share few numbers, trains these, and writes the file. The dense
network is trained on the images as they are, the compressed one on distorted ones (turned, scaled, shifted a little);
what that alone does for the dense network is in the table too. Prints tables with the columns of Han et al. 2016;
errors are those of the last epoch on the 10,000 test images, by which nothing was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mnist_data import Shuffled, error, read_digits
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.storage import stored_bytes

DISTORTION = 0.12


class Data(NamedTuple):
    """Images and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One network and how it is compressed.

    Attributes:
        name: Name of the network.
        build: Makes it, untrained.
        paper: Errors before and after, and compression rate, of Han et al. 2016.
        layers: By path, name in the paper, share of weights pruned and bits of those left.
        lr: Learning rate of the dense network; retraining has half of it, codebooks a thirtieth.
        epochs: Of the dense network; after the last round of pruning (one after each other); of the codebooks.
        rounds: Rounds of pruning.
    """

    name: str
    build: Callable[[], nn.Module]
    paper: tuple[float, float, int]
    layers: dict[str, tuple[str, float, int]]
    lr: float
    epochs: tuple[int, int, int]
    rounds: int

    def recipe(self, loader: Any) -> list[lnn.Step]:
        """Return the steps. The shares pruned rise as 1 - (1 - t)^3, fast where most weights do not matter."""
        steps: list[lnn.Step] = []
        for done in range(1, self.rounds + 1):
            part = 1 - (1 - done / self.rounds) ** 3
            steps += [lnn.Prune(part * share, where=path) for path, (_, share, _) in self.layers.items()]
            steps.append(self.retraining(loader, self.epochs[1] if done == self.rounds else 1))
        steps += [lnn.Codebook(bits, where=path) for path, (_, _, bits) in self.layers.items()]
        return [*steps, fine_tune(loader, self.epochs[2], self.lr / 30)]

    def retraining(self, loader: Any, epochs: int) -> lnn.FineTune:
        """Return the training of a pruned network."""
        return fine_tune(loader, epochs, self.lr / 2)


def lenet_300_100() -> nn.Module:
    """LeNet-300-100: two hidden layers."""
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """LeNet-5 as Caffe has it: no activation behind its convolutions."""
    convolutions = (nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


EXPERIMENTS = (
    Experiment(
        "LeNet-300-100",
        lenet_300_100,
        (1.64, 1.58, 40),
        {"1": ("ip1", 0.95, 3), "3": ("ip2", 0.9, 3), "5": ("ip3", 0.5, 3)},
        lr=0.1,
        epochs=(15, 18, 3),
        rounds=5,
    ),
    Experiment(
        "LeNet-5",
        lenet_5,
        (0.80, 0.74, 39),
        {"0": ("conv1", 0.4, 4), "2": ("conv2", 0.9, 3), "5": ("ip1", 0.96, 3), "7": ("ip2", 0.85, 3)},
        lr=0.05,
        epochs=(6, 6, 2),
        rounds=4,
    ),
)


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return SGD with momentum; its weight decay leaves weights that are not needed small, to be pruned."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def fine_tune(loader: Any, epochs: int, lr: float) -> lnn.FineTune:
    """Return a step of training, a tenth of it towards the dense network's outputs."""
    return lnn.FineTune(loader, epochs, optimizer=functools.partial(sgd, lr=lr), temperature=2.0, alpha=0.1)


def train(model: nn.Module, loader: Any, epochs: int, lr: float) -> None:
    """Train on labels: the learning rate rises for a twentieth of the time, then falls to zero."""
    optimizer = sgd(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * len(loader), pct_start=0.05, cycle_momentum=False
    )
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()


def print_layers(experiment: Experiment, small: nn.Module) -> None:
    """Print what the weights of each layer take, packed (P + Q) and coded (P + Q + H)."""
    print(
        "| layer | weights | kept | weight bits P+Q | P+Q+H | index bits P+Q | P+Q+H | of float32 P+Q | P+Q+H |\n|"
        + " --- |" * 9
    )
    sizes = [stored_bytes(small, coding=coding) for coding in ("none", "auto")]
    total = np.zeros(8)
    for path, (name, _, _) in experiment.layers.items():
        layer = small.get_submodule(path)
        assert isinstance(layer, (lnn.CodebookConv2d, lnn.CodebookLinear))
        row = [layer.indices.numel(), layer.nonzeros or layer.indices.numel()]
        for part in ("indices", "mask", ""):
            row += [sum(n for key, n in size.items() if key.startswith(f"{path}.{part}")) for size in sizes]
        _print_row(name, np.array(row))
        total += row
    _print_row("total", total)


def _print_row(name: str, row: NDArray[np.float64]) -> None:
    weights, kept, *parts = row
    cells = [f"{weights:,.0f}", f"{kept / weights:.1%}"]
    cells += [f"{8 * size / kept:.1f}" for size in parts[:4]]
    cells += [f"{size / (4 * weights):.2%}" for size in parts[4:]]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def run(experiment: Experiment, data: Data, seed: int) -> str:
    """Train, compress and save one network, print its table, and return its row of the summary."""
    begin = time.process_time()
    torch.manual_seed(seed)
    dense, plain, distorted = experiment.build(), Shuffled(*data.train, 128), Shuffled(*data.train, 128, DISTORTION)
    train(dense, plain, experiment.epochs[0], experiment.lr)
    image = data.train[0][:1]
    small = lnn.compress_model(dense, image, experiment.recipe(distorted), seed=seed).model
    retrained = lnn.compress_model(
        dense, image, experiment.retraining(distorted, experiment.epochs[1]), seed=seed
    ).model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.lrnn"
        sizes = lnn.save(dense, Path(folder) / "dense.lrnn"), lnn.save(small, path)
        loaded = lnn.load(path, experiment.build())
    print(f"\n{experiment.name}\n")
    print_layers(experiment, small)
    before, after, rate = experiment.paper
    errors = [f"{error(model, *data.test):.2f} %" for model in (dense, retrained, loaded)]
    return (
        f"| {experiment.name} | {before:.2f} % to {after:.2f} %, {rate}x | {' | '.join(errors)} | {sizes[0]:,} | "
        f"{sizes[1]:,} | {sizes[0] / sizes[1]:.1f}x | {time.process_time() - begin:.0f} s |"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--nets", nargs="+", default=[e.name for e in EXPERIMENTS], help="networks to compress")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.data / "MNIST" / "raw"
    data = Data(read_digits(folder, "train"), read_digits(folder, "t10k"))
    print(f"seed {arguments.seed}, torch {torch.__version__}, one thread")
    rows = [run(e, data, arguments.seed) for e in EXPERIMENTS if e.name in arguments.nets]
    print(
        "\n| network | Han et al. 2016 | error, dense | dense, retrained | compressed "
        "| bytes, dense | compressed | ratio | processor time |\n|" + " --- |" * 9
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
