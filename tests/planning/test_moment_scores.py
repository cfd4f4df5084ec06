"""The criteria on second moments against networks whose channels are really cut, on the calibration data."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.groups import ChannelGroup, Member
from lowrank_nn.planning.moment_scores import MOMENT_CRITERIA, from_moments, readers_of

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, 6, 6, generator=GENERATOR, dtype=torch.float64)


def net(bias=True):
    """A padded convolution that reads six channels, and a linear layer that reads 4 x 9 features of its channels."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=bias),
            nn.Flatten(),
            nn.Linear(36, 5, bias=bias),
        )
    return model.double().eval()


def groups():
    one = tuple((i,) for i in range(6))
    first = ChannelGroup("0", 6, (Member("0.weight", 0, one, "out"), Member("2.weight", 1, one, "in")))
    features = tuple(tuple(range(9 * i, 9 * i + 9)) for i in range(4))
    rows = Member("2.weight", 0, tuple((i,) for i in range(4)), "out")
    return [first, ChannelGroup("2", 4, (rows, Member("4.weight", 1, features, "in")))]


def score(model, criterion, group, *, corrected, batches=None):
    batches = [X[:25], X[25:]] if batches is None else batches
    scores = from_moments(model, groups(), criterion, batches, corrected=corrected, seed=0, progress=False)
    return scores(groups()[group])


def change(model, unit, *, corrected):
    """Mean squared change of the logits, up to a shift, when a unit of the last group is zeroed."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut[4].weight[:, 9 * unit : 9 * unit + 9] = 0
        difference = cut(X) - model(X)
    difference -= difference.mean(1, keepdim=True)
    if corrected:
        difference -= difference.mean(0)
    return float(difference.square().sum(1).mean())


@pytest.mark.parametrize("corrected", [True, False])
def test_the_least_greedy_score_is_the_change_of_the_output(corrected):
    model = net()
    scores = score(model, "thinet", 1, corrected=corrected)
    changes = torch.tensor([change(model, unit, corrected=corrected) for unit in range(4)])
    assert int(scores.argmin()) == int(changes.argmin())
    assert float(scores.min()) == pytest.approx(float(changes.min()), rel=0.2)  # H comes from random probes


@pytest.mark.parametrize("criterion", list(MOMENT_CRITERIA))
def test_a_repeated_channel_and_a_dead_one_cost_nothing_together(criterion):
    model = net()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, -1
        model[0].weight[5], model[0].bias[5] = model[0].weight[1], model[0].bias[1]
    scores = score(model, criterion, 0, corrected=True)
    assert float(scores[4]) < 1e-4 * float(scores.max())
    if criterion == "obs":  # only least squares makes up for a repeated channel
        assert min(float(scores[5]), float(scores[1])) < 1e-3 * float(scores.max())


def test_a_constant_channel_costs_nothing_where_its_mean_is_made_up_for():
    model = net()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0, 2
        model[2].padding = (0, 0)
        model[4] = nn.Linear(16, 5).double()
    only = groups()[:1]
    free, dear = (
        from_moments(model, only, "thinet", [X], corrected=corrected, seed=0, progress=False)(only[0])
        for corrected in (True, False)
    )
    assert float(free[3]) < 1e-3 * float(free.max())
    assert float(dear[3]) > 0.1 * float(dear.max())


def test_without_a_bias_nothing_makes_up_for_the_mean():
    model = net(bias=False)
    torch.testing.assert_close(score(model, "thinet", 1, corrected=True), score(model, "thinet", 1, corrected=False))


def test_readers_are_plain_layers_with_units_in_their_columns():
    model = net()
    assert [path for path, _, _ in readers_of(model, groups()[0])] == ["2"]
    nothing = ChannelGroup("0", 6, groups()[0].members[:1])
    assert from_moments(model, [nothing], "obs", [X], corrected=True, seed=0, progress=False)(nothing) is None


def test_a_group_with_a_reader_of_another_kind_has_no_scores():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 2, 2), **{str(i): layer for i, layer in enumerate(net())}})
    model.forward = lambda x: model["2"](x := model["0"](x)).sum() + model["up"](x).sum()
    model.double()
    (first, _) = groups()
    both = ChannelGroup("0", 6, (*first.members, Member("up.weight", 0, first.members[0].positions, "in")))
    score = from_moments(model, [both], "thinet", [X], corrected=True, seed=0, progress=False)
    assert score(first) is not None
    assert score(both) is None


def test_needs_calibration_and_takes_a_single_tensor():
    with pytest.raises(CalibrationError, match="calibration=batches"):
        from_moments(net(), groups(), "obs", None, corrected=True, seed=0, progress=False)
    one = score(net(), "obs", 0, corrected=True, batches=X)
    torch.testing.assert_close(one, score(net(), "obs", 0, corrected=True, batches=[X]))


def test_leaves_the_model_alone():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    score(model, "obs", 0, corrected=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
