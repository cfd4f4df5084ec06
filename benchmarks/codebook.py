"""Shared weights on a CIFAR ResNet: accuracy and bytes by bits, with no training and after a short one.

python benchmarks/codebook.py --data DIR --weights DIR/weights/cifar10_resnet56.safetensors

DIR holds ``cifar-10-batches-py`` as torchvision downloads it. Prints a Markdown table. Training moves centroids, biases
and norms; it distils from the dense network on augmented training images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar_data import Augmented, accuracy, read_images
from models import cifar_resnet_from
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.storage import packed_size


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss that Fisher information is taken of."""
    return F.cross_entropy(model(batch[0]), batch[1])


def run(arguments: argparse.Namespace) -> None:
    """Share the weights in all ways and print the table."""
    folder = arguments.data / "cifar-10-batches-py"
    images, labels = (part[: arguments.test_images] for part in read_images(folder, "test_batch"))
    train_images, train_labels = read_images(folder, "data_batch_1")
    dense = cifar_resnet_from(load_file(arguments.weights)).eval()
    tune = lnn.FineTune(Augmented(train_images, train_labels, 128), 1, lr=arguments.lr)
    full = packed_size(dense)
    print(
        f"{arguments.weights.stem}, {len(labels)} test images, dense {accuracy(dense, images, labels):.2f} %, "
        f"{full:,} bytes. Fisher information: {arguments.fisher_images} training images. Training: one epoch of 9984 "
        f"augmented images, AdamW, lr {arguments.lr}. torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| bits | k-means | accuracy | after training | file bytes |\n|" + " --- |" * 5, flush=True)
    for bits in arguments.bits:
        samples = [(train_images[: arguments.fisher_images], train_labels[: arguments.fisher_images])]
        steps = {
            "linear start": lnn.Codebook(bits, init="linear"),
            "density start": lnn.Codebook(bits, init="density"),
            "optimal": lnn.Codebook(bits),
            "optimal, by Fisher information": lnn.Codebook(bits, batches=samples, loss=cross_entropy),
        }
        for name, step in steps.items():
            small = lnn.compress_model(dense, images[:1], step).model
            trained = ""
            if name == "optimal":
                tuned = lnn.compress_model(small, images[:1], [tune]).model
                trained = f"{accuracy(tuned, images, labels):.2f}"
            size = packed_size(small)
            before = accuracy(small, images, labels)
            print(f"| {bits} | {name} | {before:.2f} | {trained} | {size:,} ({full / size:.2f}x) |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--fisher-images", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
