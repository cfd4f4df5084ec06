"""The output curvature against Jacobians by brute force, with the probes that the network's output really got."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.metrics import CURVATURE_IMAGES
from tests.planning.probes import NETS, Spied
from tests.planning.seeded import randn, seeded


def calls_of(net, layer, x):
    """What a layer is called with for one image, and the derivative of the flattened outputs in what it returns."""
    forward, inputs, shapes, shifts = layer.forward, [], [], []

    def shifted(x):
        y = forward(x)
        inputs.append(x.detach().clone())
        shapes.append(y.shape)
        return y + shifts[len(shapes) - 1] if shifts else y

    def outputs(*values):
        shifts[:], shapes[:] = values, []
        found = net(x[None])
        return torch.cat([part.flatten() for part in ([found] if isinstance(found, torch.Tensor) else found)])

    layer.forward = shifted
    try:
        with torch.no_grad():
            net(x[None])
        seen = list(inputs)
        zeros = tuple(torch.zeros(shape, dtype=x.dtype) for shape in shapes)
        return seen, torch.autograd.functional.jacobian(outputs, zeros)
    finally:
        del layer.forward


def patches_of(layer, x):
    """Input patches of a call for one image, (groups, p, positions)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).mT
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].unflatten(
        0, (layer.groups, -1)
    )


def by_position(layer, g):
    """Bring a gradient at the outputs of one call for one image into the shape (groups, o, positions)."""
    return (
        g.reshape(1, -1, g.shape[-1]).mT
        if isinstance(layer, nn.Linear)
        else g[0].unflatten(0, (layer.groups, -1)).flatten(2)
    )


def ridged(matrices, share=1e-4):
    size = np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1]
    return matrices + share * size[:, None, None] * np.eye(matrices.shape[1])


def combined(coherent, by_position, trace):
    """H = (T + S tr T / tr S) / 2."""
    T, S = coherent.numpy() / trace[:, None, None], by_position.numpy()
    ratio = np.trace(T, axis1=1, axis2=2) / np.trace(S, axis1=1, axis2=2)
    return ridged((T + ratio[:, None, None] * S) / 2)


def brute_force(net, layer, x, probes, mean):
    """H from the weight gradient G of each image, all of it."""
    coherent, by_positions, squares, positions = 0, 0, 0, 0
    for index, image in enumerate(x):
        v = torch.cat([probe[index].flatten() for probe in probes])
        G = 0
        for inputs, jacobian in zip(*calls_of(net, layer, image), strict=True):
            g = by_position(layer, torch.tensordot(v, jacobian, 1))
            u = patches_of(layer, inputs) - mean[:, :, None]
            G = G + g @ u.mT
            by_positions = by_positions + g @ g.mT
            squares, positions = squares + u.square().sum((1, 2)), positions + u.shape[2]
        coherent = coherent + G @ G.mT
    return combined(coherent / len(x), by_positions / len(x), (squares / positions).numpy())


def every_filter(shape, generator):
    """Stands in for random filters, 8 for each group: a basis, with which sums over filters are complete."""
    groups, size = shape[0] // 8, int(np.prod(shape[1:]))
    return (torch.eye(size, dtype=torch.float64) * size**0.5).repeat(groups, 1).reshape(-1, *shape[1:])


@pytest.mark.parametrize("name", NETS)
def test_curvature_is_that_of_all_weight_gradients(name, monkeypatch):
    monkeypatch.setattr("lowrank_nn.planning.curvature.random_filters", every_filter)
    build, shape = NETS[name]
    net, x = seeded(build), randn(7, *shape, seed=3) + 0.5
    model = Spied(net).train()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    metrics = collect_metrics(model, x, layers)
    probes = model.probes()
    assert all(len(probe) == len(x) for probe in probes)
    net.eval()
    for path, layer in layers.items():
        expected = brute_force(net, layer, x, probes, metrics[path].mean)
        np.testing.assert_allclose(metrics[path].curvature.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_random_filters_estimate_what_all_filters_give(monkeypatch):
    model, x = seeded(NETS["conv"][0]), randn(1500, 2, 7, 7)
    paths = ["0", "2", "5"]
    found = [collect_metrics(model, x.split(size), paths) for size in (10, 64, 1500)]
    monkeypatch.setattr("lowrank_nn.planning.curvature.random_filters", every_filter)
    expected = collect_metrics(model, x.split(64), paths)
    for metrics in found:
        for path, metric in metrics.items():
            assert relative(metric.curvature, expected[path].curvature) < 0.1


def test_probes_are_standard_normal_and_without_mean_for_logits_alone():
    x = randn(20000, 3, dtype=torch.float32)
    logits = Spied(nn.Linear(3, 4))
    collect_metrics(logits, x, ["net"])
    (v,) = logits.probes()
    np.testing.assert_allclose(v.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(v.T), np.eye(4) - 0.25, atol=0.05)
    tokens = Spied(nn.Linear(3, 4))
    collect_metrics(tokens, x.reshape(5000, 4, 3), ["net"])
    (v,) = tokens.probes()
    np.testing.assert_allclose(np.cov(v.reshape(5000, 16).T), np.eye(16), atol=0.1)
    single = Spied(nn.Linear(3, 1))
    collect_metrics(single, x, ["net"])
    np.testing.assert_allclose(single.probes()[0].var(), 1, atol=0.05)


def projection(size):
    return np.eye(size) - 1 / size


@pytest.fixture
def _many_images(monkeypatch):
    monkeypatch.setattr("lowrank_nn.planning.metrics.CURVATURE_IMAGES", 10**9)


@pytest.mark.usefixtures("_many_images")
def test_the_error_is_the_expected_squared_change_of_a_linear_network():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), randn(20000, 6) @ randn(6, 6, seed=1)
    metrics = collect_metrics(model, x.split(100), ["0", "1"])
    J = model[1].weight.detach().numpy()
    np.testing.assert_allclose(metrics["0"].curvature[0].numpy(), J.T @ projection(4) @ J, atol=0.05)
    np.testing.assert_allclose(metrics["1"].curvature[0].numpy(), projection(4), atol=0.05)
    centred = x - x.mean(0)
    for seed in range(3):
        change = randn(5, 6, seed=seed)
        after = (centred @ change.T).numpy() @ J.T @ projection(4)
        assert metrics["0"].error(change) == pytest.approx((after**2).sum(1).mean(), rel=0.04)
        change = randn(4, 5, seed=seed)
        after = ((centred @ model[0].weight.T) @ change.T).detach().numpy() @ projection(4)
        assert metrics["1"].error(change) == pytest.approx((after**2).sum(1).mean(), rel=0.04)


