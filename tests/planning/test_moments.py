"""The moments of input patches against numpy on every patch that F.unfold gives."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.moments import RunningCovariance
from tests.planning.patches import all_patches, check, covariances, large, ridged, same
from tests.planning.seeded import randn, seeded

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 4, "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (2, 3), "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": (4, 2), "padding": "same", "padding_mode": "circular", "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_of_every_geometry(options, batched):
    layer = seeded(lambda: nn.Conv2d(4, 8, **options))
    x = randn(6, 4, 7, 6) + torch.arange(4.0).view(4, 1, 1)
    patches = all_patches(layer, x)
    metric = collect_metrics(layer, x.split(4) if batched else list(x), [""])[""]
    check(metric, patches)
    assert metric.covariance.shape == (layer.groups, *[layer.weight[0].numel()] * 2)
    # In the order of the weight: the covariance of the outputs is that of W u.
    outputs = layer(x).detach().movedim(1, 0).reshape(layer.groups, 8 // layer.groups, -1).numpy()
    expected = np.stack([np.cov(group, bias=True).reshape(len(group), -1) for group in outputs])
    weight = layer.weight.detach().reshape(layer.groups, -1, layer.weight[0].numel()).numpy()
    seen = weight @ covariances(patches) @ weight.transpose(0, 2, 1)
    np.testing.assert_allclose(seen, expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (4, 6, 5), (3, 2, 4, 5)])
def test_linear_layers_of_any_rank(shape):
    layer = seeded(lambda: nn.Linear(5, 3))
    x = randn(3, *shape) * 3 + 1
    check(collect_metrics(layer, list(x), [""], curvature=False)[""], all_patches(layer, x))


def test_a_large_mean_cancels_nothing():
    layer = nn.Linear(4, 2)
    x = randn(3000, 4, dtype=torch.float32) + torch.tensor([0.0, 100.0, -3000.0, 1.0])
    x[:100] = 0  # a first batch that tells nothing about the rest
    metric = collect_metrics(layer, x[100:].split(100), [""], curvature=False)[""]
    check(metric, all_patches(layer, x[100:].double()), rtol=1e-6)
    metric = collect_metrics(layer, x.split(100), [""], curvature=False)[""]
    check(metric, all_patches(layer, x.double()), rtol=1e-6)


def test_running_covariance_weighs_its_pieces():
    running, x = RunningCovariance(), randn(2, 30, 7)
    for part, weight in zip(x.split((4, 1, 25), 1), (1, 3, 2), strict=True):
        running.add(part.clone(), weight)
    weights = np.repeat([1, 3, 2], [4, 1, 25])
    expected = np.stack([np.cov(group.T, bias=True, fweights=weights) for group in x.numpy()])
    np.testing.assert_allclose(running.covariance().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(running.covariance().numpy(), expected, atol=1e-12)  # asking changes nothing
    np.testing.assert_allclose(running.mean().numpy(), np.average(x.numpy(), 1, weights), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_models_are_widened(dtype):
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype), randn(40, 5).to(dtype)
    metrics = collect_metrics(model, x, ["0", "2"])
    check(metrics["0"], all_patches(model[0], x.double()), rtol=1e-5)
    hidden = model[:2](x).detach().double()
    check(metrics["2"], all_patches(model[2], hidden), rtol=1e-5)
    assert metrics["0"].curvature.dtype == torch.float64


def test_long_patches_keep_the_variances_and_the_covariance_of_the_outputs():
    model = seeded(lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2))
    x = randn(9, 6, 5, 5) + 1
    metric = collect_metrics(model, x.split(4), [""], max_features=26)[""]
    patches = all_patches(model, x)
    expected = covariances(patches)
    variances = np.diagonal(expected, axis1=1, axis2=2)
    assert metric.is_diagonal
    np.testing.assert_allclose(metric.covariance.numpy(), variances + 1e-5 * variances.mean(1, keepdims=True))
    np.testing.assert_allclose(metric.mean.numpy(), patches.mean(1))
    outputs = model(x).detach().movedim(1, 0).reshape(2, 2, -1).transpose(1, 2).numpy()
    np.testing.assert_allclose(metric.outputs.numpy(), ridged(covariances(outputs)))
    assert metric.curvature.shape == (2, 2, 2)
    full = collect_metrics(model, x, [""], max_features=27)[""]
    assert not full.is_diagonal
    assert full.outputs is None


def test_dead_inputs_leave_an_invertible_metric():
    layer = seeded(lambda: nn.Conv2d(4, 8, 1, groups=4))
    x = randn(20, 4, 3, 3)
    x[:, 1], x[:, 2] = 0, 5
    metric = collect_metrics(layer, x, [""])[""]
    eigenvalues = torch.linalg.eigvalsh(metric.covariance)
    assert eigenvalues[[0, 3]].min() > 0.5
    assert eigenvalues[1:3].min() > 0
    assert eigenvalues[1:3].max() < 1e-9
    assert torch.linalg.eigvalsh(metric.curvature).min() > 0
    nothing = collect_metrics(layer, torch.zeros_like(x), [""])[""]
    assert torch.linalg.eigvalsh(nothing.covariance).min() > 0


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives(device):
    model, x = seeded(large), randn(8, 3, 23, 23)
    on_cpu = collect_metrics(model, x.split(3), ["0", "2", "4"])
    there = collect_metrics(model.to(device), x.to(device).split(3), ["0", "2", "4"])
    assert {t.device for m in there.values() for t in (m.covariance, m.mean, m.curvature)} == {device}
    moved = {
        path: type(metric)(metric.covariance.cpu(), metric.mean.cpu(), metric.curvature.cpu())
        for path, metric in there.items()
    }
    same(on_cpu, moved, rtol=1e-6)
