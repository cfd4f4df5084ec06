"""Criteria of filter pruning against numpy, and which units they choose."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.graph.groups import ChannelGroup, Member, find_groups
from lowrank_nn.planning import unit_importance
from lowrank_nn.planning.importance import obstacle
from lowrank_nn.planning.unit_choice import KeepRule, least_important
from tests.graph.hand_groups import chain_groups
from tests.zoo._seeded import seeded
from tests.zoo.nfnet import StandardisedConv2d

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


@pytest.fixture
def net():
    def build():
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(54, 4)), None

    return seeded(build)()[0]


def groups_of(net):
    return [group for group in chain_groups(net) if not group.frozen]


def scores(net, criterion, **options):
    found = unit_importance(net, groups_of(net), criterion, **options)
    return {name: values.numpy() for name, values in found.items()}


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def relative(values):
    return values / values.mean()


def arrays(net):
    return {name: tensor.detach().double().numpy() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_over_all_weights_of_the_group(net, criterion, order):
    w, found = arrays(net), scores(net, criterion)
    one = [np.linalg.norm(w["0.weight"].reshape(8, -1), order, axis=1)]
    one.append(np.linalg.norm(w["3.weight"].transpose(1, 0, 2, 3).reshape(8, -1), order, axis=1))
    np.testing.assert_allclose(found["0"], np.mean([relative(v) for v in one], 0))
    two = [np.linalg.norm(w["3.weight"].reshape(6, -1), order, axis=1)]
    two.append(np.linalg.norm(w["6.weight"].reshape(4, 6, 9).transpose(1, 0, 2).reshape(6, -1), order, axis=1))
    np.testing.assert_allclose(found["3"], np.mean([relative(v) for v in two], 0))


def test_scales_of_norms_and_groups_without(net):
    found = scores(net, "bn_scale")
    assert found.keys() == {"0"}
    np.testing.assert_allclose(found["0"], relative(np.abs(arrays(net)["1.weight"])))


def test_geometric_median_is_the_sum_of_distances(net):
    rows = arrays(net)["3.weight"].reshape(6, -1)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(1)
    np.testing.assert_allclose(scores(net, "geometric_median")["3"], relative(distances))


def test_activations_where_they_are_read(net):
    with torch.no_grad():
        first = net[:3](X).double().numpy()
        second = net[:5](X).double().numpy()
    for name, maps in (("0", first), ("3", second)):
        means = np.abs(maps).mean((0, 2, 3))
        np.testing.assert_allclose(
            scores(net, "activation", calibration=[X[:2], X[2:]])[name], relative(means), rtol=1e-5
        )
        np.testing.assert_allclose(scores(net, "apoz", calibration=[(X, Y)])[name], (maps != 0).mean((0, 2, 3)))


def test_taylor_is_the_first_order_change_of_the_loss(net):
    found = scores(net, "taylor", batches=[(X, Y)], loss=loss)
    wide, step = copy.deepcopy(net).double(), 1e-6
    for unit in range(6):
        change = []
        for sign in (-1, 1):
            moved = copy.deepcopy(wide)
            with torch.no_grad():
                moved[6].weight.unflatten(1, (6, 9))[:, unit] *= 1 + sign * step
            change.append(float(loss(moved, (X.double(), Y)).detach()))
        slope = (change[1] - change[0]) / (2 * step)
        assert found["3"][unit] == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)


def test_obd_is_half_of_fisher_times_squares(net):
    found = scores(net, "obd", batches=[(X, Y)], loss=loss)
    fisher = torch.zeros_like(net[3].weight, dtype=torch.float64)
    for image, label in zip(X, Y, strict=True):
        net.zero_grad()
        loss(net, (image[None], label[None])).backward()
        fisher += net[3].weight.grad.double().square() / len(X)
    expected = (fisher * net[3].weight.detach().double().square()).sum((0, 2, 3)) / 2
    np.testing.assert_allclose(found["0"], expected.numpy(), rtol=1e-4)


def test_the_model_is_left_as_it_was(net):
    net.train()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    for criterion in ("l1", "activation", "taylor", "obd"):
        scores(net, criterion, calibration=[X], batches=[(X, Y)], loss=loss)
    assert all(before[name].equal(tensor) for name, tensor in net.state_dict().items())
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 7
    assert all(p.grad is None for p in net.parameters())
    assert all("forward" not in vars(module) for module in net.modules())


def test_random_depends_on_the_seed_alone(net):
    first, again, other = (scores(net, "random", seed=seed)["0"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_weights_that_a_layer_does_not_compute_with_as_they_stand_decide_nothing():
    """Of three groups the first is read, the second computed by a convolution that standardises its weight."""

    def build():
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), StandardisedConv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(80, 4)), None

    net = seeded(build)()[0]
    groups = [group for group in find_groups(net, X) if not group.frozen]
    assert [group.name for group in groups] == ["0", "2", "4"]
    for criterion in ("lasso", "thinet", "obs"):
        assert unit_importance(net, groups, criterion, calibration=[X]).keys() == {"2", "4"}
        assert (
            obstacle(net, groups[0], criterion)
            == "2 may compute with another weight: StandardisedConv2d overrides forward"
        )
        assert obstacle(net, groups[1], criterion) == ""
    assert unit_importance(net, groups, "similar").keys() == {"4"}
    assert all("2 may compute with another weight" in obstacle(net, group, "similar") for group in groups[:2])
    assert unit_importance(net, groups, "l1").keys() == {"0", "2", "4"}
    assert obstacle(net, groups[0], "l1") == obstacle(net, groups[0], lambda model, group: group.size) == ""


def test_own_functions_and_errors(net):
    assert scores(net, lambda model, group: torch.arange(group.size))["3"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(OptionError, match="criterion must be one of l1, l2"):
        scores(net, "l3")
    with pytest.raises(OptionError, match=r"a number for each unit of 0; it returned list"):
        scores(net, lambda model, group: [1] * group.size)
    with pytest.raises(CalibrationError, match=r"some units of 0 by .* is not finite"):
        scores(net, lambda model, group: torch.full((group.size,), torch.nan))
    for batches, bad in (([], loss), ([(X, Y)], lambda m, b: m(b[0])), ([(X, Y)], lambda m, b: m(b[0]).sum().detach())):
        with pytest.raises(CalibrationError, match="taylor"):
            scores(net, "taylor", batches=batches, loss=bad)


@pytest.mark.cuda
def test_on_cuda(net, device):
    expected = scores(net, "activation", calibration=[X])
    found = scores(net.to(device), "activation", calibration=[X.to(device)])
    np.testing.assert_allclose(found["0"], expected["0"], rtol=1e-4)
    assert scores(net, "taylor", batches=[(X.to(device), Y.to(device))], loss=loss).keys() == {"0", "3"}


def test_ties_go_from_the_end():
    assert least_important(torch.tensor([1.0, 0, 0, 2, 0]), 2) == (2, 4)
    assert least_important(torch.ones(3), 0) == ()


@pytest.mark.parametrize(
    ("rule", "size", "wanted", "kept"),
    [
        (KeepRule(), 20, 7, 7),
        (KeepRule(), 20, 0, 2),
        (KeepRule(min_keep=0), 20, 0, 1),
        (KeepRule(round_to=8), 20, 7, 8),
        (KeepRule(round_to=8), 20, 9, 16),
        (KeepRule(round_to=8), 20, 17, 20),
        (KeepRule(round_to=8), 6, 1, 6),
    ],
)
def test_how_many_stay(rule, size, wanted, kept):
    assert rule.kept(size, wanted) == kept


def test_global_choice_is_the_least_of_all_within_limits():
    values = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([5.0, 0.25, 6.0, 7.0])}
    assert KeepRule("global").choose(values, 3 / 8) == {"a": (0, 1), "b": (1,)}
    assert KeepRule("global", min_keep=0.5).choose(values, 5 / 8) == {"a": (0, 1), "b": (0, 1)}
    assert KeepRule("layer").choose(values, 0.5) == {"a": (0, 1), "b": (0, 1)}
    assert KeepRule("layer").choose(values, 0.0) == {"a": (), "b": ()}


def test_complex_weights_count_with_both_parts():
    model = nn.Module()
    model.mixing = nn.Parameter(torch.tensor([3 + 4j, 5 + 0j, 0 + 1j])[:, None])
    group = ChannelGroup("mixing", 3, (Member("mixing", 0, ((0,), (1,), (2,)), "out"),))
    scores = unit_importance(model, [group], "l2")["mixing"]
    torch.testing.assert_close(scores / scores[1], torch.tensor([1.0, 1.0, 0.2], dtype=torch.float64))
