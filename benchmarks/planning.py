"""How long the planner takes with calibration images, and its peak memory: ResNet-50 at 224 x 224, all formats.

python benchmarks/planning.py --images 256

Random weights, the spectra of every kernel's channels decaying as i^-1/2, and random images, of which neighbouring
pixels resemble each other: what they say means nothing, but the work is that of trained weights and photographs.
"""

from __future__ import annotations

import argparse
import time

import torch
from architectures import MemoryPeak, resident_bytes
from latency import draw_weights
from models import resnet50
from torch import Tensor
from torch.nn import functional

import lowrank_nn as lnn


def smooth_images(count: int, size: int) -> Tensor:
    """Return random images with detail at every scale."""
    octaves = [torch.randn(count, 3, size // 2**k, size // 2**k) for k in range(6)]
    grown = [functional.interpolate(octave, size=(size, size), mode="bilinear") for octave in octaves]
    return torch.stack(grown).sum(0) / len(grown) ** 0.5


def main() -> None:
    """Read the command line, plan and compress, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--params", type=float, default=0.3, help="share of the parameters that may remain")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = resnet50().eval()
    draw_weights(model)
    images = smooth_images(arguments.images, arguments.size)
    budget = lnn.Budget(params=arguments.params)
    before, start = resident_bytes(), time.perf_counter()
    with MemoryPeak() as memory:
        result = lnn.compress_model(model, images[:1], budget=budget, calibration=images.split(arguments.batch))
    seconds, grown = time.perf_counter() - start, (memory.peak - before) / 2**30
    print(
        f"ResNet-50, {arguments.images} images of {arguments.size} x {arguments.size}, {torch.get_num_threads()} "
        f"threads: {result.report.compression_rate['params']:.2f}x params in {seconds:.0f} s, {grown:.1f} GiB beside "
        f"the model and the images at the peak"
    )


if __name__ == "__main__":
    main()
