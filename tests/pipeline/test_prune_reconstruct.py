"""Filters removed with the best made of what is left: refits on data, merging, training that empties filters."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph.groups import find_groups
from tests.pipeline.reconstruction import images
from tests.zoo import ZOO
from tests.zoo.nfnet import StandardisedConv2d


@torch.no_grad()
def error(dense, small, x):
    expected, got = dense(x), small(x)
    return float((got - expected).square().mean() / expected.square().mean())


def run(model, x, *steps, **options):
    return lnn.compress_model(model, x[:2], list(steps), progress=False, **options)


def chain():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(640, 5),
        ).eval()


@pytest.mark.parametrize("criterion", ["l1", "lasso", "thinet", "obs"])
def test_refits_repair_most_of_what_removal_breaks(criterion):
    model, x = chain(), images(48, 3, 8)
    prune = {"granularity": "filter", "criterion": criterion}
    plain = run(model, x, lnn.Prune(0.4, **prune, reconstruct=False), calibration=[x[:24], x[24:]])
    result = run(model, x, lnn.Prune(0.4, **prune), calibration=[x[:24], x[24:]])
    assert result.report.after == plain.report.after == result.plan.after
    assert result.model[0].out_channels == 7
    fresh = images(48, 3, 8, seed=1)
    assert error(model, result.model, fresh) < 0.7 * error(model, plain.model, fresh)


def test_criteria_on_data_choose_better_than_norms():
    model, x = chain(), images(64, 3, 8)
    fresh = images(64, 3, 8, seed=1)
    errors = {
        criterion: error(
            model,
            run(model, x, lnn.Prune(0.4, granularity="filter", criterion=criterion), calibration=[x]).model,
            fresh,
        )
        for criterion in ("random", "lasso", "thinet", "obs")
    }
    assert max(errors["lasso"], errors["thinet"], errors["obs"]) < errors["random"]


def test_the_zoo_network_with_residual_sums():
    model, _ = ZOO["resnet20"]()
    x = images(8, 3, 32)
    steps = lnn.Prune(0.25, granularity="filter"), lnn.Prune(0.25, granularity="filter", reconstruct=False)
    refitted, plain = (run(model, x, step, calibration=[x]).model for step in steps)
    assert error(model, refitted, x) < 0.5 * error(model, plain, x)
    assert {name: p.shape for name, p in refitted.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }


def test_repeated_and_constant_filters_go_without_loss():
    model, x = chain(), images(48, 3, 8)
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[1].bias):
            tensor[8:10] = tensor[2:4]
        model[1].weight[10:], model[1].bias[10:] = 0, -1.0
    result = run(
        model,
        x,
        lnn.Prune(4 / 12, granularity="filter", criterion="obs", where="0"),
        calibration=[x[:24], x[24:]],
    )
    assert result.model[0].out_channels == 8
    assert error(model, result.model, images(16, 3, 8, seed=1)) < 1e-4


def test_similar_units_are_merged_without_data():
    model, x = chain(), images(8, 3, 8)
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[1].bias):
            tensor[8:] = tensor[:4]
        model[3].weight[6:], model[3].bias[6:] = model[3].weight[:4], model[3].bias[:4]
    step = lnn.Prune(4 / 12, granularity="filter", criterion="similar", where=["0", "3"])
    for recipe in ([step], [lnn.FoldBatchNorm(), step]):
        result = run(model, x, *recipe)
        assert (result.model[0].out_channels, result.model[3].out_channels) == (8, 7)
        assert error(model, result.model, x) < 1e-9


def test_merging_and_refitting_together_keep_the_target():
    model, x = chain(), images(48, 3, 8)
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[1].bias):
            tensor[8:] = tensor[:4]
    step = lnn.Prune(4 / 12, granularity="filter", criterion="similar", where="0")
    result = run(model, x, step, calibration=[x[:24], x[24:]])
    assert error(model, result.model, images(16, 3, 8, seed=1)) < 1e-6


def test_factorised_layers_that_lost_channels_are_refitted():
    model, x = chain(), images(48, 3, 8)
    lowrank = lnn.Apply(lnn.TuckerConv2d, where="3", rank=(8, 6))
    prune = {"granularity": "filter", "criterion": "l1", "where": "0"}
    plain, refitted = (
        run(model, x, lowrank, lnn.Prune(0.3, **prune, reconstruct=flag), calibration=[x]) for flag in (False, True)
    )
    assert refitted.model[3].in_channels == plain.model[3].in_channels == 8
    fresh, whole = images(48, 3, 8, seed=1), run(model, x, lowrank).model
    assert error(whole, refitted.model, fresh) < 0.8 * error(whole, plain.model, fresh)


def test_a_layer_called_twice_is_left_and_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.head(x + self.second(x) + self.second(x.relu()))

    model, x = Twice().eval(), torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    result = run(model, x, lnn.Prune(0.25, granularity="filter"), calibration=[x])
    (remark,) = (text for text, paths in result.report.remarks.items() if "second" in paths)
    assert "not called exactly once" in remark


def test_a_layer_that_computes_with_another_weight_is_left_and_named():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), StandardisedConv2d(8, 4, 3)).eval(), images(16, 3, 8)
    result = run(model, x, lnn.Prune(0.25, granularity="filter"), calibration=[x])
    reader = result.model[2].weight
    assert reader.shape == (4, 6, 3, 3)
    assert all(any(torch.equal(column, given) for given in model[2].weight.unbind(1)) for column in reader.unbind(1))
    assert result.report.remarks["Prune: not refitted: StandardisedConv2d overrides forward"] == ("2",)


def test_the_given_model_stays_and_the_bits_repeat():
    model, x = chain(), images(24, 3, 8)
    before = copy.deepcopy(model.state_dict())
    step = lnn.Prune(0.4, granularity="filter", criterion="lasso")
    one, two = (run(model, x, step, calibration=[x]).model.state_dict() for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_training_with_a_channel_lasso_empties_filters_that_go_without_loss():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    data = [(x, (x[:, 0] * x[:, 1] > 0).long())] * 100
    tune = lnn.FineTune(
        data,
        5,
        loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        regularizer=lnn.ChannelLasso(find_groups(model, x), 0.002),
    )
    trained = run(model, x, tune).model
    pruned = run(trained, x, lnn.Prune(0.5, granularity="filter")).model
    assert pruned[0].out_features == 16
    assert error(trained, pruned, x) < 1e-3
    with torch.no_grad():
        assert float((pruned(x).argmax(1) == data[0][1]).float().mean()) > 0.95


class Pyramid(nn.Module):
    """Two stages of the same units and weights; a unit of the first costs 16 times the MACs of one of the second."""

    def __init__(self):
        super().__init__()
        self.first, self.reads = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
        self.second, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x):
        x = self.reads(self.first(x).relu())
        return self.head(self.second(F.avg_pool2d(x, 4)).relu())


@pytest.mark.parametrize("criterion", ["thinet", "taylor"])
def test_under_a_budget_units_go_where_they_save_most_for_what_they_are_worth(criterion):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Pyramid().eval()
    x = images(8, 3, 16)
    step = lnn.Prune(
        granularity="filter",
        criterion=criterion,
        batches=[x],
        loss=lambda net, batch: net(batch).square().mean(),
        reconstruct=False,
    )
    by_macs = run(model, x, step, calibration=[x], budget=lnn.Budget(macs=0.6)).model
    by_params = run(model, x, step, calibration=[x], budget=lnn.Budget(params=0.6)).model
    shares = [net.first.out_channels / net.second.out_channels for net in (by_macs, by_params)]
    assert shares[0] < 0.85 * shares[1]
