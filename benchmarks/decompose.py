"""Time the decompositions against tensorly, on one thread.

Prints a markdown table. Every row shows the medians over the rounds of both libraries' times, which are taken in turn
in this one process, the ratio of these medians, and the relative errors reached. One thread means one for torch and
one for the BLAS under numpy: the environment variables are set before either is imported.

Tucker-2 runs at half the channels of kernels whose channel spectra decay as i^-1/2 (as those of trained networks do),
against `tensorly.decomposition.partial_tucker` at its defaults on the numpy backend. CP runs 20 sweeps against 20
iterations of `tensorly.decomposition.parafac`, on the kernel with its taps merged (C, C, 9) and as it is (C, C, 3, 3).

    python benchmarks/decompose.py
    python benchmarks/decompose.py --quick
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import tensorly  # noqa: E402
import torch  # noqa: E402
from tensorly.decomposition import parafac, partial_tucker  # noqa: E402
from torch import Tensor  # noqa: E402

from lowrank_nn.decompose import cp_als, cp_tensor, tucker2  # noqa: E402

VGG16 = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256)] + [(512, 512)] * 5
CP_SWEEPS = 20


class Contestant(NamedTuple):
    """A way to decompose: ``run`` is timed, ``rebuild`` turns its result into a tensor."""

    name: str
    run: Callable[[], Any]
    rebuild: Callable[[Any], Tensor]


class Timing(NamedTuple):
    """Median time in seconds and relative Frobenius error of a contestant."""

    seconds: float
    error: float


def trained_like_kernel(out_channels: int, in_channels: int, seed: int = 0) -> Tensor:
    """Return a float32 kernel (O, I, 3, 3) whose channel spectra decay as i^-1/2, in random bases."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(out_channels, in_channels, 9, generator=generator, dtype=torch.float64)
    for mode, size in enumerate((out_channels, in_channels)):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
        kernel = torch.tensordot(basis * spectrum, kernel, dims=([1], [mode])).movedim(0, mode)
    return kernel.float().reshape(out_channels, in_channels, 3, 3).contiguous()


def race(kernel: Tensor, contestants: Sequence[Contestant], rounds: int) -> dict[str, Timing]:
    """Run the contestants in turn, in reversed order every other round, after one unmeasured call of each."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    errors = {}
    for contestant in contestants:
        rebuilt = contestant.rebuild(contestant.run()).double()
        errors[contestant.name] = float((rebuilt - kernel.double()).norm() / kernel.double().norm())
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            start = time.perf_counter()
            contestant.run()
            seconds[contestant.name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(times), errors[name]) for name, times in seconds.items()}


def tucker_race(kernel: Tensor, rounds: int) -> dict[str, Timing]:
    """Race Tucker-2 at half the channels (the three channels of an image are kept)."""
    rank = (kernel.shape[0] // 2, max(kernel.shape[1] // 2, 3))
    array = kernel.numpy()

    def ours(name: str, **options: Any) -> Contestant:
        return Contestant(
            name,
            lambda: tucker2(kernel, rank, **options),
            lambda f: torch.einsum("abhw,oa,ib->oihw", f.core, f.out_factor, f.in_factor),
        )

    reference = Contestant(
        "tensorly",
        lambda: partial_tucker(array, rank=list(rank), modes=[0, 1]),
        lambda result: torch.from_numpy(tensorly.tenalg.multi_mode_dot(result[0][0], result[0][1], modes=[0, 1])),
    )
    return race(kernel, [reference, ours("default"), ours("3 sweeps", sweeps=3, tolerance=0)], rounds)


def cp_race(tensor: Tensor, rank: int, rounds: int) -> dict[str, Timing]:
    """Race CP on a tensor of three or four modes."""
    array = tensor.numpy()
    reference = Contestant(
        "tensorly",
        lambda: parafac(array, rank=rank, n_iter_max=CP_SWEEPS, tol=0, init="svd", random_state=0),
        lambda result: torch.from_numpy(np.ascontiguousarray(tensorly.cp_to_tensor(result))),
    )
    ours = Contestant("ours", lambda: cp_als(tensor, rank, sweeps=CP_SWEEPS), cp_tensor)
    return race(tensor, [reference, ours], rounds)


def row(label: str, reference: Timing, ours: Timing) -> str:
    """Format one row of the table."""
    return (
        f"| {label} | {reference.seconds * 1e3:.1f} | {ours.seconds * 1e3:.1f} "
        f"| {reference.seconds / ours.seconds:.1f}x | {reference.error:.6f} | {ours.error:.6f} |"
    )


def total(timings: Sequence[Timing]) -> Timing:
    """Return the summed time and the mean error."""
    return Timing(sum(t.seconds for t in timings), statistics.mean(t.error for t in timings))


def tucker_rows(label: str, races: Sequence[dict[str, Timing]]) -> None:
    """Print the rows for the default and for three sweeps."""
    for name in ("default", "3 sweeps"):
        reference, ours = (total([result[key] for result in races]) for key in ("tensorly", name))
        print(row(f"Tucker-2, {label}, {name}", reference, ours), flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 256, 512], help="channels of square kernels")
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="timed calls of each contestant at 512 channels (more at fewer; on VGG-16 at most 3)",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, VGG-16 left out, CP on the smallest kernel")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Trying to compute SVD", category=UserWarning)

    print(
        f"One thread, {rounds} rounds, torch {torch.__version__}, numpy {np.__version__}, "
        f"tensorly {tensorly.__version__}, {platform.machine()}\n\n"
        "| case | tensorly ms | lowrank_nn ms | ratio | error tensorly | error lowrank_nn |\n"
        "|---|---|---|---|---|---|"
    )
    for size in arguments.sizes:
        tucker_rows(f"{size}x{size}x3x3", [tucker_race(trained_like_kernel(size, size), rounds * max(1, 512 // size))])
    if not arguments.quick:
        kernels = [trained_like_kernel(*shape, seed=index) for index, shape in enumerate(VGG16)]
        tucker_rows("VGG-16, 13 kernels", [tucker_race(kernel, min(rounds, 3)) for kernel in kernels])
    for size, rank in [(128, 64)] if arguments.quick else [(128, 64), (256, 128)]:
        kernel = trained_like_kernel(size, size)
        for tensor in (kernel.flatten(2), kernel):
            result = cp_race(tensor, rank, min(rounds, 3))
            label = "x".join(str(n) for n in tensor.shape)
            print(row(f"CP, {label}, rank {rank}", result["tensorly"], result["ours"]), flush=True)


if __name__ == "__main__":
    main()
