"""Every input patch of a layer, and what numpy says of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def all_patches(layer, x):
    """Every input patch of a call, (groups, n, p), from F.unfold of the explicitly padded input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).numpy()
    x = x if x.dim() == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2).numpy()


def covariances(patches):
    return np.stack([np.atleast_2d(np.cov(group.T, bias=True)) for group in patches])


def ridged(matrices, share=1e-5):
    size = np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1]
    return matrices + share * size[:, None, None] * np.eye(matrices.shape[1])


def check(metric, patches, rtol=1e-10):
    expected = ridged(covariances(patches))
    assert metric.covariance.dtype == metric.mean.dtype == torch.float64
    np.testing.assert_allclose(metric.covariance.numpy(), expected, rtol=rtol, atol=rtol * abs(expected).max())
    np.testing.assert_allclose(metric.mean.numpy(), patches.mean(1), rtol=rtol, atol=rtol * abs(patches).max())


def same(left, right, rtol, names=("covariance", "mean", "curvature")):
    assert left.keys() == right.keys()
    for path in left:
        for name in names:
            torch.testing.assert_close(getattr(left[path], name), getattr(right[path], name), rtol=rtol, atol=1e-12)


def large():
    """Maps of 21 x 21 and 10 x 10, so that positions are drawn."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.Linear(400, 20))
