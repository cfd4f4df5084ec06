"""Least squares of a layer's targets on its inputs, against numpy on patches from unfold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.planning.regression import RIDGES, MomentSums, choose_ridge

CONV = {"kernel_size": 3, "stride": 2, "padding": 1}
LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, **CONV), (8, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (8, 4, 6, 6)),
    "one image": (lambda: nn.Conv2d(4, 6, **CONV), (4, 9, 9)),
    "linear": (lambda: nn.Linear(5, 3), (40, 5)),
    "tokens": (lambda: nn.Linear(5, 3), (8, 7, 5)),
    "one vector": (lambda: nn.Linear(5, 3), (5,)),
}


def make(name):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64) + 3
    return layer, x, layer(x).detach() + 0.3 * torch.randn_like(layer(x))


def rows(layer, x, y):
    """All patches (groups, images, positions, p) and targets (groups, images, positions, o)."""
    if isinstance(layer, nn.Linear):
        x, y = (v.reshape(1, -1 if v.dim() > 1 else 1, v[0].numel() // v.shape[-1] or 1, v.shape[-1]) for v in (x, y))
        return x, y
    x, y = (v if v.dim() == 4 else v[None] for v in (x, y))
    u = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    u = u.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2)
    return u, y.unflatten(1, (layer.groups, -1)).flatten(3).permute(1, 0, 3, 2)


@pytest.mark.parametrize("about_zero", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_moments(name, about_zero):
    layer, x, y = make(name)
    sums = MomentSums(layer, 0)
    sums.add(x, y)
    moments = sums.moments().raw() if about_zero else sums.moments()
    for g, (u, t) in enumerate(zip(*rows(layer, x, y), strict=True)):
        u, t = u.reshape(-1, u.shape[-1]).numpy(), t.reshape(-1, t.shape[-1]).numpy()
        mean, target_mean = (np.zeros(v.shape[1]) if about_zero else v.mean(0) for v in (u, t))
        np.testing.assert_allclose(moments.covariance[g], (u - mean).T @ (u - mean) / len(u), atol=1e-10)
        np.testing.assert_allclose(moments.cross[g], (t - target_mean).T @ (u - mean) / len(u), atol=1e-10)
        np.testing.assert_allclose(moments.mean[g], mean, atol=1e-10)
        np.testing.assert_allclose(moments.target_mean[g], target_mean, atol=1e-10)
        np.testing.assert_allclose(sums.means()[0][g], u.mean(0), atol=1e-10)
        np.testing.assert_allclose(sums.means()[1][g], t.mean(0), atol=1e-10)


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1] * 8, [7, 1]])
def test_every_fourth_image_is_held_out_however_they_are_batched(sizes):
    layer, x, y = make("conv")
    sums, apart = MomentSums(layer, 0), MomentSums(layer, 0)
    for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
        sums.add(part, target)
    assert sums.images == 8
    apart.add(x[3::4], y[3::4])
    torch.testing.assert_close(sums.moments(1).cross, apart.moments(0).cross)
    few = MomentSums(layer, 0)
    few.add(x[:3], y[:3])
    assert not few.has_held_out
    weight = layer.weight.detach().flatten(1)[None]
    assert choose_ridge(few, weight, None, about_zero=False) is None


@pytest.mark.parametrize("name", ["conv", "grouped", "tokens"])
def test_least_squares_and_gain(name):
    layer, x, y = make(name)
    sums = MomentSums(layer, 0)
    sums.add(x, y)
    moments = sums.moments()
    weight = torch.randn_like(moments.cross)
    root = torch.randn(moments.cross.shape[0], moments.cross.shape[1], moments.cross.shape[1], dtype=torch.float64)
    curvature = root @ root.mT
    left = moments.left_by(weight)
    change = left.least_squares(1e-3)
    total = 0.0
    for g, (u, t) in enumerate(zip(*rows(layer, x, y), strict=True)):
        u, t = (v.reshape(-1, v.shape[-1]).numpy() for v in (u, t))
        u, t = u - u.mean(0), t - t.mean(0)
        # Ridge regression of the residual, as least squares over extra rows.
        ridge = 1e-3 * np.mean(u.var(0)) * len(u)
        inputs = np.concatenate([u, np.sqrt(ridge) * np.eye(u.shape[1])])
        residual = np.concatenate([t - u @ weight[g].numpy().T, np.zeros((u.shape[1], t.shape[1]))])
        np.testing.assert_allclose(change[g].T, np.linalg.lstsq(inputs, residual, rcond=None)[0], atol=1e-8)
        before, after = t - u @ weight[g].numpy().T, t - u @ (weight + change)[g].numpy().T
        h = curvature[g].numpy()
        total += np.mean(np.sum(before @ h * before, 1)) - np.mean(np.sum(after @ h * after, 1))
    assert left.gain(change, curvature) == pytest.approx(total)
    identity = torch.eye(curvature.shape[1], dtype=torch.float64).expand_as(curvature)
    assert left.gain(change, None) == pytest.approx(left.gain(change, identity))


def chosen(layer, x, y, about_zero=False):
    sums = MomentSums(layer, 0)
    sums.add(x, y)
    return choose_ridge(sums, layer.weight.detach().double()[None], None, about_zero=about_zero)


def test_the_ridge_is_least_where_there_are_many_data_and_none_where_there_is_nothing_to_learn():
    torch.manual_seed(0)
    layer, other = nn.Linear(20, 10), nn.Linear(20, 10)
    few, many = torch.randn(40, 20), torch.randn(4000, 20)
    with torch.no_grad():
        assert chosen(layer, many, other(many)) == RIDGES[0]
        assert chosen(layer, many, other(many), about_zero=True) == RIDGES[0]
        assert chosen(layer, few, layer(few) + torch.randn(40, 10)) is None
        for seed in range(5):  # only rounding errors are left to learn
            x = torch.randn(4000, 20, generator=torch.Generator().manual_seed(seed))
            assert chosen(layer, x, layer(x)) is None
        between = chosen(layer, few, layer(few) + other(few) + 0.3 * torch.randn(40, 10))
    assert between is not None
    assert between > RIDGES[0]


def test_large_means_cost_no_accuracy():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    x = torch.randn(500, 6) + 1e4
    y = x @ torch.randn(6, 4)
    sums = MomentSums(layer, 0)
    for part, target in zip(x.split(50), y.split(50), strict=True):
        sums.add(part, target)
    moments = sums.moments()
    torch.testing.assert_close(moments.covariance[0], torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-4)


def test_constant_inputs_and_values_that_are_not_finite():
    layer = nn.Linear(6, 4)
    sums = MomentSums(layer, 0)
    sums.add(torch.ones(8, 6), torch.ones(8, 4))
    assert sums.are_finite()
    improvement = sums.moments().left_by(layer.weight.detach().double()[None]).least_squares(RIDGES[0])
    assert torch.isfinite(improvement).all()
    sums.add(torch.full((1, 6), torch.inf), torch.ones(1, 4))
    assert not sums.are_finite()
