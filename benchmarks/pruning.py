"""What removing filters costs in accuracy: a pretrained CIFAR ResNet under MAC budgets.

python benchmarks/pruning.py --data DIR --weights DIR/weights/cifar10_resnet56.safetensors
python benchmarks/pruning.py --data DIR --weights DIR/weights/cifar10_resnet20.safetensors --images 500

DIR holds ``cifar-10-batches-py`` as torchvision downloads it. Rows on data see ``--images`` training images without
augmentation; only the Taylor criterion sees their labels. Accuracy is that on test images. With ``--speed`` also how
many times as fast as the dense network each runs at these batch sizes, in turn with it (medians of 25). With
``--epochs`` each network is then distilled from the dense one, and its accuracy printed epoch by epoch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from cifar_data import accuracy, read_images
from cifar_training import add_training_options, distil
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_nn as lnn
from lowrank_nn.cost import compare_speed

Recipe = list[lnn.Step]
Recipes = dict[str, Callable[[], Recipe]]


def task_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of one batch."""
    return cross_entropy(model(batch[0]), batch[1])


class Study:
    """A dense network, the images that compression may see, and those that it is judged on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = arguments.data / "cifar-10-batches-py"
        self.images, self.labels = (part[: arguments.test_images] for part in read_images(folder, "test_batch"))
        self.train = read_images(folder, "data_batch_*")
        images, labels = (part[: arguments.images] for part in self.train)
        self.labelled = list(zip(images.split(100), labels.split(100), strict=True))
        self.calibration = images.split(100)
        self.dense = cifar_resnet_from(load_file(arguments.weights))
        self.seed: int = arguments.seed

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test images in percent."""
        return accuracy(model, self.images, self.labels)

    def describe(self, result: lnn.Result, sizes: list[int]) -> str:
        """Return accuracy, parameters left, and speed-ups at the batch sizes."""
        parts = [f"{100 / result.report.compression_rate['params']:.0f} %"]
        for batch in (self.images[:size] for size in sizes):
            with torch.inference_mode():
                timing = compare_speed(partial(self.dense, batch), partial(result.model, batch), rounds=25)
            parts.append(f"{timing.ratio:.2f}x")
        return f"{self.accuracy(result.model):.2f} ({', '.join(parts)})"

    def filters(self, criterion: str, *, reconstruct: bool, amount: float | None = None) -> lnn.Step:
        """Return the step that removes filters."""
        needs_loss = criterion in ("taylor", "obd")
        return lnn.Prune(
            amount,
            granularity="filter",
            criterion=criterion,
            reconstruct=reconstruct,
            scope="global",
            batches=self.labelled if needs_loss else None,
            loss=task_loss if needs_loss else None,
        )


def methods(study: Study) -> Recipes:
    """Return the recipe of each row."""
    low_rank = lnn.LowRank(where="layer*")
    return {
        "L1": lambda: [study.filters("l1", reconstruct=False)],
        "L1 + least squares": lambda: [study.filters("l1", reconstruct=True)],
        "Taylor": lambda: [study.filters("taylor", reconstruct=False)],
        "Taylor + least squares": lambda: [study.filters("taylor", reconstruct=True)],
        "LASSO + least squares": lambda: [study.filters("lasso", reconstruct=True)],
        "ThiNet + least squares": lambda: [study.filters("thinet", reconstruct=True)],
        "OBS + least squares": lambda: [study.filters("obs", reconstruct=True)],
        "low rank": lambda: [low_rank],
        "both: least tenth of all filters (OBS), low rank": lambda: [
            study.filters("obs", reconstruct=True, amount=0.1),
            low_rank,
        ],
    }


def sweep(study: Study, recipe: Recipe, times: list[float]) -> Iterator[lnn.Result]:
    """Compress to each budget in turn."""
    budgets = [lnn.Budget(macs=1 / t) for t in times]
    return lnn.sweep(study.dense, study.images[:2], budgets, recipe, calibration=study.calibration, seed=study.seed)


def without_training(study: Study, recipes: Recipes, arguments: argparse.Namespace) -> None:
    """Print accuracy by method and budget, and the seconds that all budgets of a method took together."""
    print(
        "Accuracy in percent (params left"
        + "".join(f", times as fast at batch {size}" for size in arguments.speed)
        + ").\n"
    )
    head = ["method", *(f"{t:g}x fewer MACs" for t in arguments.times), "seconds"]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)
    for name, recipe in recipes.items():
        cells, seconds, start = [], 0.0, time.perf_counter()
        for result in sweep(study, recipe(), arguments.times):
            seconds += time.perf_counter() - start
            cells.append(study.describe(result, arguments.speed))
            start = time.perf_counter()
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


def with_training(study: Study, recipes: Recipes, arguments: argparse.Namespace) -> None:
    """Print accuracy by method and budget, epoch by epoch of distillation."""
    for name, recipe in recipes.items():
        for result in sweep(study, recipe(), arguments.times):
            print(f"\n{name}:", flush=True)
            distil(result, study.dense, study.train, (study.images, study.labels), arguments)


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--times", type=float, nargs="+", default=[1.3, 1.5, 2.1], help="how many times fewer MACs")
    parser.add_argument("--methods", nargs="+", help="rows wanted, by their beginning; all if left out")
    parser.add_argument("--images", type=int, default=2000, help="training images seen")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--speed", type=int, nargs="+", default=[], metavar="BATCH", help="batch sizes to time")
    parser.add_argument("--seed", type=int, default=0)
    add_training_options(parser)
    arguments = parser.parse_args()
    study = Study(arguments)
    recipes = {
        name: recipe
        for name, recipe in methods(study).items()
        if not arguments.methods or name.startswith(tuple(arguments.methods))
    }
    print(
        f"{arguments.weights.stem}, dense {study.accuracy(study.dense):.2f} %, {len(study.labels)} test images, "
        f"{arguments.images} training images, seed {arguments.seed}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads.\n",
        flush=True,
    )
    if arguments.epochs:
        with_training(study, recipes, arguments)
    else:
        without_training(study, recipes, arguments)


if __name__ == "__main__":
    main()
