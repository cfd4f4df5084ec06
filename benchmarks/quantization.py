"""A CIFAR ResNet with small integers for weights, without training: accuracy, change of the logits, file size.

python benchmarks/quantization.py --data DIR --weights DIR/weights/cifar10_resnet56.safetensors

DIR holds ``cifar-10-batches-py`` as torchvision downloads it. Prints a Markdown table. Calibration and low-rank fits
see 512 training images, without labels; accuracy is that on the test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar_data import read_images
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_nn as lnn
from lowrank_nn.storage import packed_size

Recipes = dict[str, tuple[list[lnn.Step], lnn.Budget | None]]


def recipes(dense: nn.Module, example: Tensor, bits: list[int]) -> Recipes:
    """Return the steps and the budget by name."""
    quantize, fold = lnn.Quantize, lnn.FoldBatchNorm()
    found: Recipes = {}
    for width in bits:
        name = f"int{width}"
        found[f"{name}, nearest"] = ([fold, quantize(name, data_aware=False)], None)
        found[f"{name}, on data, not in order"] = ([fold, quantize(name, data_aware=True, reconstruct=False)], None)
        found[f"{name}, on data"] = ([fold, quantize(name, data_aware=True)], None)
        planned = lnn.plan(dense, example, [fold, quantize(name)], progress=False)
        found[f"int2 to int8, the bytes of {name}"] = (
            [fold, quantize([f"int{choice}" for choice in range(2, 9)])],
            lnn.Budget(bytes=planned.after.bytes / planned.before.bytes),
        )
    found["int8, inputs too"] = ([fold, quantize("int8", activations="int8")], None)
    found["LowRank 3x, int8, inputs too"] = (
        [lnn.LowRank(), fold, quantize("int8", activations="int8")],
        lnn.Budget(params=1 / 3),
    )
    return found


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, their mean over the classes removed."""
    z = torch.cat([model.eval()(batch) for batch in images.split(250)])
    return z - z.mean(1, keepdim=True)


def accuracy(z: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    return 100 * float((z.argmax(1) == labels).float().mean())


def run(arguments: argparse.Namespace) -> None:
    """Quantize the network in all ways and print the table."""
    folder = arguments.data / "cifar-10-batches-py"
    images, labels = (part[: arguments.test_images] for part in read_images(folder, "test_batch"))
    calibration = read_images(folder, "data_batch_1")[0][:512].split(128)
    dense = cifar_resnet_from(load_file(arguments.weights)).eval()
    expected, full = logits(dense, images), packed_size(dense)
    print(
        f"{arguments.weights.stem}, {len(labels)} test images, dense {accuracy(expected, labels):.2f} %, {full:,} "
        f"bytes. Calibration: 512 training images. Seed 0. torch {torch.__version__}\n"
    )
    print("| weights | accuracy | change of the logits | file bytes |\n|" + " --- |" * 4, flush=True)
    for name, (steps, budget) in recipes(dense, images[:1], arguments.bits).items():
        small = lnn.compress_model(dense, images[:1], steps, budget=budget, calibration=calibration).model
        z, size = logits(small, images), packed_size(small)
        change = float((z - expected).square().sum() / expected.square().sum())
        print(f"| {name} | {accuracy(z, labels):.2f} | {change:.2%} | {size:,} ({full / size:.2f}x) |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3], help="bits per weight, inputs in float")
    parser.add_argument("--test-images", type=int, default=10_000)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
