"""Sizes of saved files with and without entropy coding, and the speed of coding, saving and loading.

Prints Markdown tables, on one thread. Sizes are those of a CIFAR ResNet (``--weights``, a safetensors file) whose
convolutions and classifier are quantized and pruned one by one, with no training. "Entropy" is what the tensors take
at best, every coded symbol by its share in its tensor: integers by their values, masks by the distances between the
entries they keep. Speeds of coding are medians over rounds of processor time, those of decoding also set against a copy
of the symbols in memory; saving and loading are timed by the clock, in turn with safetensors.

    python benchmarks/storage.py --weights DIR/weights/cifar10_resnet20.safetensors
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import cifar_resnet_from, vgg16  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scipy.stats import entropy  # noqa: E402
from torch import nn  # noqa: E402

import lowrank_nn as lnn  # noqa: E402
from lowrank_nn.storage import packed_size, stored_bytes  # noqa: E402
from lowrank_nn.storage._bits import pack_bits, unpack_bits  # noqa: E402
from lowrank_nn.storage._coders import CODERS  # noqa: E402
from lowrank_nn.storage._gaps import to_gaps  # noqa: E402
from lowrank_nn.storage._save import CODER_OF  # noqa: E402

INT8, INT4, INT3 = (lnn.Quantize(name) for name in ("int8", "int4", "int3"))
PRUNE = lnn.Prune(0.8)
RECIPES: dict[str, list[Any]] = {
    "as it is": [],
    "int8": [INT8],
    "int4": [INT4],
    "int3": [INT3],
    "80 % pruned": [PRUNE],
    "80 % pruned, int8": [PRUNE, INT8],
    "80 % pruned, int4": [PRUNE, INT4],
}


def at_best(model: nn.Module) -> int:
    """Return the bytes of all tensors, with what coding may take at its entropy."""
    sizes = stored_bytes(model, coding="none")
    state = model.state_dict()
    for key in sizes:
        layer = model.get_submodule(key.rpartition(".")[0])
        if key.endswith(".weight_int"):
            values = state[key] if layer.mask is None else state[key][layer.mask.expand_as(state[key])]
            sizes[key] = min(sizes[key], _entropy_bytes(values.numpy()))
        elif state[key].dtype is torch.bool:
            sizes[key] = min(sizes[key], _entropy_bytes(to_gaps(state[key].reshape(-1).numpy())))
    return sum(sizes.values())


def _entropy_bytes(symbols: NDArray[Any]) -> int:
    _, counts = np.unique(symbols, return_counts=True)
    return int(np.ceil(symbols.size * entropy(counts, base=2) / 8))


def print_sizes(dense: nn.Module) -> None:
    """Print the sizes of files."""
    full = packed_size(dense)
    print("| network | none | auto | max | huffman | entropy | auto over it | not values | dense / auto |")
    print("|" + " --- |" * 9)
    for name, recipe in RECIPES.items():
        images = torch.zeros(1, 3, 32, 32)
        small = lnn.compress_model(dense, images, recipe, progress=False).model if recipe else dense
        sizes = {coding: packed_size(small, coding=coding) for coding in CODER_OF}
        overhead = sizes["auto"] - sum(stored_bytes(small).values())
        best = at_best(small) + overhead
        cells = [f"{size:,}" for size in (*(sizes[coding] for coding in ("none", "auto", "max", "huffman")), best)]
        over, ratio = sizes["auto"] / best - 1, full / sizes["auto"]
        print(f"| {name} | {' | '.join(cells)} | {over:+.1%} | {overhead:,} | {ratio:.2f}x |")


def print_speeds(count: int, rounds: int) -> None:
    """Print the speed of the coders."""
    steps = np.arange(256) - 127.5
    shares = {
        "16 levels": np.exp(-np.abs(np.arange(16) - 7.5) / 2),
        "16 levels, 70 % zeros": np.r_[7, 3 * np.exp(-np.arange(15) / 2) * (1 - np.exp(-0.5))],
        "256 levels": np.exp(-((steps / 40) ** 2) / 2),
    }
    print(f"\n{count:,} symbols | encode, M/s | decode, M/s | decode / copy | size over entropy")
    print("--- | --- | --- | --- | ---")
    for name, weights in shares.items():
        symbols = np.random.default_rng(0).choice(weights.size, count, p=weights / weights.sum()).astype(np.uint8)
        copy = _seconds(symbols.copy, rounds)
        for coder_name, coder in CODERS.items():
            data = coder.encode(symbols)
            times = [
                _seconds(functools.partial(coder.encode, symbols), rounds),
                _seconds(functools.partial(coder.decode, data, count), rounds),
            ]
            over = data.size / _entropy_bytes(symbols) - 1
            label = f"{name} ({entropy(np.bincount(symbols), base=2):.2f} bits), {coder_name}"
            _print_speed(label, count, times, copy, over)
        bits = (weights.size - 1).bit_length()
        packed = pack_bits(symbols, bits, 0)
        times = [
            _seconds(functools.partial(pack_bits, symbols, bits, 0), rounds),
            _seconds(functools.partial(unpack_bits, packed, count, bits, 0, symbols.dtype), rounds),
        ]
        over = packed.size / _entropy_bytes(symbols) - 1
        _print_speed(f"{name}, in {bits} bits each", count, times, copy, over)


def _print_speed(name: str, count: int, times: list[float], copy: float, over: float) -> None:
    speeds = [f"{count / seconds / 1e6:.0f}" for seconds in times]
    print(f"{name} | {speeds[0]} | {speeds[1]} | {times[1] / copy:.0f}x | {over:+.1%}")


def print_files(rounds: int) -> None:
    """Print how long it takes to save and load VGG-16, which is 528 MB, against safetensors."""
    model, fresh = vgg16(), vgg16()
    print("\nVGG-16, float32 | safetensors, s | lowrank_nn, s | ratio\n--- | --- | --- | ---")
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Path(folder) / "a.safetensors", Path(folder) / "a.lrnn"
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "save": (lambda: save_file(model.state_dict(), plain), lambda: lnn.save(model, ours)),
            "load": (lambda: fresh.load_state_dict(load_file(plain)), lambda: lnn.load(ours, fresh)),
        }
        sums = [0.0, 0.0]
        for name, calls in pairs.items():
            times = [[_seconds(call, 1, time.perf_counter) for call in calls] for _ in range(rounds)]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            sums = [total + median for total, median in zip(sums, medians, strict=True)]
            print(f"{name} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[1] / medians[0]:.1f}x")
        print(f"both | {sums[0]:.2f} | {sums[1]:.2f} | {sums[1] / sums[0]:.1f}x")


def _seconds(call: Callable[[], Any], rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    times = []
    for _ in range(rounds):
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a CIFAR ResNet")
    parser.add_argument("--symbols", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.weights.stem}, torch {torch.__version__}, numpy {np.__version__}, one thread\n")
    print_sizes(cifar_resnet_from(load_file(arguments.weights)))
    print_speeds(arguments.symbols, arguments.rounds)
    print_files(arguments.rounds)


if __name__ == "__main__":
    main()