@pytest.mark.usefixtures("_many_images")
@pytest.mark.parametrize("kind", ["uncorrelated", "smooth", "constant"])
def test_the_error_adds_up_over_positions_however_correlated(kind):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 25, 5)))
    x = randn(6000, 3, 5, 5)
    if kind == "smooth":
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "circular"), 3, 1)
    if kind == "constant":
        x = x[:, :, :1, :1].expand(-1, -1, 5, 5)
    metric = collect_metrics(model, x.split(100), ["0"])["0"]
    changes = randn(60, 4, 3, 1, 1, seed=1)
    centred = x - x.mean(0)
    after = torch.stack([F.conv2d(centred, change).flatten(1) for change in changes]) @ model[2].weight.detach().T
    after -= after.mean(2, keepdim=True)
    expected = float(after.square().sum(2).mean())
    assert np.mean([metric.error(change) for change in changes]) == pytest.approx(expected, rel=0.1)
    if kind == "uncorrelated":  # for each change, not only on average
        for change, exact in zip(changes, after.square().sum(2).mean(1), strict=True):
            assert metric.error(change) == pytest.approx(float(exact), rel=0.2)


def test_outputs_in_any_container():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        rest: dict

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(NETS["relu"][0])

        def forward(self, x):
            z = self.net(x)
            return Output(z, {"same": z, "classes": z.argmax(1), "name": "net", "count": len(x)})

    model, x = Wrapped(), randn(12, 5)
    expected = collect_metrics(model.net, x, ["0"])["0"].curvature
    assert torch.equal(collect_metrics(model, x, ["net.0"])["net.0"].curvature, expected)


def test_only_the_first_images_are_probed():
    model = Spied(nn.Linear(3, 2))
    collect_metrics(model, randn(20 * 80, 3, dtype=torch.float32).split(80), ["net"])
    assert len(model.probes()[0]) == -(-CURVATURE_IMAGES // 80) * 80


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_a_batch_without_a_batch_dim_counts_as_one_image():
    conv, linear = seeded(lambda: nn.Conv2d(2, 4, 3)), seeded(lambda: nn.Linear(100, 3))
    x = randn(800, 2, 7, 7)
    unbatched = collect_metrics(nn.Sequential(conv, nn.Flatten(-3), linear), list(x), ["0", "2"])
    # The same outputs, but not a matrix: v keeps its mean in both.
    batched = nn.Sequential(conv, nn.Flatten(), linear, nn.Unflatten(1, (3, 1)))
    for path, metric in collect_metrics(batched, x.split(50), ["0", "2"]).items():
        assert relative(unbatched[path].curvature, metric.curvature) < 0.15
        torch.testing.assert_close(unbatched[path].covariance, metric.covariance)


class Windows(nn.Module):
    """A layer that sees the tokens of all images in one long first dim, as window attention does."""

    def __init__(self, windows):
        super().__init__()
        self.layer, self.head, self.windows = nn.Linear(3, 4), nn.Linear(4, 3), windows

    def forward(self, x):
        tokens = self.layer(x.reshape(-1, 3) if self.windows else x)
        return self.head(tokens.reshape(len(x), -1, 4).tanh().sum(1))


def test_tokens_in_the_first_dim_belong_to_their_images():
    x = randn(40, 6, 3) + randn(40, 1, 3, seed=1)
    plain = collect_metrics(seeded(lambda: Windows(False)), x, ["layer"])["layer"]
    windows = collect_metrics(seeded(lambda: Windows(True)), x, ["layer"])["layer"]
    torch.testing.assert_close(windows.curvature, plain.curvature)
