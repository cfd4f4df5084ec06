"""Time and peak memory of the one-shot recipe, without fine-tuning, on AlexNet, VGG-16 and ResNet-50.

python benchmarks/architectures.py

Each network is compressed in a process of its own. The weights are random: in every layer a quarter of the possible
rank stands out of noise, so that VBMF finds ranks to work with. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from models import alexnet, resnet50, vgg16
from torch import nn

import lowrank_nn as lnn

NETWORKS = {"AlexNet": (alexnet, 227), "VGG-16": (vgg16, 224), "ResNet-50": (resnet50, 224)}


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Fill every kernel with a signal of a quarter of the possible rank, of norm equal to the noise's."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            matrix = layer.weight.flatten(1)
            rank = max(1, min(matrix.shape) // 4)
            signal = torch.randn(matrix.shape[0], rank) @ torch.randn(rank, matrix.shape[1])
            matrix += signal * (matrix.norm() / signal.norm())


class MemoryPeak:
    """Peak resident memory of this process while the block runs, in bytes."""

    def __enter__(self) -> MemoryPeak:
        self.peak, self.running = resident_bytes(), True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.005)


def resident_bytes() -> int:
    """Return the memory that this process holds now (Linux), or its peak so far (elsewhere)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str) -> dict[str, float]:
    """Compress one network in this process and return what it took."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    draw_weights(model)
    inputs = torch.randn(1, 3, size, size)
    with torch.no_grad():
        model(inputs)  # torch's own buffers are not the library's
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resident_bytes() - weights
    start = time.perf_counter()
    with MemoryPeak() as memory:
        result = lnn.compress_model(model, inputs, "one-shot", progress=False)
    seconds = time.perf_counter() - start
    rate = result.report.compression_rate
    peak = memory.peak - before
    return {"seconds": seconds, "weights": weights, "peak": peak, "params": rate["params"], "macs": rate["macs"]}


def main() -> None:
    """Print the table, or what one network took (used by the script itself)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only)))
        return
    print(f"one-shot, no fine-tuning, batch 1, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| network | model | seconds | peak memory, model included | params | MACs |\n|" + " --- |" * 6)
    for name in arguments.networks:
        output = subprocess.run([sys.executable, __file__, "--only", name], check=True, capture_output=True, text=True)
        row = json.loads(output.stdout)
        peak = f"{row['peak'] / 1e6:.0f} MB ({row['peak'] / row['weights']:.2f}x the model)"
        cells = [name, f"{row['weights'] / 1e6:.0f} MB", f"{row['seconds']:.1f}", peak]
        print("| " + " | ".join([*cells, f"{row['params']:.2f}x", f"{row['macs']:.2f}x"]) + " |", flush=True)


if __name__ == "__main__":
    main()
