"""A pretrained CIFAR ResNet in one shot and under budgets, before and after a short fine-tune, with int8 on top.

python benchmarks/cifar10.py --data DIR --weights DIR/weights/cifar10_resnet56.safetensors

DIR holds ``cifar-10-batches-py`` as torchvision downloads it. Prints a Markdown table. Fine-tuning distils from the
dense network on augmented training images (crop and flip); accuracy is that of the last epoch on all test images.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from cifar_data import Augmented, accuracy, read_images
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_nn as lnn
from lowrank_nn.cost import compare_speed


class Table:
    """Rows of the result, measured as they are added and printed as Markdown."""

    HEAD = ("network", "accuracy", "after fine-tune", "params", "MACs", "file bytes", "ms, batch 1", "ms, batch 32")

    def __init__(self, dense: nn.Module, images: Tensor) -> None:
        self.dense, self.images = dense, images
        print("| " + " | ".join(self.HEAD) + " |\n|" + " --- |" * len(self.HEAD), flush=True)

    def add(self, name: str, result: lnn.Result, before: float | None, after: float | None) -> None:
        """Print the row of a compressed network."""
        report, rate = result.report, result.report.compression_rate
        assert report.file_bytes is not None
        times = [self._milliseconds(result.model, size) for size in (1, 32)]
        self._print(
            name,
            "" if before is None else f"{before:.2f}",
            "" if after is None else f"{after:.2f}",
            f"{report.after.params:,} ({rate['params']:.2f}x)",
            f"{report.after.macs / 1e6:.1f} M ({rate['macs']:.2f}x)",
            f"{report.file_bytes[1]:,} ({rate['file']:.2f}x)",
            *(f"{ms:.2f} ({ratio:.2f}x)" for ms, ratio in times),
        )

    def add_dense(self, result: lnn.Result, before: float) -> None:
        """Print the row of the dense network, as the reports of the others see it."""
        report = result.report
        assert report.file_bytes is not None
        cost = (f"{report.before.params:,}", f"{report.before.macs / 1e6:.1f} M", f"{report.file_bytes[0]:,}")
        times = (f"{self._milliseconds(self.dense, size)[0]:.2f}" for size in (1, 32))
        self._print("dense", f"{before:.2f}", "", *cost, *times)

    def _milliseconds(self, model: nn.Module, size: int) -> tuple[float, float]:
        """Return median milliseconds of a model and the speed-up over the dense one, run in turn."""
        batch, dense = self.images[:size], self.dense
        with torch.no_grad():
            timing = compare_speed(lambda: dense(batch), lambda: model(batch), rounds=25)
        return timing.second, timing.ratio

    @staticmethod
    def _print(*cells: str) -> None:
        print("| " + " | ".join(cells) + " |", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Compress the network in all ways and print the table."""
    folder = arguments.data / "cifar-10-batches-py"
    images, labels = read_images(folder, "test_batch")
    train_images, train_labels = read_images(folder, "data_batch_*")
    dense = cifar_resnet_from(load_file(arguments.weights))
    loader = Augmented(train_images[: arguments.images], train_labels[: arguments.images], 128)
    print(
        f"{arguments.weights.stem}, {len(labels)} test images, seed {arguments.seed}. LowRank: on 512 training images. "
        f"Fine-tune: {arguments.epochs} epochs of {128 * len(loader)} augmented training images, distillation, AdamW, "
        f"lr {arguments.lr}. int8: norms folded, weights and activations, same images. torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; ms: median of 25, in turn with the dense network (speed-up in brackets).\n"
    )

    def compress(model: nn.Module, recipe: list[Any], budget: lnn.Budget | None = None) -> lnn.Result:
        calibration = train_images[:512].split(128)
        return lnn.compress_model(
            model, images[:1], recipe, budget=budget, calibration=calibration, seed=arguments.seed
        )

    table = Table(dense, images)
    int8 = [lnn.FoldBatchNorm(), lnn.Quantize("int8", activations="int8")]
    tune = lnn.FineTune(loader, arguments.epochs, lr=arguments.lr, teacher=dense)
    quantized = compress(dense, int8)
    table.add_dense(quantized, accuracy(dense, images, labels))
    table.add("dense + int8", quantized, accuracy(quantized.model, images, labels), None)
    cases: list[tuple[str, list[Any], lnn.Budget | None]] = [("one-shot (VBMF)", ["one-shot"], None)]
    cases += [(f"LowRank {times:g}x", [lnn.LowRank()], lnn.Budget(params=1 / times)) for times in arguments.times]
    for name, recipe, budget in cases:
        small = compress(dense, recipe, budget)
        before = accuracy(small.model, images, labels)
        tuned = compress(small.model, [tune])
        tuned = dataclasses.replace(small, model=tuned.model)  # keep the report that compares with the dense network
        table.add(name, tuned, before, accuracy(tuned.model, images, labels))
        quantized = compress(tuned.model, int8)
        final = lnn.compare(dense, quantized.model, images[:1])
        table.add(
            f"{name} + int8",
            dataclasses.replace(quantized, report=final),
            None,
            accuracy(quantized.model, images, labels),
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--times", type=float, nargs="+", default=[2, 3, 5], help="how many times fewer params")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="training images per epoch")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
