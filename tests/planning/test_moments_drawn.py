"""Moments of positions drawn at random: estimates without bias, the same in batches of any size."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.patches import PatchSampler
from tests.planning.patches import all_patches, check, covariances, large, same
from tests.planning.seeded import randn, seeded


def test_moments_do_not_depend_on_how_the_data_come_in_batches(monkeypatch):
    model, x = seeded(large), randn(24, 3, 23, 23)
    paths = ["0", "2", "4"]
    whole = collect_metrics(model, x, paths)
    same(whole, collect_metrics(model, x.split(7), paths), rtol=1e-8, names=("covariance", "mean"))
    same(whole, collect_metrics(model, x.split(1), paths), rtol=1e-8, names=("covariance", "mean"))
    monkeypatch.setattr("lowrank_nn.planning.patches.CHUNK", 5000)
    same(whole, collect_metrics(model, x, paths), rtol=1e-8)


def test_results_repeat_bit_for_bit_and_depend_on_the_seed():
    model, x = seeded(large), randn(4, 3, 23, 23)
    first = collect_metrics(model, x, ["0", "2"])
    torch.manual_seed(17)
    same(first, collect_metrics(model, x, ["0", "2"]), rtol=0)
    other = collect_metrics(model, x, ["0", "2"], seed=1)
    assert not torch.equal(first["0"].covariance, other["0"].covariance)
    assert not torch.equal(first["2"].curvature, other["2"].curvature)
    # What is asked for besides plays no part.
    same({"2": first["2"]}, collect_metrics(model, x, ["2"]), rtol=0)


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (64, 64), (65, 64), (256, 64), (784, 98), (1024, 128), (9999, 128)]
)
def test_how_many_positions_are_drawn(size, count):
    sampler = PatchSampler(nn.Linear(1, 1), 0)
    x = torch.arange(float(size)).reshape(1, size, 1).repeat(200, 1, 1)
    (patches,) = sampler.draw(x)
    drawn = patches.inputs.reshape(200, count)
    assert patches.weight * count == pytest.approx(size)
    hits = torch.bincount(drawn.flatten().long(), minlength=size)
    # Each position is drawn with the same probability, here up to 5 standard deviations.
    expected = 200 * count / size
    assert (hits - expected).abs().max() <= 5 * expected**0.5 + 1
    assert hits.sum() == 200 * count
    if count < size:
        assert len(drawn.unique(dim=0)) > 100  # other ones in every image


def test_drawn_positions_estimate_the_moments_without_bias():
    layer = seeded(lambda: nn.Conv2d(2, 1, 3, padding=1))
    place = torch.linspace(0, 3, 30, dtype=torch.float64)
    x = randn(300, 2, 30, 30) * (1 + place) + place[:, None] * torch.tensor([1.0, -2.0]).view(2, 1, 1)
    metric = collect_metrics(layer, x.split(50), [""], curvature=False)[""]
    patches = all_patches(layer, x)
    expected = covariances(patches)[0]
    size = np.trace(expected) / len(expected)
    assert abs(metric.covariance[0].numpy() - expected).max() < 0.03 * size
    assert abs(metric.mean.numpy() - patches.mean(1)).max() < 0.03 * size**0.5


class TwoMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        large, small = x[:, 0, None, None, None].expand(-1, 1, 16, 16), x[:, 1, None, None, None].expand(-1, 1, 4, 4)
        return [self.shared(large), self.shared(small)]


def test_drawn_positions_stand_for_all_of_their_map():
    model, x = seeded(TwoMaps), randn(50, 2) + torch.tensor([0.0, 5.0])
    metric = collect_metrics(model, x.split(20), ["shared"])["shared"]
    every = np.concatenate([np.repeat(x[:, 0].numpy(), 256), np.repeat(x[:, 1].numpy(), 16)])
    check(metric, every.reshape(1, -1, 1))


def test_the_outputs_of_large_maps_are_drawn_where_the_inputs_are():
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    metric = collect_metrics(model, randn(4, 500, 3, dtype=torch.float32), [""], max_features=2)[""]
    assert metric.outputs is None  # 3 outputs are more than 2
    wide = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        wide.weight.copy_(torch.eye(3, 4))
    metric = collect_metrics(wide, randn(4, 500, 4, dtype=torch.float32), [""], max_features=3)[""]
    torch.testing.assert_close(metric.outputs[0].diagonal(), metric.covariance[0, :3], rtol=1e-4, atol=0)
