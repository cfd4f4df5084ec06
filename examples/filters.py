"""Filters removed for good: what belongs together, removal on data, the proof, and the time it saves.

Run it with ``python examples/filters.py``; a few seconds.
"""

from __future__ import annotations

import torch
from digits import accuracy, digits, trained_net
from torch.utils.data import DataLoader

import lowrank_nn as lnn


def main() -> None:
    """Print the channel groups, halve the multiply-accumulates, fine-tune, and compare."""
    training, test = digits()
    images = training.tensors[0]
    dense = trained_net(training)

    print("Channels that go together:")
    for group in lnn.find_groups(dense, images[:2]):
        print(f"  {str(group).splitlines()[0]}")

    prune = lnn.Prune(granularity="filter", criterion="obs")
    budget = lnn.Budget(macs=0.5)
    untrained = lnn.compress_model(dense, images[:1], [prune], budget=budget, calibration=images[:512].split(64))
    tune = lnn.FineTune(DataLoader(training, batch_size=64, shuffle=True), epochs=3, lr=1e-3)
    result = lnn.compress_model(
        dense, images[:64], [prune, tune], budget=budget, calibration=images[:512].split(64), measure_speed=True
    )
    print(f"\n{result.report}")
    print(f"\nlayer1.conv1 is now {result.model.layer1.conv1}")
    print(
        f"accuracy {accuracy(dense, test):.2f} % dense, {accuracy(untrained.model, test):.2f} % with filters removed, "
        f"{accuracy(result.model, test):.2f} % after three epochs; {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
