"""Penalties against numpy, their gradients at zero, and what training with them does."""

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import OptionError, PlanError
from lowrank_nn.graph.groups import ChannelGroup, Member

GENERATOR = torch.Generator().manual_seed(0)


def net():
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=GENERATOR)
    return model


def grouped(weight, granularity, groups):
    """The units of a weight as rows, by numpy."""
    w = weight.detach().double().numpy()
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)  # (g, o, i, taps)
    order = {
        "filter": ((0, 1), (2, 3)),
        "channel": ((0, 2), (1, 3)),
        "kernel": ((0, 1, 2), (3,)),
        "group": ((0, 2, 3), (1,)),
        "shape": ((3,), (0, 1, 2)),
    }
    units, inner = order[granularity]
    moved = w.transpose(*units, *inner)
    return moved.reshape(np.prod([w.shape[d] for d in units]), -1)


@pytest.mark.parametrize("granularity", ["filter", "channel", "kernel", "group", "shape"])
def test_group_lasso_against_numpy(granularity):
    model = net()
    layers = [(model[0].weight, 2), (model[3].weight, 1)]
    if granularity in ("filter", "channel"):
        layers.append((model[6].weight, 1))
    expected = 0.0
    for weight, groups in layers:
        rows = grouped(weight, granularity, groups)
        expected += np.sqrt(rows.shape[1]) * np.linalg.norm(rows, axis=1).sum()
    assert float(lnn.GroupLasso(0.3, granularity)(model).detach()) == pytest.approx(0.3 * expected, rel=1e-5)


def test_gradient_of_group_lasso_is_the_formula_and_zero_at_zero():
    conv = nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        conv.weight[1] = 0
    lnn.GroupLasso(0.5)(conv).backward()
    norms = conv.weight.detach().flatten(1).norm(dim=1)
    expected = 0.5 * np.sqrt(12) * conv.weight.detach() / norms[:, None, None, None]
    expected[1] = 0
    torch.testing.assert_close(conv.weight.grad, expected)
    assert conv.bias.grad is None


def test_where_and_but_not():
    model = net()
    first = float(lnn.GroupLasso(1, where="0")(model).detach())
    rest = float(lnn.GroupLasso(1, but_not=["0"])(model).detach())
    assert first + rest == pytest.approx(float(lnn.GroupLasso(1)(model).detach()))
    factorised = nn.Sequential(lnn.TuckerConv2d(4, 6, 3, rank=(3, 2)))
    assert float(lnn.GroupLasso(1, where="0.core")(factorised).detach()) > 0
    assert lnn.GroupLasso(1, where="0")(factorised) == lnn.GroupLasso(1)(factorised)  # of what a layer is made of
    with pytest.raises(PlanError, match="'fc' matches no layer"):
        lnn.GroupLasso(1, where="fc")(model)
    with pytest.raises(PlanError, match="but_not leaves no layer"):
        lnn.GroupLasso(1, but_not="*")(model)


def test_scale_l1():
    model = net()
    with torch.no_grad():
        model[1].weight[2] = 0
    penalty = lnn.ScaleL1(0.1)(model)
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0.1 * float(model[1].weight.detach().abs().sum()))
    torch.testing.assert_close(model[1].weight.grad, 0.1 * model[1].weight.detach().sign())
    with pytest.raises(PlanError, match="no batch normalisation"):
        lnn.ScaleL1(0.1, where="4")(model)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_strength_is_checked(strength):
    with pytest.raises(OptionError, match="strength"):
        lnn.GroupLasso(strength)
    with pytest.raises(OptionError, match="granularity"):
        lnn.GroupLasso(1, "fliter")


def sign_of_a_product():
    """A task that a few hidden units solve."""
    x = torch.randn(256, 2, generator=GENERATOR)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def test_fine_tune_takes_a_regularizer_and_whole_filters_vanish():
    x, y = sign_of_a_product()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    data = [(x, y)] * 100

    def train(regularizer):
        step = lnn.FineTune(
            data,
            4,
            loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
            regularizer=regularizer,
        )
        return lnn.compress_model(model, x, [step], progress=False).model

    plain, sparse = train(None), train(lnn.GroupLasso(0.004, where="0"))

    def live(trained):
        return int((trained[0].weight.detach().norm(dim=1) > 1e-2).sum())

    def right(trained):
        with torch.no_grad():
            return float((trained(x).argmax(1) == y).float().mean())

    assert live(plain) > 24
    assert 2 <= live(sparse) <= 16
    assert right(sparse) > 0.95


def groups_of_net():
    """The six channels between the convolutions of ``net``, and the frozen output."""
    one = tuple((i,) for i in range(6))
    members = [Member(name, 0, one, "out") for name in ("0.weight", "0.bias")]
    members += [Member(f"1.{name}", 0, one, "through") for name in ("weight", "bias", "running_mean", "running_var")]
    members.append(Member("3.weight", 1, one, "in"))
    pairs = ChannelGroup("3", 2, (Member("3.weight", 0, ((0, 1), (2, 3)), "out"),))
    frozen = ChannelGroup("6", 3, (Member("6.weight", 0, ((0,), (1,), (2,)), "out"),), frozen="reaches the output")
    return ChannelGroup("0", 6, tuple(members)), pairs, frozen


def test_channel_lasso_against_numpy():
    model = net()
    penalty = lnn.ChannelLasso(groups_of_net(), 0.2)
    parts = (model[0].weight, model[0].bias, model[1].weight, model[1].bias)
    rows = [t.detach().numpy().reshape(6, -1) for t in parts]
    units = np.concatenate([*rows, model[3].weight.detach().numpy()[:, :, 0, 0].T], axis=1)
    pairs = model[3].weight.detach().numpy().reshape(2, -1)
    expected = sum(np.sqrt(u.shape[1]) * np.linalg.norm(u, axis=1).sum() for u in (units, pairs))
    assert float(penalty(model).detach()) == pytest.approx(0.2 * expected, rel=1e-5)


def test_channel_lasso_has_no_gradient_at_zero_and_pulls_all_members_together():
    model = net()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[4] = 0
        model[3].weight[:, 4] = 0
    lnn.ChannelLasso(groups_of_net()[:1], 1.0)(model).backward()
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[3].weight):
        assert tensor.grad.isfinite().all()
    assert model[0].weight.grad[4].abs().max() == 0
    unit = torch.cat([model[0].weight[1].flatten(), model[0].bias[1:2], model[1].weight[1:2], model[1].bias[1:2]])
    unit = torch.cat([unit, model[3].weight[:, 1].flatten()]).detach()
    expected = np.sqrt(len(unit)) * model[1].weight.detach()[1] / unit.norm()
    assert float(model[1].weight.grad[1]) == pytest.approx(float(expected), rel=1e-5)


def test_channel_lasso_refuses_what_does_not_fit():
    groups = groups_of_net()
    with pytest.raises(OptionError, match="no group"):
        lnn.ChannelLasso(groups[2:], 1.0)
    with pytest.raises(PlanError, match="no parameter of the group '0'"):
        lnn.ChannelLasso(groups, 1.0)(nn.Linear(2, 2))
    small = net()
    small[0] = nn.Conv2d(4, 4, (3, 2), groups=2)
    with pytest.raises(PlanError, match=r"0.weight has 4 entries along dim 0, the group wants 6"):
        lnn.ChannelLasso(groups, 1.0)(small)
