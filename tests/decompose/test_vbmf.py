"""EVBMF: pinned ranks, invariances, and the free energy by brute force."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowrank_nn.decompose import evbmf, evbmf_rank

# (output mode, input mode) of the 3x3 convolutions of a public ResNet-20 for CIFAR-10.
RESNET20_RANKS = {
    "layer1.0.conv1": (4, 8),
    "layer1.0.conv2": (5, 4),
    "layer1.1.conv1": (2, 5),
    "layer1.1.conv2": (2, 3),
    "layer1.2.conv1": (3, 7),
    "layer1.2.conv2": (5, 4),
    "layer2.0.conv1": (4, 8),
    "layer2.0.conv2": (7, 8),
    "layer2.1.conv1": (6, 8),
    "layer2.1.conv2": (3, 3),
    "layer2.2.conv1": (4, 7),
    "layer2.2.conv2": (4, 4),
    "layer3.0.conv1": (9, 6),
    "layer3.0.conv2": (2, 12),
    "layer3.1.conv1": (2, 8),
    "layer3.1.conv2": (8, 4),
    "layer3.2.conv1": (7, 6),
    "layer3.2.conv2": (26, 20),
}


def noise(rows, columns, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signal_and_noise(rows, columns, rank, *, strength=1.0):
    return strength * noise(rows, rank, seed=1) @ noise(rank, columns, seed=2) + noise(rows, columns)


def with_spectrum(rows, columns, spectrum):
    U = torch.linalg.qr(noise(rows, rows, seed=3)).Q
    V = torch.linalg.qr(noise(columns, rows, seed=4)).Q
    return (U * torch.as_tensor(spectrum, dtype=torch.float64)) @ V.T


@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 576, 10), (128, 1152, 17), (80, 80, 10), (40, 4000, 3)])
def test_known_ranks(rows, columns, rank):
    matrix = signal_and_noise(rows, columns, rank)
    assert evbmf_rank(matrix) == rank
    result = evbmf(np.linalg.svd(matrix.numpy(), compute_uv=False), columns)
    assert result.rank == rank
    assert result.noise_variance == pytest.approx(1.0, abs=0.05)


def test_pure_noise_and_zeros_have_rank_zero():
    assert evbmf_rank(noise(64, 576)) == 0
    assert evbmf_rank(torch.zeros(5, 9)) == 0
    assert evbmf_rank(noise(1, 9)) == 0


# The values for the first two spectra are the global minima known for them; ports with an absolute tolerance
# return 9 to 55 and 28 to 96, depending on scale.
@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [(1 / np.arange(1, 129), 54), (np.exp(-np.arange(1, 129) / 20), 96), (np.arange(1, 129) ** -0.7, 42)],
)
def test_slowly_decaying_spectra_at_every_scale(spectrum, expected):
    matrix = with_spectrum(128, 1152, spectrum)
    for scale in (1e-8, 1e-4, 1.0, 1e4, 1e8):
        assert evbmf_rank(matrix * scale) == expected
        assert evbmf_rank((matrix * scale).float()) == expected


def test_transposition():
    matrix = signal_and_noise(64, 576, 10)
    assert evbmf_rank(matrix.T) == 10


@pytest.mark.parametrize("residue", [0.0, 1e-3])
@pytest.mark.parametrize("transposed", [False, True])
def test_dead_rows_and_columns_are_set_aside(residue, transposed):
    matrix = signal_and_noise(64, 400, 10)
    matrix[::3] *= residue
    matrix[:, ::4] *= residue
    assert evbmf_rank(matrix.T if transposed else matrix) == 10


def test_noise_free_matrices():
    assert evbmf_rank(noise(60, 10, seed=1) @ noise(10, 200, seed=2)) == 10


def test_noise_variance_is_the_global_minimum_of_the_free_energy():
    spectrum = np.arange(1, 41) ** -0.7
    long_side = 90
    alpha = 40 / long_side

    def phi(z):
        return np.log(z + 1) / z - 0.5

    taus = np.linspace(0.01, 3, 2_000_001)
    tau = taus[np.argmin(np.abs(phi(taus) + phi(taus / alpha)))]
    edge = (1 + tau) * (1 + alpha / tau)

    def free_energy(variance):
        x = spectrum**2 / (long_side * variance)
        t = [0.5 * (v - (1 + alpha) + math.sqrt((v - (1 + alpha)) ** 2 - 4 * alpha)) for v in x if v > edge]
        return sum(x - np.log(x)) + sum(math.log(u + 1) + alpha * math.log(u / alpha + 1) - u for u in t)

    result = evbmf(spectrum, long_side)
    signal = math.ceil(40 / (1 + alpha)) - 1
    tail = spectrum[signal:] ** 2
    lower = max(tail[0] / (long_side * edge), tail.sum() / (long_side * len(tail)))
    upper = float((spectrum**2).sum()) / (40 * long_side)
    grid = np.geomspace(lower, upper, 20_001)
    best = grid[np.argmin([free_energy(variance) for variance in grid])]
    assert result.noise_variance == pytest.approx(best, rel=1e-3)
    assert result.threshold == pytest.approx(math.sqrt(long_side * edge * best), rel=1e-3)
    assert result.rank == int((spectrum > result.threshold).sum())


def test_half_precision():
    matrix = signal_and_noise(64, 576, 10)
    assert evbmf_rank(matrix.bfloat16()) == evbmf_rank(matrix.half()) == 10


@pytest.mark.skipif("LOWRANK_NN_DATA" not in os.environ, reason="needs LOWRANK_NN_DATA")
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_resnet20(scale):
    weights = load_file(Path(os.environ["LOWRANK_NN_DATA"]) / "weights" / "cifar10_resnet20.safetensors")
    found = {}
    for layer in RESNET20_RANKS:
        kernel = weights[f"{layer}.weight"] * scale
        found[layer] = (evbmf_rank(kernel.flatten(1)), evbmf_rank(kernel.transpose(0, 1).flatten(1)))
    assert found == RESNET20_RANKS
