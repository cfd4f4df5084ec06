"""What compression costs in accuracy: a pretrained CIFAR ResNet under parameter budgets, by method.

python benchmarks/accuracy.py --data DIR --weights DIR/weights/cifar10_resnet56.safetensors
python benchmarks/accuracy.py --data DIR --weights DIR/weights/cifar10_resnet20.safetensors --times 5 --epochs 30

DIR holds ``cifar-10-batches-py`` as torchvision downloads it. Nothing is trained without ``--epochs``; the rows on data
see ``--images`` training images without their labels and without augmentation. With ``--epochs`` the network of the
last row is then distilled from the dense one, or from that of ``--teacher``, on augmented training images: 0.9
distillation, 0.1 cross-entropy, warm-up and cosine, AdamW or SOAP (``--optimizer soap``: ``pip install
pytorch_optimizer``). Accuracy is that on all test images, after the last epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from cifar_data import accuracy, read_images
from cifar_training import add_training_options, distil
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import nn

import lowrank_nn as lnn


def methods() -> dict[str, dict[str, Any]]:
    """Return the options of ``LowRank`` by the name of the method."""
    weights_only = {"data_aware": False}
    return {
        "uniform Tucker": {"formats": [lnn.TuckerConv2d], "allocation": "uniform", **weights_only},
        "VBMF, weakened to fit (MUSCO)": {"formats": [lnn.TuckerConv2d], "allocation": "musco", **weights_only},
        "ALDS allocation of SVDs": {"formats": [lnn.SVDConv2d], "allocation": "alds", **weights_only},
        "knapsack on weights": weights_only,
        "knapsack on data": {"reconstruct": False},
        "knapsack on data, reconstructed": {},
    }


class Study:
    """A dense network, the images that compression may see, and those that it is judged on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = arguments.data / "cifar-10-batches-py"
        self.images, self.labels = read_images(folder, "test_batch")
        self.train = read_images(folder, "data_batch_*")
        self.dense = cifar_resnet_from(load_file(arguments.weights))
        self.calibration = self.train[0][: arguments.images].split(100)
        self.seed: int = arguments.seed

    def compress(self, budgets: Iterable[lnn.Budget], **options: Any) -> Iterator[lnn.Result]:
        """Compress all layers but the stem and the classifier, to each budget in turn."""
        step = lnn.LowRank(where="layer*", **options)
        return lnn.sweep(self.dense, self.images[:1], budgets, [step], calibration=self.calibration, seed=self.seed)

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images in percent."""
        return accuracy(model, self.images, self.labels)


def without_training(study: Study, times: list[float], names: list[str]) -> None:
    """Print accuracy by method and budget, and the seconds that all budgets of a method took together.

    A dash stands for budgets that the method cannot meet.
    """
    head = ["method", *(f"{t:g}x" for t in sorted(times)), "seconds"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for name in names:
        cells, seconds = [], 0.0
        results = study.compress((lnn.Budget(params=1 / t) for t in sorted(times)), **methods()[name])
        with contextlib.suppress(lnn.BudgetError):
            start = time.perf_counter()
            for result in results:
                seconds += time.perf_counter() - start
                cells.append(f"{study.accuracy(result.model):.2f}")
                start = time.perf_counter()
        cells += ["-"] * (len(times) - len(cells))
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--times", type=float, nargs="+", default=[1.5, 2, 3, 5, 9], help="how many times fewer params")
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()), help="rows wanted")
    parser.add_argument("--images", type=int, default=2000, help="unlabelled training images")
    parser.add_argument("--macs", type=float, help="with --epochs: also this many times fewer MACs")
    add_training_options(parser)
    parser.add_argument("--teacher", type=Path, help="with --epochs: weights to distil from (default: --weights)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show the library's log")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    study = Study(arguments)
    print(
        f"{arguments.weights.stem}, dense {study.accuracy(study.dense):.2f} %, {len(study.labels)} test images, "
        f"{arguments.images} unlabelled training images, seed {arguments.seed}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads.\n",
        flush=True,
    )
    if not arguments.epochs:
        without_training(study, arguments.times, arguments.methods)
        return
    macs = None if arguments.macs is None else 1 / arguments.macs
    teacher = cifar_resnet_from(load_file(arguments.teacher)) if arguments.teacher else study.dense
    for t in arguments.times:
        print(f"\n{t:g}x fewer params:", flush=True)
        (small,) = study.compress([lnn.Budget(params=1 / t, macs=macs)])
        distil(small, teacher, study.train, (study.images, study.labels), arguments)


if __name__ == "__main__":
    main()
