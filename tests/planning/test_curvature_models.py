"""Curvature on models of all kinds: without gradients, in inference mode, checkpointed, in half precision."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_nn.planning import collect_metrics
from tests.planning.probes import NETS, Reused, Spied
from tests.planning.seeded import randn, seeded


class Stopped(nn.Module):
    """Gradients end between two layers."""

    def __init__(self, stop):
        super().__init__()
        self.first, self.last, self.stop = nn.Linear(4, 4), nn.Linear(4, 3), stop

    def forward(self, x):
        return self.last(self.stop(self.first(x)))


class Underived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no derivative")


@torch.no_grad()
def without_grad(x):
    return x * 2


STOPS = {
    "detach": torch.detach,
    "no_grad": without_grad,
    "rounded to integers": lambda x: x.int().double(),
    "no derivative": Underived.apply,
}


@pytest.mark.parametrize("name", STOPS)
def test_layers_that_no_gradient_reaches_have_no_curvature(name, caplog):
    model, x = seeded(lambda: Stopped(STOPS[name])), randn(10, 4)
    with caplog.at_level(logging.INFO, "lowrank_nn"):
        metrics = collect_metrics(model, x.split(4), ["first", "last"])
    assert metrics["first"].curvature is None
    with torch.no_grad():
        alone = collect_metrics(model.last, model.stop(model.first(x)).split(4), [""])[""]
    torch.testing.assert_close(metrics["last"].curvature, alone.curvature)
    message = "no curvature of first: a change of their own outputs counts as it is"
    assert [r.levelname for r in caplog.records if message in r.getMessage()] == ["INFO"]
    assert ("no derivative" in caplog.text) == (name == "no derivative")


class Outside(nn.Module):
    """Cannot run with gradients at all, or gives nothing that has one."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how

    def forward(self, x):
        return self.how(self.layer(x))


NO_GRADIENTS = {
    "numpy": lambda y: torch.from_numpy(y.numpy().copy()),
    "classes": lambda y: y.argmax(1),
    "nothing": lambda y: None,
    "detached": lambda y: y.detach(),
    "nan": lambda y: y * (y * 0).sqrt(),  # derivative 0 * inf
}


@pytest.mark.parametrize("name", NO_GRADIENTS)
def test_models_without_gradients_have_their_moments_all_the_same(name):
    model, x = seeded(lambda: Outside(NO_GRADIENTS[name])), randn(10, 4)
    metric = collect_metrics(model, x, ["layer"])["layer"]
    assert metric.curvature is None
    expected = collect_metrics(model.layer, x, [""], curvature=False)[""]
    assert torch.equal(metric.covariance, expected.covariance)


def test_inference_mode_in_the_model_and_around_the_call():
    class Inference(Outside):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    x = randn(10, 4)
    expected = collect_metrics(seeded(lambda: Outside(torch.sin)), x, ["layer"])["layer"].covariance
    inside = collect_metrics(seeded(lambda: Inference(torch.sin)), x.split(4), ["layer"])["layer"]
    assert inside.curvature is None
    assert not inside.covariance.is_inference()
    torch.testing.assert_close(inside.covariance, expected)
    with torch.inference_mode():
        around = collect_metrics(seeded(lambda: Outside(torch.sin)), x, ["layer"])["layer"]
    assert torch.equal(around.covariance, expected)


def test_frozen_parameters_and_inputs_with_gradients_make_no_difference():
    model, x = seeded(Reused), randn(10, 2, 4, 4)
    expected = collect_metrics(model, x, ["first", "conv", "head"])
    model.conv.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    watched = x.clone().requires_grad_()
    for batch in (x, watched, watched * 1):
        found = collect_metrics(model, batch, ["first", "conv", "head"])
        for path, metric in expected.items():
            assert torch.equal(found[path].curvature, metric.curvature)
            assert not found[path].covariance.requires_grad
            assert not found[path].curvature.requires_grad
    assert watched.grad is None


def test_checkpointed_models():
    class Checkpointed(Reused):
        def forward(self, x):
            x = checkpoint(lambda x: self.conv(self.conv(x).relu()).relu(), self.first(x), use_reentrant=False)
            return self.head(x.mean((2, 3)))

    x = randn(6, 2, 4, 4)
    plain = collect_metrics(seeded(Reused), x, ["first", "conv"])
    again = collect_metrics(seeded(Checkpointed), x, ["first", "conv"])
    for path in plain:
        torch.testing.assert_close(again[path].curvature, plain[path].curvature)
        torch.testing.assert_close(again[path].covariance, plain[path].covariance)


def test_a_layer_with_too_many_outputs_has_no_curvature():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))), randn(10, 3)
    metrics = collect_metrics(model, x, ["0", "2"], max_features=7)
    assert metrics["0"].curvature is None
    assert metrics["2"].curvature.shape == (1, 4, 4)
    assert metrics["2"].is_diagonal
    assert metrics["2"].outputs.shape == (1, 4, 4)


def test_without_curvature_no_gradient_is_computed():
    model = Spied(seeded(NETS["relu"][0]))
    metrics = collect_metrics(model, randn(5, 5), ["net.0"], curvature=False)
    assert metrics["net.0"].curvature is None
    assert model.kept.parts == {0: []}


def test_narrow_models():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), randn(400, 5, dtype=torch.float32)
    wide = collect_metrics(model, x, ["0"])["0"].curvature
    narrow = collect_metrics(model.bfloat16(), x.bfloat16(), ["0"])["0"].curvature
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.05 * float(wide.max()))
