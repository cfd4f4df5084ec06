"""Metrics that the tests of fits under one share: random ones, those of random inputs, and errors under them."""

import torch
from torch.nn import functional as F

from lowrank_nn.decompose import Metric


def random_covariances(groups, size, generator, *, rank=None):
    """Covariances of falling spectrum, (groups, size, size); of this rank, or full."""
    rank = size if rank is None else min(rank, size)
    drawn = torch.randn(groups, size, rank, generator=generator, dtype=torch.float64)
    drawn = drawn * torch.logspace(0, -1, rank, dtype=torch.float64)
    mixed = torch.randn(groups, size, size, generator=generator, dtype=torch.float64) @ drawn
    return mixed @ mixed.mT / size


def random_metric(layer, seed=0, *, diagonal=False, curvature=True, rank=None):
    """A metric for a dense layer: unrelated to it, and far from the identity.

    Args:
        layer: An ``nn.Conv2d`` or ``nn.Linear``.
        seed: Another seed gives another metric.
        diagonal: Whether only the diagonal of the covariance is known.
        curvature: Whether the network's curvature is known.
        rank: Rank of the covariance; full if left out.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = getattr(layer, "groups", 1)
    out, size = layer.weight.shape[0] // groups, layer.weight[0].numel()
    covariance = random_covariances(groups, size, generator, rank=rank)
    mean = torch.randn(groups, size, generator=generator, dtype=torch.float64)
    curved = random_covariances(groups, out, generator) if curvature else None
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2).contiguous()
    return Metric(covariance, mean, curved)


def patches(layer, x):
    """Every input patch of a layer without padding, (groups, n, p) in the order of the weight's dims."""
    if isinstance(layer, torch.nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, g p, positions)
    return unfolded.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def metric_of(layer, x):
    """The metric of a layer without curvature, from all its patches in ``x``."""
    seen = patches(layer, x).double()
    mean = seen.mean(1)
    centred = seen - mean[:, None]
    return Metric(centred.mT @ centred / seen.shape[1], mean)


def images(channels, seed=0, *, count=20, size=12):
    """Random images as networks see them: correlated between channels and between neighbours, mean not zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, size + 2, size + 2, generator=generator, dtype=torch.float64)
    smooth = F.avg_pool2d(noise, 3, stride=1) + 0.3 * noise[:, :, 1:-1, 1:-1]
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return F.relu(torch.einsum("cd,ndhw->nchw", mixing, smooth) + 0.5)


def error_of(compressed, layer, metric):
    """The error under the metric of the change of a layer's weight."""
    return metric.error((layer.weight - compressed.weight).detach())


def output_error(compressed, layer, x):
    """Squared difference of the outputs, summed over channels and averaged over all else."""
    with torch.no_grad():
        return float((compressed(x) - layer(x)).square().movedim(1, -1).flatten(0, -2).sum(-1).mean())
