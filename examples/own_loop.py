"""Compressed layers in a training loop of one's own: no recipe, no walker, only modules and a loss.

Run it with ``python examples/own_loop.py``; a few seconds.
"""

from __future__ import annotations

import copy

import torch
from digits import DigitNet, accuracy, digits, trained_net
from torch.utils.data import DataLoader

import lowrank_nn as lnn


def by_hand(dense: DigitNet) -> DigitNet:
    """Return a copy with layers replaced one by one, each by what suits it."""
    student = copy.deepcopy(dense)
    for block in (student.layer1, student.layer2):
        block.conv1 = lnn.TuckerConv2d.from_pretrained_layer(block.conv1, rank=(12, 12))
        block.conv2 = lnn.CPConv2d.from_pretrained_layer(block.conv2, rank=lnn.Params(0.2))
    student.down = lnn.SVDConv2d.from_pretrained_layer(student.down, rank=lnn.SpeedUp(3))
    return student


def main() -> None:
    """Replace layers, distil with a penalty that empties filters, and round the weights to integers."""
    training, test = digits()
    dense = trained_net(training)
    student = by_hand(dense)
    before = accuracy(student, test)

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    penalty = lnn.GroupLasso(1e-5, but_not="fc")
    for _ in range(5):
        for images, labels in DataLoader(training, batch_size=64, shuffle=True):
            with torch.no_grad():
                soft = dense(images)
            loss = lnn.distill_loss(student.train()(images), soft, labels) + penalty(student)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = accuracy(student, test)

    # Factors are ordinary layers: any of them can be replaced again.
    for block in (student.layer1, student.layer2):
        block.conv1.core = lnn.QuantConv2d.from_pretrained_layer(block.conv1.core, bits=8)

    print(lnn.compare(dense, student, test.tensors[0][:1]))
    print(
        f"\naccuracy {accuracy(dense, test):.2f} % dense, {before:.2f} % replaced, {after:.2f} % after five epochs, "
        f"{accuracy(student, test):.2f} % with cores of 8 bits"
    )


if __name__ == "__main__":
    main()
